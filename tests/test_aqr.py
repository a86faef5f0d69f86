"""AQR beyond what its notebooks show: every figure of 002 and 003, gradients of every setting against a naive loop, determinism, precision, cost in memory."""
import itertools
import math

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

from moe_lab import params
from moe_lab.aqr_health import ALARMS, HEALTHY, PHASES, aqr_findings
from moe_lab.aqr_modulate import AttentionBias, FeatureModulator, coverage, expected_mean, gain, spare_small, stage_statistics
from moe_lab.aqr_render import GaussianRenderer, splat, view_places
from moe_lab.aqr_weights import LocalAttention, MLPWeightGenerator, SensorMaps, WeightGenerator, window_attention
from moe_lab.detectors.aqr_cmt import AQRCMTParams
from moe_lab.detectors.cmt import CMTParams
from moe_lab.diagnose import out_of_band

COMBINE, POSTPROCESS = ("sum", "blend"), ("global_max", "per_view_max", "clamp", "none")


@pytest.fixture(autouse=True)
def seeded(one_thread, deterministic):
    torch.manual_seed(0)


def queries_on(shape, maps=2, queries=6, batch=2):
    return torch.rand(batch, queries), torch.rand(batch, maps, queries, 2) * torch.tensor(shape[::-1]), torch.rand(batch, maps, queries) < 0.6


def test_published_configurations():
    runs = params.load(ROOT / "params.yaml", "paper", only=[]).runs
    own = {name: {key: value for key, value in run.model.items() if key not in CMTParams.model_fields} for name, run in runs.items() if run.detector == "aqr_cmt"}
    said = {name: AQRCMTParams(**fields) for name, fields in own.items()}
    assert said["aqr_fixed"] == AQRCMTParams()
    assert said["aqr_lidar_only"] == AQRCMTParams(modulate_camera=False)
    assert [(said[name].max_weight_clamp, said[name].residual_weight) for name in ("aqr_aggressive", "aqr_conservative")] == [(2.5, .6), (1.3, .85)]
    assert (said["aqr_collapsed"].postprocess, said["aqr_collapsed"].sigma, said["aqr_collapsed"].residual_weight) == ("global_max", 2, .5)


def naive(renderer, weights, places, shape, visible, paints=None):
    """One query, one map and one cell at a time, in double precision."""
    sigma, (B, N, Q, _) = renderer.sigma.item(), places.shape
    painted, mass = torch.zeros(2, B, N, *shape, dtype=torch.double)
    for b, n, q in itertools.product(range(B), range(N), range(Q)):
        if not visible[b, n, q] or paints is not None and not paints[q]:
            continue
        x, y = places[b, n, q].tolist()
        for i, j in itertools.product(range(shape[0]), range(shape[1])):
            if max(abs(i - math.floor(y)), abs(j - math.floor(x))) <= renderer.radius:
                height = math.exp(-((j + 0.5 - x) ** 2 + (i + 0.5 - y) ** 2) / (2 * sigma**2)) / (2 * math.pi * sigma**2 if renderer.kernel == "mass" else 1)
                painted[b, n, i, j] += weights[b, q] * height
                mass[b, n, i, j] += height
    if renderer.combine == "blend":
        painted = (painted + renderer.faint * renderer.background) / (mass + renderer.faint)
    if renderer.postprocess == "clamp":
        return painted.clamp(0, renderer.max_weight_clamp)
    if renderer.postprocess == "none":
        return painted
    over = painted.flatten(1).amax(1).view(-1, 1, 1, 1) if renderer.postprocess == "global_max" else painted.amax((2, 3), keepdim=True)
    return painted / over.clamp(min=1e-6)


@pytest.mark.parametrize("kernel", ["peak", "mass"])
@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("postprocess", POSTPROCESS)
@pytest.mark.parametrize("combine", COMBINE)
def test_renderer_equals_loop(combine, postprocess, learn_sigma, kernel):
    shape = (5, 7)
    renderer = GaussianRenderer(combine, postprocess, 0.8, learn_sigma, kernel=kernel).double()
    weights, places, visible = queries_on(shape)
    weights, places = weights.double(), places.double()
    torch.testing.assert_close(renderer(weights, places, shape, visible), naive(renderer, weights, places, shape, visible), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("postprocess", POSTPROCESS)
@pytest.mark.parametrize("combine", COMBINE)
def test_renderer_gradcheck(combine, postprocess):
    shape, renderer = (5, 6), GaussianRenderer(combine, postprocess, 0.9, learn_sigma=True, max_weight_clamp=0.9).double()
    weights, places, visible = queries_on(shape)
    places = (places.floor() + 0.1 + 0.8 * torch.rand_like(places)).double().requires_grad_()  # away from the borders of cells, where windows move

    def call(w, p, s):
        return torch.func.functional_call(renderer, {"sigma_logit": s}, (w, p, shape, visible))

    assert torch.autograd.gradcheck(call, (weights.double().requires_grad_(), places, renderer.sigma_logit.detach().requires_grad_()))


def detector_like(nograd=False, learn_sigma=True, combine="blend", head=True):
    """Generator, renderer, modulator, and a 'detection loss' on the features of both sensors; the tensors that should hear of it."""
    points = torch.tensor([[[0.0, 10, 0], [2, 12, 0.5], [-3, 9, 0]]]).requires_grad_()
    front = torch.tensor([[100.0, 100, 0, 0], [0, 50, -100, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    views, seen = view_places(points, front[None, None], (100, 200), (10, 20))
    above = (points[..., :2] + 16)[:, None]
    sensors = [SensorMaps(torch.randn(1, 1, 32 * 32, 16), (32, 32), above, torch.ones(1, 1, 3).bool()), SensorMaps(torch.randn(1, 1, 200, 16), (10, 20), views, seen)]
    generator = WeightGenerator(16, 4, 32, (3, 5)) if head else MLPWeightGenerator(16)
    renderer, modulator = GaussianRenderer(combine, "none" if combine == "blend" else "clamp", 1.0, learn_sigma, nograd=nograd), FeatureModulator(0.5)
    weights = generator(torch.randn(1, 3, 16), sensors).weights
    changed = [modulator(m.tokens, renderer(w, m.places, m.shape, m.visible), name) for m, w, name in zip(sensors, weights.unbind(-1), ("lidar", "camera"))]
    loss = sum((c * torch.randn_like(c)).sum() for c in changed)
    return loss, dict(points=points, sigma=renderer.sigma_logit, weights=weights, **dict(generator.named_parameters()))


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("combine", COMBINE)
def test_loss_reaches_everything(combine, head):
    loss, heard = detector_like(combine=combine, head=head)
    for (name, _), gradient in zip(heard.items(), torch.autograd.grad(loss, list(heard.values()))):
        assert gradient.abs().max() > 0, name


def test_nograd_is_the_originals_dead_gradient():
    loss, heard = detector_like(nograd=True)
    assert not loss.requires_grad  # nothing but features is left, and these ask for no gradient here


def test_denoising_queries_never_paint():
    shape = (6, 8)
    weights, places, visible = queries_on(shape)
    matching, renderer = torch.arange(6) >= 2, GaussianRenderer("blend", "none")
    torch.testing.assert_close(renderer(weights, places, shape, visible, matching).double(), naive(renderer, weights, places, shape, visible, matching), atol=1e-6, rtol=1e-6)
    weights, places = weights.requires_grad_(), places.requires_grad_()
    at_weights, at_places = torch.autograd.grad(renderer(weights, places, shape, visible, matching).square().sum(), (weights, places))
    assert at_weights[:, :2].abs().max() == 0 and at_places[:, :, :2].abs().max() == 0 and at_weights[:, 2:].abs().max() > 0


def test_a_point_behind_a_camera_paints_nothing_and_has_no_nan():
    front = torch.tensor([[100.0, 100, 0, 0], [0, 50, -100, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    points = torch.tensor([[[0.0, -10, 0], [0, 0, 0], [1e-9, 1e-9, 0]]]).requires_grad_()
    places, seen = view_places(points, front[None, None], (100, 200), (10, 20))
    painted = GaussianRenderer()(torch.ones(1, 3), places, (10, 20), seen)
    assert not seen.any() and painted.abs().max() == 0
    assert torch.autograd.grad((painted + places.sum() * 0).sum(), points)[0].isfinite().all()


def test_every_view_that_sees_a_query_is_painted():
    weights, places = torch.ones(1, 1), torch.full((1, 6, 1, 2), 4.5)
    seen = torch.tensor([1, 0, 1, 0, 0, 1]).bool().view(1, 6, 1)
    assert GaussianRenderer()(weights, places, (9, 9), seen).amax((0, 2, 3)).tolist() == [1, 0, 1, 0, 0, 1]


def test_figures_of_003():
    assert coverage(900, 2, 180**2) == pytest.approx(3.14, abs=5e-3) and coverage(900, 1, 180**2) == pytest.approx(0.78, abs=6e-3)
    assert math.pi * 6**2 == pytest.approx(113, abs=0.2) and math.pi * 3**2 == pytest.approx(28, abs=0.3)
    assert gain(0.015, 0.5) == pytest.approx(0.5075) and gain(0.45, 0.7) == pytest.approx(0.835)
    assert [gain(w, 0.7) for w in (0.75, 0.5, 0.4)] == pytest.approx([0.925, 0.85, 0.82])
    assert torch.tensor(2.0).sigmoid().item() == pytest.approx(0.88, abs=1e-3)
    assert 0.45 * 3 == pytest.approx(1.35) and 0.45 / 1.35 == pytest.approx(1 / 3)
    hot = GaussianRenderer(postprocess="global_max")(torch.full((1, 4), 0.45), torch.tensor([[[4.5, 4.5]] * 3 + [[20.5, 4.5]]]), (9, 25))
    assert hot[0, 4, 4] == 1 and hot[0, 4, 20].item() == pytest.approx(1 / 3)


def test_figures_of_002():
    assert [gain(limit, r) for limit, r in ((2.5, 0.6), (1.5, 0.8), (1.3, 0.85))] == pytest.approx([1.6, 1.1, 1.045])
    for limit, r in ((2.5, 0.6), (1.5, 0.8), (1.3, 0.85)):  # and the code never exceeds them
        painted = GaussianRenderer(sigma=2.0, max_weight_clamp=limit)(torch.ones(1, 400), torch.rand(1, 400, 2) * 10, (10, 10))
        features = torch.ones(1, 3, 10, 10)
        assert FeatureModulator(r)(features, painted, "lidar").max().item() == pytest.approx(gain(limit, r))


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_mean_of_a_map_is_foretold(sigma):
    painted = GaussianRenderer(postprocess="none", sigma=sigma)(torch.full((4, 900), 0.45), torch.rand(4, 900, 2) * 180, (180, 180))
    assert painted.mean().item() == pytest.approx(expected_mean(0.45, 900, sigma, 180**2), rel=0.03)


def test_published_repair_cannot_reach_its_own_band():
    assert expected_mean(1.0, 900, 1.0, 180**2) < ALARMS[0].low < HEALTHY[0].low  # even with all weights at 1


def test_sparing_is_nearer_to_one():
    weights = torch.tensor([0.2, 0.9, 1.5])
    spared = spare_small(weights, torch.full((3,), 1.0))
    assert ((spared - 1).abs() < (weights - 1).abs()).all()
    assert torch.equal(spare_small(weights, torch.full((3,), 2.0)), weights)


def scene(dim=16, queries=30, batch=2):
    def sensor(maps, shape, visible):
        return SensorMaps(torch.randn(batch, maps, shape[0] * shape[1], dim), shape, torch.rand(batch, maps, queries, 2) * torch.tensor(shape[::-1]), visible)
    return sensor(1, (12, 12), torch.ones(batch, 1, queries).bool()), sensor(6, (6, 10), torch.rand(batch, 6, queries) < 0.2)


def test_portions_change_nothing(monkeypatch):
    index, inside = torch.randint(50, (40, 9)), torch.rand(40, 9) < 0.7
    inside[:, 4] = True
    leaves = [torch.randn(40, 2, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True), torch.randn(2, 9, requires_grad=True)]

    def results():
        result, total = window_attention(*leaves, index, inside)
        return result, total, *torch.autograd.grad(result.square().sum() + total.sin().sum(), leaves)

    whole = results()
    monkeypatch.setattr("moe_lab.aqr_weights.PORTION", dict(cpu=9 * 8 * 7, cuda=1))
    for a, b in zip(whole, results()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_bit_equal_from_run_to_run():
    sensors, generator, queries = scene(), WeightGenerator(16, 4, 32, (3, 5)), torch.randn(2, 30, 16)
    renderer = GaussianRenderer("blend", "none", learn_sigma=True)

    def run():
        weights = generator(queries, sensors).camera
        painted = renderer(weights, sensors[1].places, sensors[1].shape, sensors[1].visible)
        return painted, *torch.autograd.grad(painted.square().sum(), [*(p for n, p in generator.named_parameters()), renderer.sigma_logit], allow_unused=True)

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_no_dense_mask_and_no_projection_of_tokens():
    """Operations do not grow with the maps, and no tensor of queries x tokens is made."""
    layer, queries = LocalAttention(32, 4, (5, 15)), torch.randn(1, 50, 32)
    counted = []
    for side in (20, 60):
        places, seen = torch.rand(1, 1, 50, 2) * side, torch.ones(1, 1, 50).bool()
        maps = [SensorMaps(torch.randn(1, 1, side * side, 32), (side, side), places, seen) for _ in range(2)]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(queries, maps)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_autocast_and_low_precision():
    sensors, generator = scene(), WeightGenerator(16, 4, 32, (3, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        said = generator(torch.randn(2, 30, 16), sensors)
        painted = GaussianRenderer()(said.camera, sensors[1].places, sensors[1].shape, sensors[1].visible)
        changed = FeatureModulator()(sensors[1].tokens.bfloat16(), painted, "camera")
    assert painted.dtype == torch.float32 and changed.dtype == torch.bfloat16 and painted.isfinite().all()
    said.weights.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in generator.parameters() if p.grad is not None)


def test_queries_that_no_camera_sees():
    bev, cameras = scene()
    cameras.visible[:] = False
    said = WeightGenerator(16, 4, 32, (3, 5))(torch.randn(2, 30, 16), (bev, cameras))
    assert said.weights.isfinite().all()
    assert MLPWeightGenerator(16)(torch.randn(2, 30, 16), (bev, cameras)).weights.isfinite().all()
    assert AttentionBias((3, 5))(said.weights, (bev, cameras))[..., 144:].abs().max() == 0


def test_attention_bias_equals_loop():
    bev, cameras = scene(queries=4, batch=2)
    weights, bias = torch.rand(2, 4, 2), AttentionBias((3, 5), scale=2.0)
    expected = torch.zeros(2, 4, 144 + 6 * 60)
    for b, q, (s, start, maps, size) in itertools.product(range(2), range(4), ((0, 0, bev, 3), (1, 144, cameras, 5))):
        (H, W), half = maps.shape, size // 2
        for n in range(maps.places.shape[1]):
            x, y = maps.places[b, n, q].floor().int().tolist()
            for i, j in itertools.product(range(max(0, y - half), min(H, y + half + 1)), range(max(0, x - half), min(W, x + half + 1))):
                expected[b, q, start + n * H * W + i * W + j] = 2 * weights[b, q, s] * maps.visible[b, n, q]
    torch.testing.assert_close(bias(weights, (bev, cameras)).detach(), expected)


def test_statistics_are_what_they_say_and_feed_the_bands():
    features, painted = torch.randn(2, 6, 8, 4, 5), torch.full((2, 6, 4, 5), 0.015)
    row = stage_statistics("camera", torch.full((2, 9), 0.45), painted, features, FeatureModulator(0.5)(features, painted, "camera"), 18, 2.0)
    assert row["aqr/camera/relative_change"] == pytest.approx(1 - 0.5075, abs=1e-4)
    assert row["aqr/camera/energy"] == pytest.approx(0.5075**2, abs=1e-4)
    assert row["aqr/camera/map_share"] == pytest.approx(0.015 / 0.45, rel=1e-4)
    assert row["aqr/camera/coverage"] == pytest.approx(18 * math.pi * 36 / 240)
    assert [f.column for f in out_of_band(row, ALARMS)] == ["aqr/camera/map_mean"]
    assert [epoch for epoch, _ in aqr_findings([row, row], alarms_only=True)] == [0, 1]
    assert all(begin < end for begin, end, _ in PHASES)


def test_splat_off_the_map_is_only_a_tail():
    places = torch.tensor([[-1.0, 2.5], [-50.0, 2.5]])
    painted = splat(torch.ones(2), places, torch.tensor(1.0), torch.arange(2), 2, (5, 6), 3)
    assert painted[0, 2, 0].item() == pytest.approx(math.exp(-(1.5**2) / 2)) and painted[1].abs().max() < 1e-30
