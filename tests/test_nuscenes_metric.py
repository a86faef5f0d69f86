"""The vectorised nuScenes metric against nuscenes-devkit on random datasets: every number equal in every bit."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_lab.boxes import Detections
from moe_lab.data.nuscenes import NuScenesDetection
from moe_lab.data.scene import collate3d, toy_batch
from moe_lab.evaluate_nuscenes import degrade, disturbed, evaluate_nuscenes, judge, nuscenes_results, thin, truth_of
from moe_lab.nuscenes_metric import (
    ATTRIBUTES,
    NAMES,
    Truth,
    devkit_scores,
    differences,
    evaluate,
    greedy,
    in_racks,
    match,
    random_world,
    results_table,
    summarise,
)
from moe_lab.params import UserError

thorough = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def compare(boxes, ego, racks, results):
    scores = evaluate(Truth.from_lists(boxes, ego, racks), results)
    assert differences(scores, devkit_scores(boxes, ego, racks, results)) == []
    return scores


def nonempty(boxes, results):
    return any(boxes.values()) and any(results.values())  # otherwise the devkit raises


@thorough
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 30), st.integers(1, 40), st.sampled_from([0, 0.25, 1, 3]))
def test_random_datasets(seed, samples, objects, found, grid):
    world = random_world(seed, samples, objects, found, grid)
    if nonempty(world.boxes, world.results):
        compare(world.boxes, world.ego, world.racks, world.results)


@thorough
@given(st.integers(0, 2**32), st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True), st.sampled_from([0, 0.5]))
def test_crowds_of_few_classes(seed, names, grid):
    "Many boxes of one class in one place: long chains of second choices, high recall."
    rng, world = np.random.default_rng(seed), random_world(seed, 2, 20, 60, grid)
    for lists in (world.boxes, world.results):
        for token, boxes in lists.items():
            for box in boxes:
                step = rng.normal(0, 4, 3) if not grid else rng.integers(-6, 7, 3) * grid
                box |= dict(detection_name=str(rng.choice(names)), translation=(np.array(world.ego[token]) + step).tolist())
    if nonempty(world.boxes, world.results):
        compare(world.boxes, world.ego, {}, world.results)


number = st.floats(-45, 45, allow_nan=False).map(lambda x: round(x, 1))
side = st.sampled_from([0.5, 1.0, 2.0, 3.5])
speed = st.sampled_from([0.0, 1.5, -3.0, math.nan])
single = st.builds(
    lambda x, y, size, rotation, velocity, name, attribute, score, points: dict(
        translation=[x, y, 0.5], size=size, rotation=rotation, velocity=velocity, detection_name=name, attribute_name=attribute,
        detection_score=score, num_pts=points),
    number, number, st.tuples(side, side, side).map(list),
    st.sampled_from([[1.0, 0, 0, 0], [0.0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 1], [0.7, 0.1, 0, 0.7]]),
    st.tuples(speed, speed).map(list), st.sampled_from(NAMES[-5:]), st.sampled_from(ATTRIBUTES),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.sampled_from([-1, 0, 3]))


@thorough
@given(st.lists(st.tuples(st.lists(single, max_size=8), st.lists(single, max_size=12), st.lists(single, max_size=2), st.booleans()), min_size=1, max_size=3))
def test_shrinkable_datasets(samples):
    "Small datasets that hypothesis can simplify: zero and unit quaternions, scores of zero, NaN speed, points on a rack's surface."
    boxes, results, racks, ego = {}, {}, {}, {}
    for k, (true, found, stands, copied) in enumerate(samples):
        token = f"s{k}"
        boxes[token], racks[token], ego[token] = true, stands, [0.5 * k, -1.0, 0.0]
        results[token] = found + (copy.deepcopy(true) if copied else [])
    if nonempty(boxes, results):
        compare(boxes, ego, racks, results)


def test_surface_of_a_rack():
    "Exactly on the surface rounding decides; the devkit is asked, so both agree for any turn of the rack."
    rng = np.random.default_rng(0)
    for _ in range(20):
        turn, place, size = rng.normal(0, 1, 4) * (1, 0, 0, 1), rng.normal(0, 10, 3), rng.uniform(1, 4, 3)
        w, x, y, z = turn / np.linalg.norm(turn)
        heading = np.array([w * w - z * z, 2 * w * z, 0])
        surface = (place + heading * size[1] / 2 * rng.choice([-1, 1])).tolist()
        box = dict(translation=surface, size=[1.0, 1, 1], rotation=[1.0, 0, 0, 0], velocity=[0.0, 0], detection_name="bicycle", attribute_name="")
        rack = dict(translation=place.tolist(), size=size.tolist(), rotation=turn.tolist())
        car = box | dict(detection_name="car", num_pts=1)
        compare({"a": [box, car]}, {"a": [0, 0, 0]}, {"a": [rack]}, {"a": [box | dict(detection_score=0.5), car | dict(detection_score=0.5)]})


@thorough
@given(st.integers(0, 2**32))
def test_parts_equal_evaluations_of_their_own(seed):
    world = random_world(seed, 4, 30, 50, 0.5)
    truth, part = Truth.from_lists(world.boxes, world.ego, world.racks), ["1", "3"]
    some = summarise(match(truth, results_table(truth, world.results)), np.isin(truth.tokens, part))
    alone = evaluate(Truth.from_lists({t: world.boxes[t] for t in part}, world.ego, world.racks), {t: world.results[t] for t in part})
    np.testing.assert_array_equal(some.ap, alone.ap)
    np.testing.assert_array_equal(some.errors, alone.errors)


@thorough
@given(st.lists(st.lists(st.integers(0, 9), max_size=6, unique=True), max_size=40))
def test_greedy_is_the_plain_loop(wishes):
    expected, free = [], set(range(10))
    for wish in wishes:
        expected.append(next((w for w in wish if w in free), -1))
        free.discard(expected[-1])
    rows = np.repeat(np.arange(len(wishes)), [len(w) for w in wishes]).astype(int)
    assert greedy(rows, np.array(sum(wishes, []), int), (len(wishes), 10)).tolist() == expected


def test_order_of_samples_decides_among_equal_scores():
    "The devkit goes through an official split in the order of the result file."
    world = random_world(5, 6, 40, 60, 1.0)
    truth, order = Truth.from_lists(world.boxes, world.ego, world.racks), list(world.results)[::-1]
    ours = evaluate(truth, world.results, order)
    flipped = devkit_scores({t: world.boxes[t] for t in order}, world.ego, world.racks, world.results)
    assert differences(ours, flipped) == []
    assert differences(evaluate(truth, world.results), flipped) != []


@pytest.mark.parametrize("change, words", [
    (lambda r: r.pop("1"), "no entry for sample '1'"), (lambda r: r.update(x=[]), "'x' is not in the ground truth"),
    (lambda r: r.update({"0": r["0"][:1] * 501}), "501 boxes"), (lambda r: r["0"][0].update(size=[1, 2]), "size must be 3"),
    (lambda r: r["0"][0].update(detection_name="tram"), "'tram' is none of"), (lambda r: r["0"][0].update(rotation=[math.nan] * 4), "rotation must be 4"),
    (lambda r: r["0"][0].pop("detection_score"), "missing or negative"), (lambda r: r["0"][0].update(detection_score=math.nan), "detection_score"), (lambda r: r["0"][0].pop("velocity"), "velocity must be 2"),
    (lambda r: r["0"][0].update(translation=None), "translation must be 3")])
def test_messages(change, words):
    world = random_world(4, 2, 20, 40)
    change(world.results)
    with pytest.raises(UserError, match=words) as error:
        evaluate(Truth.from_lists(world.boxes, world.ego, world.racks), world.results)
    assert "\n" not in str(error.value)


def test_a_size_of_zero_where_it_matters():
    world = random_world(1, 1, 60, 0)
    box = next(b for b in world.boxes["0"] if b["detection_name"] == "car" and b["num_pts"])
    box["translation"] = world.ego["0"]
    flat = {k: v for k, v in box.items() if k != "num_pts"} | dict(size=[0.0, 1, 1], detection_score=0.5)
    with pytest.raises(UserError, match="size of zero"):
        evaluate(Truth.from_lists(world.boxes, world.ego, world.racks), {"0": [flat]})


def test_racks_of_another_sample_do_not_count():
    box = dict(translation=[1.0, 0, 0], size=[1.0, 1, 1], rotation=[1.0, 0, 0, 0], velocity=[0.0, 0], detection_name="bicycle", attribute_name="")
    truth = Truth.from_lists({"a": [box], "b": [box]}, {"a": [0, 0, 0], "b": [0, 0, 0]}, {"b": [box]})
    assert in_racks(truth.boxes, truth.racks).tolist() == [False, True]


# --- on the sample data, read by our reader and by the devkit ---------------------------------------------------------

SAMPLES = Path(__file__).parents[1] / "samples" / "nuscenes"


@pytest.fixture(scope="module")
def val():
    return NuScenesDetection(SAMPLES, "val", (32, 64))


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_reader_metric_and_devkit_agree(val, noise):
    truth, results = truth_of(val), disturbed(truth_of(val), val.ground_truth(), noise, seed=1)
    fast, official = evaluate_nuscenes(truth, results), judge(SAMPLES, None, "val", results)
    assert fast.metrics == official.metrics and fast.counts == official.counts


def test_silence(val):
    truth, silent = truth_of(val), {t: [] for t in val.image_ids}
    assert evaluate_nuscenes(truth, silent).metrics == judge(SAMPLES, val.version, val.split, silent).metrics


def test_results_of_another_split(val):
    for call in (lambda r: evaluate_nuscenes(truth_of(val), r), lambda r: judge(SAMPLES, None, "test", r)):
        with pytest.raises(UserError, match="another split"):
            call({t: [] for t in (*val.image_ids, "nowhere")})


def test_oracle_through_the_lidar_frame(val):
    "Targets as detections, from a batch and back to the global frame: nearly the truth, up to the rounding of result files."
    truth, results = truth_of(val), {}
    for k in range(len(val)):
        batch = collate3d([val[k]])
        target = batch["targets"][0]
        results |= nuscenes_results([Detections(target["boxes"], torch.ones(len(target["labels"])), target["labels"])], batch)
    metrics = evaluate_nuscenes(truth, results).metrics
    assert metrics["AP/class/car"] == pytest.approx(1) and metrics["mAP"] == pytest.approx(0.9)  # the sample world has no construction vehicle
    missing = 1 / 10  # what that class adds to each mean over ten, nine and eight classes
    assert metrics["mATE"] == pytest.approx(missing, abs=0.002) and metrics["mASE"] == pytest.approx(missing, abs=0.002)
    assert metrics["mAOE"] == pytest.approx(1 / 9, abs=0.002) and metrics["mAVE"] == pytest.approx(1 / 8, abs=0.01)


TWO = """
import json, sys, torch
from accelerate import PartialState
from moe_lab.boxes import Detections
from moe_lab.evaluate_nuscenes import predict_3d
from moe_lab.nuscenes_metric import NAMES
from moe_lab.params import EvalParams
state = PartialState(cpu=True)
class One(torch.nn.Linear):
    def forward(self, batch): return batch["points"]
    def detect(self, outputs, batch, evaluate):
        return [Detections(torch.ones(len(p), 9), torch.full((len(p),), 0.5), torch.zeros(len(p)).long()) for p in outputs]
class Loader(list):
    class dataset: names = NAMES
batch = lambda k: dict(images=torch.zeros(1, 6, 3, 8, 8), points=[torch.zeros(k, 5)], image_ids=[f"t{k}"], lidar2global=torch.eye(4)[None].double())
mine = Loader(batch(k) for k in range(4) if k % 2 == state.process_index or k == 3)
results = predict_3d(One(1, 1), mine, EvalParams(), without="camera")
open(f"{sys.argv[1]}/{state.process_index}.json", "w").write(json.dumps(results))
state.destroy_process_group()
"""


def test_two_processes_gather_all_results(tmp_path):
    (tmp_path / "program.py").write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tmp_path / "program.py", tmp_path]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second and {t: len(rows) for t, rows in first.items()} == {"t0": 0, "t1": 1, "t2": 2, "t3": 3}


@pytest.mark.parametrize("without", ["camera", "lidar", "lidar/4", "CAM_FRONT", None])
def test_degrading_leaves_the_batch_alone(without):
    batch = toy_batch(2, size=(32, 32))
    images, points = batch["images"].clone(), [p.clone() for p in batch["points"]]
    worse = degrade(batch, without)
    assert set(worse) == set(batch) and torch.equal(batch["images"], images) and all(map(torch.equal, batch["points"], points))
    assert all(p.shape[1] == 5 for p in worse["points"]) and worse["images"].shape == images.shape


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300), st.integers(1, 9), st.text(max_size=5))
def test_thinning(count, factor, token):
    points = torch.arange(count * 5.0).reshape(count, 5)
    kept = thin(points, factor, token)
    assert len(kept) == math.ceil(count / factor) and torch.equal(kept, thin(points, factor, token))
    assert (kept[1:, 0] > kept[:-1, 0]).all() and set(kept[:, 0].tolist()) <= set(points[:, 0].tolist())
