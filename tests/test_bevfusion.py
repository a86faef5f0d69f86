"""BEVFusion as a whole: the published size, missing sensors, learning by heart, equal bits. What its parts do is tested in their notebooks."""

import pytest
import torch
from types import SimpleNamespace
from conftest import ROOT
from moe_lab import detectors
from moe_lab.data.scene import toy_batch, without
from moe_lab.detectors.bevfusion import BEVFusion, image_hills
from moe_lab.params import load

TINY = dict(point_range=(-24, -24, -5, 24, 24, 3), cell=1.5, fused=16, bev_channels=(16, 24), bev_layers=(1, 1), bev_out=16, queries=20, hidden=32, heads=4, ffn=64, dropout=0.0, head_width=16, dense_weight=0.25,
            camera=dict(backbone="resnet", width=8, depths=[1, 1, 1, 1], options={}, neck=16, depths_range=(1, 30, 2), depth_hidden=16, depth_input="histogram", pool=1, channels=16),
            lidar=dict(encoder="pillars", pillar_channels=[16], channels=16))
JUDGED = SimpleNamespace(conf=0.0, max_detections=10)


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return BEVFusion(10, **(TINY | changes))


def learn(model, batch, steps, lr=4e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        total = sum(model.loss(model(batch), batch).values())
        total.backward()
        optimizer.step()
    return total.item()


def size(*modules): return sum(p.numel() for m in modules for p in m.parameters())


pytestmark = pytest.mark.usefixtures("one_thread")


def test_published_sizes():
    with torch.device("meta"): model = BEVFusion(10)
    assert size(model.backbone) == 28_288_354 - (768 * 1000 + 1000) - 2 * 768 + 2 * (192 + 384 + 768)   # Swin-T without classifier, with a norm for each map
    assert abs(size(model.lidar) - 2.69e6) < 5e3
    assert abs(size(model.bev_backbone) - 4.28e6) < 5e3
    assert abs(size(model.bev_neck) - 0.30e6) < 5e3
    assert size(model.fuser) == (80 + 256) * 256 * 9 + 512
    assert model.grid.shape == (180, 180) and model.view.pool_grid.shape == (360, 360) and len(model.view.depths) == 118
    assert model.view.channels == 80 and model.lidar.channels == 256 and model.bev_neck.channels == 512
    assert size(model) == 39_803_214   # all parts as the reference sizes them


def test_the_profile_paper_is_the_published_configuration():
    "What `params.yaml` says for real data, laid over the small run, is the model of the paper."
    runs = load(ROOT / "params.yaml", "paper", only=["bevfusion", "cbdes_fixed"]).runs
    with torch.device("meta"):
        assert size(detectors.build("bevfusion", 10, **runs["bevfusion"].model)) == 39_803_214
        pool = detectors.build("cbdes", 10, **runs["cbdes_fixed"].model)
    assert (pool.params.pool.channels, len(pool.params.pool.experts)) == (256, 4)


def test_every_parameter_has_a_part():
    model = make()
    assert sum(size(model.get_submodule(name)) for names in model.parts.values() for name in names) == size(model)


def test_published_sizes_of_single_sensors():
    with torch.device("meta"): both, camera, lidar = (BEVFusion(10, modality=m) for m in ("both", "camera", "lidar"))
    assert not hasattr(camera, "lidar") and not hasattr(lidar, "backbone")
    assert camera.bev_backbone.stages[0][0][0].in_channels == 80 and lidar.bev_backbone.stages[0][0][0].in_channels == 256
    assert max(size(camera), size(lidar)) < size(both)


@pytest.mark.parametrize("encoder", ["pillars", "sparse"])
@pytest.mark.parametrize("depth_input", ["image", "histogram"])
def test_missing_sensors(encoder, depth_input):
    model, batch = make(camera=TINY["camera"] | dict(depth_input=depth_input), lidar=TINY["lidar"] | dict(encoder=encoder, stages=(4, 4, 8, 8))), toy_batch(2)
    nobody = dict(boxes=torch.zeros(0, 9), labels=torch.zeros(0, dtype=torch.int64))
    for changed in (batch, without(batch, "lidar"), without(batch, "cameras"), without(without(batch, "lidar"), "cameras"), without(batch, "CAM_BACK"), batch | dict(targets=[nobody, nobody])):
        terms = model.train().loss(model(changed), changed)
        assert all(term.isfinite() for term in terms.values())
        sum(terms.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        with torch.no_grad(): found = model.eval().detect(model(changed), changed, JUDGED)
        assert all(d.boxes.shape == (10, 9) and d.boxes.isfinite().all() for d in found)


def test_unknown_velocity_teaches_nothing():
    batch = toy_batch(2)
    for target in batch["targets"]: target["boxes"][:, 7:] = float("nan")
    model = make()
    terms = model.loss(model(batch), batch)
    assert all(term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    head = model.head.predict[0].parts["velocity"][-1]
    assert head.weight.grad.abs().max() == 0 and all(p.grad.isfinite().all() for p in model.parameters())


def test_learns_two_samples_by_heart():
    batch, model = toy_batch(2), make()
    first = learn(model, batch, 1)
    assert learn(model, batch, 60) < first / 5
    found = model.detect(model(batch), batch, JUDGED)
    for boxes, target in zip(found, batch["targets"]):
        distance = torch.cdist(target["boxes"][:, :2], boxes.boxes[:, :2])
        assert (distance.amin(1) < 1).sum() >= 3
        near = distance.argmin(1)
        assert (boxes.labels[near] == target["labels"]).sum() >= 3


def test_equal_bits():
    torch.use_deterministic_algorithms(True)
    try: runs = [(learn(model := make(), toy_batch(2), 4), model) for _ in range(2)]
    finally: torch.use_deterministic_algorithms(False)
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1].state_dict().values(), runs[1][1].state_dict().values()))


def test_a_map_has_one_orientation():
    "A post is found at its own place whether cameras or LiDAR report it: rows are y, columns are x."
    for modality in ("lidar", "both"):
        model = make(modality=modality).eval()
        post = torch.tensor([[12.0, -6.0, z, 0.5, 0.0] for z in torch.linspace(-1, 1, 8)])
        with torch.no_grad():
            lit = (model.lidar([post]) - model.lidar([post[:0]])).abs().sum(1)[0]
        row, column = divmod(lit.argmax().item(), model.grid.shape[1])
        expected = model.grid.index(post[0, :2]).item()
        assert max(abs(row - expected // model.grid.shape[1]), abs(column - expected % model.grid.shape[1])) <= 1


def test_tasks_of_the_cameras():
    "Heatmaps of images and of the cameras' map exist in training alone, and everything learns from them."
    model, batch = make(image_weight=0.5, camera_weight=0.5), toy_batch(2)
    terms = model.loss(model(batch), batch)
    assert {"images", "camera"} <= set(terms)
    (terms["images"] + terms["camera"]).backward()
    learns = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learns == {"backbone", "neck", "view", "camera_heatmap", "image_heatmap"}
    assert not {"images", "camera"} & set(model.eval().loss(model(batch), batch))


def test_hills_stand_where_centres_are_seen():
    batch = toy_batch(1)
    boxes, matrices = batch["targets"][0]["boxes"], batch["lidar2image"][0]
    camera, box, hills = image_hills(boxes, matrices, (64, 96), (8, 12))
    assert len(camera) >= len(boxes)
    for k, b, hill in zip(camera, box, hills):
        u, v, d, _ = matrices[k] @ torch.cat([boxes[b, :3], torch.ones(1)])
        row, column = divmod(hill.argmax().item(), 12)
        assert d > 0 and (row, column) == (int(v / d / 8), int(u / d / 8)) and hill.max() == 1
