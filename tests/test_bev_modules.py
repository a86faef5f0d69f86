"""Bird's-eye view, sparse convolution, voxels and both branches: what holds for every shape, checked on many; and what is equal to the last bit."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lab.bev import BEVGrid, depth_image, frustum, pool_geometry, view_pool
from moe_lab.detectors.camera_branch import BACKBONES, CameraBackbone, DepthLSS, LSSFPN, stage_channels
from moe_lab.detectors.lidar_branch import PillarEncoder, SECOND, SECONDFPN, SparseEncoder
from moe_lab.params import UserError
from moe_lab.sparse_conv import SparseConv3d, SubmanifoldConv3d, decode, encode, sparse
from moe_lab.voxels import DynamicPillars, VoxelGrid, mean_voxels

RANGE = (-54, -54, -5, 54, 54, 3)


@pytest.fixture(autouse=True)
def seeded(one_thread, deterministic):
    torch.manual_seed(0)


def for_all(*strategies):
    "given, on thirty examples that are the same in every run."
    return lambda test: settings(deadline=None, max_examples=30, derandomize=True, database=None)(given(*strategies)(test))


def rotation(yaw, pitch=0., roll=0.):
    "4 x 4."
    def turn(a, i, j):
        m = torch.eye(4)
        m[i, i] = m[j, j] = math.cos(a)
        m[i, j], m[j, i] = -math.sin(a), math.sin(a)
        return m
    return turn(yaw, 0, 1) @ turn(pitch, 1, 2) @ turn(roll, 0, 2)


def cameras(count, image_size=(64, 96), shake=0.):
    "lidar2image of cameras all around, pitched and rolled at random by up to `shake` radians."
    focal = image_size[1] * .7
    intrinsics = torch.tensor([[focal, 0, image_size[1] / 2, 0], [0, focal, image_size[0] / 2, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    forward_is_y = torch.tensor([[1., 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    noise = shake * (2 * torch.rand(count, 2) - 1)
    return torch.stack([intrinsics @ forward_is_y @ rotation(2 * math.pi * k / count, *noise[k].tolist()) for k in range(count)])


def close(ours, theirs, limit=5e-7):
    "Within `limit` of the largest value."
    return (ours - theirs).abs().max().item() <= limit * max(1., theirs.abs().max().item()) if theirs.numel() else ours.shape == theirs.shape


# Sparse convolution

@st.composite
def volumes(draw):
    "Shape, batch size, share of occupied sites, seed."
    return tuple(draw(st.integers(1, 9)) for _ in range(3)), draw(st.integers(1, 3)), draw(st.sampled_from([0., .02, .2, .7, 1.])), draw(st.integers(0, 999))


def occupied(shape, batch_size, share, seed, channels=3):
    "A sparse tensor with shuffled sites."
    torch.manual_seed(seed)
    coords = (torch.rand(batch_size, *shape) < share).nonzero()
    coords = coords[torch.randperm(len(coords))]
    return sparse(torch.randn(len(coords), channels).requires_grad_(), coords, shape, batch_size)


def check(layer, x, convolution):
    "Values, and gradients of features and weights, against conv3d."
    features = x.features
    dense = F.conv3d(x.dense(), layer.weight, layer.bias, **convolution)
    ours = layer(x)
    b, z, y, x_ = ours.coords.unbind(1)
    theirs = dense[b, :, z, y, x_]
    assert close(ours.features, theirs)
    direction = torch.randn_like(theirs)
    if not len(features) or not len(theirs): return ours, dense
    for a, b in zip(*(torch.autograd.grad((f * direction).sum(), (features, layer.weight), retain_graph=True) for f in (ours.features, theirs))): assert close(a, b)
    return ours, dense


@for_all(volumes(), st.sampled_from([(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 3), (3, 1, 3), (1, 1, 1)]))
def test_submanifold_equals_dense(volume, kernel):
    x = occupied(*volume)
    ours, _ = check(SubmanifoldConv3d(3, 5, kernel), x, dict(padding=tuple(k // 2 for k in kernel)))
    assert torch.equal(ours.keys, x.keys)


@for_all(volumes(), st.sampled_from([((3, 3, 3), (2, 2, 2), (1, 1, 1)), ((3, 3, 3), (2, 2, 2), (0, 1, 1)), ((3, 1, 1), (2, 1, 1), (0, 0, 0)), ((3, 3, 3), (1, 1, 1), (1, 1, 1))]))
def test_strided_equals_dense(volume, how):
    kernel, stride, padding = how
    x = occupied(*volume)
    if min(n + 2 * p - k for n, k, p in zip(volume[0], kernel, padding)) < 0: return
    ours, dense = check(SparseConv3d(3, 5, kernel, stride, padding), x, dict(stride=stride, padding=padding))
    assert close(ours.dense(), dense)
    reached = F.conv3d((x.dense() != 0).any(1, keepdim=True).float(), torch.ones(1, 1, *kernel), stride=stride, padding=padding)[:, 0] > .5
    assert torch.equal(ours.coords, reached.nonzero())   # exactly the sites that are reached


@for_all(volumes())
def test_keys_are_one_to_one(volume):
    x = occupied(*volume)
    assert torch.equal(encode(decode(x.keys, x.shape), x.shape), x.keys) and (x.keys.diff() > 0).all()


def test_layers_on_the_same_sites_share_a_rulebook():
    x = occupied((6, 6, 6), 2, .3, 0)
    first, second = SubmanifoldConv3d(3, 4), SubmanifoldConv3d(4, 4)
    y = first(x)
    rules = x.rules["submanifold", (3, 3, 3)]
    assert second(y).rules["submanifold", (3, 3, 3)] is rules


def test_bias_and_autocast():
    x, layer = occupied((6, 6, 6), 1, .3, 0), SubmanifoldConv3d(3, 4, bias=True)
    torch.nn.init.normal_(layer.bias)
    check(layer, x, dict(padding=1))
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(layer(x).features, layer(x.with_features(x.features)).features) and layer(x).features.dtype == torch.float32


# View pooling

def by_the_book(depth, features, points, grid):
    "The materialised frustum and index_add, in float64."
    rows = (depth.double()[:, None] * features.double()[:, :, None]).permute(0, 2, 3, 4, 1).flatten(0, 3)
    cell = grid.index(points).flatten()
    return torch.zeros(grid.cells, features.shape[1], dtype=torch.float64).index_add(0, cell[cell >= 0], rows[cell >= 0]).view(*grid.shape, -1).permute(2, 0, 1).float()


@for_all(st.integers(1, 4), st.floats(0, .3), st.sampled_from([4., 12., 54.]), st.integers(0, 999))
def test_pooling_equals_index_add(count, shake, reach, seed):
    "Values and both gradients, with shaken cameras and an augmented world, whether all points are inside or few."
    torch.manual_seed(seed)
    world = rotation(torch.rand(()).item()) @ torch.diag(torch.tensor([1.1, 1.1, 1.1, 1]))
    grid = BEVGrid((-reach, -reach / 2, -3, reach, reach, 3), reach / 20)
    points = frustum(cameras(count, shake=shake) @ world.inverse(), (64, 96), (8, 12), torch.arange(1, 30, 1.))
    depth, features = torch.rand(count, 29, 8, 12).softmax(1).requires_grad_(), torch.randn(count, 7, 8, 12, requires_grad=True)
    ours, theirs = view_pool(depth, features, pool_geometry(points, grid), grid), by_the_book(depth, features, points, grid)
    assert close(ours, theirs, 1e-6)
    direction = torch.randn_like(theirs)
    for a, b in zip(*(torch.autograd.grad((f * direction).sum(), (depth, features)) for f in (ours, theirs))): assert close(a, b, 2e-6)


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_pooling_with_one_gradient(needed):
    grid = BEVGrid((-10, -10, -3, 10, 10, 3), 1.)
    geometry = pool_geometry(frustum(cameras(2), (64, 96), (8, 12), torch.arange(1, 12, 1.)), grid)
    inputs = [t.requires_grad_(n) for t, n in zip((torch.rand(2, 11, 8, 12), torch.randn(2, 4, 8, 12)), needed)]
    view_pool(*inputs, geometry, grid).square().sum().backward()
    assert [t.grad is not None for t in inputs] == list(needed)


class Largest(TorchDispatchMode):
    "Remembers the largest tensor that anything made."
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor): self.elements = max(self.elements, t.numel())
        return out


def test_pooling_never_builds_the_frustum():
    grid = BEVGrid((-20, -20, -3, 20, 20, 3), 1.)
    points = frustum(cameras(6), (64, 96), (8, 12), torch.arange(1, 30, .5))
    geometry = pool_geometry(points, grid)
    depth, features = torch.rand(6, 58, 8, 12, requires_grad=True), torch.randn(6, 80, 8, 12, requires_grad=True)
    with Largest() as largest: view_pool(depth, features, geometry, grid).sum().backward()
    assert largest.elements <= max(depth.numel(), features.numel(), 80 * grid.cells) < len(geometry.cells) * 80 / 5


def test_geometry_of_another_size_is_refused():
    grid = BEVGrid((-20, -20, -3, 20, 20, 3), 1.)
    geometry = pool_geometry(frustum(cameras(2), (64, 96), (8, 12), torch.arange(1., 9)), grid)
    with pytest.raises(ValueError, match="geometry of 192 pixels"): view_pool(torch.rand(2, 8, 4, 12), torch.rand(2, 3, 4, 12), geometry, grid)


# One axis convention

@for_all(st.integers(-17, 17), st.integers(-17, 17))
def test_camera_and_lidar_put_a_post_in_the_same_cell(x, y):
    "A post that a camera sees and the LiDAR hits: the frustum's cell, the pillar's, the voxel's and the grid's are one."
    if x * x + y * y < 16: return
    post, grid = torch.tensor([[x + .5, y + .5, .05, .5, 0.]]), BEVGrid((-20, -24, -3, 20, 24, 3), 1.)
    yaw = math.atan2(y + .5, x + .5)
    lidar2image = cameras(1)[0] @ rotation(math.pi / 2 - yaw + .1)   # looks a little past the post
    u, v, d, _ = (lidar2image @ torch.tensor([*post[0, :3], 1.])).tolist()
    image = depth_image(post, lidar2image[None], (64, 96))
    row, column = image[0, 0].nonzero()[0].tolist()
    assert (row, column) == (int(v / d), int(u / d)) and abs(image.max().item() - d) < 1e-4
    depth, features = torch.zeros(1, 48, 64, 96), torch.zeros(1, 1, 64, 96)
    depth[0, round(d / .5) - 1, row, column] = features[0, 0, row, column] = 1
    points = frustum(lidar2image[None], (64, 96), (64, 96), torch.arange(1, 49) * .5)
    seen = view_pool(depth, features, pool_geometry(points, grid), grid)[0].nonzero()[0].tolist()
    i, j = y + 24, x + 20
    assert max(abs(seen[0] - i), abs(seen[1] - j)) <= 1   # depth is rounded to half a metre
    with torch.no_grad(): pillar = DynamicPillars(grid, channels=(8,)).eval()([post])
    assert pillar.abs().sum((0, 1)).nonzero().tolist() == [[i, j]]
    assert mean_voxels([post], VoxelGrid(grid, .5)).coords[0, 2:].tolist() == [i, j]
    assert grid.index(post[0, :2]).item() == i * 40 + j


# Same input, same bits

def scene(batch_size=2):
    "A batch as the reader makes it; the second sample's LiDAR is thinner."
    points = [torch.cat([torch.randn(n, 2) * 8, torch.randn(n, 1), torch.rand(n, 1), torch.zeros(n, 1)], 1) for n in (3000, 500)]
    return dict(images=torch.rand(batch_size, 3, 3, 64, 96), points=points, lidar2image=cameras(3).expand(batch_size, -1, -1, -1))


def camera_branch(name="resnet"):
    "Backbone, neck and view transform, tiny."
    backbone = CameraBackbone(name, width=16, depths=[1, 1, 1, 1])
    return torch.nn.ModuleList([backbone, LSSFPN(backbone.channels, 16), DepthLSS(BEVGrid((-16, -16, -5, 16, 16, 3), 1.), 16, 8, (1., 20., 1.), 16)])


def see(branch, batch):
    "All three, one after the other."
    backbone, neck, view = branch
    return view(neck(backbone(batch["images"].flatten(0, 1))).unflatten(0, batch["images"].shape[:2]), batch)


MODELS = {
    "camera": (camera_branch, see),
    "sparse": (lambda: SparseEncoder(BEVGrid((-16, -16, -5, 16, 16, 3), 1.), channels=(4, 8, 8, 8), blocks=1), lambda m, b: m(b["points"])),
    "pillars": (lambda: PillarEncoder(BEVGrid((-16, -16, -5, 16, 16, 3), 1.), pillar_channels=(8, 8), channels=8), lambda m, b: m(b["points"])),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("threads", [1, 2])
def test_bit_equal_from_run_to_run(name, threads):
    "Map and all gradients; no parameter is without one."
    torch.set_num_threads(threads)
    make, call = MODELS[name]
    first, batch = make(), scene()
    second = copy.deepcopy(first)
    for model in (first, second):
        model.out = call(model, batch)
        model.out.square().mean().backward()
    assert torch.equal(first.out, second.out)
    for (where, a), b in zip(first.named_parameters(), second.parameters()): assert a.grad is not None and torch.equal(a.grad, b.grad), where


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_missing_sensors(name, training):
    "Black images, no points, in one sample or in all: finite maps, gradients and statistics."
    make, call = MODELS[name]
    model, batch = make().train(training), scene()
    nothing = torch.zeros(0, 5)
    for points in ([nothing, batch["points"][1]], [nothing, nothing]):
        for images in (batch["images"], torch.zeros_like(batch["images"])):
            out = call(model, dict(batch, points=points, images=images))
            assert out.isfinite().all()
            out.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(b.isfinite().all() for b in model.buffers())


@pytest.mark.parametrize("name", MODELS)
def test_no_sample_changes_another(name):
    "In eval mode, a sample's map does not depend on its neighbours in the batch."
    make, call = MODELS[name]
    model, batch = make().eval(), scene()
    alone = {key: value[1:] for key, value in batch.items()}
    with torch.no_grad(): torch.testing.assert_close(call(model, batch)[1:], call(model, alone), rtol=1e-5, atol=1e-6)


def test_state_dict_holds_no_geometry():
    branch, batch = camera_branch(), scene()
    keys = set(branch.state_dict())
    see(branch, batch)
    assert set(branch.state_dict()) == keys and branch[2].geometry.entries
    assert not copy.deepcopy(branch)[2].geometry.entries


# Published sizes, on the meta device

def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("make, published", [(lambda: SparseEncoder(BEVGrid(RANGE, .6)), 2.69e6), (SECOND, 4.28e6), (SECONDFPN, .30e6)])
def test_published_lidar_sizes(make, published):
    with torch.device("meta"): assert abs(count(make()) - published) < 5e3


def test_derived_sizes_of_the_sparse_encoder():
    "Weights counted by hand: input, four stages of two residual blocks, three strided convolutions, the last one; two per channel for each of 21 norms."
    weights = 27 * (5 * 16 + 4 * (16**2 + 32**2 + 64**2 + 128**2) + 16 * 32 + 32 * 64 + 64 * 128) + 3 * 128**2
    norms = 2 * (16 + 4 * (16 + 32 + 64 + 128) + 32 + 64 + 128 + 128)
    with torch.device("meta"): encoder = SparseEncoder(BEVGrid(RANGE, .6))
    assert count(encoder) == weights + norms and encoder.channels == 256


@pytest.mark.parametrize("name, published, missing", [("swin", 28_288_354, 1000 * 769 + 1536 - 2688), ("resnet", 25_557_032, 1000 * 2049),
                                                      ("convnext", 28_589_128, 1000 * 769 + 1536 - 2688), ("pvt", 25.36e6, 1000 * 513)])
def test_published_backbones(name, published, missing):
    "Without classifier and last norm, with a norm for each map where the backbone has them (transformers' Swin and ConvNeXt)."
    with torch.device("meta"): backbone = CameraBackbone(name)
    assert abs(count(backbone) + missing - published) <= (0 if isinstance(published, int) else 5e3)
    assert backbone.channels == {"swin": [192, 384, 768], "resnet": [512, 1024, 2048], "convnext": [192, 384, 768], "pvt": [128, 320, 512]}[name]


def test_paper_view_transform():
    "118 depths, 80 channels; 6 x 118 x 32 x 88 points on 360 x 360 cells, halved to 180 x 180."
    with torch.device("meta"): view = DepthLSS(BEVGrid(RANGE, .6))
    assert (len(view.depths), view.pool_grid.shape, view.grid.shape, view.channels) == (118, (360, 360), (180, 180), 80)
    assert view.depth_net[-1].out_channels == 198 and view.depth_net[0][0].in_channels == 256 + 64


# What users get wrong

@pytest.mark.parametrize("call, says", [
    (lambda: BEVGrid((0, 0, 0, 1, 1, 1), .3), "no multiple of the cell"),
    (lambda: BEVGrid((0, 0, 0, -1, 1, 1), 1.), "must end above"),
    (lambda: stage_channels("vgg"), "choose from"),
    (lambda: CameraBackbone("resnet", 16, [1] * 4)(torch.rand(1, 3, 60, 96)), "multiples of 32"),
    (lambda: SparseEncoder(BEVGrid(RANGE, .6), voxel_height=2.), "too high"),
])
def test_messages(call, says):
    with pytest.raises(UserError, match=says): call()


def test_every_backbone_learns_everywhere():
    for name in BACKBONES:
        backbone = CameraBackbone(name, width=16, depths=[1, 1, 1, 1])
        sum(m.square().sum() for m in backbone(torch.rand(2, 3, 64, 96))).backward()
        assert not [where for where, p in backbone.named_parameters() if p.grad is None], name
