"""The same parameters give the same bytes, whoever loads the data."""
import toy


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
