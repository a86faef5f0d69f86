"""Runs the toy training in forked children and kills them. Imported modules are shared, so that a child starts in milliseconds.

python kill_driver.py WORLD FOLDER: prints one JSON line per scenario: how its children ended."""
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch._dynamo  # noqa: F401 - what the first optimizer would import, in every child anew
import toy

import moe_lab.checkpoint
import moe_lab.train

SCENARIOS = {  # name: (module attribute, n-th call that is the last, kill before or after it)
    "in the first batch": ("train_batch", 1, "before"),
    "in the middle of an epoch": ("train_batch", 5, "after"),
    "state written but not yet synced": ("fsync", 3, "before"),
    "state synced but not yet in place": ("replace", 3, "before"),
    "state just put in place": ("replace", 4, "after"),
    "in an evaluation": ("evaluate_coco", 2, "before"),
    "training done, checkpoint half written": ("write_half", 14, "before"),
    "checkpoint written, metrics not": ("write_json", 2, "before"),
    "metrics written, state not removed": ("finish", 1, "before"),
}


def arm(point: str, count: int, when: str) -> None:
    """Make this process kill itself at the n-th call of something."""
    owner = {"train_batch": moe_lab.train.Trainer, "fsync": os, "replace": os, "evaluate_coco": toy, "finish": toy,
             "write_json": moe_lab.checkpoint, "write_half": moe_lab.checkpoint}[point]
    name = "_replace" if point == "write_half" else point
    original, calls = getattr(owner, name), [0]

    def deadly(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count and point == "write_half":
            args[0].with_name(f".{args[0].name}.half.tmp").write_bytes(args[1][: len(args[1]) // 2])
        if calls[0] == count and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        value = original(*args, **kwargs)
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    setattr(owner, name, deadly)


def child(world: Path, folder: Path, trap: tuple | None = None, model=None) -> int:
    """Fork a child that trains (the toy, or what `model` builds); give its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        if trap:
            arm(*trap)
        with open(folder.with_suffix(".log"), "a") as log:
            toy.run(world, folder / "out", folder / "resume", model=model and model(), log=lambda line: print(line, file=log, flush=True))
        os._exit(0)
    except BaseException as e:
        print(repr(e), file=sys.stderr, flush=True)
        os._exit(1)


def ended(pid: int) -> int:
    """Exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def random_kills(world: Path, folder: Path, delay: float) -> list[int]:
    """Kill from outside after a while, a little later each time, until a child gets through."""
    codes = []
    while not codes or codes[-1] == -signal.SIGKILL:
        pid = child(world, folder)
        time.sleep(delay * (1 + len(codes)))
        os.kill(pid, signal.SIGKILL)
        codes.append(ended(pid))
    return codes


if __name__ == "__main__":
    world, base = map(Path, sys.argv[1:])
    pair = [ended(child(world, base / "yolo", ("train_batch", 5, "after"), toy.yolo)), ended(child(world, base / "yolo", model=toy.yolo))]
    print(json.dumps(["yolo in the middle of an epoch", str(base / "yolo"), pair]), flush=True)
    for number, (name, trap) in enumerate(SCENARIOS.items()):
        folder = base / f"{number}"
        print(json.dumps([name, str(folder), [ended(child(world, folder, trap)), ended(child(world, folder))]]), flush=True)
    print(json.dumps(["killed from outside again and again", str(base / "outside"), random_kills(world, base / "outside", 0.05)]), flush=True)
