"""The pages of README's "Use real COCO": the official tree has years in its names, no annotated test split, and no conditions."""
import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import papermill
import pytest
from ruamel.yaml import YAML

from moe_lab import cli
from moe_lab.evaluate import evaluate_coco
from moe_lab.report import load_run, plot_where
from moe_lab.routing_report import by_condition, information, plot_conditions, usage

ROOT = Path(__file__).parent.parent
IMAGES = 12  # of each split


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    "A few images in the official layout, and what a training on them would leave: decent predictions, metrics of val alone."
    root = tmp_path_factory.mktemp("official")
    for split in ("train", "val"):
        content = json.loads((ROOT / f"samples/coco/annotations/instances_{split}.json").read_text())
        content["images"] = [{k: v for k, v in image.items() if k != "condition"} for image in content["images"][:IMAGES]]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
        (folder := root / f"data/coco/{split}2017").mkdir(parents=True)
        for image in content["images"]: shutil.copy(ROOT / f"samples/coco/{split}" / image["file_name"], folder)
        (root / "data/coco/annotations").mkdir(exist_ok=True)
        (file := root / f"data/coco/annotations/instances_{split}2017.json").write_text(json.dumps(content))
    found = [dict(image_id=a["image_id"], category_id=a["category_id"], bbox=[v + k % 9 for v in a["bbox"]], score=1 / (2 + k % 7))
             for k, a in enumerate(content["annotations"]) if not a.get("iscrowd")]
    make_run(root, evaluate_coco(file, found, dict.fromkeys(kept, "")).metrics, found)
    return root


def make_run(root: Path, scores: dict, found: list[dict]) -> None:
    (folder := root / "runs/yolov7_tiny").mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"val": scores, "model": {"parameters": 6_000_000, "flops": 13e9}}))
    (folder / "history.csv").write_text("epoch,train/box,train/loss,val/AP,val/AP50\n1,2,2,0.1,0.2\n2,1,1,0.2,0.3\n")
    (folder / "predictions.json").write_text(json.dumps({"val": found}))


def markdown(notebook) -> str:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return "\n".join("".join(o["data"]["text/markdown"]) for o in outputs if "text/markdown" in o.get("data", {})).replace("\u00a0", " ")


def test_the_baseline_report_is_written(official, tmp_path):
    where = dict(runs=str(official / "runs"), data=str(official / "data/coco"), bench="nothing.json")
    text = markdown(papermill.execute_notebook(ROOT / "nbs/analysis/yolov7_baseline.ipynb", tmp_path / "out.ipynb", where, progress_bar=False))
    assert " on val (AP " in text and " on test" not in text and "| val |" in text and "| test |" not in text
    assert "does not say what the conditions were" in text and "Among the worst tenth" not in text


def test_the_front_page_shows_a_dash(official):
    "And no row for what has not been trained."
    for name in ("nbs", "reports"): (official / name).mkdir()
    own = dict(detector="yolov7_tiny", data=dict(root="data/coco", image_size=[256, 320]), train=dict(epochs=2, batch_size=8, lr=0.01))
    YAML().dump(dict(profile="paper", threads=1, runs=dict(yolov7_tiny=own, later=own), profiles=dict(paper={})), official / "params.yaml")
    done = papermill.execute_notebook(ROOT / "nbs/index.ipynb", official / "nbs/out.ipynb", cwd=official / "nbs", progress_bar=False)
    (row,) = [line for line in markdown(done).splitlines() if line.startswith("| `")]
    assert row.startswith("| `yolov7_tiny` | 0.") and row.endswith(" | – | – | 6.00 M | 13.00 G |")


def test_the_last_words_of_make_repro(official, monkeypatch, capsys):
    monkeypatch.chdir(official)
    cli.done(Path("site"))
    assert "yolov7_tiny" in capsys.readouterr().out


def test_figures_do_without_conditions(official):
    records = [dict(image_id=i, condition="", experts=[i % 2, 2], weights=[0.5, 0.5], probs=[0.25] * 4) for i in range(4)]
    plot_conditions(by_condition(records), plt.subplots()[1])
    assert len(usage(records)) == 4 and information(records).most == 0
    assert len(plot_where(load_run("yolov7_tiny", official / "runs").metrics["val"]).axes) == 1
    plt.close("all")
