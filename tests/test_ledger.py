"""Ledgers of RT-DETR: their lines add up to what a plain counter sees, forward and backward, and looking at a model does not change it."""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_lab.detectors.rtdetr import RTDETR
from moe_lab.diagnose import ATTENTION
from moe_lab.ledger import active_parameters, time_ledger, time_ledgers, work_ledger

TINY = dict(backbone="r10", backbone_width=0.25, d_model=32, heads=4, encoder_ffn=64, decoder_ffn=64, decoder_layers=2, queries=20, points=2, denoising=20)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return RTDETR(5, **TINY).eval()


@pytest.fixture
def batch():
    target = dict(boxes=torch.tensor([[10.0, 10, 50, 40], [4, 4, 20, 60]]), labels=torch.tensor([4, 1]), ignore=torch.zeros(0, 4))
    return dict(images=torch.rand(2, 3, 64, 96), targets=[target, target])


def counted(call) -> int:
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        call()
    return counter.get_total_flops()


def test_operations_add_up_to_what_a_counter_sees(detector, batch):
    forward = work_ledger(detector, batch)
    assert forward.forward["total"] == forward.forward.drop("total").sum() == counted(lambda: detector(batch))
    step = work_ledger(detector, batch, training=True)
    detector.train()
    torch.manual_seed(0)
    assert step.loc["total"].sum() == counted(lambda: sum(detector.loss(detector(batch), batch).values()).backward())
    assert 0 < 2 * step.forward["aifi_attention"] < step.backward["aifi_attention"]  # the kernel computes its products anew on the way back


def test_backward_is_charged_to_the_parts_that_made_it(detector, batch):
    """Freezing the backbone takes the backward operations out of its line alone."""
    before = work_ledger(detector, batch, training=True)
    for parameter in detector.net.model.backbone.parameters():
        parameter.requires_grad_(False)
    after = work_ledger(detector, batch, training=True)
    assert before.backward["backbone"] > 0 and after.backward["backbone"] == 0
    rest = [line for line in before.index if line not in ("backbone", "projection", "total")]
    assert after.backward[rest].equals(before.backward[rest]) and after.forward.equals(before.forward)


def test_looking_changes_nothing(detector, batch):
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    first = next(detector.parameters())
    first.grad = torch.ones_like(first)
    generator = torch.get_rng_state()
    time_ledger(detector, batch, training=True, repeats=1)
    work_ledger(detector, batch, training=True)
    assert not detector.training and torch.equal(first.grad, torch.ones_like(first)) and torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[name]) for name, value in detector.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in detector.modules())


def test_times_of_several_models_are_whole(detector, batch):
    tables = time_ledgers({"one": detector, "other": RTDETR(5, **TINY)}, batch, training=True, repeats=2)
    for table in tables.values():
        assert table.loc["total"].sum() == pytest.approx(table.drop("total").to_numpy().sum())
        assert (table.loc[["backbone", "decoder", "loss"]].sum(axis=1) > 0).all()


def test_a_failing_model_is_left_without_hooks(detector):
    with pytest.raises((ValueError, RuntimeError, IndexError, AttributeError)):
        work_ledger(detector, torch.rand(1, 3, 64))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in detector.modules())


def test_a_plain_detector_is_active_as_a_whole(detector):
    assert active_parameters(detector) == sum(p.numel() for p in detector.parameters())
