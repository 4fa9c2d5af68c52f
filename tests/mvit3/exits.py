"""Many ends of a run in one process that has the imports: each is a fork of it, with loading processes, that fails
somewhere.

As a program: `exits.py FOLDER` writes a line for each point: its name, its exit status, the step of the checkpoint that
is left, what was said.
"""

# ruff: noqa: E402
import atexit
import os

STATUS = [0]
# The first to be registered is the last to be called: what Python waits for at its end is over then, and PyTorch's
# destructors (a second) are not what is tested.
atexit.register(lambda: os._exit(STATUS[0]) if STATUS[0] != "parent" else None)

import errno
import json
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from PIL import Image

# imported before the forks
from mvit3 import backends, checkpoint, cli, commands, logs, loss, report, trainer  # noqa: F401
from mvit3.data import loader

LIMIT = 120  # seconds after which a process hangs: they take one or two
KINDS = {
    "bug": lambda: ValueError("injected"),
    "runtime": lambda: RuntimeError("injected"),
    "memory": lambda: RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"
    ),
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
            print("failing now", flush=True)
            raise KINDS[kind]()
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


# Where, on which call of which function, and with what. A run is two epochs of two steps, and two evaluations after
# each. Each of its two loading processes reads a batch of four images an epoch.
PLACES = {
    "data": (loader._Training, "load", (1, 4, 7)),
    "validation": (loader._Validation, "__getitem__", (1, 4)),
    "forward": (loss.Criterion, "mix", (1, 3, 4)),
    "backward": (torch.Tensor, "backward", (1, 2, 4)),
    "update": (trainer.Trainer, "_update", (2,)),
    "average": (trainer.Ema, "update", (2, 4)),
    "evaluation": (trainer, "evaluate", (1, 2, 4)),
    "checkpoint": (checkpoint, "_write", (1, 2)),
    "names": (checkpoint.os, "replace", (1, 3)),
    "history": (logs, "write_csv", (1, 2)),
    "report": (commands, "write_html", (1,)),
    "summary": (commands, "summary", (1,)),
}
CALLS = [(place, call) for place, (_, _, calls) in PLACES.items() for call in calls]
POINTS = [(*call, kind) for i, call in enumerate(CALLS) for kind in ("memory", list(KINDS)[i % len(KINDS)])]


def images(root: Path) -> None:
    for part, count in (("train", 4), ("val", 3)):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40), (80 * (name == "a"), 20 * i, 0)).save(root / part / name / f"{i}.jpg")


def run(place: str, call: int, kind: str) -> None:
    owner, name, _ = PLACES[place]
    failing(owner, name, kind, call)
    arguments = [
        "train", f"--data={FOLDER / 'images'}", f"--run.output={FOLDER / POINT}", "--model.name=mobilevitv3_xxs",
        "--data.batch_size=4", "--data.eval_batch_size=2", "--data.workers=2", "--data.resize=32", "--data.crop=32",
        "--sampler.size=32", "--sampler.sizes=[]", "--schedule.epochs=2", "--schedule.warmup_iterations=0",
        "--run.threads=1", "--run.save_steps=1", "--quiet",
    ]  # fmt: skip
    commands._backend = lambda trainer: "not looked at"
    try:
        STATUS[0] = cli.main(arguments)
    except SystemExit as error:
        STATUS[0] = error.code
    except BaseException as error:  # as Python itself does
        traceback.print_exc()
        STATUS[0], sys.last_value = 1, error  # what it refers to lives on, loading processes too
    sys.exit()


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
    STATUS[0] = "parent"
    running, waiting = {}, list(POINTS)
    while running or waiting:
        while waiting and len(running) < 3:
            place, call, kind = waiting.pop(0)
            POINT = f"{len(waiting)}_{place}_{call}_{kind}"
            log = open(FOLDER / f"{POINT}.log", "w")  # noqa: SIM115
            child = os.fork()
            if not child:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                run(place, call, kind)
            running[child] = POINT, time.time()
        for child, (point, began) in list(running.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            if not done and time.time() - began > LIMIT:
                os.kill(child, signal.SIGKILL)
                done, status = os.waitpid(child, 0)
            if done:
                code = os.waitstatus_to_exitcode(status)
                said = (FOLDER / f"{point}.log").read_text()[-2000:]
                print(
                    json.dumps({"point": point, "code": code, "step": last_step(FOLDER / point), "said": said}),
                    flush=True,
                )
                del running[child]
        time.sleep(0.02)
