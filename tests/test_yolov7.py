"""What the notebooks of the detector cannot show: random programs against the importer, random boxes against the definition of NMS."""
import io
import pickle
import random
import subprocess
import sys
import zipfile

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moe_lab.boxes import box_iou, nms
from moe_lab.detectors import build
from moe_lab.detectors.yolov7_import import import_yolov7, read_checkpoint
from moe_lab.params import UserError


def greedy(boxes, scores, labels, iou_thr):
    "NMS by definition."
    order, keep = scores.argsort(descending=True, stable=True).tolist(), []
    for i in order:
        if all(labels[i] != labels[j] or box_iou(boxes[[i]], boxes[[j]]) <= iou_thr for j in keep):
            keep.append(i)
    return keep


box = st.tuples(*[st.integers(0, 12)] * 4).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.tuples(box, st.integers(0, 6), st.integers(0, 2)), max_size=25), st.sampled_from([0.0, 1 / 3, 0.5, 0.65, 1.0]), st.integers(1, 9))
def test_nms_is_greedy_suppression(rows, iou_thr, block):
    boxes = torch.tensor([r[0] for r in rows], dtype=torch.float32).view(-1, 4)
    scores, labels = torch.tensor([r[1] / 6 for r in rows]), torch.tensor([r[2] for r in rows], dtype=torch.long)
    expected = greedy(boxes, scores, labels, iou_thr)
    assert nms(boxes, scores, labels, iou_thr, block=block).tolist() == expected
    assert nms(boxes, scores, labels, iou_thr, max_detections=3, block=block).tolist() == expected[:3]


def archive(path, program, **entries):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", program)
        for name, content in entries.items():
            z.writestr(f"archive/data/{name}", content)
    return path


HOSTILE = {
    "global opcode": b"cos\nsystem\n(S'echo hacked > {}'\ntR.",
    "inst opcode": b"(S'echo hacked > {}'\nios\nsystem\n.",
    "dotted name": b"\x80\x04\x8c\x08builtins\x8c\x0deval.__call__\x93\x8c\x011\x85R.",
    "stack global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0becho hacked\x85R.",
    "extension registry": b"\x80\x02\x82\x01)R.",
    "memo bomb": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "length bomb": b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.",
    "build on a class": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aX\x01\x00\x00\x00bsb.",
    "calls a tensor type": b"\x80\x02ctorch\nTensor\n)R.",
    "endless recursion": b"(" * 200_000 + b"t" * 200_000 + b".",
    "no end": b"\x80\x02}",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_programs_are_refused(kind, tmp_path):
    victim = tmp_path / "hacked"
    path = archive(tmp_path / "evil.pt", HOSTILE[kind].replace(b"{}", str(victim).encode()))
    with pytest.raises(UserError, match="evil.pt: "):
        import_yolov7(path, tmp_path / "out.safetensors")
    assert not victim.exists() and not (tmp_path / "out.safetensors").exists()


def test_claims_beyond_the_storage_are_refused(tmp_path):
    class Reference(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", 10**12) if value == "STORAGE" else None

    class Claim:
        def __init__(self, size, stride, offset): self.args = ("STORAGE", offset, size, stride, False, None)
        def __reduce__(self): return torch._utils._rebuild_tensor_v2, self.args

    for size, stride, offset in (((10**6, 10**6), (0, 0), 0), ((4,), (1,), -1), ((4,), (-1,), 3), ((4,), (1,), 1), ((2,), (3, 1), 0)):
        buffer = io.BytesIO()
        Reference(buffer, 2).dump({"model": {"weight": Claim(size, stride, offset)}})
        with pytest.raises(UserError, match="claim.pt: damaged checkpoint"):
            read_checkpoint(archive(tmp_path / "claim.pt", buffer.getvalue(), **{"0": bytes(16)}))


def test_random_damage_never_escapes(tmp_path):
    good = {"model": build("yolov7_tiny", num_classes=1, width=0.1).state_dict()}
    torch.save(good, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as z:
        program = next(z.read(n) for n in z.namelist() if n.endswith("data.pkl"))
    chance = random.Random(0)
    for _ in range(150):
        damaged = bytearray(program)
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        with pytest.raises(UserError):
            read_checkpoint(archive(tmp_path / "damaged.pt", bytes(damaged)))


def test_importing_does_not_import(tmp_path):
    "Names in a checkpoint are looked up in a list, not in Python: a package called `models` on the path stays unloaded."
    (tmp_path / "models.py").write_text("raise SystemExit('loaded')")
    path = archive(tmp_path / "m.pt", b"\x80\x02cmodels\nModel\n)\x81}b.")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom moe_lab.detectors.yolov7_import import read_checkpoint\ntry: read_checkpoint({str(path)!r})\nexcept ValueError as e: print(e, 'models' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "no tensors" in out.stdout and out.stdout.strip().endswith("False"), out


def test_detect_answers_for_every_image():
    "Every one of 160 images gets its detections in the worst case, when nearly all predictions pass; the reference drops images after 10 seconds."
    model = build("yolov7_tiny", num_classes=8, width=0.25).eval()
    outputs = [torch.randn(160, 3, 256 // s, 320 // s, 13) - 3 for s in (8, 16, 32)]
    batch = dict(letterbox=torch.tensor([[1.0, 0, 0]]).expand(160, 3), sizes=torch.tensor([[256, 320]]).expand(160, 2))
    from moe_lab.params import EvalParams
    found = model.detect(outputs, batch, EvalParams())
    assert len(found) == 160 and all(0 < len(d) <= 300 for d in found)


def test_losses_train_under_deterministic_algorithms():
    "Same step twice, same bits."
    def step():
        torch.manual_seed(0)
        model = build("yolov7_tiny", num_classes=3, width=0.1)
        targets = [dict(boxes=torch.tensor([[4.0, 4, 40, 50], [20, 8, 60, 30]]), labels=torch.tensor([0, 2]))] * 2
        batch = dict(images=torch.rand(2, 3, 64, 96), targets=targets)
        sum(model.loss(model(batch), batch).values()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(step(), step())
    finally:
        torch.use_deterministic_algorithms(before)
