"`moe-lab detect`: what it draws and writes, and one line for whatever can be wrong with what it is given."
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from typer.testing import CliRunner

from moe_lab import checkpoint, detectors
from moe_lab.cli import app
from moe_lab.data.coco import CocoDetection
from moe_lab.data.core import make_loader
from moe_lab.detect import detect
from moe_lab.evaluate import predict, quiet
from moe_lab.params import EvalParams, UserError

CATEGORIES = [dict(id=1, name="person"), dict(id=3, name="car")]
LOW = 1e-6  # an untrained detector is sure of nothing


def save_run(root: Path, name: str, detector: str, **changes):
    "A run with an untrained detector, saved as a training saves it."
    torch.manual_seed(1)
    model = detectors.build(detector, num_classes=2, width=0.125)
    metadata = dict(run=name, detector=detector, model=model.params.model_dump(), categories=CATEGORIES, image_size=[64, 96])
    checkpoint.save(root / "runs" / name / "checkpoint.safetensors", model.state_dict(), metadata | changes)
    return model.eval()


@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    "A folder with two runs and the images of the toy world."
    root = tmp_path_factory.mktemp("place")
    save_run(root, "plain", "yolov7_tiny")
    save_run(root, "routed", "moe_yolo")
    shutil.copytree(world / "val", root / "images")
    return root


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)


def command(*words: str, run="plain", source="images", out="out"):
    "Exit code and all that is printed."
    result = CliRunner().invoke(app, ["detect", "--run", run, "--source", str(source), "--out", str(out), *words])
    return result.exit_code, result.output


def refused(*words: str, **options) -> str:
    "The one line that a mistake ends with."
    code, output = command(*words, **options)
    lines = [line for line in output.strip().splitlines() if not line.startswith("━")]  # a bar stands there if the work had begun
    assert code == 1 and len(lines) == 1 and lines[0].startswith("moe-lab: "), output
    return lines[0]


def test_pictures_and_records(world, tmp_path):
    report = detect("plain", Path("images"), tmp_path, conf=LOW, max_detections=4, batch_size=3)
    names = [f"{i}.jpg" for i in range(1, 9)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "detections.json", "images.json"])
    assert all(Image.open(tmp_path / name).size == (192, 128) for name in names)
    content = json.loads((tmp_path / "images.json").read_text())
    assert content["image_id"] == "the number in the file name"
    assert [(i["image_id"], i["file_name"], i["width"], i["height"]) for i in content["images"]] == [(k + 1, name, 96, 64) for k, name in enumerate(names)]
    results = json.loads((tmp_path / "detections.json").read_text())
    assert len(results) == report.detections == sum(i["detections"] for i in content["images"]) > 0
    assert all(r["file_name"] == f"{r['image_id']}.jpg" and r["category_id"] in (1, 3) for r in results)
    with quiet():
        assert len(COCO(world / "annotations" / "instances_val.json").loadRes(str(tmp_path / "detections.json")).anns) == len(results)


@pytest.mark.parametrize("run, detector", [("plain", "yolov7_tiny"), ("routed", "moe_yolo")])
def test_the_same_detections_as_in_the_evaluation(world, place, tmp_path, run, detector):
    "Images are prepared as in training: the numbers are those of `predict`, to the last digit."
    evaluate = EvalParams(conf=LOW, max_detections=5, batch_size=4)
    expected = predict(save_run(tmp_path, run, detector), make_loader(CocoDetection(world, "val", (64, 96)), 4), evaluate)
    detect(run, Path("images"), tmp_path / "out", conf=LOW, max_detections=5, batch_size=4)
    found = [{k: v for k, v in r.items() if k != "file_name"} for r in json.loads((tmp_path / "out" / "detections.json").read_text())]
    assert found == expected


def test_experts_of_each_image(tmp_path):
    detect("routed", Path("images"), tmp_path, conf=LOW, max_detections=3)
    rows = json.loads((tmp_path / "experts.json").read_text())
    assert [r["file_name"] for r in rows] == [f"{i}.jpg" for i in range(1, 9)]
    for row in rows:
        assert len(set(row["experts"])) == 2 and set(row["experts"]) <= set(range(4))
        assert row["weights"] == sorted(row["weights"], reverse=True) and sum(row["weights"]) == pytest.approx(1, abs=1e-5)
    assert Image.open(tmp_path / "1.jpg").height > 128  # a line under the picture names them
    detect("plain", Path("images"), tmp_path, conf=LOW)
    assert not (tmp_path / "experts.json").exists()


def test_threshold_and_overlap_are_obeyed(tmp_path):
    scores = lambda out: [r["score"] for r in json.loads((out / "detections.json").read_text())]
    detect("routed", Path("images"), tmp_path / "all", conf=LOW)
    border = sorted(scores(tmp_path / "all"))[len(scores(tmp_path / "all")) // 2]
    detect("routed", Path("images"), tmp_path / "half", conf=border)
    assert 0 < len(scores(tmp_path / "half")) < len(scores(tmp_path / "all"))
    assert min(scores(tmp_path / "half")) >= border - 1e-5  # five decimals are written
    detect("routed", Path("images"), tmp_path / "fused", conf=LOW, wbf_iou=0.05)
    assert len(scores(tmp_path / "fused")) < len(scores(tmp_path / "all"))


def test_one_file_of_another_format_and_size(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 500, 3), np.uint8)).save(tmp_path / "tall.bmp")
    code, output = command("--conf", str(LOW), source=tmp_path / "tall.bmp", out=tmp_path / "out")
    assert code == 0 and "1 images" in output and "from 1" in output
    assert Image.open(tmp_path / "out" / "tall.bmp.png").size == (500, 900)
    for r in json.loads((tmp_path / "out" / "detections.json").read_text()):
        x, y, w, h = r["bbox"]
        assert r["image_id"] == 1 and x >= 0 and y >= 0 and x + w <= 500.01 and y + h <= 900.01


def test_grey_and_transparent_images(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("L", (90, 60), 99).save(tmp_path / "in" / "grey.png")
    Image.new("RGBA", (90, 60), (9, 99, 9, 50)).save(tmp_path / "in" / "clear.png")
    assert command(source=tmp_path / "in", out=tmp_path / "out")[0] == 0


@pytest.mark.parametrize("size", [(4000, 3), (3, 4000), (1, 1)])
def test_a_line_of_pixels(size, tmp_path):
    "An image that the network sees less than a pixel of costs nobody's records."
    (tmp_path / "in").mkdir()
    Image.new("RGB", size, "white").save(tmp_path / "in" / "line.png")
    shutil.copy("images/1.jpg", tmp_path / "in")
    code, output = command("--conf", str(LOW), source=tmp_path / "in", out=tmp_path / "out")
    assert code == 0, output
    images = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert [(i["file_name"], i["width"], i["height"]) for i in images] == [("1.jpg", 96, 64), ("line.png", *size)]


def test_broken_files_cost_only_themselves(tmp_path):
    shutil.copytree("images", tmp_path / "in")
    whole = (tmp_path / "in" / "1.jpg").read_bytes()
    (tmp_path / "in" / "2.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "3.jpg").write_bytes(b"")
    (tmp_path / "in" / "4.jpg").write_text("<html>404</html>")
    code, output = command("--conf", str(LOW), "--batch-size", "3", source=tmp_path / "in", out=tmp_path / "out")
    assert code == 1 and "5 images" in output and "Traceback" not in output
    assert [name for name in ("2.jpg", "3.jpg", "4.jpg") if f"{name}: the image is" not in output] == []
    assert [i["file_name"] for i in json.loads((tmp_path / "out" / "images.json").read_text())["images"]] == [f"{i}.jpg" for i in (1, 5, 6, 7, 8)]


def test_a_png_that_claims_to_be_enormous(tmp_path):
    header = struct.pack(">IIBBBBB", 2**30, 2**30, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + b"\0\0\0\0IEND")
    assert "bomb.png" in refused(source=tmp_path / "bomb.png", out=tmp_path / "out")


def test_nothing_readable_leaves_earlier_results(tmp_path):
    command(out=tmp_path / "out")
    before = (tmp_path / "out" / "images.json").read_bytes()
    (tmp_path / "a.jpg").write_text("no")
    assert "a.jpg: the image is not readable" in refused(source=tmp_path / "a.jpg", out=tmp_path / "out")
    assert (tmp_path / "out" / "images.json").read_bytes() == before


def test_mistakes_in_the_request(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert "no such run; did you mean plain?" in refused(run="plian")
    assert "dvc repro train@NAME" in refused(run="plian")
    assert "no such run" in refused(run="../runs/plain")
    assert "no such file or folder" in refused(source="nowhere")
    assert "no images in this folder" in refused(source=tmp_path / "empty")
    assert "would be overwritten" in refused(out="images")
    assert "would be overwritten" in refused(source="images/1.jpg", out="./images/../images")
    assert "cannot write into this folder" in refused(out="images/1.jpg/x")
    assert "fuses no boxes" in refused("--wbf-iou", "0.5")
    assert "model.wbf_iou" in refused("--wbf-iou", "1.5", run="routed")
    assert "options: conf" in refused("--conf", "1.5")
    assert "options: batch_size" in refused("--batch-size", "0")
    assert "--device nowhere: not available here" in refused("--device", "nowhere")


def test_a_run_of_the_parameter_file_without_checkpoint(tmp_path):
    params = Path(__file__).parent.parent / "params.yaml"
    assert "no checkpoint yet; make it with `dvc repro train@yolov7_tiny`" in refused("--params-file", str(params), run="yolov7_tiny")


HOSTILE = {
    "pickle": (lambda file: file.write_bytes(b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR."), "Python pickle, which can run code"),
    "torch archive": (lambda file: torch.save({}, file), "PyTorch archive"),
    "cut short": (lambda file: file.write_bytes(file.read_bytes()[:-9]), "damaged checkpoint"),
    "huge header": (lambda file: file.write_bytes((2**62).to_bytes(8, "little") + b"{}"), "damaged checkpoint"),
    "no metadata": (lambda file: checkpoint.save(file, {}), "no detector is described"),
    "a list": (lambda file: checkpoint.save(file, {}, [1]), "no detector is described"),
    "any class": (lambda file: checkpoint.save(file, {}, dict(detector="os:system", model={}, categories=CATEGORIES, image_size=[64, 64])), "unknown detector 'os:system'"),
    "enormous input": (lambda file: checkpoint.save(file, {}, dict(detector="yolov7_tiny", model={}, categories=CATEGORIES, image_size=[64, 2**40])), "image_size.1"),
    "enormous model": (lambda file: checkpoint.save(file, {}, dict(detector="moe_yolo", model=dict(width=4.0, num_experts=64), categories=CATEGORIES, image_size=[64, 64])), "do not fit the model"),
    "nameless class": (lambda file: checkpoint.save(file, {}, dict(detector="yolov7_tiny", model={}, categories=[{"name": "car"}], image_size=[64, 64])), "categories.0.id"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoints(place, name):
    make, expected = HOSTILE[name]
    save_run(place, "hostile", "yolov7_tiny")
    make(place / "runs" / "hostile" / "checkpoint.safetensors")
    code, output = command(run="hostile")
    assert code == 1 and expected in output and "Traceback" not in output
    assert not Path("hacked").exists()
    shutil.rmtree(place / "runs" / "hostile")


def test_a_full_disk_is_explained(tmp_path, monkeypatch):
    import errno
    import os
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match="no space for"):
        detect("plain", Path("images"), tmp_path / "out")
    assert [p for p in (tmp_path / "out").iterdir()] == []


def test_progress_counts_every_image(tmp_path):
    steps = []
    detect("plain", Path("images"), tmp_path, conf=LOW, max_detections=2, batch_size=3, progress=lambda *step: steps.append(step[:2]))
    assert steps == [(0, 8), (3, 8), (6, 8), (8, 8)]


def test_the_installed_command(tmp_path):
    done = subprocess.run([Path(sys.executable).with_name("moe-lab"), "detect", "--run", "plain", "--source", "images/1.jpg", "--out", tmp_path],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1/1" in done.stderr and "1 images" in done.stdout
