"""Whatever is wrong with the input or the disk, one line says what, where and what to do; earlier results stay as they were."""
import errno
import json
import os
import subprocess
import sys
import tempfile
import textwrap

import pytest
import toy
import torch

from moe_lab import checkpoint
from moe_lab.data.coco import CocoDetection
from moe_lab.evaluate import evaluate_coco, load_ground_truth
from moe_lab.params import UserError


def damaged(root, change):
    return toy.write_dataset(root, splits=(("train", 4),), change=lambda split, data: change(data))


def complaint(root, split="train"):
    """The single line that a user sees on opening the dataset and reading all of it."""
    with pytest.raises(UserError) as caught:
        data = CocoDetection(root, split, toy.SIZE)
        [data[i] for i in range(len(data))]
    assert "\n" not in str(caught.value)
    return str(caught.value)


BROKEN = {
    "empty dataset": (lambda d: d["images"].clear(), "images: the dataset is empty"),
    "no categories": (lambda d: d["categories"].clear(), "categories: the list is empty"),
    "no annotation list": (lambda d: d.pop("annotations"), "annotations: this list is missing"),
    "unknown category": (lambda d: d["annotations"][2].update(category_id=77), "annotations[2].category_id: no entry with id 77 in categories"),
    "unknown image": (lambda d: d["annotations"][1].update(image_id=99), "annotations[1].image_id: no entry with id 99 in images"),
    "image twice": (lambda d: d["images"].append(d["images"][0]), "images: id 1 occurs more than once"),
    "annotation twice": (lambda d: d["annotations"].append(d["annotations"][0]), "annotations: id 1 occurs more than once"),
    "annotation id 0": (lambda d: d["annotations"][0].update(id=0), "annotations: id 0 is in use"),
    "box of three numbers": (lambda d: d["annotations"][1].update(bbox=[1, 2, 3]), "annotations[1].bbox: [1, 2, 3] is not"),
    "box of text": (lambda d: d["annotations"][1].update(bbox=["a"] * 4), "annotations[1].bbox"),
    "box of nothing": (lambda d: d["annotations"][1].update(bbox=None), "annotations[1].bbox: None is not"),
    "box that is not finite": (lambda d: d["annotations"][1].update(bbox=[1, 2, float("inf"), 3]), "annotations[1].bbox"),
    "box missing": (lambda d: d["annotations"][1].pop("bbox"), "annotations[1].bbox: missing"),
    "no file name": (lambda d: d["images"][3].pop("file_name"), "images[3].file_name: missing"),
    "size of zero": (lambda d: d["images"][3].update(width=0), "images[3]: width and height must be positive"),
    "size of another image": (lambda d: d["images"][3].update(width=95), "4.jpg: 96x64 pixels, but"),
    "image not there": (lambda d: d["images"][3].update(file_name="x.jpg"), "images[3].file_name: no such image 'x.jpg'"),
    "entry that is no object": (lambda d: d["images"].append(5), "images[4].id: missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_annotations(name, tmp_path):
    change, expected = BROKEN[name]
    assert expected in complaint(damaged(tmp_path / "d", change))


def test_annotation_outside_the_image_is_skipped_and_counted(tmp_path):
    data = CocoDetection(damaged(tmp_path / "d", lambda d: d["annotations"][0].update(bbox=[200, 10, 20, 20])), "train", toy.SIZE)
    assert len(data.notes) == 1 and "boxes have no area inside their image and were skipped (first: annotations[0])" in data.notes[0]
    assert sum(map(len, data.index.boxes)) == len(data.index.path.read_text().split('"bbox"')) - 2


def test_annotation_partly_outside_is_clipped_and_counted(tmp_path):
    data = CocoDetection(damaged(tmp_path / "d", lambda d: d["annotations"][0].update(bbox=[80, 50, 40, 40])), "train", toy.SIZE)
    assert "1 of" in data.notes[0] and "were clipped" in data.notes[0]
    assert data.index.boxes[0][0].tolist() == [80, 50, 96, 64]


def test_missing_annotation_file(tmp_path):
    assert "instances_val.json: no such annotation file" in complaint(damaged(tmp_path / "d", lambda d: None), "val")


def test_missing_image_folder(tmp_path):
    root = damaged(tmp_path / "d", lambda d: None)
    (root / "train").rename(root / "elsewhere")
    assert "no such image folder" in complaint(root)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'{"images": [}', b"\xff\xfe\x00\x01"])
def test_invalid_json(content, tmp_path):
    root = damaged(tmp_path / "d", lambda d: None)
    (root / "annotations" / "instances_train.json").write_bytes(content)
    assert str(root / "annotations" / "instances_train.json") in complaint(root)


@pytest.mark.parametrize("share, expected", [(0.0, "is empty"), (0.02, "not readable"), (0.5, "cut short"), (0.999, "cut short")])
def test_truncated_image(share, expected, tmp_path):
    root = damaged(tmp_path / "d", lambda d: None)
    image = root / "train" / "2.jpg"
    image.write_bytes(image.read_bytes()[: int(image.stat().st_size * share)])
    assert "2.jpg: the image is " in (text := complaint(root)) and (expected in text or "not readable" in text)


def test_notes_reach_the_log(tmp_path, caplog):
    CocoDetection(damaged(tmp_path / "d", lambda d: d["annotations"][0].update(bbox=[1, 2, 0, 9])), "train", toy.SIZE)
    assert "were skipped" in caplog.text


class NanAfter(toy.CellDetector):
    """A detector whose loss becomes NaN in the second epoch."""

    def on_epoch(self, epoch, epochs):
        self.factor = float("nan") if epoch else 1.0

    def loss(self, outputs, batch):
        terms = super().loss(outputs, batch)
        return {**terms, "box": terms["box"] * self.factor}


def test_nan_loss_says_where_and_leaves_earlier_results(tmp_path):
    root = toy.write_dataset(tmp_path / "d")
    toy.run(root, tmp_path / "out")
    before = toy.contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"runs\.toy: epoch 2, step 1: loss term 'box' is nan .* on images \d+, .*try a lower train\.lr"):
        toy.run(root, tmp_path / "out", model=NanAfter(2))
    assert toy.contents(tmp_path / "out") == before


class NoGradient(torch.autograd.Function):
    """Passes a loss on, and NaN back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


class NanGradient(toy.CellDetector):
    """A detector whose losses are always finite; the gradient is NaN at the given call of `loss`."""

    def __init__(self, call):
        super().__init__(2)
        self.calls, self.call = 0, call

    def loss(self, outputs, batch):
        self.calls += 1
        terms = super().loss(outputs, batch)
        return {**terms, "box": NoGradient.apply(terms["box"])} if self.calls == self.call else terms


@pytest.mark.parametrize("call, changes, where", [
    (9, {}, r"epoch 3, step 3"),  # the last of all steps, after which no loss would tell
    (4, dict(clip_norm=0.0, ema_decay=0.0), r"epoch 2, step 1"),
    (1, dict(batch_size=4, nominal_batch=8), r"epoch 1, step 2"),  # accumulated: noticed at the step, with the images of both batches
])
def test_nan_gradient_says_where_and_leaves_earlier_results(call, changes, where, world, tmp_path):
    toy.run(world, tmp_path / "out")
    before = toy.contents(tmp_path / "out")
    with pytest.raises(UserError, match=rf"runs\.toy: {where}: the losses are finite, but the norm of their gradient is nan on images (\d+, ){{7}}\d+; try a lower"):
        toy.run(world, tmp_path / "out", model=NanGradient(call), **changes)
    assert toy.contents(tmp_path / "out") == before


def test_weights_that_are_no_numbers_are_not_saved(world, tmp_path):
    class Spoilt(toy.CellDetector):
        def observe(self):  # after the step
            torch.nn.init.constant_(self.head.bias, float("inf"))
            return {}

    with pytest.raises(UserError, match=r"runs\.toy: epoch 1: 'head\.bias' is not finite any more; nothing is saved"):
        toy.run(world, tmp_path / "out", tmp_path / "resume", model=Spoilt(2), save_seconds=1e9, ema_decay=0.0, batch_size=24)
    assert not (tmp_path / "out").exists() and not (tmp_path / "resume").exists()


RESULT = dict(image_id=1, category_id=3, bbox=[1.0, 2, 30, 20], score=0.5)


@pytest.mark.parametrize("change, expected", [
    (dict(image_id=77), r"results: image_id 77 is not in the ground truth \(1 such images\)"),
    (dict(category_id=2), r"results: category_id 2 is not in the ground truth .* class indices instead of ids"),
    (dict(score=float("nan")), r"results\[1\]: bbox .*, score nan: not finite \(1 such"),
    (dict(bbox=[1, float("inf"), 2, 2]), r"results\[1\]: bbox \[1, inf, 2, 2\], score 0.5: not finite"),
])
def test_results_that_cannot_be_judged(change, expected, world):
    with pytest.raises(UserError, match=expected):
        evaluate_coco(world / "annotations/instances_val.json", [RESULT, RESULT | change])


def test_ground_truth_that_cannot_judge(tmp_path):
    with pytest.raises(UserError, match="none.json: no such annotation file"):
        evaluate_coco(tmp_path / "none.json", [RESULT])
    root = damaged(tmp_path / "d", BROKEN["annotation id 0"][0])
    with pytest.raises(UserError, match=r"instances_train.json: annotations: id 0 is in use; .* number from 1"):
        evaluate_coco(root / "annotations/instances_train.json", [RESULT])


def test_only_some_images_are_judged_whatever_the_ground_truth_is(world):
    path = world / "annotations/instances_val.json"
    results = [RESULT | dict(image_id=i, score=i / 9) for i in (1, 2, 3)]
    asked = [evaluate_coco(truth, results, image_ids=[1, 2, 3]) for truth in (path, json.loads(path.read_text()), load_ground_truth(path))]
    assert asked[0] == asked[1] == asked[2] and asked[0].counts["images"] == 3
    assert evaluate_coco(path, []).metrics["AP"] == 0


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_leaves_earlier_results(tmp_path, monkeypatch):
    root = toy.write_dataset(tmp_path / "d")
    toy.run(root, tmp_path / "out")
    before = toy.contents(tmp_path / "out")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"no space for .* MiB free\); make room and run again"):
        toy.run(root, tmp_path / "out", lr=0.01)
    assert toy.contents(tmp_path / "out") == before
    assert not [f for f in (tmp_path / "out").iterdir() if f.suffix == ".tmp"]


def test_disk_that_fills_up_while_writing(tmp_path):
    """A real limit on the size of files, in a process of its own."""
    checkpoint.save(tmp_path / "c.safetensors", {"w": torch.zeros(10)})
    before = (tmp_path / "c.safetensors").read_bytes()
    code = f"""
        import resource, signal, torch
        from moe_lab import checkpoint
        from moe_lab.params import UserError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpoint.save({str(tmp_path / 'c.safetensors')!r}, {{"w": torch.zeros(1_000_000)}})
        except UserError as e:
            print(e)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert "c.safetensors: no space for 3.8 MiB" in done.stdout, done.stderr
    assert (tmp_path / "c.safetensors").read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["c.safetensors"]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        checkpoint.write_json(tmp_path / "file" / "metrics.json", {})


def write_as_nobody(path) -> str:
    """What a process without root's privileges is told on writing to `path`."""
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            checkpoint.write_json(path, {})
        except UserError as e:
            os.write(write, str(e).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as answer:
        return answer.read()


def test_read_only_folder():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        assert f"{folder}/metrics.json: cannot be written (Permission denied); check the folder's permissions" in write_as_nobody(f"{folder}/metrics.json")
        assert os.listdir(folder) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_read_only_file_system(number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    with pytest.raises(UserError, match="cannot be written .*choose another folder"):
        checkpoint.write_json(tmp_path / "metrics.json", {})


def test_hostile_checkpoint_is_not_executed(tmp_path):
    path = tmp_path / "evil.safetensors"
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch " + str(tmp_path / "hacked").encode() + b"'\ntR.")
    with pytest.raises(UserError, match="evil.safetensors: this is a Python pickle"):
        checkpoint.load(path)
    assert not (tmp_path / "hacked").exists()


def test_checkpoint_of_another_model(tmp_path):
    checkpoint.save(tmp_path / "c.safetensors", toy.CellDetector(2).state_dict())
    with pytest.raises(UserError, match="c.safetensors: 2 tensors do not fit the model: head.bias"):
        checkpoint.load_weights(toy.CellDetector(3), checkpoint.load(tmp_path / "c.safetensors")[0], tmp_path / "c.safetensors")
