"""What tests share: one thread, determinism, digests of samples, and a throw-away checkout in which the pipeline runs with the `smoke` profile."""
import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside each other; torch reads this when it is imported

import numpy as np
import pytest
import torch
import toy
from moe_lab.data.synthetic import make_samples
from moe_lab.run import run_environment
from moe_lab.warm import warm_kernels
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


LONG = ("test_pipeline", "test_studies", "test_nuscenes_samples", "test_samples", "test_resume", "test_site")


def pytest_collection_modifyitems(items):
    "Files of minutes first: a long one that starts last keeps one worker busy while the others have nothing to do."
    place = {name: k for k, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture
def one_thread():
    "Small tensors: a second thread would mostly wait."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def deterministic():
    "As the training loop has it."
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def cpu_seconds() -> float:
    "What finished subprocesses have used of a processor, so that a busy machine does not count."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def digests_of(root: Path) -> dict:
    "Digest of every file below a folder."
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()}


def regenerated_otherwise(world: str, folder: Path) -> list[str]:
    "Files of a committed sample world that the generator makes otherwise, or not at all, or too many."
    make_samples(folder, worlds=(world,), progress=False)
    made, committed = digests_of(folder / world), digests_of(ROOT / "samples" / world)
    return [name for name in made.keys() | committed.keys() if made.get(name) != committed.get(name)]


def printed_twice(script: str) -> list[str]:
    "What a script prints on this processor, and on one that has none of the instructions that numpy chooses by processor."
    found = [f for f, on in np.core._multiarray_umath.__cpu_features__.items() if on]
    dispatched = [f for f in np.core._multiarray_umath.__cpu_dispatch__ if f in found]
    without = {"NPY_DISABLE_CPU_FEATURES": " ".join(dispatched)}
    return [subprocess.run([sys.executable, "-c", script], env={**os.environ, **env}, capture_output=True, text=True, check=True).stdout for env in ({}, without)]


class Checkout:
    "A copy of the tracked files, under git and DVC of its own."

    def __init__(self, path: Path):
        self.path = path
        self.env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1", "PYTHONPATH": str(path),
                    "GIT_AUTHOR_NAME": "test", "GIT_AUTHOR_EMAIL": "test@example.org", "GIT_COMMITTER_NAME": "test",
                    "GIT_COMMITTER_EMAIL": "test@example.org"}

    def call(self, *command: str, ok: bool = True, timeout: int = 300) -> subprocess.CompletedProcess:
        "Run a command inside; with `ok`, fail the test with its output when it fails."
        done = subprocess.run(command, cwd=self.path, env=self.env, capture_output=True, text=True, timeout=timeout)
        assert not ok or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done

    def edit(self, file: str, old: str, new: str) -> None:
        "Replace `old`, which must be there, in a file."
        path = self.path / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def keep_runs(self, *names: str) -> None:
        "Drop all other runs from params.yaml: what they would add is time."
        yaml, path = YAML(), self.path / "params.yaml"
        yaml.width = 200
        params = yaml.load(path)
        for part in (params["runs"], *params["profiles"].values()):
            for name in set(part) - {*names, "*"}:
                del part[name]
        for profile in [name for name, part in params["profiles"].items() if name != "tiny" and not part]:
            del params["profiles"][profile]
        yaml.dump(params, path)

    def commit(self) -> None:
        "Commit all that changed."
        self.call("git", "add", "-A")
        self.call("git", "commit", "-qm", "change", ok=False)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Iterator[Checkout]:
    "The tracked files of this working tree, committed, with the `smoke` profile; without what would add nothing but time: other worlds than COCO's, and the results of the study."
    path = tmp_path_factory.mktemp("checkout") / "moe_lab"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    left_out = re.compile(r"samples/(?!coco/)|studies/\w+/")
    for name in filter(lambda n: n and (ROOT / n).is_file() and not left_out.match(n), names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, path / name)
    with warm_kernels(run_environment(ROOT, threads=1)):
        here = Checkout(path)
        here.edit("params.yaml", "profile: tiny", "profile: smoke")
        here.call("git", "init", "-q")
        here.commit()
        yield here


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    "A dataset small enough to train on in a second."
    return toy.write_dataset(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def reference(world, tmp_path_factory) -> dict:
    "What a run that nobody disturbed leaves behind."
    out = tmp_path_factory.mktemp("reference")
    toy.run(world, out)
    return toy.contents(out)
