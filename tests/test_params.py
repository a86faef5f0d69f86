"""Strict parameters, from the command line down: every mistake in params.yaml is one clear line and nothing runs."""
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from ruamel.yaml import YAML

from moe_lab.params import Params, RunParams, UserError, describe, load, plain, read_yaml

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


def edited_text(tmp_path, old: str, new: str) -> Path:
    "params.yaml with its anchors, changed at one place, as a person would."
    text = (ROOT / "params.yaml").read_text()
    assert old in text, old
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(old, new, 1))
    return path


SLIPS = {
    "in an anchor": ("train: &more\n      epochs:", "train: &more\n      epoch:", "runs.yolov7_tiny_more.train.epoch: unknown key; did you mean epochs?", "      epoch:"),
    "in an anchor on one line": ("evaluate: &judged {conf:", "evaluate: &judged {cnf:", "runs.yolov7_tiny.evaluate.cnf: unknown key; did you mean conf?", "{cnf:"),
    "not a pair": ("image_size: [256, 320]", "image_size: 256", "runs.yolov7_tiny.data.image_size: Input should be a valid tuple (found 256)", "image_size: 256"),
    "three sides": ("image_size: [256, 320]", "image_size: [256, 320, 32]", "runs.yolov7_tiny.data.image_size", "image_size: [256, 320, 32]"),
    "no number": ("hsv_h: 0.015", "hsv_h: .nan", "runs.yolov7_tiny.data.augment.hsv_h: Input should be a finite number", "hsv_h: .nan"),
    "endless": ("lr: 0.006", "lr: .inf", "runs.yolov7_tiny.train.lr: Input should be a finite number", "lr: .inf"),
    "anchors are no list": ("width: 0.25 ", "anchors: 5\n      width: 0.25 ", "runs.yolov7_tiny.model.anchors: need 3 lists", "anchors: 5"),
    "anchors below zero": ("width: 0.25 ", "anchors: [[-1, 2], [3, 4], [0, 0]]\n      width: 0.25 ", "every width and height must be a number above 0", "anchors: [[-1"),
    "a run is a number": ("runs:\n", "runs:\n  broken: 5\n", "runs.broken: expected keys and values below it, found 5", "  broken: 5"),
    "a profile is a number": ("\n  tiny: {}", "\n  tiny: 4", "profiles.tiny: expected keys and values below it, found 4", "  tiny: 4"),
    "a profile's run is a number": ("\n  tiny: {}", "\n  tiny: {yolov7_tiny: 3}", "profiles.tiny.yolov7_tiny: expected keys", "  tiny: {yolo"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_in_the_text_names_its_line(tmp_path, slip):
    "Also where the key is shared by a merge, and so stands in a line of another run; and it is told once."
    old, new, expected, there = SLIPS[slip]
    path = edited_text(tmp_path, old, new)
    line = next(k for k, text in enumerate(path.read_text().splitlines(), 1) if there in text)
    with pytest.raises(UserError) as error:
        load(path)
    (told,) = [text for text in str(error.value).splitlines() if expected in text]
    assert told.startswith(f"{path}:{line}: ")


@pytest.mark.parametrize("content", ["runs: [1, 2]", "runs: {a: 5}", "runs: {}\nprofiles: 3", "runs: {}\nprofiles: {tiny: 4}"])
def test_every_level_is_a_group_of_keys(tmp_path, content):
    (path := tmp_path / "params.yaml").write_text(f"threads: 1\n{content}\n")
    with pytest.raises(UserError, match="expected keys and values below it"):
        load(path)


@pytest.mark.parametrize("old, new, expected", [
    ("      train: &long\n        epochs:", "      train: &long\n        epochz:", "epochz: unknown key; did you mean epochs?"),
    ("lr: 0.01\n        lr_final", "lr: -0.01\n        lr_final", "lr: Input should be greater than 0 (found -0.01)"),
])
def test_a_slip_in_a_profile_is_found_there(tmp_path, old, new, expected):
    path = edited_text(tmp_path, old, new)
    line = next(k for k, text in enumerate(path.read_text().splitlines(), 1) if new.strip().splitlines()[-1 if "train" in new else 0] in text)
    with pytest.raises(UserError) as error:
        load(path, "paper")
    assert f"{path}:{line}: profiles.paper.yolov7_tiny.train.{expected}" in str(error.value)


def test_reference_says_what_a_key_may_be():
    rows = {key: meaning for key, _, meaning in describe(RunParams)}
    assert rows["train.lr_final"].endswith("(> 0, ≤ 1)") and rows["train.optimizer"].endswith("(sgd, adamw)")
    assert rows["data.scene.tilt"].endswith("(≥ 0, ≤ 45)")


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
