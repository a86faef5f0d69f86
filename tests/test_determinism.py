"""The same parameters give the same bytes, whoever loads the data."""
import pytest
import toy


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return toy.write_dataset(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    toy.run(world, out)
    return toy.contents(out)


def test_same_run_twice(world, reference, tmp_path):
    toy.run(world, tmp_path)
    assert toy.contents(tmp_path) == reference


def test_number_of_workers_does_not_matter(world, reference, tmp_path):
    toy.run(world, tmp_path, workers=2)
    assert toy.contents(tmp_path) == reference


def test_saving_state_changes_nothing(world, reference, tmp_path):
    toy.run(world, tmp_path / "out", resume=tmp_path / "resume")
    assert toy.contents(tmp_path / "out") == reference
    assert not (tmp_path / "resume").exists()


def test_another_seed_is_another_run(world, reference, tmp_path, monkeypatch):
    same = toy.settings
    monkeypatch.setattr(toy, "settings", lambda **changes: same(**changes).model_copy(update=dict(seed=4)))
    toy.run(world, tmp_path)
    assert toy.contents(tmp_path)["checkpoint.safetensors"] != reference["checkpoint.safetensors"]


def test_the_toy_learns(world, tmp_path):
    assert toy.run(world, tmp_path, epochs=12)["AP50"] > 0.2
