"What the CMT notebooks cannot show in one process or at one seed: no leak from any denoising query, equal bits from run to run, published networks that really run."
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from moe_lab.checkpoint import load, save
from moe_lab.data.scene import toy_batch, without
from moe_lab.detectors.cmt import CMT, PAPER, TINY, CMTParams
from moe_lab.detectors.cmt_denoising import make_denoising
from moe_lab.detectors.cmt_encoding import encode_queries

SPACE = (-24.0, -24.0, -5.0, 24.0, 24.0, 3.0)
SMALL = TINY | dict(point_range=SPACE, cell=2.4, queries=12, token_stride=1)
HELPED = SMALL | dict(token_stride=2, dense_weight=1.0, dense_view_weight=0.5, dense_queries=5, dense_start=True, dense_height=-1.0, content=True)


pytestmark = pytest.mark.usefixtures("one_thread")


def rerun(model, memory, queries, reference, bias=None):
    code = encode_queries(model.encoding, reference, memory.lidar2image, memory.image_size)
    moved = queries._replace(reference=reference, position=code.embedding, projection=code.projection)
    return model.decode(memory, moved, bias)


@pytest.mark.parametrize("params", [SMALL, HELPED], ids=["published form", "with helpers"])
@pytest.mark.parametrize("objects", [1, 3, 5])
def test_no_denoising_query_reaches_a_matching_query(params, objects):
    torch.manual_seed(objects)
    model, batch = CMT(10, **params).train(), toy_batch(2, seed=objects, count=objects)
    batch["targets"][1] = {key: value[: objects // 2] for key, value in batch["targets"][1].items()}  # padding in the second scene
    with torch.no_grad():
        memory = model.memory(batch)
        dense = model.dense(memory.bev, memory.views) if model.dense is not None else None
        queries = model.queries(memory, batch, dense)
        count, total = queries.count, queries.reference.shape[1]
        plain = rerun(model, memory, queries, queries.reference)
        assert total > count
        for which in range(count, total):
            moved = queries.reference.clone()
            moved[:, which] = torch.rand(2, 3)
            after = rerun(model, memory, queries, moved)
            assert torch.equal(plain.logits[:, :, :count], after.logits[:, :, :count])
            assert torch.equal(plain.codes[:, :, :count], after.codes[:, :, :count])


def test_no_gradient_from_matching_answers_to_denoising_queries():
    model, batch = CMT(10, **SMALL).train(), toy_batch(2)
    memory = model.memory(batch)
    queries = model.queries(memory, batch)
    reference = queries.reference.detach().requires_grad_()
    out = rerun(model, memory, queries, reference)
    (out.logits[:, :, : queries.count].sum() + out.codes[:, :, : queries.count].sum()).backward()
    assert reference.grad[:, : queries.count].abs().sum() > 0
    assert not reference.grad[:, queries.count :].any()


def test_bias_of_a_variant_touches_matching_queries_only():
    model, batch = CMT(10, **SMALL).train(), toy_batch(2)
    with torch.no_grad():
        memory = model.memory(batch)
        queries = model.queries(memory, batch)
        bias = torch.randn(2, queries.count, memory.tokens().shape[1]) * 5
        free, biased = model.decode(memory, queries), model.decode(memory, queries, bias)
        heads = model.decode(memory, queries, bias[:, None].expand(-1, 4, -1, -1))
    # the first layer: what denoising queries see of matching ones afterwards may differ
    torch.testing.assert_close(free.codes[0, :, queries.count :], biased.codes[0, :, queries.count :])
    assert (free.codes[0, :, : queries.count] - biased.codes[0, :, : queries.count]).abs().max() > 1e-4
    torch.testing.assert_close(biased.codes, heads.codes)


def test_denoising_noise_is_of_the_objects_size():
    "The points of an object stay inside its box, whatever its heading."
    batch = toy_batch(3, count=6)
    noisy = make_denoising(batch["targets"], SPACE, 10, groups=50, queries=900)
    low, high = torch.tensor(SPACE).split(3)
    for scene, targets in enumerate(batch["targets"]):
        boxes = targets["boxes"][noisy.object[scene]]
        away = noisy.reference[scene] * (high - low) + low - boxes[:, :3]
        cos, sin = boxes[:, 6].cos(), boxes[:, 6].sin()
        along = torch.stack([cos * away[:, 0] + sin * away[:, 1], cos * away[:, 1] - sin * away[:, 0], away[:, 2]], -1)
        assert (along.abs() <= boxes[:, 3:6] / 2 + 1e-4).all()


def test_more_objects_than_queries():
    model, batch = CMT(10, **SMALL | dict(queries=3)).train(), toy_batch(2, count=8)
    terms = model.loss(model(batch), batch)
    assert all(term.isfinite() for term in terms.values())


PROGRAM = """
import hashlib, torch
from moe_lab.data.scene import toy_batch
from moe_lab.detectors.cmt import CMT, TINY
torch.set_num_threads(2); torch.use_deterministic_algorithms(True); torch.manual_seed(0)
model = CMT(10, **TINY | dict(point_range=(-24., -24., -5., 24., 24., 3.), cell=2.4, queries=12, dense_weight=1., dense_view_weight=.5, dense_queries=5, dense_start=True, dense_height=-1.0, content=True))
optimizer, batch = torch.optim.AdamW(model.parameters(), lr=1e-3), toy_batch(2)
for _ in range(3):
    sum(model.loss(model(batch), batch).values()).backward()
    optimizer.step(), optimizer.zero_grad()
print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())
"""


def test_equal_bits_from_run_to_run():
    results = {subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": str(seed)}).stdout for seed in (1, 2)}
    assert len(results) == 1


@pytest.mark.parametrize("sensor", ["cameras", "lidar", "CAM_FRONT"])
def test_a_sensor_may_be_missing(sensor):
    torch.manual_seed(0)
    model, batch = CMT(10, **HELPED | dict(dense_start=False, dense_height=None)).eval(), toy_batch(2)
    with torch.no_grad():
        whole, less = (model.detect(model(b), b, SimpleNamespace(conf=0.0, max_detections=20)) for b in (batch, without(batch, sensor)))
    assert [len(d) for d in less] == [20, 20]
    assert not torch.equal(whole[0].scores, less[0].scores)


def test_checkpoint_comes_back(tmp_path):
    torch.manual_seed(0)
    model, batch = CMT(10, **HELPED).eval(), toy_batch(1)
    save(tmp_path / "checkpoint.safetensors", model.state_dict(), {})
    twin = CMT(10, **SMALL | dict(token_stride=2, dense_queries=5, dense_weight=1.0, dense_view_weight=0.5, dense_start=True, dense_height=-1.0, content=True)).eval()
    twin.load_pretrained(load(tmp_path / "checkpoint.safetensors")[0])
    with torch.no_grad():
        assert torch.equal(model(batch).codes, twin(batch).codes)


@pytest.mark.parametrize("params", [dict(lidar="voxels", lidar_channels=(4, 4, 8, 8), voxel_height=0.2), dict(camera="resnet", camera_width=16, camera_depths=(1, 1, 1, 1))], ids=["voxels", "resnet"])
def test_the_published_branches_run(params):
    torch.manual_seed(0)
    model, batch = CMT(10, **SMALL | params), toy_batch(2)
    terms = model.loss(model(batch), batch)
    sum(terms.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_published_parameters():
    "Facts 1.2: head 8,763,396; VoVNet-99 and CP-FPN; sparse encoder 2.69 M, SECOND 4.28 M, SECOND-FPN 0.30 M."
    with torch.device("meta"):
        models = {name: CMT(10, **params) for name, params in PAPER.items()}
    count = lambda *modules: sum(p.numel() for m in modules for p in m.parameters())
    for model in models.values():
        assert count(model.shared, model.encoding, model.reference, model.decoder, model.heads) == 8_763_396
        assert count(model.points.encoder) == pytest.approx(2.69e6, abs=1e4)
        assert count(model.points.backbone) == pytest.approx(4.28e6, abs=1e4)
        assert count(model.points.neck) == pytest.approx(0.30e6, abs=1e4)
    assert count(models["vov_1600x640"].images) == 69_523_520 + 1_049_344
    assert CMTParams() == models["vov_1600x640"].params
    assert models["r50_800x320"].points.encoder.voxels.shape[1:] == (1080, 1080)
