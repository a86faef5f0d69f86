"""nuScenes: the numbers are the devkit's own, sweeps of a moving car agree about what stands still, every augmentation keeps pixels, points and boxes
together, damage is named, and rare classes are shown more often."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_lab.boxes3d import (FIELDS, corners, from_global, matrix_to_quaternion, points_in_boxes, pose_matrix, project, quaternion_to_matrix,
                             to_global, transform_boxes, transform_points)
from moe_lab.data.core import make_loader
from moe_lab.data.multiview import draw_motion, draw_view, motion_matrix, move_scene, view_cameras, view_matrix
from moe_lab.data.nuscenes import DETECTION_NAMES, TABLES, NuScenesDetection, class_balanced, find_split, read_cloud, read_columns
from moe_lab.data.scene import CAMERAS, make_scene, ring_cameras
from moe_lab.params import AugmentParams, SceneParams, UserError
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.data_classes import LidarPointCloud
from pyquaternion import Quaternion

SAMPLE = Path(__file__).parent.parent / "samples/nuscenes"
SIZE = (64, 128)
SCENES = {"mini_train": ["scene-0061", "scene-0553"], "mini_val": ["scene-0103"]}
STATIC, DRIVEN = np.array([12.0, 9, 0.9]), np.array([-6.0, 20, 0.8])   # where two cars stand or start, in each scene's own piece of the city
EVERYWHERE = SceneParams(point_range=(-200, -200, -50, 200, 200, 50), sweeps=2)


# --- a world of three short drives -------------------------------------------------------------------------------------------------

class Writer:
    """Three scenes of four key frames with two sweeps between them: a car that turns while it drives, one object that stands, one that moves."""

    def __init__(self, root: Path, version: str = "v1.0-mini", scenes=SCENES, sweeps: bool = True, gap: float = 0.5):
        self.root, self.folder, self.gap = root, root / version, gap
        self.tables = {name: [] for name in TABLES}
        self.rng = np.random.default_rng(0)
        self.scenes = scenes
        self.fixed()
        for number, name in enumerate(n for names in scenes.values() for n in names):
            self.scene(number, name, sweeps)
        self.save()

    def add(self, table: str, token: str, **row) -> str:
        self.tables[table].append(dict(token=token, **row))
        return token

    def fixed(self) -> None:
        for name in ("vehicle.car", "human.pedestrian.adult", "static_object.bicycle_rack", "animal"):
            self.add("category", name, name=name, description="")
        self.add("attribute", "moving", name="vehicle.moving", description="")
        self.add("visibility", "4", level="v80-100", description="")
        self.add("log", "log", logfile="n", vehicle="n", date_captured="2026-01-01", location="singapore-onenorth")
        self.add("map", "map", log_tokens=["log"], category="semantic_prior", filename="maps/map.png")
        (self.root / "maps").mkdir(parents=True)
        (self.root / "maps/map.png").touch()
        lidar = Quaternion(axis=[0, 0, 1], degrees=-90) * Quaternion(axis=[1, 0.2, 0], degrees=1)
        self.sensor("LIDAR_TOP", [0.9, 0, 1.8], lidar, [])
        for camera, degrees in zip(CAMERAS, (0, -55, 55, 180, 110, -110)):
            turn = Quaternion(axis=[0, 0, 1], degrees=degrees) * Quaternion(matrix=np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0.0]]))
            self.sensor(camera, [1.5 * np.cos(np.radians(degrees)), np.sin(np.radians(degrees)), 1.5], turn, [[120, 0, 80], [0, 120, 45], [0, 0, 1]])

    def sensor(self, channel: str, translation, rotation, intrinsic) -> None:
        self.add("sensor", channel, channel=channel, modality="lidar" if channel == "LIDAR_TOP" else "camera")
        self.add("calibrated_sensor", channel, sensor_token=channel, translation=list(map(float, translation)), rotation=list(rotation.elements),
                 camera_intrinsic=intrinsic)

    def pose(self, seconds: float, origin: np.ndarray) -> tuple[np.ndarray, Quaternion]:
        return origin + [4 * seconds, 8 * seconds, 0], Quaternion(axis=[0, 0, 1], degrees=60 + 12 * seconds) * Quaternion(axis=[0, 1, 0], degrees=0.5)

    def data(self, channel: str, sample: str, seconds: float, origin, key: bool, prev: str, content: bytes) -> str:
        time = 1_600_000_000_000_000 + round(seconds * 1e6) + (11_000 if channel != "LIDAR_TOP" else 0)
        translation, rotation = self.pose(seconds + (0.011 if channel != "LIDAR_TOP" else 0), origin)
        token, ending = f"{sample}-{channel}-{seconds:.3f}", "pcd.bin" if channel == "LIDAR_TOP" else "jpg"
        name = f"{'samples' if key else 'sweeps'}/{channel}/{token}.{ending}"
        self.add("ego_pose", token, translation=list(translation), rotation=list(rotation.elements), timestamp=time)
        width, height = (0, 0) if channel == "LIDAR_TOP" else (160, 90)
        self.add("sample_data", token, sample_token=sample, ego_pose_token=token, calibrated_sensor_token=channel, filename=name, fileformat=ending,
                 width=width, height=height, timestamp=time, is_key_frame=key, prev=prev, next="")
        if prev:
            next(r for r in self.tables["sample_data"] if r["token"] == prev)["next"] = token
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_bytes(content)
        return token

    def sweep(self, seconds: float, origin) -> bytes:
        """Points on both objects and on the ground, some from the own roof, seen from where the car is."""
        ego, sensor = self.pose(seconds, origin), next(r for r in self.tables["calibrated_sensor"] if r["token"] == "LIDAR_TOP")
        inverse = np.linalg.inv(pose_matrix(np.array(ego[0]), ego[1].elements) @ pose_matrix(np.array(sensor["translation"]), np.array(sensor["rotation"])))
        spread = self.rng.uniform(-0.45, 0.45, (30, 3)) * [4, 1.8, 1.5]
        ground = np.c_[self.rng.uniform(-30, 30, (40, 2)), np.zeros(40)]
        city = np.concatenate([spread + origin + STATIC, spread + origin + DRIVEN + [2 * seconds, 0, 0], ground + origin])
        xyz = np.concatenate([city @ inverse[:3, :3].T + inverse[:3, 3], self.rng.uniform(-0.9, 0.9, (5, 3))])
        return np.c_[xyz, self.rng.integers(0, 256, len(xyz)), np.arange(len(xyz)) % 32].astype("<f4").tobytes()

    def scene(self, number: int, name: str, sweeps: bool) -> None:
        origin, before, tokens = np.array([600.0 + 500 * number, 1600, 0]), {}, [f"{name}-{k}" for k in range(4)]
        self.add("scene", name, name=name, description=("night: a", "Rain, cars", "fog: b")[number % 3], log_token="log", nbr_samples=4,
                 first_sample_token=tokens[0], last_sample_token=tokens[-1])
        image = cv2.imencode(".jpg", self.rng.integers(0, 256, (90, 160, 3), np.uint8))[1].tobytes()
        for k, token in enumerate(tokens):
            start = self.gap * k
            self.add("sample", token, timestamp=1_600_000_000_000_000 + round(start * 1e6), scene_token=name,
                     prev=tokens[k - 1] if k else "", next=tokens[k + 1] if k < 3 else "")
            for channel in CAMERAS:
                before[channel] = self.data(channel, token, start, origin, True, before.get(channel, ""), image)
            for step in (0, self.gap / 3, 2 * self.gap / 3) if sweeps else (0,):
                points, previous = self.sweep(start + step, origin), before.get("LIDAR_TOP", "")
                before["LIDAR_TOP"] = self.data("LIDAR_TOP", token, start + step, origin, step == 0, previous, points)
            self.annotations(k, token, tokens, origin, start)

    def annotations(self, k: int, sample: str, tokens, origin, seconds: float) -> None:
        things = [("stands", "vehicle.car", STATIC, 30, range(4)), ("drives", "vehicle.car", DRIVEN + [2 * seconds, 0, 0], 30, range(4)),
                  ("walks", "human.pedestrian.adult", [3, 4 + seconds, 1], 0, (1, 2)), ("rack", "static_object.bicycle_rack", [8, 8, 0.5], 9, (1,)),
                  ("dog", "animal", [5, 5, 0.4], 3, (0, 1))]
        for name, category, place, points, present in things:
            link = lambda i, name=name, present=present: f"{tokens[i]}-{name}" if i in present else ""
            if k in present:
                self.add("sample_annotation", link(k), sample_token=sample, instance_token=f"{tokens[0]}-{name}", visibility_token="4",
                         attribute_tokens=["moving"] if name == "drives" else [], translation=list(map(float, origin + place)), size=[1.8, 4, 1.5],
                         rotation=[1.0, 0.0, 0.0, 0.0], num_lidar_pts=points, num_radar_pts=0, prev=link(k - 1), next=link(k + 1))
            if k == present[0]:
                self.add("instance", f"{tokens[0]}-{name}", category_token=category, nbr_annotations=len(present),
                         first_annotation_token=link(present[0]), last_annotation_token=link(present[-1]))

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, rows in self.tables.items():
            (self.folder / f"{name}.json").write_text(json.dumps(rows))
        (self.folder / "splits.json").write_text(json.dumps(self.scenes))


@pytest.fixture(scope="session")
def mini(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("nuscenes") / "data"
    Writer(root)
    return root


@pytest.fixture(scope="session")
def devkit(mini) -> NuScenes:
    return NuScenes("v1.0-mini", str(mini), verbose=False)


@pytest.fixture()
def copy(mini, tmp_path) -> Path:
    "One that may be damaged."
    return shutil.copytree(mini, tmp_path / "data")


def open_all(root: Path, split: str = "train", **more) -> NuScenesDetection:
    return NuScenesDetection(root, split, SIZE, scene=EVERYWHERE, **more)


# --- the devkit's own numbers --------------------------------------------------------------------------------------------------------

def test_boxes_are_where_the_devkit_puts_them(mini, devkit):
    data = open_all(mini)
    for row in data.rows:
        boxes, labels = data.objects(int(row), empty=True)
        sample = devkit.get("sample", str(data.columns.tokens[row]))
        expected = [b for b in devkit.get_sample_data(sample["data"]["LIDAR_TOP"])[1] if b.name in ("vehicle.car", "human.pedestrian.adult")]
        assert len(boxes) == len(expected) and [DETECTION_NAMES[k] for k in labels] == [b.name.split(".")[1].replace("adult", "pedestrian") for b in expected]
        for box, other in zip(boxes, expected):
            np.testing.assert_allclose(box[:3], other.center, atol=1e-4)
            np.testing.assert_allclose(box[3:6], other.wlh[[1, 0, 2]], atol=1e-5)
            front = other.orientation.rotation_matrix[:2, 0]
            np.testing.assert_allclose(box[6], np.arctan2(front[1], front[0]), atol=1e-4)


def test_velocities_are_the_devkits(mini, devkit):
    data = open_all(mini)
    for row in data.rows:
        anns = [devkit.get("sample_annotation", t) for t in devkit.get("sample", str(data.columns.tokens[row]))["anns"]]
        known = [devkit.box_velocity(a["token"])[:2] for a in anns if a["category_name"] in ("vehicle.car", "human.pedestrian.adult")]
        back = data.columns.lidar.pose[data.columns.key[row]][:3, :3]
        moved = [(back.T @ [*v, 0])[:2] for v in known]
        np.testing.assert_allclose(data.objects(int(row), empty=True)[0][:, 7:], moved, atol=1e-4)
        truth = data.ground_truth()[str(data.columns.tokens[row])]
        np.testing.assert_allclose([t["velocity"] for t in truth], known, atol=1e-9)


@pytest.mark.parametrize("gap", [0.5, 1.4, 1.5, 1.6])
def test_velocities_across_long_gaps(tmp_path, gap):
    "Centred differences may span 3 s, one-sided ones 1.5 s; beyond that nobody knows."
    root = tmp_path / "data"
    Writer(root, gap=gap, sweeps=False)
    devkit, found = NuScenes("v1.0-mini", str(root), verbose=False), read_columns(root / "v1.0-mini").boxes
    expected = np.array([devkit.box_velocity(a["token"])[:2] for a in devkit.sample_annotation])
    np.testing.assert_allclose(found.velocity, expected, atol=1e-9)
    assert np.isnan(expected).any() and np.isnan(expected).all() == (gap > 1.5)


@pytest.mark.parametrize("sweeps", [0, 1, 2, 9])
def test_clouds_are_the_devkits(mini, devkit, sweeps):
    columns = read_columns(mini / "v1.0-mini")
    for k, token in enumerate(columns.tokens):
        points, times = LidarPointCloud.from_file_multisweep(devkit, devkit.get("sample", str(token)), "LIDAR_TOP", "LIDAR_TOP", sweeps + 1)
        found = read_cloud(mini, columns.lidar, columns.key[k], sweeps)
        assert len(found) == points.nbr_points()
        np.testing.assert_allclose(found[:, :3], points.points[:3].T, atol=1e-4)
        np.testing.assert_allclose(found[:, 3] * 255, points.points[3], atol=1e-3)
        np.testing.assert_allclose(found[:, 4], times[0], atol=1e-6)


def test_pixels_are_the_devkits(mini, devkit):
    """A box's corners, through `lidar2image`, are where the devkit's camera boxes are projected (it goes through the camera's own ego pose)."""
    data = open_all(mini)
    row = int(data.rows[1])
    sample, boxes = devkit.get("sample", str(data.columns.tokens[row])), data.objects(row, empty=True)[0]
    checked = 0
    for camera, matrix in zip(CAMERAS, data.lidar2image(row)):
        _, found, lens = devkit.get_sample_data(sample["data"][camera])
        for other in found:
            camera2lidar = np.linalg.inv(matrix) @ np.block([[lens, np.zeros((3, 1))], [np.zeros(3), 1]])
            own = [b for b in boxes if np.allclose(b[:3], transform_points(other.center[None], camera2lidar)[0], atol=1e-3)]
            pixels = lens @ other.corners()
            for box in own:
                # the box stands upright in the LiDAR frame and leans by the car's pitch in the city: a few centimetres at its corners
                np.testing.assert_allclose(project(corners(box[None])[0], matrix)[:, :2], (pixels[:2] / pixels[2]).T, atol=1.5)
                np.testing.assert_allclose(project(box[None, :3], matrix)[0, :2], (lens @ other.center)[:2] / other.center[2], atol=0.01)
                checked += 1
    assert checked >= 2


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no sample world")
def test_the_sample_world_is_read_as_the_devkit_reads_it():
    nusc, data = NuScenes("v1.0-mini", str(SAMPLE), verbose=False), NuScenesDetection(SAMPLE, "val", SIZE, scene=EVERYWHERE)
    for row in map(int, data.rows[::9]):
        sample = nusc.get("sample", str(data.columns.tokens[row]))
        anns = [nusc.get("sample_annotation", t) for t in sample["anns"]]
        kept = [a for a in anns if a["num_lidar_pts"] + a["num_radar_pts"] > 0 and category_to_detection_name(a["category_name"])]
        boxes, own = data.objects(row)[0], {b.token: b for b in nusc.get_sample_data(sample["data"]["LIDAR_TOP"])[1]}
        np.testing.assert_allclose(boxes[:, :3], [own[a["token"]].center for a in kept], atol=1e-4)
        key = data.raw(row)[1]
        assert points_in_boxes(key[key[:, 4] == 0], boxes).sum(0).tolist() == [a["num_lidar_pts"] for a in kept]
        points, times = LidarPointCloud.from_file_multisweep(nusc, sample, "LIDAR_TOP", "LIDAR_TOP", 3)
        np.testing.assert_allclose(key[:, :3], points.points[:3].T, atol=1e-4)
        np.testing.assert_allclose(key[:, 4], times[0], atol=1e-6)


# --- sweeps ---------------------------------------------------------------------------------------------------------------------------

def test_what_stands_still_is_in_one_place(mini):
    data = open_all(mini)
    last = [int(r) for r in data.rows if str(data.columns.tokens[r]).endswith("-3")]
    for row in last:
        cloud = read_cloud(mini, data.columns.lidar, data.columns.key[row], sweeps=8)
        (stands, drives), _ = data.objects(row)
        assert len(np.unique(cloud[:, 4])) == 9
        for age in np.unique(cloud[:, 4]):
            old = cloud[cloud[:, 4] == age]
            assert points_in_boxes(old, stands[None], 0.05).sum() == 30, "the standing car has all its points, however old"
            assert (points_in_boxes(old, drives[None], 0.05).sum() == 30) == (age < 0.01) or 0.01 < age < 0.2, "the driving car leaves a trail"
            where = drives.copy()
            where[:2] -= age * drives[7:]
            assert points_in_boxes(old, where[None], 0.05).sum() >= 30, "the driving car was where its velocity says"


def test_ages_count_back_from_zero(mini):
    data = open_all(mini)
    ages = np.unique(data[1]["points"][:, 4])
    np.testing.assert_allclose(ages, [0, 1 / 6, 1 / 3], atol=1e-4)
    assert np.unique(data[0]["points"][:, 4]).tolist() == [0], "a scene's first frame has nothing before it"
    assert (data[1]["points"][:, 3].min() >= 0) and (0.5 < data[1]["points"][:, 3].max() <= 1)


# --- augmentation ---------------------------------------------------------------------------------------------------------------------

numbers = dict(scale=st.floats(0, 0.5), degrees=st.floats(0, 30), mirror=st.sampled_from([0.0, 1.0]), shift=st.floats(0, 0.3))


def random_scene(rng) -> dict:
    boxes = np.c_[rng.uniform(-15, 15, (6, 2)), rng.uniform(-1, 1, 6), rng.uniform(0.5, 5, (6, 3)), rng.uniform(-4, 4, 6), rng.normal(size=(6, 2))]
    inside = (rng.dirichlet(np.ones(8), (6, 20)) @ corners(boxes)).reshape(-1, 3)
    return make_scene(np.zeros((6, 90, 160, 3), np.uint8), np.c_[inside, np.zeros((120, 2))], ring_cameras((90, 160)), boxes=boxes, labels=np.zeros(6))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rotation=st.floats(0, 3.1), stretch=st.floats(0, 0.3), flip=st.sampled_from([0.0, 0.5, 1.0]), **numbers)
def test_every_pixel_follows_its_point(seed, rotation, stretch, flip, scale, degrees, mirror, shift):
    """The points of an object, through the augmented matrix, are the augmented pixels; and they are still in its box."""
    rng = np.random.default_rng(seed)
    scene = random_scene(rng)
    views = [draw_view(rng, (90, 160), SIZE, scale, shift, mirror, degrees) for _ in CAMERAS]
    images, matrices = view_cameras(list(scene["images"]), scene["lidar2image"], views, SIZE)
    moved = move_scene(scene | dict(images=images, lidar2image=matrices), draw_motion(rng, rotation, stretch, 0.5, flip))
    for camera in range(6):
        before = project(scene["points"].astype(float), scene["lidar2image"][camera].astype(float))
        seen = before[:, 2] > 1
        flat = np.c_[before[seen, :2], np.ones((seen.sum(), 2))] @ view_matrix((90, 160), views[camera], SIZE).T
        after = project(moved["points"], moved["lidar2image"][camera])
        np.testing.assert_allclose(after[seen, :2], flat[:, :2], atol=0.05, rtol=1e-4)
    assert points_in_boxes(moved["points"], moved["boxes"], 0.005)[np.arange(120), np.repeat(np.arange(6), 20)].all()


@settings(max_examples=40, deadline=None)
@given(angle=st.floats(-4, 4), scale=st.floats(0.5, 1.5), flip_x=st.booleans(), flip_y=st.booleans(), seconds=st.floats(0.1, 2))
def test_velocities_move_with_their_boxes(angle, scale, flip_x, flip_y, seconds):
    motion, rng = motion_matrix(angle, scale, (1, 2, 0.5), flip_x, flip_y), np.random.default_rng(0)
    now = random_scene(rng)["boxes"].astype(float)
    later = now.copy()
    later[:, :2] += seconds * now[:, 7:]
    before, after = transform_boxes(now, motion), transform_boxes(later, motion)
    np.testing.assert_allclose(after[:, :2] - before[:, :2], seconds * before[:, 7:], atol=1e-6)


def test_a_painted_point_is_found_at_its_pixel():
    "The image itself, not only its matrix: one white pixel block, wherever the view takes it."
    for seed in range(30):
        rng = np.random.default_rng(seed)
        view = draw_view(rng, (90, 160), SIZE, 0.3, 0.1, 0.5, 20)
        x, y = rng.integers(40, 120), rng.integers(40, 75)
        image = np.zeros((90, 160, 3), np.uint8)
        image[y - 2 : y + 3, x - 2 : x + 3] = 255
        found, matrices = view_cameras([image], np.eye(4)[None], [view], SIZE)
        u, v = (matrices[0] @ [x + 0.5, y + 0.5, 1, 1])[:2]
        weight = found[0, ..., 0].astype(float)
        if 6 < u < SIZE[1] - 6 and 6 < v < SIZE[0] - 6:
            rows, cols = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
            np.testing.assert_allclose([(cols * weight).sum() / weight.sum(), (rows * weight).sum() / weight.sum()], [u, v], atol=0.25)


def test_augmented_samples_of_the_reader_fit(mini):
    wild = EVERYWHERE.model_copy(update=dict(rotation=3.0, scale=0.2, translate=1.0, flip=0.5, tilt=10.0))
    changes = AugmentParams(scale=0.3, translate=0.1, flip=0.5, hsv_v=0.4)
    plain, moving = open_all(mini), NuScenesDetection(mini, "train", SIZE, changes, scene=wild)
    for epoch in range(4):
        for i in range(len(plain)):
            still, moved = plain[i], moving[epoch, i]
            assert len(moved["points"]) == len(still["points"]) and moved["labels"].tolist() == still["labels"].tolist()
            was, now = (points_in_boxes(s["points"], s["boxes"], m) for s, m in ((still, 0.02), (moved, 0.05)))
            assert (now | ~was).all()
    assert (moved["lidar2global"] == still["lidar2global"]).all()
    assert not np.array_equal(moving[0, 1]["images"], moving[1, 1]["images"])
    again = NuScenesDetection(mini, "train", SIZE, changes, scene=wild, cache=False)
    assert np.array_equal(moving[2, 1]["images"], again[2, 1]["images"])


def test_without_augmentation_nothing_is_random(mini):
    wild = EVERYWHERE.model_copy(update=dict(rotation=3.0, flip=1.0, tilt=10.0))
    a, b = NuScenesDetection(mini, "val", SIZE, scene=wild)[0, 1], open_all(mini, "val")[7, 1]
    assert all(np.array_equal(a[k], b[k], equal_nan=a[k].dtype.kind == "f") for k in ("images", "points", "boxes", "lidar2image"))


# --- boxes there and back ------------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_global_and_back(seed):
    rng = np.random.default_rng(seed)
    pose = pose_matrix(rng.uniform(-3000, 3000, 3), np.array([1, *rng.normal(0, 0.01, 2), rng.normal()]))
    boxes = np.c_[rng.uniform(-50, 50, (5, 3)), rng.uniform(0.3, 10, (5, 3)), rng.uniform(-3.1, 3.1, 5), rng.normal(0, 5, (5, 2))]
    back = from_global(*to_global(boxes, pose), np.linalg.inv(pose))
    np.testing.assert_allclose(back[:, :7], boxes[:, :7], atol=2e-5)
    np.testing.assert_allclose(back[:, 7:], boxes[:, 7:], atol=0.1)
    assert len(FIELDS) == boxes.shape[1]


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: np.linalg.norm(q) > 0.1))
def test_quaternions_are_pyquaternions(q):
    matrix = quaternion_to_matrix(np.array(q))
    np.testing.assert_allclose(matrix, Quaternion(q).rotation_matrix, atol=1e-12)
    np.testing.assert_allclose(quaternion_to_matrix(matrix_to_quaternion(matrix)), matrix, atol=1e-7)


# --- what is shown -------------------------------------------------------------------------------------------------------------------

def test_boxes_without_points_are_not_asked_for(mini):
    data = open_all(mini)
    assert {DETECTION_NAMES[k] for i in range(len(data)) for k in data[i]["labels"]} == {"car"}
    assert "pedestrian" in {t["detection_name"] for boxes in data.ground_truth().values() for t in boxes if t["num_pts"] == 0}
    assert sum(map(len, data.bicycle_racks().values())) == 2


def test_range(mini):
    near = NuScenesDetection(mini, "train", SIZE, scene=SceneParams(point_range=(-15, -15, -3, 15, 15, 3)))
    for i in range(len(near)):
        points, boxes = near[i]["points"], near[i]["boxes"]
        assert (np.abs(points[:, :2]) <= 15).all() and (np.abs(boxes[:, :2]) <= 15).all()
        assert len(points) < len(open_all(mini)[i]["points"])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 6))
def test_balanced_classes(seed, samples, classes):
    present = np.random.default_rng(seed).random((samples, classes)) < 0.4
    rows = class_balanced(present, seed)
    assert rows.tolist() == class_balanced(present, seed).tolist()
    if present.any():
        each = present.sum() // present.any(0).sum()
        assert len(rows) == each * present.any(0).sum() and present[rows].any(1).all()
        assert all((present[rows][:, c]).sum() >= each for c in np.flatnonzero(present.any(0)))


def test_class_balance_lengthens_the_epoch_of_the_reader(mini):
    data = NuScenesDetection(mini, "train", SIZE, AugmentParams(flip=0.5), scene=EVERYWHERE.model_copy(update=dict(class_balanced=True)))
    assert len(data) == len(data.order) and sorted(set(data.order)) == list(range(len(data.rows)))
    assert len(list(make_loader(data, 1, shuffle=True))) == len(data)


def test_workers_change_nothing(mini):
    data = NuScenesDetection(mini, "train", SIZE, AugmentParams(scale=0.2, flip=0.5), scene=EVERYWHERE.model_copy(update=dict(rotation=1.0)))
    for a, b in zip(*(list(make_loader(data, 3, shuffle=True, seed=1, workers=n)) for n in (0, 2)), strict=True):
        assert a["image_ids"] == b["image_ids"]
        assert all((a[k] == b[k]).all() for k in ("images", "lidar2image", "lidar2global"))
        assert all((p == q).all() for p, q in zip(a["points"], b["points"]))


# --- splits and versions ----------------------------------------------------------------------------------------------------------------

def test_official_names(mini):
    assert find_split(mini / "v1.0-mini", "val") == ("mini_val", SCENES["mini_val"])
    assert [len(find_split(Path(f"v1.0-{name}"), "train")[1]) for name in ("mini", "trainval")] == [8, 700]
    assert [NuScenesDetection.has_split(mini, s) for s in ("train", "mini_val", "test")] == [True, True, False]
    assert not NuScenesDetection.has_split(mini / "nothing", "val")


def test_custom_splits(copy):
    (copy / "v1.0-mini/splits.json").write_text(json.dumps({"my_train": ["scene-0103"], "my_val": ["scene-0061"], "other": ["scene-0553"]}))
    assert [NuScenesDetection(copy, s, SIZE).images[0]["scene"] for s in ("train", "val", "other")] == ["scene-0103", "scene-0061", "scene-0553"]
    assert [NuScenesDetection(copy, s, SIZE).conditions[0] for s in ("train", "val", "other")] == ["fog", "night", "rain"]


def test_root_may_name_the_version(copy):
    shutil.copytree(copy / "v1.0-mini", copy / "v1.0-trainval")
    with pytest.raises(UserError, match="several versions .*set data.root to one of them"):
        NuScenesDetection(copy, "train", SIZE)
    assert len(NuScenesDetection(copy / "v1.0-mini", "train", SIZE)) == 8


# --- damage -------------------------------------------------------------------------------------------------------------------------------

def first(root: Path, pattern: str) -> Path:
    return sorted(root.glob(pattern))[0]


DAMAGE = {
    "no such folder": (lambda root: shutil.rmtree(root), r"data: no such folder; check data.root"),
    "no tables": (lambda root: shutil.rmtree(root / "v1.0-mini"), r"data: no nuScenes tables here; expected v1.0-mini"),
    "table missing": (lambda root: (root / "v1.0-mini/ego_pose.json").unlink(), r"ego_pose.json: no such table"),
    "table broken": (lambda root: (root / "v1.0-mini/scene.json").write_text('[{"token"'), r"scene.json:1:\d+: not valid JSON"),
    "table empty": (lambda root: (root / "v1.0-mini/calibrated_sensor.json").write_text("[]"), r"v1.0-mini: the tables do not fit together"),
    "map missing": (lambda root: (root / "maps/map.png").unlink(), r"map.json: .*map.png does not exist"),
    "image missing": (lambda root: first(root, "samples/CAM_BACK/*0061*").unlink(),
                      r"sample_data.json: 1 of \d+ files are not there, the first is .*CAM_BACK"),
    "sweeps missing": (lambda root: shutil.rmtree(root / "sweeps"),
                       r"sample_data.json: .*the first is .*sweeps/.*with data.scene.sweeps: 0 they are not needed"),
    "splits broken": (lambda root: (root / "v1.0-mini/splits.json").write_text("[]"), r"splits.json: not a table of splits"),
    "scene unknown": (lambda root: (root / "v1.0-mini/splits.json").write_text('{"train": ["scene-0062"]}'),
                      r"splits.json: train: scene 'scene-0062' is not in the tables; did you mean scene-0061"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_when_the_dataset_is_opened(copy, damage):
    change, message = DAMAGE[damage]
    change(copy)
    with pytest.raises(UserError, match=message):
        open_all(copy)


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def replace_image(path: Path) -> None:
    path.write_bytes(cv2.imencode(".jpg", np.zeros((20, 30, 3), np.uint8))[1].tobytes())


CORRUPT = {
    "cloud cut": ("samples/LIDAR_TOP/*0061-0*", lambda p: cut(p, 7), r"0061-0.*\.pcd\.bin: \d+ bytes are no whole number of points"),
    "cloud of nonsense": ("samples/LIDAR_TOP/*0061-0*", lambda p: p.write_bytes(b"\xff" * 40), r"\.pcd\.bin: holds values that are not numbers"),
    "image cut": ("samples/CAM_FRONT/*0061-0*", lambda p: cut(p, 200), r"CAM_FRONT.*\.jpg: the image is (cut short|not readable)"),
    "no image": ("samples/CAM_FRONT/*0061-0*", lambda p: p.write_bytes(b"JFIF"), r"\.jpg: the image is not readable"),
    "other image": ("samples/CAM_FRONT/*0061-0*", replace_image, r"\.jpg: 30x20 pixels, but .*sample_data.json says 160x90"),
}


@pytest.mark.parametrize("damage, workers", [*((damage, 0) for damage in CORRUPT), ("cloud cut", 1)])
def test_damage_is_named_when_a_sample_is_read(copy, damage, workers):
    pattern, change, message = CORRUPT[damage]
    change(first(copy, pattern))
    data = open_all(copy, cache=False)
    with pytest.raises(UserError, match=message):
        list(make_loader(data, 1, workers=workers))


def test_unknown_split(mini):
    with pytest.raises(UserError, match="v1.0-mini/splits.json: no split 'vall'; did you mean val"):
        open_all(mini, "vall")


def test_two_attributes(copy):
    path = copy / "v1.0-mini/sample_annotation.json"
    rows = json.loads(path.read_text())
    rows[3]["attribute_tokens"] = ["moving", "moving"]
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match="sample_annotation.json: .*: 2 attributes, the metric allows one"):
        open_all(copy)


def test_a_lost_sensor_is_named(copy):
    path = copy / "v1.0-mini/sample_data.json"
    path.write_text(json.dumps([r for r in json.loads(path.read_text()) if "0553-1-CAM_BACK_LEFT" not in r["token"]]))
    with pytest.raises(UserError, match="sample scene-0553-1 has no key frame of CAM_BACK_LEFT"):
        open_all(copy)


def test_changed_tables_are_read_again(copy):
    before = len(open_all(copy).ground_truth()["scene-0061-0"])
    path = copy / "v1.0-mini/sample_annotation.json"
    rows = [r for r in json.loads(path.read_text()) if r["token"] != "scene-0061-0-drives"]
    for r in rows:
        if r["prev"] == "scene-0061-0-drives": r["prev"] = ""
    path.write_text(json.dumps(rows))
    assert len(open_all(copy).ground_truth()["scene-0061-0"]) == before - 1


def test_the_devkit_is_not_kept(mini):
    "The dataset holds columns; the devkit's dicts are gone once it is open."
    code = ("import gc, sys; from moe_lab.data.nuscenes import NuScenesDetection, NuScenes; from pathlib import Path\n"
            "data = NuScenesDetection(sys.argv[1], 'train', 64); gc.collect()\n"
            "assert not any(isinstance(o, NuScenes) for o in gc.get_objects())")
    subprocess.run([sys.executable, "-c", code, str(mini)], check=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
