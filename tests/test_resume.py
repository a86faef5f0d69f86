"""kill -9 at any moment, run again: the results are bit-identical to those of a run that was left alone."""
import copy
import json
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
import toy
from typer.testing import CliRunner

from moe_lab import checkpoint
from moe_lab.cli import app
from moe_lab.params import UserError

HERE = Path(__file__).parent
NOTEBOOK = HERE.parent / "nbs/pipeline/train.ipynb"


def test_killed_and_started_again(world, reference, tmp_path):
    driver = subprocess.run([sys.executable, HERE / "kill_driver.py", world, tmp_path], capture_output=True, text=True, timeout=300, check=False)
    assert driver.returncode == 0, driver.stderr
    scenarios = [json.loads(line) for line in driver.stdout.splitlines()]
    assert len(scenarios) == 11
    toy.run(world, tmp_path / "yolo alone", model=toy.yolo())
    references = {"yolo in the middle of an epoch": toy.contents(tmp_path / "yolo alone")}
    for name, folder, codes in scenarios:
        assert codes[-1] == 0 and set(codes[:-1]) <= {-signal.SIGKILL}, (name, codes, driver.stderr)
        assert len(codes) > 1, f"{name}: nobody was killed"
        assert toy.contents(Path(folder) / "out") == references.get(name, reference), name
        assert not (Path(folder) / "resume").exists(), name


class Stop(Exception):
    pass


def stop(line):
    if line.startswith("epoch 2"):
        raise Stop


@pytest.fixture
def interrupted(world, tmp_path):
    """A resume folder left by a run that stopped in its second epoch."""
    with pytest.raises(Stop):
        toy.run(world, tmp_path / "out", tmp_path / "resume", log=stop)
    assert not (tmp_path / "out").exists()
    return tmp_path


def test_state_of_other_parameters_is_not_used(world, interrupted):
    lines = []
    toy.run(world, interrupted / "out", interrupted / "resume", log=lines.append, lr=0.01)
    assert lines[0] == "[resume] parameters, code, data or first weights changed since the interrupted run; starting afresh"
    toy.run(world, interrupted / "fresh", lr=0.01)
    assert toy.contents(interrupted / "out") == toy.contents(interrupted / "fresh")


def test_state_of_other_first_weights_is_not_used(world, tmp_path):
    """The same command goes on only while its start file holds the same weights."""
    start, lines = tmp_path / "start.safetensors", []

    def begin(value, **more):
        torch.manual_seed(0)
        model = toy.CellDetector(2)
        torch.nn.init.constant_(model.head.bias, value)
        checkpoint.save(start, model.state_dict())
        toy.run(world, tmp_path / "out", tmp_path / "resume", model=model, files=[start], **more)

    for value in (0.1, 0.1, 0.2):
        with pytest.raises(Stop):
            begin(value, log=lambda line: (lines.append(line), stop(line)))
    assert [line.split("; ")[-1].split(" in ")[0] for line in lines if "resume" in line] == ["[resume] going on", "starting afresh"]


def test_damaged_state_is_not_used(world, reference, interrupted):
    state = interrupted / "resume" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    lines = []
    toy.run(world, interrupted / "out", interrupted / "resume", log=lines.append)
    assert "damaged" in lines[0]
    assert toy.contents(interrupted / "out") == reference


def test_progress_is_the_same_whether_interrupted_or_not(world, interrupted):
    resumed, alone = [], []
    toy.run(world, interrupted / "out", interrupted / "resume", log=resumed.append)
    toy.run(world, interrupted / "alone", log=alone.append)
    assert resumed[0].startswith("[resume] going on in epoch 2")
    assert resumed[1:] == alone


def before_training(monkeypatch, **given) -> dict:
    """Names of the training notebook, whose cells ran with these parameters up to the training itself, which is only asked with what."""
    cells = [c["source"] for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "code"]
    last = next(k for k, code in enumerate(cells) if "trained = train(" in code)
    names = {}
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr("moe_lab.train.train", lambda *args, **asked: names.update(asked))
    for code in cells[: last + 1]:
        if "draw_batch" not in code and "parameter_ledger(" not in code:
            exec(code, names)
        if code.startswith('run = "'):
            names |= given
    return names


def test_a_start_file_is_used_whatever_init_from_says(monkeypatch, tmp_path):
    """Also where the run is from scratch; and the file belongs to the state of an interrupted run."""
    given = dict(run="yolov7_tiny", out=str(tmp_path), start="")
    fresh = before_training(monkeypatch, **given)
    assert all(Path(file).suffix == ".json" for file in fresh["files"])
    other = copy.deepcopy(fresh["model"])
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.5)
    start = tmp_path / "other.safetensors"
    checkpoint.save(start, other.state_dict())
    begun = before_training(monkeypatch, **given | dict(start=str(start)))
    assert all(torch.equal(a, b) for a, b in zip(begun["model"].state_dict().values(), other.state_dict().values()))
    assert begun["files"] == [*fresh["files"], start]
    with pytest.raises(UserError, match="none.safetensors: no such checkpoint"):
        before_training(monkeypatch, **given | dict(start=str(tmp_path / "none.safetensors")))


def test_a_start_file_that_is_not_there_is_one_line():
    words = ["run", str(NOTEBOOK), "--run", "yolov7_tiny", "--params-file", str(HERE.parent / "params.yaml"), "--start", "none.safetensors"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert result.output.startswith("moe-lab: --start none.safetensors: no such checkpoint")
