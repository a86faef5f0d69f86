"""kill -9 at any moment, run again: the results are bit-identical to those of a run that was left alone."""
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import toy

HERE = Path(__file__).parent


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


@pytest.fixture
def interrupted(world, tmp_path):
    """A resume folder left by a run that stopped in its second epoch."""
    class Stop(Exception):
        pass

    def log(line):
        if line.startswith("epoch 2"):
            raise Stop
    with pytest.raises(Stop):
        toy.run(world, tmp_path / "out", tmp_path / "resume", log=log)
    assert not (tmp_path / "out").exists()
    return tmp_path


def test_state_of_other_parameters_is_not_used(world, interrupted):
    lines = []
    toy.run(world, interrupted / "out", interrupted / "resume", log=lines.append, lr=0.01)
    assert lines[0] == "[resume] parameters, code or data changed since the interrupted run; starting afresh"
    toy.run(world, interrupted / "fresh", lr=0.01)
    assert toy.contents(interrupted / "out") == toy.contents(interrupted / "fresh")


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
