"""The study pipeline as a user drives it: a first seed, another seed, a variant, a fresh clone. In order; each test goes on where the last one stopped."""
import json
import re

import pytest
from conftest import ROOT, Checkout, cpu_seconds
from ruamel.yaml import YAML

from moe_lab.params import load
from moe_lab.report import by_seed, load_studies
from moe_lab.verify import repeated_runs

DATASETS = {"": "coco", "dair_": "dair_v2x", "nuscenes_": "nuscenes"}  # beginning of a list's name -> what its runs are trained on
RESULTS = {"metrics.json", "history.csv", "routing.json", "tier.json"}


def read(file: str) -> dict:
    return YAML(typ="safe").load((ROOT / file).read_text())


def ran(done) -> list[str]:
    return re.findall(r"\] (?:studies/dvc.yaml:)?(\S+)  \d+ s", done.stdout)


def study(here: Checkout, ok: bool = True):
    return here.call("make", "-o", "setup", "study", ok=ok)


@pytest.fixture(scope="module")
def studied(checkout):
    "A study of one run with one seed, of seconds."
    lists = dict.fromkeys(read("studies/params.yaml"), []) | dict(seeds=dict.fromkeys(DATASETS.values(), [0]), from_scratch=["yolov7_tiny"])
    (checkout.path / "studies/params.yaml").write_text("".join(f"{name}: {json.dumps(values)}\n" for name, values in lists.items()))
    checkout.edit("studies/dvc.yaml", "--profile study", "--profile smoke")
    checkout.call("git", "rm", "-qf", "studies/dvc.lock")
    assert ran(study(checkout)) == ["from_scratch@yolov7_tiny-0"]
    checkout.commit()
    return checkout


# --- what the files say -------------------------------------------------------------------------------------------------------------

def test_no_run_starts_from_itself():
    starts = {name: run.get("init_from") for name, run in read("params.yaml")["runs"].items()}
    for name in starts:
        chain = [name]
        while chain[-1] != "scratch":
            chain.append(starts[chain[-1]])
            assert chain[-1] not in chain[:-1], chain
    train = read("dvc.yaml")["stages"]["train"]["do"]
    assert "runs/${item.init_from}/checkpoint.safetensors" in train["deps"]


def test_studied_runs_exist_and_start_where_their_list_says():
    runs, lists, stages = load(ROOT / "params.yaml", "study").runs, read("studies/params.yaml"), read("studies/dvc.yaml")["stages"]
    seeds = lists.pop("seeds")
    assert set(seeds) == set(DATASETS.values()) and all(len(set(some)) == len(some) >= 3 for some in seeds.values())
    assert set(lists) == set(stages) - {"plan"}
    looked_at = lists.pop("calibrated") + lists.pop("leaning")
    assert set(looked_at) <= {name for names in lists.values() for name in names}
    for start, names in lists.items():
        dataset, _, base = start.rpartition("from_")
        assert {(runs[name].dataset, runs[name].init_from) for name in names} == {(DATASETS[dataset], base)}
        assert any("checkpoint" in dep for dep in stages[start]["deps"]) == (base != "scratch")


def test_seed_0_is_the_run_of_the_pipeline_to_the_last_digit():
    "The same training, executed twice, in different folders: unless the processors were of different kinds."
    tiny, study = (load(ROOT / "params.yaml", profile).runs for profile in ("tiny", "study"))
    twice = repeated_runs(ROOT)
    assert set(twice) == {name for name, run in tiny.items() if study[name] == run}
    alike = [name for name, same in twice.items() if same is not None]
    assert len(alike) > len(twice) / 2 and [name for name in alike if not twice[name]] == []


# --- what happens -------------------------------------------------------------------------------------------------------------------

def test_results_go_to_git_and_the_rest_to_dvc(studied):
    kept = {name.rsplit("/", 1)[1] for name in studied.call("git", "ls-files", "studies/yolov7_tiny").stdout.split()}
    assert kept == RESULTS
    assert studied.call("git", "status", "--porcelain").stdout == ""
    (found,) = load_studies(studied.path / "studies")["yolov7_tiny"].values()
    assert 0 <= found.metrics["val"]["AP50"] <= 1 and len(found.history) == 1
    assert re.search(r"yolov7_tiny/0\s+identical", studied.call("moe-lab", "verify", "--studies", ok=False).stdout)


def test_a_second_study_runs_nothing_and_is_quick(studied):
    start = cpu_seconds()
    assert ran(study(studied)) == [] and cpu_seconds() - start < 10  # of a processor, however busy it is; about 3


def test_a_fresh_clone_runs_nothing_although_it_has_no_checkpoints(studied, tmp_path):
    studied.call("git", "clone", "-q", ".", str(tmp_path / "clone"))
    clone = Checkout(tmp_path / "clone")
    assert ran(study(clone)) == []


def test_the_root_pipeline_leaves_the_study_alone(studied):
    for target in ("analysis_moe_yolo", "site"):
        upstream = studied.call("dvc", "dag", "--dot", target).stdout
        assert '"train@moe_yolo"' in upstream and "studies/dvc.yaml" not in upstream
    assert "studies" not in studied.call("dvc", "metrics", "show", "--json").stdout


def test_another_seed_runs_only_that_and_somebody_elses_parameters_nothing(studied):
    studied.edit("params.yaml", "        epochs: 300", "        epochs: 301")
    studied.edit("studies/params.yaml", '"coco": [0]', '"coco": [0, 1]')
    assert ran(study(studied)) == ["from_scratch@yolov7_tiny-1"]
    losses = [run.history["train/loss"].iloc[0] for run in load_studies(studied.path / "studies")["yolov7_tiny"].values()]
    assert losses[0] != losses[1]
    assert set(by_seed(load_studies(studied.path / "studies")["yolov7_tiny"], "AP50")) <= {0, 1}


def test_a_variant_starts_from_the_checkpoint_of_its_seed(studied):
    studied.edit("studies/params.yaml", "from_yolov7_tiny: []", "from_yolov7_tiny: [yolov7_tiny_more]")
    done = studied.call("dvc", "repro", "studies/dvc.yaml:from_yolov7_tiny@yolov7_tiny_more-1")
    assert re.findall(r"Running stage 'studies/dvc.yaml:([^']+@[^']+)'", done.stdout) == ["from_yolov7_tiny@yolov7_tiny_more-1"]
    lock = YAML(typ="safe").load((studied.path / "studies/dvc.lock").read_text())["stages"]
    files = lambda stage, kind: {entry["path"]: entry["md5"] for entry in lock[stage][kind]}
    checkpoint = "studies/yolov7_tiny/1/checkpoint.safetensors"
    assert files("from_yolov7_tiny@yolov7_tiny_more-1", "deps")[checkpoint] == files("from_scratch@yolov7_tiny-1", "outs")[checkpoint]
