"""Strict parameters, from the command line down: every mistake in params.yaml is one clear line and nothing runs."""
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from ruamel.yaml import YAML

from moe_lab.params import Params, UserError, describe, load, plain, read_yaml

ROOT = Path(__file__).parent.parent
MOE_LAB = Path(sys.executable).with_name("moe-lab")


def edited(tmp_path, change) -> Path:
    values = plain(read_yaml(ROOT / "params.yaml"))
    change(values)
    path = tmp_path / "params.yaml"
    YAML(typ="safe").dump(values, path)
    return path


def baseline(values) -> dict:
    return values["runs"]["yolov7_tiny"]


MISTAKES = {
    "unknown key": (lambda v: baseline(v)["train"].update(epoch=3), "runs.yolov7_tiny.train.epoch: unknown key; did you mean epochs?"),
    "unknown model key": (lambda v: baseline(v)["model"].update(widht=1.0), "runs.yolov7_tiny.model.widht: unknown key; did you mean width?"),
    "out of range": (lambda v: baseline(v)["train"].update(lr=-1.0), "runs.yolov7_tiny.train.lr"),
    "wrong type": (lambda v: baseline(v)["train"].update(epochs="many"), "found 'many'"),
    "missing key": (lambda v: baseline(v)["data"].pop("root"), "runs.yolov7_tiny.data.root: missing"),
    "unknown detector": (lambda v: baseline(v).update(detector="yolov7_tyni"), "did you mean yolov7_tiny?"),
    "unknown profile": (lambda v: v.update(profile="tinny"), "did you mean tiny?"),
    "profile for no run": (lambda v: v["profiles"]["paper"].update(yolo={}) or v.update(profile="paper"), "profiles.paper.yolo: no such run"),
    "odd image size": (lambda v: baseline(v)["data"].update(image_size=[250, 320]), "multiples of 32"),
    "init from nowhere": (lambda v: baseline(v).update(init_from="yolo"), "runs.yolov7_tiny.init_from: no run 'yolo'"),
    "top level": (lambda v: v.update(thread=2), "thread: unknown key; did you mean threads?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_names_file_key_and_fix(tmp_path, mistake):
    change, expected = MISTAKES[mistake]
    path = edited(tmp_path, change)
    with pytest.raises(UserError) as error:
        load(path)
    assert str(path) in str(error.value) and expected in str(error.value)


def test_every_committed_profile_is_valid():
    profiles = plain(read_yaml(ROOT / "params.yaml"))["profiles"]
    assert {"tiny", "smoke", "paper"} <= set(profiles)
    for profile in profiles:
        assert load(ROOT / "params.yaml", profile).profile == profile


def test_paper_profile_is_the_published_recipe():
    run = load(ROOT / "params.yaml", "paper").runs["yolov7_tiny"]
    assert run.model["width"] == 1.0 and run.data.image_size == (640, 640)
    train = run.train
    assert (train.epochs, train.lr, train.lr_final, train.momentum, train.weight_decay) == (300, 0.01, 0.01, 0.937, 5e-4)
    assert (train.warmup_epochs, train.warmup_steps, train.ema_decay, train.nominal_batch) == (3, 1000, 0.9999, 64)
    augment = run.data.augment
    assert (augment.mosaic, augment.mixup, augment.translate, augment.scale, augment.flip) == (1.0, 0.05, 0.1, 0.5, 0.5)
    assert (augment.hsv_h, augment.hsv_s, augment.hsv_v) == (0.015, 0.7, 0.4)


def test_command_line_prints_one_line_and_touches_nothing(tmp_path):
    path = edited(tmp_path, MISTAKES["unknown key"][0])
    before = sorted((ROOT / "runs").rglob("*"))
    done = subprocess.run([MOE_LAB, "run", "nbs/pipeline/train.ipynb", "--run", "yolov7_tiny", "--params-file", path],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "did you mean epochs?" in done.stderr
    assert sorted((ROOT / "runs").rglob("*")) == before


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=12))
def test_no_unknown_key_ever_passes(tmp_path_factory, key):
    known = {name.split(".")[0] for name, _, _ in describe(Params)}
    if key not in known | {"runs", "profiles"}:
        path = edited(tmp_path_factory.mktemp("params"), lambda v: v.update({key: 1}, runs={"yolov7_tiny": v["runs"]["yolov7_tiny"]}, profiles={"tiny": {}}))
        with pytest.raises(UserError, match="unknown key"):
            load(path)
