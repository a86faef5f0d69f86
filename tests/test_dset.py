"""DSET beyond what its notebook shows: equality with the base, exact counts, resume across the schedule, sparsity in operations, export."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import ROOT
from moe_lab import checkpoint, params, pruning
from moe_lab.detectors.dset import DSET, DSETParams
from moe_lab.detectors.rtdetr import RTDETR
from moe_lab.detectors.sparse_rtdetr import fold
from moe_lab.export import export_onnx, exportable
from moe_lab.params import UserError

TINY = dict(backbone="r10", backbone_width=.25, d_model=32, heads=4, encoder_ffn=64, decoder_ffn=96, decoder_layers=3, queries=30, points=2, denoising=20, dense_weight=1.0)
SIZE = (96, 128)  # tokens: 12 x 16, 6 x 8, 3 x 4
VARIANTS = dict(
    moe_rtdetr=dict(decoder_experts=6), dset=dict(keep=.7, encoder_experts=4, decoder_experts=6), dset_prune_only=dict(keep=.7),
    dset_moe_only=dict(encoder_experts=4, decoder_experts=6), dset_zero_restore=dict(keep=.7, encoder_experts=4, decoder_experts=6, restore="zero"),
    dset_sparse=dict(memory_keep=[.3, .6, 1], sparse_fusion=True, fast=True, exit_after=1, exit_keep=.34),
    dset_fast=dict(memory_keep=[.4, .8, 1], sparse_fusion=True, fast=True, exit_after=1, exit_keep=.5, prune_warmup=2, mask_weight=.3))


@pytest.fixture(autouse=True)
def seeded(one_thread):
    torch.manual_seed(0)


def batch(images=2, objects=(2, 1)):
    boxes = torch.tensor([[10.0, 10, 50, 40], [64, 40, 120, 90]])
    targets = [dict(boxes=boxes[:n], labels=torch.arange(n), ignore=torch.tensor([[0.0, 60, 60, 90]])) for n in objects[:images]]
    return dict(images=torch.rand(images, 3, *SIZE), targets=targets, image_ids=list(range(images)))


def shaken(model):
    """Weights that are all different, so that no ranking is a matter of rounding."""
    torch.manual_seed(1)
    for p in model.parameters():
        p.data += .05 * torch.randn_like(p)
    for head in (model.net.model.enc_score_head, *model.net.model.decoder.class_embed):
        torch.nn.init.normal_(head.weight)
    return model


def answers(model, images):
    with torch.no_grad():
        out = model.eval()(images)
    return torch.cat([out.intermediate_logits[:, -1], out.intermediate_reference_points[:, -1]], -1)


def ranked(answer):
    return torch.stack([image[image[:, 0].argsort()] for image in answer])


def operations(model, images):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images)
    return counter.get_total_flops()


@pytest.mark.parametrize("extra", [dict(keep=.5), dict(keep=.5, gate="none"), dict(memory_keep=[.5, .5, .5]), dict(keep=.5, memory_keep=[.5, 1, 1], sparse_fusion=True, spatial_prior=True, gate="none")])
def test_keeping_everything_is_the_base_to_the_last_bit(extra):
    """At epoch 0: outputs in evaluation and training, and losses. Gradients too, where the scorers do not add theirs."""
    dset, base, data = shaken(DSET(5, **TINY, **extra)), RTDETR(5, **TINY), batch()
    base.load_state_dict({name: value for name, value in dset.state_dict().items() if name in base.state_dict()})
    dset.on_epoch(0, 20)
    assert torch.equal(answers(dset, data["images"]), answers(base, data["images"]))
    losses, grads = [], []
    for model in (dset, base):
        torch.manual_seed(3)
        model.train().zero_grad()
        terms = {name: term for name, term in model.loss(model(data), data).items() if name not in ("prune", "mask")}
        sum(terms.values()).backward()
        losses.append(terms)
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[0].keys() == losses[1].keys() and all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])
    assert "gate" not in extra or all(torch.equal(grads[0][name], grad) for name, grad in grads[1].items() if grad is not None)


def test_counts_are_exact_and_order_is_kept():
    model = shaken(DSET(5, **TINY, keep=.7, memory_keep=[.3, .6, .9], sparse_fusion=True))
    for epoch, share in ((0, 1.0), (3, None), (5, .5), (10, 0.0), (40, 0.0)):
        model.on_epoch(epoch, 50)
        answers(model, torch.rand(2, 3, *SIZE))
        openness = 1 - min(epoch / 10, 1) if share is None else share
        for (name, decision), final, tokens in zip(model.decisions().items(), (.7, .3, .6, .9), (12, 48, 48, 12)):
            expected = max(1, math.floor((final + openness * (1 - final)) * tokens + 1e-6))
            assert decision.indices.shape == (2, expected), (epoch, name)
            assert (decision.indices.diff(dim=1) > 0).all()
            best = decision.scores.topk(expected).indices.sort().values
            assert torch.equal(decision.indices, best)


def test_positions_follow_their_tokens():
    """Attention over kept tokens = attention over all, with the pruned ones masked out."""
    model = shaken(DSET(5, **TINY, keep=.5, prune_warmup=0)).eval()
    aifi, tokens = model.net.model.encoder.aifi[0], torch.randn(2, 32, 3, 4)
    with torch.no_grad():
        out = aifi(tokens).flatten(2).mT
        kept = aifi.pruner.last.mask.flatten(1)
        rows, position = tokens.flatten(2).mT, aifi.position_embedding(width=4, height=3, device=torch.device("cpu"), dtype=torch.float32)
        mask = torch.zeros(2, 1, 12, 12).masked_fill(~kept[:, None, None], -torch.inf)
        everything = aifi.layers[0](rows, attention_mask=mask, spatial_position_embeddings=position)
    torch.testing.assert_close(out[kept], everything[kept], atol=1e-5, rtol=1e-4)
    assert torch.equal(out[~kept], rows[~kept])


def test_detection_loss_teaches_the_scorers():
    """Without any supervision by boxes: nothing through `none`, and through the gate what a finite difference says."""
    data = batch()
    for gate in ("straight_through", "scale", "none"):
        model = shaken(DSET(5, **TINY, keep=.7, memory_keep=[.4, .6, 1], sparse_fusion=True, prune_warmup=0, mask_weight=0, gate=gate)).train()
        sum(term for name, term in model.loss(model(data), data).items() if name not in ("prune", "mask")).backward()
        grads = [pruner.predictor.score.weight.grad for pruner, _ in model.pruners.values()]
        assert all((grad is None or grad.abs().sum() == 0) if gate == "none" else (grad.abs().sum() > 0 and grad.isfinite().all()) for grad in grads)
    processed, fallback, scores = torch.randn(1, 3, 4, dtype=torch.float64), torch.randn(1, 3, 4, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn(1, 3, 4, dtype=torch.float64)
    task = lambda tokens: (tokens - wanted).square().sum((0, 2))
    task(pruning.gated(processed, fallback, scores)).sum().backward()
    numeric = (task(processed) - task(processed - 1e-6 * (processed - fallback))) / 1e-6 * .25
    torch.testing.assert_close(scores.grad[0], numeric, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_and_detects(name):
    model, data = DSET(5, **TINY, **VARIANTS[name]), batch()
    groups = model.param_groups(SimpleNamespace(weight_decay=1e-4))
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    optimizer = torch.optim.AdamW([dict(params=g["params"], weight_decay=g["weight_decay"]) for g in groups], lr=1e-3)
    boxes = []
    for step in range(16):
        model.on_epoch(step, 20)
        model.train()
        terms = model.loss(model(data), data)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        boxes.append((terms["box"] + terms["giou"]).item())
        seen = model.observe() | {f"train/{key}": value.item() for key, value in terms.items()}
    assert min(boxes[6:]) < boxes[0]
    row = seen | model.summarise(seen)
    assert all(math.isfinite(value) for value in row.values())
    for layer, mixture in model.mixtures.items():
        assert abs(sum(row[f"routing/{layer}/usage/{e}"] for e in range(len(mixture.experts))) - 1) < 1e-5
    if model.pruners:
        assert row["prune/recall_random"] == pytest.approx(row["prune/keep_ratio"])
    frame = dict(data, letterbox=torch.tensor([[1.0, 0, 0]]).expand(2, 3), sizes=torch.tensor([SIZE] * 2))
    with torch.no_grad():
        found = model.eval().detect(model(frame), frame, SimpleNamespace(conf=0.0, nms_iou=.5, max_detections=15))
    assert [len(d) for d in found] == [15, 15]
    nothing = batch(objects=(0, 0))
    model.train()
    assert all(term.isfinite() for term in model.loss(model(nothing), nothing).values())


def test_balance_is_of_each_layer_and_averaged():
    model, data = DSET(5, **TINY, encoder_experts=4, encoder_top_k=1, decoder_experts=6).train(), batch()
    terms = model.loss(model(data), data)
    each = {name: row for name, row in model.observe().items() if name.endswith("/balance")}
    decoder = [value for name, value in each.items() if "decoder" in name]
    assert len(decoder) == 3 and len(set(decoder)) == 3
    assert terms["balance"].item() == pytest.approx(.05 * sum(decoder) / 3 + .1 * each["routing/encoder0/balance"], rel=1e-5)
    terms["balance"].backward()
    assert all(layer.router.gate.weight.grad.abs().sum() > 0 for layer in model.mixtures.values())


def test_expert_width_and_operations():
    """`matched` costs what the dense networks cost, `full` k times that; on top comes the router."""
    images, base = torch.rand(1, 3, *SIZE), operations(RTDETR(5, **TINY), torch.rand(1, 3, *SIZE))
    dense, router = 3 * 30 * 2 * 2 * 32 * 96, 3 * 30 * 2 * 32 * 6
    for width, factor in (("matched", 1), ("full", 3)):
        assert operations(DSET(5, **TINY, decoder_experts=6, expert_width=width), images) == base + (factor - 1) * dense + router


def test_pruned_work_is_not_done():
    """Operations fall with the share, in proportion where tokens are dropped, and an early exit spares layers."""
    images = torch.rand(1, 3, *SIZE)
    build = lambda **extra: fold(DSET(5, **TINY, fast=True, prune_warmup=0, **extra))
    full, half = operations(build(), images), operations(build(memory_keep=[.5, 1, 1], sparse_fusion=True), images)
    quarter = operations(build(memory_keep=[.25, 1, 1], sparse_fusion=True), images)
    scorer = 48 * 2 * (32 * 128 + 128)
    fine = 2 * 64 * 16 * 2 + 2 * 16 * 16 * 9 * 3 + 2 * 16 * 32  # fusion block: two 1x1, three 3x3, one 1x1
    projections = 2 * 32 * 32 * 3 + 2 * 32 * 5                  # to and from the encoder, of memory; class scores
    backbone = 2 * 32 * 32                                      # projection of the backbone's map
    assert half - quarter >= 48 * (fine + projections + backbone) * .9
    assert full - half > half - quarter - scorer
    assert operations(build(exit_after=1, exit_keep=.3), images) < full


def test_fast_is_the_same_up_to_rounding():
    for extra in ({}, dict(memory_keep=[.4, .7, .9]), dict(keep=.7, memory_keep=[.4, .7, 1], sparse_fusion=True, decoder_experts=4, decoder_top_k=2)):
        slow = shaken(DSET(5, **TINY, **extra, prune_warmup=0)).eval()
        fast = DSET(5, **TINY, **extra, prune_warmup=0, fast=True).eval()
        fast.load_state_dict(slow.state_dict())
        images = torch.rand(2, 3, *SIZE)
        torch.testing.assert_close(answers(fast, images), answers(slow, images), atol=1e-4, rtol=1e-3)
        alone = torch.cat([answers(fast, image[None]) for image in images])
        torch.testing.assert_close(alone, answers(fast, images), atol=1e-4, rtol=1e-3)


def test_early_exit_keeps_everybodys_last_word():
    options = dict(fast=True, exit_after=1, exit_keep=.34)
    whole, images = shaken(DSET(5, **TINY)).eval(), torch.rand(1, 3, *SIZE)
    early = DSET(5, **TINY, **options).eval()
    early.load_state_dict(whole.state_dict())
    with torch.no_grad():
        first = whole(images)
        said = first.intermediate_logits[0, 0]
        order = said.amax(-1).argsort(descending=True)
        answer = early(images)
    assert answer.intermediate_logits.shape == (1, 1, 30, 5)
    torch.testing.assert_close(answer.intermediate_logits[0, 0, 10:], said[order[10:]], atol=1e-4, rtol=1e-3)


def test_average_and_checkpoint_prune_like_the_model(tmp_path):
    """The share is part of the state: whoever loads weights prunes as the training did."""
    from moe_lab.train import EMA
    model = DSET(5, **TINY, keep=.7)
    average = EMA(model, .9, 5)
    model.on_epoch(5, 20)
    average.update(model)
    assert average.model.pruners["s32"][0].ratio == .85
    checkpoint.save(tmp_path / "c.safetensors", model.state_dict(), {})
    fresh = DSET(5, **TINY, keep=.7)
    checkpoint.load_weights(fresh, checkpoint.load(tmp_path / "c.safetensors")[0], "c")
    assert fresh.pruners["s32"][0].ratio == .85
    copy.deepcopy(model)


def test_resume_across_the_schedule(tmp_path):
    """Stopped in the middle of an epoch while the share falls, then started again: the same history and weights."""
    import toy
    world = toy.write_dataset(tmp_path / "world", splits=(("train", 12), ("val", 4)))

    def model():
        torch.manual_seed(3)
        return DSET(2, **TINY | dict(decoder_layers=1, queries=10), keep=.5, prune_warmup=3, encoder_experts=2, encoder_top_k=1, memory_keep=[.5, 1, 1], sparse_fusion=True)

    class Stop(Exception):
        pass

    def stop(line):
        if line.startswith("epoch 2"):
            raise Stop
    settings = dict(epochs=4, optimizer="adamw", lr=1e-3, mosaic_off_epochs=0)
    toy.run(world, tmp_path / "alone", model=model(), **settings)
    with pytest.raises(Stop):
        toy.run(world, tmp_path / "out", tmp_path / "resume", model=model(), log=stop, **settings)
    toy.run(world, tmp_path / "out", tmp_path / "resume", model=model(), **settings)
    assert toy.contents(tmp_path / "out") == toy.contents(tmp_path / "alone")
    history = (tmp_path / "alone" / "history.csv").read_text().splitlines()
    shares = [float(row.split(",")[history[0].split(",").index("prune/memory_s8/keep_ratio")]) for row in history[1:]]
    assert shares[0] == 1 and shares[-1] == pytest.approx(.5, abs=.05) and shares == sorted(shares, reverse=True)


def test_published_configurations():
    paper = params.load(ROOT / "params.yaml", "paper")
    runs = dict(dset_r18="dset", dset_r50="dset_r50")
    bases = dict(dset_r18="rtdetr", dset_r50="rtdetr_r50")
    with torch.device("meta"):
        sizes = {name: DSET(8, **paper.run(run).model) for name, run in runs.items()}
        base = {name: RTDETR(8, **paper.run(run).model) for name, run in bases.items()}
    assert {name: model.params.keep for name, model in sizes.items()} == dict(dset_r18=.6, dset_r50=.7)
    count = lambda model: sum(p.numel() for p in model.parameters())
    ffn, scorer = 2 * 256 * 1024 + 1024 + 256, 256 * 128 + 128 + 128 + 1
    assert count(sizes["dset_r18"]) - count(base["dset_r18"]) == (ffn + 2 * 257) + 3 * (2 * ffn + 3 * 257) + scorer
    assert count(sizes["dset_r50"]) - count(base["dset_r50"]) == (3 * ffn + 4 * 257) + 6 * (5 * ffn + 6 * 257) + scorer


@pytest.mark.parametrize("profile", ["tiny", "study", "paper"])
def test_ablations_differ_in_what_they_ablate(profile):
    runs = params.load(ROOT / "params.yaml", profile).runs
    whole, experts = runs["dset"], {"encoder_experts", "encoder_top_k", "decoder_experts", "decoder_top_k"}
    changed = lambda name: {key for key, value in runs[name].model.items() if value != whole.model[key]}
    assert changed("dset_prune_only") == {"encoder_experts", "decoder_experts"}
    assert changed("dset_moe_only") == {"keep"} and changed("dset_zero_restore") == {"restore"}
    assert changed("moe_rtdetr") <= experts | {"keep", "prune_warmup"}
    for name in ("dset_prune_only", "dset_moe_only", "dset_zero_restore", "moe_rtdetr", "rtdetr_more"):
        assert runs[name].train == whole.train and runs[name].data == whole.data, name


def test_wrong_parameters_are_explained():
    for wrong, says in ((dict(memory_keep=[.5]), "one for each of the 3 strides"), (dict(fast=True, sampling="discrete"), "set sampling to default"),
                        (dict(encoder_experts=1), "only 1 experts"), (dict(memory_keep=[0, 1, 1]), "above 0")):
        with pytest.raises(ValueError, match=says):
            DSETParams(**wrong)


@pytest.mark.parametrize("name", ["rtdetr", "dset_sparse"])
def test_onnx_gives_the_same(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model = shaken(RTDETR(5, **TINY) if name == "rtdetr" else DSET(5, **TINY, **VARIANTS[name], prune_warmup=0))
    reference = export_onnx(model, tmp_path / "m.onnx", SIZE, batch_size=2)
    session, images = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"]), torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        ours = reference(images)
    for mine, theirs in zip(ours, session.run(None, {"images": images.numpy()})):
        torch.testing.assert_close(torch.from_numpy(theirs), mine, atol=1e-3, rtol=0)


def test_what_cannot_be_exported_says_so():
    with pytest.raises(UserError, match="cannot leave out experts"):
        exportable(DSET(5, **TINY, decoder_experts=6))
