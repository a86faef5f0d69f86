"""The committed nuScenes samples: what the generator makes, byte for byte; what the devkit reads, counts and judges."""
import contextlib
import io
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import printed_twice, regenerated_otherwise
from nuscenes.eval.common.loaders import get_samples_of_custom_split, load_gt_of_sample_tokens
from nuscenes.eval.detection.config import config_factory
from nuscenes.eval.detection.data_classes import DetectionBox
from nuscenes.eval.detection.evaluate import DetectionEval
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.data_classes import LidarPointCloud
from nuscenes.utils.geometry_utils import points_in_box, transform_matrix, view_points
from PIL import Image
from pyquaternion import Quaternion

from moe_lab.data.synthetic_nuscenes import CAMERAS, FRAMES, NEAR, PREFIX, SPLITS, VERSION

ROOT = Path(__file__).parent.parent / "samples" / "nuscenes"
CLASSES = {"car", "truck", "bus", "trailer", "pedestrian", "motorcycle", "bicycle", "traffic_cone", "barrier"}
CONDITIONS = {"day", "night", "rain", "fog"}

# One key frame of each condition, made in a fresh process: prints the digest of its pictures, points and poses.
DIGEST = """
import hashlib, json, tempfile
from pathlib import Path
from moe_lab.data.synthetic_nuscenes import SENSORS, avenue, fill_street, generator, record_frame, set_off
out, digest = Path(tempfile.mkdtemp()), hashlib.sha256()
for channel in SENSORS:
    for kind in ('samples', 'sweeps'): (out / kind / channel).mkdir(parents=True)
for i, condition in enumerate(('day', 'night', 'rain', 'fog')):
    rng = generator(7, i)
    rows, poses, _, pixels = record_frame(fill_street(rng, set_off(rng, avenue(rng, condition))), out, i, 9, (7, i), 224, 126)
    digest.update(json.dumps([rows, poses, pixels.tolist()]).encode())
    for row in rows: digest.update((out / row['filename']).read_bytes())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def nusc() -> NuScenes:
    return NuScenes(VERSION, str(ROOT), verbose=False)


@pytest.fixture(scope="module")
def judged(nusc, tmp_path_factory):
    "Judge a result by the devkit: split and boxes per sample to its metrics."
    def judge(split: str, results: dict) -> dict:
        out = tmp_path_factory.mktemp("judge")
        meta = dict(use_camera=True, use_lidar=True, use_radar=False, use_map=False, use_external=False)
        (out / "results.json").write_text(json.dumps(dict(meta=meta, results=results)))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return DetectionEval(nusc, config_factory("detection_cvpr_2019"), str(out / "results.json"), PREFIX + split, str(out), verbose=False).main(render_curves=False)
    return judge


def tokens_of(nusc: NuScenes, split: str) -> list:
    return get_samples_of_custom_split(split_name=PREFIX + split, nusc=nusc)


def oracle(nusc: NuScenes, split: str) -> dict:
    "The truth that the metric keeps, as a result."
    with contextlib.redirect_stderr(io.StringIO()):
        truth = load_gt_of_sample_tokens(nusc, tokens_of(nusc, split), DetectionBox, verbose=False)
    row = lambda t, b: dict(sample_token=t, translation=b.translation, size=b.size, rotation=b.rotation, velocity=np.nan_to_num(b.velocity).tolist(),
                            detection_name=b.detection_name, detection_score=1., attribute_name=b.attribute_name)
    return {t: [row(t, b) for b in truth[t] if b.num_pts > 0] for t in truth.sample_tokens}


def lidar_of(nusc: NuScenes, sample: dict) -> tuple[np.ndarray, list]:
    "Points (3, n) and boxes of a key frame, both in the LiDAR's frame."
    path, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
    return LidarPointCloud.from_file(path).points[:3].astype(float), boxes


def test_regenerated_byte_for_byte(tmp_path):
    assert regenerated_otherwise("nuscenes", tmp_path) == []


def test_same_bytes_without_vector_instructions():
    "numpy picks its loops by processor; the oldest x86-64 must give what this one gives."
    here, oldest = printed_twice(DIGEST)
    assert here == oldest


def test_devkit_loads_thirteen_tables(nusc):
    assert len(list((ROOT / VERSION).glob("*.json"))) == 14    # and splits.json
    assert all(nusc.get(table, getattr(nusc, table)[-1]["token"]) for table in nusc.table_names)
    assert {s["nbr_samples"] for s in nusc.scene} == {FRAMES} and len(nusc.sample) == FRAMES * sum(SPLITS.values())


def test_splits_share_no_scene_and_have_all_conditions(nusc):
    splits = json.loads((ROOT / VERSION / "splits.json").read_text())
    conditions = {s["name"]: s["description"].split(":")[0] for s in nusc.scene}
    assert {name: len(scenes) for name, scenes in splits.items()} == {PREFIX + s: n for s, n in SPLITS.items()}
    assert sorted(n for scenes in splits.values() for n in scenes) == sorted(conditions)
    for scenes in splits.values():
        assert set(Counter(conditions[n] for n in scenes).values()) == {len(scenes) // 4} and {conditions[n] for n in scenes} == CONDITIONS


def test_chains_are_whole(nusc):
    for scene in nusc.scene:
        token, seen = scene["first_sample_token"], []
        while token:
            seen.append(nusc.get("sample", token))
            token = seen[-1]["next"]
        assert len(seen) == FRAMES and seen[-1]["token"] == scene["last_sample_token"]
        assert set(np.diff([s["timestamp"] for s in seen])) == {500_000}
    for instance in nusc.instance:
        token, count = instance["first_annotation_token"], 0
        while token:
            row, count = nusc.get("sample_annotation", token), count + 1
            assert row["instance_token"] == instance["token"]
            last, token = row["token"], row["next"]
        assert (last, count) == (instance["last_annotation_token"], instance["nbr_annotations"])


def test_every_key_frame_has_its_files_and_a_sweep(nusc):
    for row in nusc.sample_data:
        assert (ROOT / row["filename"]).is_file() and row["timestamp"] == nusc.get("ego_pose", row["ego_pose_token"])["timestamp"]
    for sample in nusc.sample:
        assert set(sample["data"]) == {*CAMERAS, "LIDAR_TOP"}
        before = nusc.get("sample_data", nusc.get("sample_data", sample["data"]["LIDAR_TOP"])["prev"])
        assert not before["is_key_frame"] and sample["timestamp"] - before["timestamp"] == 250_000
        assert all(abs(nusc.get("sample_data", t)["timestamp"] - sample["timestamp"]) <= 25_000 for t in sample["data"].values())


def test_files_are_of_their_kind(nusc):
    for row in nusc.sample_data[::37]:
        if row["fileformat"] == "jpg":
            assert Image.open(ROOT / row["filename"]).size == (row["width"], row["height"]) == (224, 126)
        else:
            points = np.fromfile(ROOT / row["filename"], "<f4").reshape(-1, 5)
            assert len(points) > 400 and np.isfinite(points).all() and points[:, 3].min() >= 0 and points[:, 3].max() <= 255
            assert set(points[:, 4]) <= set(range(32)) and np.abs(points[:, :2]).max() < 45


def test_points_are_counted_as_the_devkit_counts(nusc):
    for sample in nusc.sample[::7]:
        points, boxes = lidar_of(nusc, sample)
        for box in boxes:
            said = nusc.get("sample_annotation", box.token)["num_lidar_pts"]
            assert said == points_in_box(box, points).sum(), box.token


def to_image(nusc: NuScenes, sample: dict, channel: str, points: np.ndarray) -> np.ndarray:
    "LiDAR points (3, n) of a key frame to pixels and depth of a camera, by way of both ego poses."
    for code, inverse in ((sample["data"]["LIDAR_TOP"], False), (sample["data"][channel], True)):
        data = nusc.get("sample_data", code)
        chain = [nusc.get("calibrated_sensor", data["calibrated_sensor_token"]), nusc.get("ego_pose", data["ego_pose_token"])]
        for part in reversed(chain) if inverse else chain:
            points = (transform_matrix(part["translation"], Quaternion(part["rotation"]), inverse) @ np.vstack([points, np.ones(points.shape[1])]))[:3]
    return np.vstack([view_points(points, np.array(chain[0]["camera_intrinsic"]), True)[:2], points[2:]])


def test_points_of_an_object_fall_into_its_projected_box(nusc):
    checked = 0
    for sample in nusc.sample[3::40]:
        points, boxes = lidar_of(nusc, sample)
        for box in boxes:
            mine = points[:, points_in_box(box, points)]
            for channel in CAMERAS if mine.shape[1] > 4 else ():
                code = sample["data"][channel]
                _, seen, lens = nusc.get_sample_data(code, selected_anntokens=[box.token])
                if not seen or (seen[0].corners()[2] < 1).any():
                    continue
                x, y, depth = to_image(nusc, sample, channel, mine)
                frame = view_points(seen[0].corners(), lens, True)[:2]
                assert (depth > 0).all()
                assert (x > frame[0].min() - .5).all() and (x < frame[0].max() + .5).all() and (y > frame[1].min() - .5).all() and (y < frame[1].max() + .5).all()
                checked += mine.shape[1]
    assert checked > 500


def test_velocities_come_from_motion(nusc):
    speeds = defaultdict(list)
    for row in nusc.sample_annotation[::3]:
        if row["attribute_tokens"] and row["prev"] and row["next"]:
            speeds[nusc.get("attribute", row["attribute_tokens"][0])["name"]].append(np.linalg.norm(nusc.box_velocity(row["token"])[:2]))
    assert min(speeds["vehicle.moving"]) > .2 and max(speeds["vehicle.moving"]) < 15 and min(speeds["pedestrian.moving"]) > .2
    assert max(speeds["vehicle.parked"] + speeds["vehicle.stopped"] + speeds["pedestrian.standing"] + speeds["cycle.without_rider"]) < .05


def test_classes_surround_the_ego(nusc):
    count, ways, levels = Counter(), Counter(), Counter()
    for sample in nusc.sample:
        for box in lidar_of(nusc, sample)[1]:
            row = nusc.get("sample_annotation", box.token)
            assert np.linalg.norm(box.center[:2]) < NEAR + 2
            levels[row["visibility_token"]] += 1
            if row["num_lidar_pts"]:
                count[row["category_name"].split(".")[1]] += 1
                ways[int((np.arctan2(box.center[1], box.center[0]) + np.pi) // (np.pi / 3)) % 6] += 1
    assert min(count.values()) > 1.2 * len(nusc.sample) and len(count) == len(CLASSES)
    assert min(ways.values()) > .08 * sum(ways.values()) and set(levels) == {"1", "2", "3", "4"}


@pytest.mark.parametrize("split", ["val", "test"])
def test_oracle_reaches_the_ceiling(nusc, judged, split):
    "There is no construction vehicle: AP 0 and errors of 1 for one class of ten bound mAP by .9; NDS by .9 and the mean of errors."
    result = judged(split, oracle(nusc, split))
    print(f"{split}: oracle mAP {result['mean_ap']:.3f}, NDS {result['nd_score']:.3f}")
    assert all(result["mean_dist_aps"][name] > .999 for name in CLASSES)
    assert result["mean_ap"] == pytest.approx(.9, abs=1e-3) and .89 < result["nd_score"] <= .9


def test_constant_predictor_gets_nothing(nusc, judged):
    "The average scene around every ego: one box of each class on a lattice of sixteen places."
    results = {}
    for token in tokens_of(nusc, "val"):
        data = nusc.get("sample_data", nusc.get("sample", token)["data"]["LIDAR_TOP"])
        pose = nusc.get("ego_pose", data["ego_pose_token"])
        turn, at = Quaternion(pose["rotation"]), np.array(pose["translation"])
        places = [turn.rotate(np.array([x, y, .8])) + at for x in (-15., -5., 5., 15.) for y in (-8., -3., 3., 8.)]
        results[token] = [dict(sample_token=token, translation=p.tolist(), size=[1.8, 4.4, 1.6], rotation=pose["rotation"], velocity=[0., 0.], detection_name=name,
                               detection_score=.5, attribute_name="") for name in sorted(CLASSES) for p in places]
    result = judged("val", results)
    print(f"constant: mAP {result['mean_ap']:.3f}, NDS {result['nd_score']:.3f}")
    assert result["mean_ap"] < .03


def test_size():
    assert sum(p.stat().st_size for p in ROOT.rglob("*.jpg")) <= 6_500_000
