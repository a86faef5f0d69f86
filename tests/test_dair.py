"""DAIR-V2X: the official trees are read as they lie, oddities change nothing, ignore regions count neither way, and the sample world is what the generator makes."""
import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from conftest import printed_twice
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_lab.data.dair_v2x import CLASSES, DairV2X, find_pictures, has_split, read_labels
from moe_lab.data.synthetic import make_samples
from moe_lab.data.synthetic_dair import DAIR_SPLITS, SIDE, SPLIT_FILE, dair_picture, info_entry, make_odd, outline_3d
from moe_lab.data.world import CONDITIONS, generator
from moe_lab.evaluate import evaluate_coco
from moe_lab.params import AugmentParams, UserError
from PIL import Image

SAMPLE = Path(__file__).parent.parent / "samples" / "dair_v2x"
SIZE = (192, 320)


def read(path: Path):
    return json.loads(path.read_text())


def entry(kind="Car", box=(10, 10, 40, 30), **more) -> dict:
    return {"type": kind, "truncated_state": 0, "occluded_state": 1, "alpha": 0, "2d_box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box)),
            "3d_dimensions": dict(h=1, w=1, l=1), "3d_location": dict(x=9, y=0, z=0), "rotation": 0.5, **more}


def write_side(side: Path, ids, label_folder="label/camera", info=None, kind="jpg") -> Path:
    """Pictures and labels of one side; `info` names the label's key in data_info.json, None writes no such file."""
    for folder in ("image", label_folder):
        (side / folder).mkdir(parents=True, exist_ok=True)
    for id in ids:
        Image.new("RGB", (64, 48)).save(side / "image" / f"{id}.{kind}")
        (side / label_folder / f"{id}.json").write_text(json.dumps([entry()]))
    if info:
        rows = [{"image_path": f"image/{id}.{kind}", info: f"{label_folder}/{id}.json"} for id in ids]
        (side / "data_info.json").write_text(json.dumps(rows))
    return side


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


# --- trees ------------------------------------------------------------------------------------------------------------------------

IDS = [f"{i:06d}" for i in range(20)]
TABLE = dict(train=IDS[:12], val=IDS[12:16], test=IDS[16:])


@pytest.mark.parametrize("key", ["label_camera_std_path", "label_camera_path"])
@pytest.mark.parametrize("kind", ["infrastructure", "vehicle"])
@pytest.mark.parametrize("place", ["split_datas", "single-{}-side", "."])
def test_single_sides(tmp_path, key, kind, place):
    side = write_side(tmp_path / f"single-{kind}-side", IDS, info=key)
    write_json(tmp_path / place.format(kind) / f"single-{kind}-split-data.json", TABLE)
    for root in (tmp_path, side):
        assert [DairV2X(root, s, 64).image_ids for s in TABLE] == [[int(i) for i in ids] for ids in TABLE.values()]


@pytest.mark.parametrize("name", ["cooperative-split-data.json", "cooperative-split-data-spd.json"])
def test_cooperative_sides(tmp_path, name):
    base = tmp_path / "cooperative-vehicle-infrastructure"
    for side in ("vehicle-side", "infrastructure-side"):
        write_side(base / side, IDS, info="label_camera_std_path")
    write_json(base / "cooperative" / "data_info.json", [])
    batches = dict(train=[0, 1], val=[2], test=[3], test_A=[4])
    write_json(tmp_path / "split_datas" / name, dict(batch_split=batches, vehicle_split=dict(train=IDS[:3], val=IDS[3:5]),
                                                     infrastructure_split=dict(train=IDS[5:9], val=IDS[9:10], test_A=IDS[10:12]), cooperative_split=TABLE))
    with pytest.raises(UserError, match="several sides .*set data.root to one of them"):
        DairV2X(tmp_path, "train", 64)
    assert [len(DairV2X(base / "vehicle-side", s, 64)) for s in ("train", "val")] == [3, 2]
    assert [len(DairV2X(base / "infrastructure-side", s, 64)) for s in ("train", "val", "test_A")] == [4, 1, 2]
    assert not has_split(base / "vehicle-side", "test")


@pytest.mark.parametrize("root", [".", "cooperative-vehicle-infrastructure", "cooperative-vehicle-infrastructure/vehicle-side"])
@pytest.mark.parametrize("labels", ["label", "label/camera"])
def test_simple_layout_of_document_001(tmp_path, root, labels):
    write_side(tmp_path / "cooperative-vehicle-infrastructure" / "vehicle-side", IDS, label_folder=labels)
    sets = {split: DairV2X(tmp_path / root, split, 64) for split in ("train", "val", "test")}
    assert [len(d) for d in sets.values()] == [14, 3, 3]
    assert sorted(i for d in sets.values() for i in d.image_ids) == list(range(20))
    assert any("no split file" in note for note in sets["train"].notes)


def test_png_images_and_names_that_are_no_numbers(tmp_path):
    side = write_side(tmp_path / "vehicle-side", ["b7", "a3"], kind="png")
    write_json(side / "split_data.json", dict(train=["b7", "a3"]))
    assert (data := DairV2X(side, "train", 64)).image_ids == [1, 2] and data.images[0]["file_name"] == "image/b7.png"


def test_label_path_of_data_info_wins_if_it_exists(tmp_path):
    side = write_side(tmp_path / SIDE, IDS[:1], info="label_camera_std_path")
    write_side(side, IDS[:1], label_folder="label/std")
    (side / "label/std/000000.json").write_text(json.dumps([entry("Bus")]))
    write_json(side / "data_info.json", [dict(image_path="image/000000.jpg", label_camera_path="label/gone/000000.json", label_camera_std_path="label/std/000000.json")])
    write_json(side / "split_data.json", dict(train=IDS[:1]))
    assert read_labels(side / find_pictures(side, "train").frames[0].label).types == ["Bus"]
    (side / "label/std/000000.json").unlink()
    assert read_labels(side / find_pictures(side, "train").frames[0].label).types == ["Car"]


# --- what is missing or broken ----------------------------------------------------------------------------------------------------

@pytest.fixture
def single(tmp_path):
    write_side(tmp_path / SIDE, IDS, info="label_camera_std_path")
    write_json(tmp_path / SPLIT_FILE, TABLE)
    return tmp_path


def test_missing_files_are_counted_and_reported(single, caplog):
    (single / SIDE / "image/000012.jpg").unlink()
    for id in ("000012", "000013", "000014"):
        (single / SIDE / f"label/camera/{id}.json").unlink()
    with caplog.at_level(logging.WARNING, "moe_lab"):
        data = DairV2X(single, "val", 64)
    assert data.missing == dict(image=["000012"], label=["000012", "000013", "000014"]) and data.image_ids == [15]
    assert "3 of 4 pictures of the split are left out: 1 without image, 3 without label (first: 000012)" in caplog.text


def test_split_without_labels_is_no_split(single):
    for id in TABLE["test"]:
        (single / SIDE / f"label/camera/{id}.json").unlink()
    assert [has_split(single, s) for s in ("train", "val", "test")] == [True, True, False]
    with pytest.raises(UserError, match="no labelled picture of split 'test' .*4 without label"):
        DairV2X(single, "test", 64)


BROKEN = {
    "cut short": ('[{"type": "Ca', "000013.json:1:11: not valid JSON"),
    "not a list": ("{}", "000013.json: not a list of objects"),
    "no type": ('[{"2d_box": {}}]', "000013.json: [0].type: missing"),
    "no box": ('[{"type": "Car"}]', "000013.json: [0].2d_box: missing"),
    "box is a list": ('[{"type": "Car", "2d_box": [1, 2, 3, 4]}]', "000013.json: [0].2d_box: [1, 2, 3, 4] is not an object"),
    "side missing": (json.dumps([entry(), entry(box=(1, 2, 3))]), "000013.json: [1].2d_box.ymax: None is not a number"),
    "side of text": (json.dumps([entry(box=(1, 2, 3, "wide"))]), "000013.json: [0].2d_box.ymax: 'wide' is not a number"),
    "not finite": (json.dumps([entry(box=(1, 2, 3, float("inf")))]), "000013.json: [0].2d_box.ymax: inf is not a number"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_corrupt_label_names_its_file(single, name):
    content, expected = BROKEN[name]
    (single / SIDE / "label/camera/000013.json").write_text(content)
    with pytest.raises(UserError) as caught:
        DairV2X(single, "val", 64)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_corrupt_image_info_and_split_name_their_file(single):
    (single / SIDE / "image/000013.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"000013\.jpg: the image is not readable"):
        DairV2X(single, "val", 64)
    write_json(single / SIDE / "data_info.json", [dict(image_path="image/000000.jpg"), dict(pointcloud_path="x")])
    with pytest.raises(UserError, match=r"data_info\.json: data_info\[1\]\.image_path: missing"):
        DairV2X(single, "val", 64)
    (single / SIDE / "data_info.json").unlink()
    write_json(single / SPLIT_FILE, ["000000"])
    with pytest.raises(UserError, match=r"single-infrastructure-split-data\.json: not a split file"):
        DairV2X(single, "val", 64)


# --- odd values -------------------------------------------------------------------------------------------------------------------

scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
anything = st.recursive(scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8)
keys = ["type", "truncated_state", "occluded_state", "turncated_state", "occulated_state", "2d_box", "rotation"]
sides = st.dictionaries(st.sampled_from(["xmin", "ymin", "xmax", "ymax"]), scalar)
objects = st.dictionaries(st.sampled_from(keys), anything | sides, max_size=7)


@settings(max_examples=150, deadline=None)
@given(st.lists(objects | anything, max_size=4) | anything)
def test_any_json_is_read_or_refused_with_its_name(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("odd") / "000001.json"
    path.write_text(json.dumps(content))
    try:
        found = read_labels(path)
    except UserError as e:
        assert str(e).startswith(str(path)) and "\n" not in str(e)
    else:
        assert np.isfinite(found.boxes).all() and set(found.states.ravel().tolist()) <= {-1, 0, 1, 2} and len(found.types) == len(content)


corner = st.integers(-60, 160)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*CLASSES, "carIGNORE", "Unknowns_movable", "Dog", ""]), st.tuples(corner, corner, corner, corner)), max_size=6), st.integers(0, 99))
def test_oddities_change_no_box(tmp_path_factory, things, seed):
    """The same labels, clean and as many hands may have written them, give the same targets, inside the image; nothing becomes background."""
    root = tmp_path_factory.mktemp("dair")
    clean = [entry(kind, box) for kind, box in things]
    rng = generator(seed)
    odd = [make_odd(e, rng, text=seed % 2 > 0, misspelt=seed % 3 > 0) for e in clean]
    write_side(root / SIDE, IDS[:2])
    for id, content in zip(IDS, (clean, odd)):
        write_json(root / SIDE / f"label/camera/{id}.json", content)
    write_json(root / SPLIT_FILE, dict(train=IDS[:2]))
    index = DairV2X(root, "train", 64).index
    assert np.array_equal(*index.boxes) and np.array_equal(*index.labels) and np.array_equal(*index.crowd)
    visible = [min(x2, 64) > max(x1, 0) and min(y2, 48) > max(y1, 0) and x2 > 0 and y2 > 0 and x1 < 64 and y1 < 48 for _, (x1, y1, x2, y2) in things]
    assert len(index.boxes[0]) == sum(visible)
    assert (index.boxes[0] >= 0).all() and (index.boxes[0] <= (64, 48, 64, 48)).all()
    assert sum(index.crowd[0]) == sum(v for v, (kind, _) in zip(visible, things) if kind not in CLASSES)


# --- ignore regions ---------------------------------------------------------------------------------------------------------------

def oracle(data: DairV2X) -> list[dict]:
    return [dict(image_id=a["image_id"], category_id=a["category_id"], bbox=a["bbox"], score=0.9) for a in data.ground_truth()["annotations"] if not a["iscrowd"]]


def test_detections_in_ignore_regions_count_neither_way():
    data = DairV2X(SAMPLE, "val", SIZE)
    truth, perfect = data.ground_truth(), oracle(data)
    regions = [a for a in truth["annotations"] if a["iscrowd"]]
    assert len(regions) % len(CLASSES) == 0 and len(regions) >= 10 * len(CLASSES)
    inside = [dict(image_id=a["image_id"], category_id=a["category_id"], bbox=a["bbox"], score=0.95) for a in regions] * 2
    assert evaluate_coco(truth, perfect, detail=False).metrics["AP"] == 1
    assert evaluate_coco(truth, perfect + inside, detail=False).metrics["AP"] == 1
    background = dict(truth, annotations=[a for a in truth["annotations"] if not a["iscrowd"]])
    assert evaluate_coco(background, perfect + inside, detail=False).metrics["AP"] < 0.9


def test_ignored_objects_are_not_missed():
    """An ignore region that nothing is found in costs no recall."""
    data = DairV2X(SAMPLE, "val", SIZE)
    assert evaluate_coco(data.ground_truth(), oracle(data), detail=False).metrics["AR100"] == 1


def test_constant_predictor_scores_nothing():
    data = DairV2X(SAMPLE, "val", SIZE)
    same = [dict(image_id=i, category_id=c["id"], bbox=[160, 90, 90, 60], score=0.5) for i in data.image_ids for c in data.categories]
    assert evaluate_coco(data.ground_truth(), same, detail=False).metrics["AP50"] < 0.03


def test_classes_that_were_not_chosen_are_ignored():
    some = DairV2X(SAMPLE, "val", SIZE, classes=("car", "Pedestrian"))
    everything = DairV2X(SAMPLE, "val", SIZE)
    assert some.names == ["car", "Pedestrian"]
    for i in range(len(some)):
        chosen = np.isin(everything.index.labels[i], (CLASSES.index("Car"), CLASSES.index("Pedestrian")))
        assert (some.index.crowd[i] == ~chosen).all() and (some.index.boxes[i] == everything.index.boxes[i]).all()


def test_ignore_regions_follow_the_image_into_the_batch():
    data = DairV2X(SAMPLE, "val", SIZE)
    i = next(i for i in range(len(data)) if data.index.crowd[i].any())
    sample, region = data[i], data.index.boxes[i][data.index.crowd[i]][0]
    scale, dx, dy = sample["letterbox"]
    assert np.allclose(sample["ignore"][0], region * scale + (dx, dy, dx, dy), atol=0.5)
    moved = DairV2X(SAMPLE, "val", SIZE, augment=AugmentParams(flip=1.0))[0, i]
    assert len(moved["ignore"]) >= len(sample["ignore"])


# --- the sample world -------------------------------------------------------------------------------------------------------------

def of_picture(side: Path, id: str) -> dict:
    names = (f"image/{id}.jpg", f"label/camera/{id}.json", f"calib/camera_intrinsic/{id}.json", f"calib/virtuallidar_to_camera/{id}.json")
    return {name: hashlib.sha256((side / name).read_bytes()).hexdigest() for name in names}


def test_regenerated_byte_for_byte(tmp_path):
    """Pictures do not depend on each other, so a few of every condition and split stand for all; the tables are compared as a whole."""
    (tmp_path / "image").mkdir()
    for index in (0, 1, 2, 3, 150, 241, 310, 399):
        made = dair_picture(index, tmp_path, 0, 448, 256)
        assert of_picture(tmp_path, f"{index:06d}") == of_picture(SAMPLE / SIDE, f"{index:06d}")
        assert made == read(SAMPLE / SIDE / "data_info.json")[index]


def test_tables_are_what_the_generator_says():
    weather, count = list(CONDITIONS), sum(DAIR_SPLITS.values())
    assert read(SAMPLE / SIDE / "data_info.json") == [info_entry(f"{i:06d}", weather[i % 4], i % 3 > 0) for i in range(count)]
    splits = read(SAMPLE / SPLIT_FILE)
    assert {s: len(ids) for s, ids in splits.items()} == DAIR_SPLITS and [int(i) for s in DAIR_SPLITS for i in splits[s]] == list(range(count))
    assert len([p for p in SAMPLE.rglob("*") if p.is_file()]) == 4 * count + 3


DIGEST = """
import hashlib, tempfile
from pathlib import Path
from moe_lab.data.synthetic_dair import make_dair
out, digest = Path(tempfile.mkdtemp()), hashlib.sha256()
make_dair(out, counts=dict(train=4), workers=1)
for file in sorted(p for p in out.rglob('*') if p.is_file()): digest.update(file.read_bytes())
print(digest.hexdigest())
"""


def test_same_bytes_without_vector_instructions():
    here, oldest = printed_twice(DIGEST)
    assert here == oldest


def test_boxes_and_calibration_agree():
    """What is seen of a thing lies in the projection of its 3D box, for every label that has one."""
    side, checked = SAMPLE / SIDE, 0
    for index in range(sum(DAIR_SPLITS.values())):
        lidar, lens = (read(side / f"calib/{c}/{index:06d}.json") for c in ("virtuallidar_to_camera", "camera_intrinsic"))
        for label in read(side / f"label/camera/{index:06d}.json"):
            if "rotation" in label and float(label["3d_dimensions"]["h"]):
                seen = np.array([float(label["2d_box"][k]) for k in ("xmin", "ymin", "xmax", "ymax")])
                x0, y0, x1, y1 = outline_3d(label, lidar["rotation"], lidar["translation"], lens["cam_K"]) - seen
                assert max(x0, y0, -x1, -y1) < 3.5, (index, label)
                checked += 1
    assert checked > 2500


def test_sample_is_balanced_and_odd_enough():
    data = DairV2X(SAMPLE, "train", SIZE, cache=False)
    labels = np.concatenate(data.index.labels)
    count = {name: int((labels == k).sum()) for k, name in enumerate(data.names)}
    assert min(n for n in count.values() if n) >= 100 and sum(n > 0 for n in count.values()) == 8
    assert {c: data.conditions.count(c) for c in CONDITIONS} == dict.fromkeys(CONDITIONS, 60)
    texts = [(SAMPLE / SIDE / f"label/camera/{i:06d}.json").read_text() for i in range(240)]
    share = lambda word: sum(word in t for t in texts)
    assert share('"xmin":"') > 20 and share("occulated_state") > 10 and share("Ignore") > 10 and share("Unknown_movable") > 10 and share('_state":3') > 5
    assert sum(np.isnan(r).sum() for r in data.index.rotations) > 20


def test_splits_share_no_picture():
    digests = {s: {of_picture(SAMPLE / SIDE, i)[f"image/{i}.jpg"] for i in ids} for s, ids in read(SAMPLE / SPLIT_FILE).items()}
    assert sum(map(len, digests.values())) == len(set().union(*digests.values())) == sum(DAIR_SPLITS.values())


def test_size():
    assert sum(p.stat().st_size for p in SAMPLE.rglob("*") if p.is_file()) <= 6_000_000


def test_worlds_are_chosen_by_name(tmp_path):
    with pytest.raises(UserError, match="no world 'nuscene'"):
        make_samples(tmp_path, worlds=("nuscene",))
