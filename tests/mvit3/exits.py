"""Many ends of a run in one process that has the imports: each is a fork of it, with the default loading processes, that fails somewhere.

As a program: `exits.py FOLDER` writes a line for each point: its name, its exit status, seconds from the failure to the end of the process.
"""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from mvit3 import backends, checkpoint, cli, commands, logs, report, trainer  # noqa: F401 -- imported before the forks
from mvit3.data import loader

LIMIT = 20  # seconds for the run and its end
KINDS = {
    "bug": lambda: ValueError("injected"),
    "runtime": lambda: RuntimeError("injected"),
    "memory": lambda: MemoryError(),
    "allocator": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    "disk": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "interrupt": lambda: KeyboardInterrupt(),
    "exit": lambda: SystemExit(3),
}


def failing(owner, name, kind, call):
    """Makes the `call`-th call of a function fail, and those after it."""
    original, calls = getattr(owner, name), [0]

    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] >= call:
            (FOLDER / f"failed_{POINT}").touch()
            raise KINDS[kind]()
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


# Where, on which call of which function, and with what. A run is two epochs of three steps, and two evaluations after each.
PLACES = {
    "data": (loader._Training, "load", (1, 4, 9)),
    "validation": (loader._Validation, "__getitem__", (1, 9)),
    "forward": (trainer.Criterion, "mix", (1, 3, 6)),
    "backward": (torch.Tensor, "backward", (1, 2, 4)),
    "update": (trainer.Trainer, "_update", (2,)),
    "average": (trainer.Ema, "update", (2, 5)),
    "evaluation": (trainer, "evaluate", (1, 2, 4)),
    "checkpoint": (checkpoint, "_write", (1, 2)),
    "names": (checkpoint.os, "replace", (1, 3)),
    "history": (logs, "write_csv", (1, 2)),
    "report": (commands, "write_html", (1,)),
    "summary": (commands, "summary", (1,)),
}
POINTS = [(place, call, kind) for place, (_, _, calls) in PLACES.items() for call in calls for kind in ("bug", "memory")]
POINTS = [p if i % 3 else (p[0], p[1], list(KINDS)[i // 3 % len(KINDS)]) for i, p in enumerate(POINTS)]


def images(root: Path) -> None:
    for part, count in (("train", 6), ("val", 3)):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40), (80 * (name == "a"), 20 * i, 0)).save(root / part / name / f"{i}.jpg")


def run(place: str, call: int, kind: str) -> None:
    owner, name, _ = PLACES[place]
    failing(owner, name, kind, call)
    arguments = [
        "train", f"--data={FOLDER / 'images'}", f"--run.output={FOLDER / POINT}", "--model.name=mobilevitv3_xxs", "--data.batch_size=4",
        "--data.eval_batch_size=2", "--data.resize=32", "--data.crop=32", "--sampler.size=32", "--sampler.sizes=[]", "--schedule.epochs=2",
        "--schedule.warmup_iterations=0", "--run.threads=1", "--run.save_steps=1", "--quiet",
    ]  # fmt: skip
    sys.exit(cli.main(arguments))


def last_step(folder: Path) -> int:
    """Of the checkpoint of a folder; 0 where there is none yet, -1 where it does not load."""
    try:
        content = checkpoint.latest(folder, print)
    except checkpoint.CheckpointError:
        return -1
    return content["progress"]["step"] if content else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    FOLDER = Path(sys.argv[1])
    images(FOLDER / "images")
    running, waiting = {}, list(POINTS)
    while running or waiting:
        while waiting and len(running) < 3:
            place, call, kind = waiting.pop(0)
            POINT = f"{place}_{call}_{kind}"
            log = open(FOLDER / f"{POINT}.log", "w")  # noqa: SIM115
            child = os.fork()
            if not child:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                run(place, call, kind)
            running[child] = POINT, time.time()
        for child, (point, began) in list(running.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            failed = FOLDER / f"failed_{point}"
            if not done and time.time() - (failed.stat().st_mtime if failed.exists() else began + LIMIT) > 10:
                os.kill(child, signal.SIGKILL)
                done, status = os.waitpid(child, 0)
            if done:
                took = time.time() - failed.stat().st_mtime if failed.exists() else None
                code = os.waitstatus_to_exitcode(status)
                said = (FOLDER / f"{point}.log").read_text()[-2000:]
                print(json.dumps({"point": point, "code": code, "took": took, "step": last_step(FOLDER / point), "said": said}), flush=True)
                del running[child]
        time.sleep(0.02)
