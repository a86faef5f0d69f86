"""The committed samples are what the generator makes, byte for byte, whatever the processor."""
import json
from pathlib import Path

import pytest
from conftest import digests_of, printed_twice, regenerated_otherwise
from moe_lab.data.synthetic import CATEGORIES, SPLITS

SAMPLES = Path(__file__).parent.parent / "samples"
COCO = SAMPLES / "coco"

# One picture of each condition, made in a fresh process: prints the digest of its pixels and annotations.
DIGEST = """
import hashlib, json, sys, tempfile
from pathlib import Path
from moe_lab.data.synthetic import coco_picture
out, digest = Path(tempfile.mkdtemp()), hashlib.sha256()
for i in range(4):
    image, found = coco_picture(i, out, 'train', 0, 320, 256)
    digest.update((out / image['file_name']).read_bytes() + json.dumps(found, sort_keys=True).encode())
print(digest.hexdigest())
"""


def table(split: str) -> dict:
    return json.loads((COCO / "annotations" / f"instances_{split}.json").read_text())


def test_regenerated_byte_for_byte(tmp_path):
    assert regenerated_otherwise("coco", tmp_path) == []


def test_same_bytes_without_vector_instructions():
    "numpy picks its loops by processor; the oldest x86-64 must give what this one gives."
    here, oldest = printed_twice(DIGEST)
    assert here == oldest


@pytest.mark.parametrize("split", SPLITS)
def test_tables_are_consistent(split):
    t = table(split)
    images, names = {i["id"]: i for i in t["images"]}, {i["file_name"] for i in t["images"]}
    assert names == {p.name for p in (COCO / split).iterdir()} and len(names) == SPLITS[split]
    assert len({a["id"] for a in t["annotations"]}) == len(t["annotations"])
    for a in t["annotations"]:
        (x, y, w, h), image = a["bbox"], images[a["image_id"]]
        assert 0 <= x < x + w <= image["width"] and 0 <= y < y + h <= image["height"] and 0 < a["area"] <= w * h
        assert a["iscrowd"] or a["area"] >= 25


def test_balance():
    t = table("train")
    shown = [a for a in t["annotations"] if not a["iscrowd"]]
    count = {n: sum(a["category_id"] == i for a in shown) for n, i in CATEGORIES.items()}
    assert {c["name"]: c["id"] for c in t["categories"]} == CATEGORIES
    assert min(count.values()) >= 250 and min(count.values()) >= .05 * len(shown)
    conditions = [i["condition"] for i in t["images"]]
    assert {c: conditions.count(c) for c in set(conditions)} == {c: 120 for c in ("day", "night", "rain", "fog")}


def test_splits_share_no_picture():
    digests = [set(digests_of(COCO / s).values()) for s in SPLITS]
    assert not digests[0] & digests[1] and not digests[0] & digests[2] and not digests[1] & digests[2]


def test_size():
    assert sum(p.stat().st_size for p in COCO.rglob("*") if p.is_file()) <= 9_000_000
