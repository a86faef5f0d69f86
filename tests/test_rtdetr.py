"""RT-DETRv2 against transformers' own: with nothing added, everything is equal to the last bit."""

import copy

import numpy as np
import pytest
import torch
from transformers import RTDetrV2ForObjectDetection

from moe_lab.data.core import make_loader, make_sample
from moe_lab.detectors.rtdetr import RTDETR, as_labels
from moe_lab.params import DataParams, RunParams, TrainParams, UserError
from moe_lab.tier import make_deterministic
from moe_lab.train import train

SMALL = dict(backbone_width=0.25, d_model=32, heads=4, encoder_ffn=64, decoder_ffn=64, queries=40, denoising=20)
SIZES = [(640, 640), (384, 640), (352, 608)]
NAMES = dict(vfl="loss_vfl", box="loss_bbox", giou="loss_giou")


def shaken(seed=0, **params):
    "A model whose weights are nowhere at their special first values."
    torch.manual_seed(seed)
    model = RTDETR(8, **(SMALL | params))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return model


def twin_of(model, layout=torch.contiguous_format):
    "transformers' model with the same weights."
    twin = RTDetrV2ForObjectDetection(copy.deepcopy(model.net.config)).to(memory_format=layout)
    told = twin.load_state_dict(model.net.state_dict(), strict=False)
    assert not told.unexpected_keys and all(name.startswith(("class_embed", "bbox_embed")) for name in told.missing_keys)
    twin.tie_weights()
    return twin.train(model.training)


def random_batch(size, counts, seed=1):
    random = torch.Generator().manual_seed(seed)
    height, width = size
    targets = []
    for n in counts:
        corner = torch.rand(n, 2, generator=random) * torch.tensor([width, height]) * 0.7
        side = torch.rand(n, 2, generator=random) * torch.tensor([width, height]) * 0.25 + 4
        labels = torch.randint(0, 8, (n,), generator=random)
        targets.append(dict(boxes=torch.cat([corner, corner + side], 1), labels=labels, ignore=torch.zeros(0, 4)))
    return dict(images=torch.rand(len(counts), 3, height, width, generator=random), targets=targets)


def named_terms(model, outputs, batch):
    "Our terms under transformers' names."
    terms, named = model.loss_by_output(outputs, batch), {}
    for name, theirs in NAMES.items():
        named |= {theirs if k == 0 else f"{theirs}_aux_{k - 1}": value for k, value in enumerate(terms["matched"][name])}
        named |= {f"{theirs}_dn_{k}": value for k, value in enumerate(terms.get("denoising", {}).get(name, []))}
    return named


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("size", SIZES, ids=["square", "wide", "odd maps"])
def test_eval_outputs_equal_transformers(size, layout):
    model = shaken().eval().to(memory_format=layout)
    images = random_batch(size, [0])["images"]
    with torch.no_grad():
        ours, theirs = model(images), twin_of(model, layout)(images)
    assert torch.equal(ours.intermediate_logits[:, -1], theirs.logits)
    assert torch.equal(ours.intermediate_reference_points[:, -1], theirs.pred_boxes)


@pytest.mark.parametrize("size", SIZES, ids=["square", "wide", "odd maps"])
def test_training_loss_and_gradients_equal_transformers(size):
    model = shaken(look_forward_twice=False)
    twin, batch = twin_of(model), random_batch(size, [3, 1])
    torch.manual_seed(5)
    outputs = model(batch)
    torch.manual_seed(5)
    theirs = twin(batch["images"], labels=as_labels(batch["targets"], size))
    ours = named_terms(model, outputs, batch)
    assert set(ours) == set(theirs.loss_dict)
    assert all(torch.equal(ours[name], theirs.loss_dict[name]) for name in ours)
    assert torch.equal(sum(ours[name] for name in theirs.loss_dict), theirs.loss)
    sum(model.loss(outputs, batch).values()).backward()
    theirs.loss.backward()
    gradients = dict(twin.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name.removeprefix("net.")].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("params", [dict(sampling="discrete"), dict(strides=(16, 32)), dict(strides=(4, 8, 16, 32)), dict(backbone="r50", backbone_width=0.125),
                                    dict(encoder_dim=48), dict(denoising=0), dict(encoder_layers=2)], ids=str)
def test_other_variants_equal_transformers_too(params):
    model = shaken(look_forward_twice=False, **params)
    twin, batch = twin_of(model), random_batch((96, 160), [2, 5, 0])
    torch.manual_seed(5)
    ours = named_terms(model, model(batch), batch)
    torch.manual_seed(5)
    theirs = twin(batch["images"], labels=as_labels(batch["targets"], (96, 160))).loss_dict
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_look_forward_twice_changes_gradients_and_nothing_else():
    once, batch = shaken(look_forward_twice=False), random_batch((64, 96), [3, 2])
    twice = RTDETR(8, **SMALL)
    twice.load_state_dict(once.state_dict())
    terms = {}
    for model in (once, twice):
        torch.manual_seed(5)
        terms[model] = model.loss(model(batch), batch)
        sum(terms[model].values()).backward()
    assert all(torch.equal(terms[once][name], terms[twice][name]) for name in terms[once])
    head = lambda model, i: model.net.model.decoder.bbox_embed[i].layers[-1].bias.grad
    assert torch.equal(head(once, -1), head(twice, -1))
    assert not torch.allclose(head(once, 0), head(twice, 0), rtol=0.05)


@pytest.mark.parametrize("counts", [[0, 0], [0, 4], [45, 1]], ids=["no objects at all", "one image without", "more objects than queries"])
def test_any_number_of_objects(counts):
    model, batch = shaken(dense_weight=1.0, select_weight=1.0), random_batch((64, 96), counts)
    terms = model.loss(model(batch), batch)
    assert all(term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    unused = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert not unused  # or processes that train together would wait for each other


class Grey(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, key):
        image = np.full((64, 96, 3), 114, np.uint8)
        return make_sample(image, [[10, 10, 50, 40]], [3], [], image_id=key[1])


def test_a_loss_that_is_no_number_is_reported_by_the_loop(tmp_path):
    make_deterministic(0, 1)
    model = RTDETR(8, **SMALL)
    torch.nn.init.constant_(model.net.model.decoder.layers[0].mlp.fc1.weight, float("nan"))
    params = RunParams(detector="rtdetr", data=DataParams(root=".", image_size=(64, 96)), train=TrainParams(epochs=1, batch_size=2, lr=0.001))
    with pytest.raises(UserError, match=r"runs\.nan: epoch 1, step 1: loss term 'vfl' is nan .* on images"):
        train(model, make_loader(Grey(), 2, shuffle=True), params, tmp_path, run="nan", log=lambda line: None)


def test_denoising_follows_the_global_generator_and_training_is_deterministic():
    results = []
    for _ in range(2):
        make_deterministic(0, 1)
        model, batch = RTDETR(8, **SMALL, dense_weight=1.0), random_batch((64, 96), [3, 2])
        torch.manual_seed(7)
        sum(model.loss(model(batch), batch).values()).backward()
        results.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    torch.use_deterministic_algorithms(False)
    assert torch.equal(*results)


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path):
    params = RunParams(detector="rtdetr", data=DataParams(root=".", image_size=(64, 96)), train=TrainParams(epochs=2, batch_size=2, lr=0.001, ema_decay=0.9))

    def run(out, evaluate=None):
        make_deterministic(0, 1)
        model = RTDETR(8, **SMALL, dense_weight=1.0)
        train(model, make_loader(Grey(), 2, shuffle=True), params, tmp_path / out, tmp_path / "state" / out, evaluate, log=lambda line: None)

    def killed(model, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return {}

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("broken", killed)
    run("broken")
    for name in ("checkpoint.safetensors", "history.csv"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    torch.use_deterministic_algorithms(False)


def test_mixed_precision():
    model, batch = shaken(), random_batch((64, 96), [3, 2])
    with torch.autocast("cpu", torch.bfloat16):
        terms = model.loss(model(batch), batch)
    sum(terms.values()).backward()
    assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
