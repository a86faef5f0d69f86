"Weighted boxes fusion against ensemble-boxes, which is installed for the tests only, and in the corners where that has no answer."
import itertools
import warnings

import numpy as np
import pytest
import torch
from ensemble_boxes import weighted_boxes_fusion as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab import boxes as module
from moe_lab.boxes import CONF_TYPES, weighted_boxes_fusion

ANYWHERE, NEARBY = "anywhere", "nearby"


def image(rng, kind, counts, classes):
    "One image: a list of models to boxes, scores, labels. Nearby: the models see the same objects, a little shifted."
    corner, side, label = rng.uniform(0, 0.8, (max(counts), 2)), rng.uniform(0.02, 0.2, (max(counts), 2)), rng.integers(0, classes, max(counts))
    boxes, scores, labels = [], [], []
    for n in counts:
        low, high = np.sort(rng.random((2, n, 2)), 0)
        if kind == NEARBY:
            low = (corner[:n] + rng.normal(0, 0.01, (n, 2))).clip(0, 1)
            high = (low + side[:n]).clip(0, 1)
        boxes.append(np.concatenate([low, high], 1))
        scores.append(rng.random(n))
        labels.append(label[:n] if kind == NEARBY else rng.integers(0, classes, n))
    return boxes, scores, labels


def tensors(images):
    "Lists of images of (boxes, scores, labels) as our three arguments."
    return [[[torch.from_numpy(column) for column in one[part]] for one in images] for part in range(3)]


def canonical(boxes, scores, labels):
    "Rows in an order that does not depend on the last bits of a score."
    rows = np.concatenate([np.reshape(boxes, (-1, 4)), np.reshape(scores, (-1, 1)), np.reshape(labels, (-1, 1))], 1)
    return rows[np.lexsort((*rows[:, :4].round(5).T, rows[:, 5], -rows[:, 4].round(7)))]


def agree(images, weights=None, **options):
    "Both fuse every image to the same rows within 1e-6; ours come best first."
    with warnings.catch_warnings(action="ignore"):  # the reference warns of what it repairs
        theirs = [reference(*one, weights=weights if np.ndim(weights) < 2 else weights[i], **options) for i, one in enumerate(images)]
    ours = weighted_boxes_fusion(*tensors(images), weights=weights, **options)
    assert len(ours) == len(images)
    for mine, other in zip(ours, theirs):
        assert mine.labels.dtype == mine.members.dtype == torch.int64
        assert (mine.scores.diff() <= 0).all()
        assert len(mine.scores) == len(other[1])
        np.testing.assert_allclose(canonical(*mine[:3]), canonical(*other), atol=1e-6, rtol=0)


@pytest.fixture(params=["loop", "arrays"])
def schedule(request, monkeypatch):
    "Whatever the number of boxes, one of the two ways."
    monkeypatch.setattr(module, "_FEW", 10**9 if request.param == "loop" else 0)


@pytest.mark.parametrize("conf_type", CONF_TYPES)
@pytest.mark.parametrize("kind", [ANYWHERE, NEARBY])
@pytest.mark.parametrize("classes", [1, 8, 80])
def test_random_batches(schedule, conf_type, kind, classes):
    rng = np.random.default_rng([CONF_TYPES.index(conf_type), kind == NEARBY, classes])
    for iou_thr, skip, overflow in itertools.product((0.0, 0.2, 0.55, 0.8), (0.0, 0.3), (False, True)):
        models = int(rng.integers(1, 6))
        images = [image(rng, kind, rng.integers(0, 25, models), classes) for _ in range(3)]
        weights = [None, rng.uniform(0.1, 3, models), rng.uniform(0.1, 3, (3, models))][int(rng.integers(3))]
        agree(images, weights, iou_thr=iou_thr, skip_box_thr=skip, conf_type=conf_type, allows_overflow=overflow)


@pytest.mark.parametrize("models, count, classes", [(2, 300, 1), (2, 300, 8), (10, 100, 80), (5, 300, 2)])
def test_many_boxes(models, count, classes):
    rng = np.random.default_rng([models, classes])
    agree([image(rng, kind, [count] * models, classes) for kind in (ANYWHERE, NEARBY)], rng.uniform(0.5, 2, models), iou_thr=0.5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(1, 3), st.sampled_from(CONF_TYPES), st.floats(0, 0.95))
def test_property(seed, counts, classes, conf_type, iou_thr):
    "Small cases of every shape, by both ways; hypothesis shrinks what fails."
    rng = np.random.default_rng(seed)
    one = image(rng, NEARBY, counts, classes)
    weights = rng.uniform(0.1, 2, len(counts))
    agree([one], weights, iou_thr=iou_thr, conf_type=conf_type)
    agree([one] * 9, weights, iou_thr=iou_thr, conf_type=conf_type)


def test_float32_input_keeps_its_type_and_precision():
    rng = np.random.default_rng(3)
    one = image(rng, NEARBY, [60, 60], 3)
    single = [[column.astype(np.float32) for column in part] for part in one[:2]] + [one[2]]
    mine, = weighted_boxes_fusion(*tensors([single]))
    assert mine.boxes.dtype == mine.scores.dtype == torch.float32
    np.testing.assert_allclose(canonical(*mine[:3]), canonical(*reference(*single)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["loop", "group", "step"])
def test_a_match_is_strictly_above_the_threshold(kind):
    "Two boxes that overlap by exactly one half, with a score that has no exact double."
    boxes, masses = np.array([[0, 0, 1, 1], [0.0, 0, 0.5, 1]]), np.array([0.9, 0.3])
    ways = dict(loop=lambda thr: module._cluster_plainly(boxes.tolist(), masses.tolist(), [0, 0], thr)[0],
                group=lambda thr: module._cluster_group(boxes.T, masses, thr).tolist(), step=lambda thr: in_step(boxes.T, masses, thr))
    assert ways[kind](0.5) == [0, 1]
    assert ways[kind](np.nextafter(0.5, 0)) == [0, 0]


def in_step(boxes, masses, thr):
    chosen = np.zeros(len(masses), np.int64)
    module._cluster_in_step(boxes, masses, np.array([0]), np.array([len(masses)]), thr, chosen)
    return chosen.tolist()


def test_members_rebuild_every_fused_box(schedule):
    rng = np.random.default_rng(5)
    images = [image(rng, NEARBY, [30, 20, 0], 2) for _ in range(3)]
    weights = torch.tensor([1.0, 2.0, 3.0])
    for one, fused in zip(images, weighted_boxes_fusion(*tensors(images), weights=weights, skip_box_thr=0.2)):
        boxes, scores, labels = (np.concatenate(part) for part in one)
        mass = scores * np.repeat(weights.numpy(), [30, 20, 0])
        members = fused.members.numpy()
        assert ((members == -1) == (scores < 0.2)).all()
        for k in range(len(fused.scores)):
            mine = members == k
            np.testing.assert_allclose(fused.boxes[k], np.average(boxes[mine], axis=0, weights=mass[mine]), atol=1e-6)
            assert (labels[mine] == fused.labels[k].item()).all()


def test_one_image_alone_is_what_it_is_in_a_batch():
    rng = np.random.default_rng(6)
    images = [image(rng, NEARBY, [n, n], 4) for n in (0, 3, 40, 200)]
    weights = rng.uniform(0.1, 2, (4, 2))
    for i, whole in enumerate(weighted_boxes_fusion(*tensors(images), weights=weights)):
        alone, = weighted_boxes_fusion(*tensors(images[i : i + 1]), weights=weights[i : i + 1])
        for a, b in zip(alone, whole):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("conf_type", CONF_TYPES)
@pytest.mark.parametrize("scores, weights", [([0.0, 0.0], [1, 1]), ([0.6, 0.5], [0, 0]), ([0.0, 0.5], [1, 0]), ([0.6, 0.0], [0, 2])])
def test_nothing_over_nothing_is_worth_nothing(schedule, conf_type, scores, weights):
    "The reference answers with NaN boxes (its issue 44), or with NaN scores."
    boxes = [torch.tensor([[0.1, 0.1, 0.5, 0.5]]), torch.tensor([[0.2, 0.1, 0.6, 0.5]])]
    fused, = weighted_boxes_fusion([boxes], [[torch.tensor([s]) for s in scores]], [[torch.tensor([4])] * 2], weights=weights, conf_type=conf_type)
    torch.testing.assert_close(fused.boxes, torch.tensor([[0.15, 0.1, 0.55, 0.5]]))
    assert fused.scores.tolist() == [0.0]


def test_zero_weight_changes_nothing_beside_others(schedule):
    rng = np.random.default_rng(7)
    agree([image(rng, ANYWHERE, [20, 1, 20], 2)], [1.0, 0.0, 2.0], conf_type="avg")


def test_a_box_without_area_is_left_out_and_says_so(schedule):
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.3, 0.3, 0.3, 0.9]])
    fused, = weighted_boxes_fusion([[boxes]], [[torch.tensor([0.3, 0.9])]], [[torch.tensor([0, 0])]])
    assert fused.members.tolist() == [0, -1]


def test_nothing_at_all():
    empty = [torch.zeros(0, 4)], [torch.zeros(0)], [torch.zeros(0, dtype=torch.int64)]
    assert weighted_boxes_fusion([], [], []) == []
    for fused in weighted_boxes_fusion(*([part] * 2 for part in empty)) + weighted_boxes_fusion([[]], [[]], [[]]):
        assert [tuple(t.shape) for t in fused] == [(0, 4), (0,), (0,), (0,)]
    below, = weighted_boxes_fusion([[torch.tensor([[0.1, 0.1, 0.2, 0.2]] * 99)]], [[torch.full((99,), 0.1)]], [[torch.zeros(99, dtype=torch.int64)]], skip_box_thr=0.5)
    assert below.boxes.shape == (0, 4) and (below.members == -1).all()


def test_labels_may_be_any_integer(schedule):
    big = 2**40
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5]])
    fused, = weighted_boxes_fusion([[boxes, boxes, boxes]], [[torch.tensor([s]) for s in (0.9, 0.6, 0.3)]], [[torch.tensor([n]) for n in (big, -5, big)]])
    assert fused.labels.tolist() == [big, -5] and fused.members.tolist() == [0, 1, 0]


def test_lists_and_arrays_are_taken_too():
    fused, = weighted_boxes_fusion([[[[0.1, 0.1, 0.5, 0.5]], np.zeros((0, 4))]], [[[0.5], []]], [[[1], []]])
    assert fused.scores.tolist() == [0.25]


def test_rounding_beyond_the_border_is_no_error(schedule):
    boxes = torch.tensor([[0.5, 0.5, 1.0000001, 1.0]])
    assert len(weighted_boxes_fusion([[boxes]], [[torch.ones(1)]], [[torch.zeros(1, dtype=torch.int64)]])[0].scores) == 1


GOOD = [[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.3, 0.9]]
MISTAKES = {
    "outside": (dict(boxes=[GOOD[0], [0.2, 0.2, 640.0, 0.9]]), "image 1, model 1, box 1: [0.2, 0.2, 640.0, 0.9] reaches outside 0..1; divide"),
    "negative": (dict(boxes=[GOOD[0], [-0.01, 0.2, 0.5, 0.9]]), "image 1, model 1, box 1"),
    "inverted": (dict(boxes=[[0.5, 0.1, 0.1, 0.5], GOOD[1]]), "image 1, model 1, box 0: [0.5, 0.1, 0.1, 0.5] is inverted"),
    "not a number": (dict(boxes=[GOOD[0], [float("nan"), 0.2, 0.5, 0.9]]), "image 1, model 1, box 1: [nan, 0.2, 0.5, 0.9] is not finite"),
    "score": (dict(scores=[0.5, float("nan")]), "image 1, model 1, box 1: score nan"),
    "negative score": (dict(scores=[-0.5, 0.4]), "image 1, model 1, box 0: score -0.5"),
    "infinite score": (dict(scores=[0.5, float("inf")]), "image 1, model 1, box 1: score inf"),
    "scores missing": (dict(scores=[0.5]), "image 1, model 1: boxes (2, 4), scores (1,), labels (2,); give one score and one label a box"),
    "labels missing": (dict(labels=[0]), "image 1, model 1: boxes (2, 4), scores (2,), labels (1,)"),
    "real labels": (dict(labels=[0.0, 1.0]), "image 1, model 1: labels are torch.float32; give integers"),
    "five columns": (dict(boxes=[[0.1, 0.1, 0.5, 0.5, 0.9]] * 2), "image 1, model 1: boxes of shape (2, 5); give (n, 4)"),
    "too many weights": (dict(weights=[1, 2, 3]), "weights of shape (3,) for 2 images of 2 models; give (2,) or (2, 2)"),
    "negative weight": (dict(weights=[1, -2]), "weights: -2.0 for model 1"),
    "conf_type": (dict(conf_type="averge"), "conf_type: unknown type 'averge'; did you mean avg?"),
    "threshold": (dict(iou_thr=1.5), "iou_thr: 1.5 is not in 0..1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(schedule, name):
    change, message = MISTAKES[name]
    parts = [[[torch.tensor(part)] * 2] * 2 for part in (GOOD, [0.5, 0.4], [0, 1])]
    for place, key in enumerate(("boxes", "scores", "labels")):
        if key in change:
            parts[place] = [parts[place][0], [parts[place][0][0], torch.tensor(change[key])]]
    options = {key: value for key, value in change.items() if key not in ("boxes", "scores", "labels")}
    with pytest.raises(ValueError) as raised:
        weighted_boxes_fusion(*parts, **options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_images_and_models_must_correspond():
    box, score, label = torch.tensor(GOOD), torch.tensor([0.5, 0.4]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="2, 1 and 2 images"):
        weighted_boxes_fusion([[box]] * 2, [[score]], [[label]] * 2)
    with pytest.raises(ValueError, match="image 1: 1, 2 and 2 models .* give empty tensors"):
        weighted_boxes_fusion([[box] * 2, [box]], [[score] * 2] * 2, [[label] * 2] * 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_answer_is_where_the_question_was():
    images = [image(np.random.default_rng(1), NEARBY, [40, 40], 3)]
    there = weighted_boxes_fusion(*[[[t.cuda() for t in models] for models in part] for part in tensors(images)])[0]
    here = weighted_boxes_fusion(*tensors(images))[0]
    for a, b in zip(there, here):
        assert a.is_cuda
        torch.testing.assert_close(a.cpu(), b)
