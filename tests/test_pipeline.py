"""The pipeline as a user drives it: repro, edit, rerun, fail, experiment, sweep. In order; each test goes on where the last one stopped."""
import json
import re
import time

import pytest
from conftest import cpu_seconds

TARGETS = ("train@yolov7_tiny", "analysis@yolov7_baseline")
README = ("--single-item", "readme")  # it reads all reports; what is tested here makes one of them
RUN = "runs/yolov7_tiny"


@pytest.fixture(scope="module")
def built(checkout):
    "The checkout after its first `dvc repro`, with one run."
    checkout.keep_runs("yolov7_tiny")
    checkout.call("dvc", "repro", *TARGETS)
    checkout.call("dvc", "repro", *README)
    checkout.commit()
    return checkout


def ran(output: str) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", output)


def test_first_repro_makes_everything(built):
    for name in ("metrics.json", "history.csv", "predictions.json", "checkpoint.safetensors", "train.ipynb", "timing.json", "tier.json"):
        assert (built.path / RUN / name).stat().st_size > 0, name
    assert not (built.path / RUN / ".resume").exists() and not (built.path / RUN / ".staging").exists()


def test_second_repro_runs_nothing_and_is_quick(built):
    start = cpu_seconds()
    done = built.call("dvc", "repro", *TARGETS)
    assert ran(done.stdout) == [] and cpu_seconds() - start < 6  # of a processor, however busy it is; about 2
    assert ran(built.call("dvc", "repro", *README).stdout) == []
    assert built.call("git", "status", "--porcelain").stdout == ""


def test_rerunning_by_force_gives_the_same_bytes(built, monkeypatch):
    "In a kernel of its own, where the first one was a copy of a process that had loaded the libraries."
    monkeypatch.delitem(built.env, "JUPYTER_DEFAULT_PROVISIONER_NAME")
    files = [f for f in (built.path / RUN).iterdir() if f.is_file() and f.name != "timing.json"]
    before = {f.name: f.read_bytes() for f in files}
    built.call("dvc", "repro", "--force", "--single-item", "train@yolov7_tiny")
    assert {f.name: f.read_bytes() for f in files} == before


def test_metrics_and_plots_show(built):
    shown = json.loads(built.call("dvc", "metrics", "show", "--json").stdout)
    assert "AP50" in json.dumps(shown)
    built.call("dvc", "plots", "show")
    page = (built.path / "dvc_plots/index.html").read_text()
    sources = re.findall(r'<script[^>]+src="([^"]+)"', page)
    assert sources and not any(s.startswith(("http:", "https:", "//")) for s in sources)
    assert all((built.path / "dvc_plots" / s).resolve().is_file() for s in sources)
    assert "train/loss" in page


def test_an_edit_reruns_only_what_it_touches(built):
    built.edit("moe_lab/site.py", '"""', '"""Edited. ', )
    status = json.loads(built.call("dvc", "status", "--json", *TARGETS).stdout)
    assert not any(stage.startswith("train") for stage in status)
    assert ran(built.call("dvc", "repro", *TARGETS).stdout) == ["code"]
    built.edit("params.yaml", "    seed: 0", "    seed: 1")
    assert ran(built.call("dvc", "repro", *TARGETS).stdout)[:2] == ["plan", "train@yolov7_tiny"]
    assert "AP50" in built.call("dvc", "metrics", "diff", "--all").stdout
    built.commit()


def test_a_failing_run_leaves_earlier_results(built):
    before = {f.name: f.read_bytes() for f in (built.path / RUN).iterdir() if f.is_file()}
    rate = re.search(r"\n      lr: ([\d.e-]+)\n", (built.path / "params.yaml").read_text())[1]
    built.edit("params.yaml", f"\n      lr: {rate}\n", "\n      lr: 1.0e+30\n")
    done = built.call("dvc", "repro", *TARGETS, ok=False)
    assert done.returncode != 0
    assert "yolov7_tiny" in done.stderr and "lr" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert {f.name: f.read_bytes() for f in (built.path / RUN).iterdir() if f.is_file()} == before
    built.edit("params.yaml", "\n      lr: 1.0e+30\n", f"\n      lr: {rate}\n")


def test_an_experiment_and_a_sweep(built):
    built.call("dvc", "exp", "run", "-S", "runs.yolov7_tiny.train.epochs=2", *TARGETS[:1])
    built.call("dvc", "exp", "run", "--queue", "-S", "runs.yolov7_tiny.seed=2,3", *TARGETS[:1])
    built.call("dvc", "queue", "start", "-j", "2")
    deadline = time.monotonic() + 240
    while "Queued" in (status := built.call("dvc", "queue", "status").stdout) or "Running" in status:
        assert time.monotonic() < deadline, status
        time.sleep(8)  # asking takes a processor for two seconds
    assert status.count("Success") == 2, status
    rows = built.call("dvc", "exp", "show", "--csv").stdout.strip().splitlines()
    assert len(rows) >= 1 + 2 + 3  # header; workspace and commit; three experiments
    assert "AP50" in rows[0]


def test_verify_says_what_differs(built):
    built.call("git", "checkout", "-q", "--", ".")
    built.call("dvc", "repro", *TARGETS)
    assert "identical" in built.call("moe-lab", "verify").stdout
    path = built.path / RUN / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["val"]["AP50"] += 0.01
    path.write_text(json.dumps(metrics))
    done = built.call("moe-lab", "verify", ok=False)
    assert done.returncode == 1 and "different" in done.stdout and "val.AP50" in done.stdout
