"""Document 004 in numbers, and the report on the mixture: with the checkpoints that the pipeline leaves, and with next to nothing."""
import shutil

import papermill
import pytest
import torch
from conftest import ROOT

from moe_lab import checkpoint, detectors
from moe_lab.data.readers import open_split
from moe_lab.params import load
from moe_lab.routers import decide
from moe_lab.sparsity_report import load_claims, load_published

CLAIMS = ROOT / "claims/moe_yolo.yaml"
RUNS = ("yolov7_tiny", "yolov7_tiny_more", "moe_yolo", "moe_yolo_nobalance", "moe_yolo_top1")


def published(part):
    return load_published(ROOT / f"claims/published/moe_yolo_004_{part}.csv")


def test_hypotheses_targets_and_risks_are_on_file():
    claims = load_claims(CLAIMS).claims
    assert len({claim.id for claim in claims}) == len(claims) >= 30
    for place in ("goal", *(f"hypothesis {k}" for k in (1, 2, 3)), *(f"risk {k}" for k in range(1, 7)), "monitoring"):
        assert any(place in claim.source for claim in claims), place
    assert all(claim.settle for claim in claims if "COCO" in claim.measure)


def test_published_tables_are_those_of_the_document():
    usage = published("usage")
    assert usage[["without", "with"]].sum().tolist() == pytest.approx([1, 1])
    drawn = published("routing")
    weights = decide(torch.tensor(drawn.probability.tolist()).log()[None], 2).weights[0].tolist()
    assert sorted(drawn.weight.dropna()) == pytest.approx(sorted(weights), abs=0.01)
    assert published("results").set_index("metric").target["AP50"] == 45
    assert len(published("monitoring")) == 3 and len(published("settings")) == 7


def leave_checkpoints(runs):
    "Untrained weights where the pipeline leaves trained ones: a baseline, and mixtures whose experts are copies of it."
    weights = None
    for name in ("yolov7_tiny", "moe_yolo", "moe_yolo_top1"):
        settings = load(ROOT / "params.yaml", only=[name]).run(name)
        names = open_split(ROOT / "samples/coco", "val", settings)
        torch.manual_seed(0)
        model = detectors.build(settings.detector, num_classes=len(names.names), **settings.model)
        if weights: model.load_pretrained(weights)
        weights = weights or model.state_dict()
        checkpoint.save(runs / name / "checkpoint.safetensors", model.state_dict(), dict(detector=settings.detector, model=settings.model, categories=names.categories))


def report_on(tmp_path, studies, data):
    "The text of the report, with plain spaces between numbers and their units."
    place = dict(runs=tmp_path / "runs", studies=studies, data=data, params_file=ROOT / "params.yaml", bench=ROOT / "bench/moe.json", claims=CLAIMS, published=ROOT / "claims/published")
    done = papermill.execute_notebook(ROOT / "nbs/analysis/moe_yolo.ipynb", tmp_path / "out.ipynb", {k: str(v) for k, v in place.items()}, progress_bar=False)
    return "\n".join(output["data"]["text/markdown"] for cell in done.cells for output in cell.get("outputs", []) if "text/markdown" in output.get("data", {})).replace("\u00a0", " ")


@pytest.fixture
def runs(tmp_path):
    for name in RUNS: shutil.copytree(ROOT / "runs" / name, tmp_path / "runs" / name, ignore=shutil.ignore_patterns("*.safetensors", "*.ipynb"))
    return tmp_path / "runs"


def test_report_with_checkpoints_and_a_study(tmp_path, runs):
    "Copies are called copies, although strangers have the same raw cosine; the top-1 router hears nothing from detection."
    leave_checkpoints(runs)
    text = report_on(tmp_path, ROOT / "studies", ROOT / "samples/coco")
    assert "The experts say nearly the same" in text and "**It cannot fall below 0.9, and its band cannot be met**" in text
    fresh = next(line for line in text.splitlines() if line.startswith("| never trained")).split("|")
    assert float(fresh[2]) > 0.9 and abs(float(fresh[3])) < 0.5
    assert "| mixture, 1 of 4 | 1 | below 0.00001 |" in text and "20 routers that never learnt say" in text
    assert text.count("| usage on val |") == 3 and "| balance loss, with minus without |" in text
    card = text.split("| claim |")[-1]
    assert card.count("**not measured**") == sum(claim.here for claim in load_claims(CLAIMS).claims) and "**needs real data**" in card


def test_report_without_checkpoints_and_study(tmp_path, runs):
    "What only a checkpoint can tell is left open, and no verdict is made of the number that cannot fall."
    text = report_on(tmp_path, tmp_path / "none", tmp_path / "none")
    assert "Whether the experts differ cannot be told" in text and "say nearly the same" not in text
    assert text.count("No checkpoint is at hand") == 2 and "| 4 experts stay alike |" in text and "| not measured |" in text
    assert f"Of {len(load_claims(CLAIMS).claims)} claims: " in text and "not measured" in text.split("claims: ")[-1]
