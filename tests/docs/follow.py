"""Follows pages of the documentation to the letter, each in a fresh environment with the wheel: `make follow`, or
`python -m tests.docs.follow dist/*.whl [--pages docs/start/timm.md ...] [--short]`.

A page is followed from top to bottom in an empty folder: what it installs is installed, blocks in `sh` run in a shell
and those in `python` in one Python, what the reader has already is given (blocks.py). Only what cannot be had is left
out, and said. With --short commands have the options that the tests add to them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from .blocks import ROOT, RUNNABLE, TRAINED, blocks

STARTS = [f"docs/start/{name}.md" for name in ("timm", "transformers", "training", "serving")]
# What runs the steps, in the environment that they install into.
DRIVER = """
import importlib, json, subprocess, sys, time
names = {"__name__": "page"}
for step in json.loads(sys.argv[1]):
    print(f"--- {step['where']}", *step["code"].strip().splitlines(), sep="\\n    ", flush=True)
    if "left_out" in step:
        print(f"left out: {step['left_out']}", flush=True)
        continue
    started = time.perf_counter()
    if step["language"] == "python":
        exec(compile("\\n" * (step["line"] - 1) + step["code"], step["where"].partition(":")[0], "exec"), names)
    elif status := subprocess.run(["sh", "-ec", step["code"]]).returncode:
        sys.exit(f"{step['where']} ended with {status}")
    importlib.invalidate_caches()  # packages may have come
    print(f"({time.perf_counter() - started:.0f} s)", flush=True)
"""


def steps(page: str, text: str, short: bool = False) -> list[dict[str, object]]:
    """What a reader of a page does, in order."""
    found = []
    for block in blocks(text):
        if block.language not in RUNNABLE:
            continue
        where, installs = f"{page}:{block.line}", block.code.startswith("pip install ")
        if given := block.notes.get("given"):
            found.append({"where": f"{where}, given", "language": "python", "line": 1, "code": given})
        step = {"where": where, "language": block.language, "line": block.line, "code": block.code}
        if "not run" in block.notes and not installs:
            step["left_out"] = block.notes["not run"]
        elif short and (more := block.notes.get("shortened by")):
            lines = [re.sub(r"\s+#.*", "", line) for line in block.code.splitlines()]
            step["code"] = "\n".join(f"{line} {' '.join(more.split())}" for line in lines)
        found.append(step)
        if installs and "runs/s/" in text:  # what such a page calls the reader's trained network
            code = f"mvit3 {' '.join(TRAINED.split())} --run.output runs/s"
            found.append({"where": f"{where}, a trained network", "language": "sh", "line": 1, "code": code})
    return found


def run(python: str | Path, todo: list[dict[str, object]], folder: Path) -> int:
    """Runs steps with a Python and the commands beside it, without what the caller's environment adds; returns the
    status that it ends with."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MVIT3_", "VIRTUAL_ENV"))}
    kept |= {"PIP_QUIET": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    kept["PATH"] = os.pathsep.join([str(Path(python).parent), kept["PATH"]])
    return subprocess.run([str(python), "-c", DRIVER, json.dumps(todo)], cwd=folder, env=kept).returncode


def follow(page: str, wheel: Path, short: bool) -> int:
    """Follows a page in an environment of its own, with the wheel in `dist`; returns the status of its end."""
    with tempfile.TemporaryDirectory(prefix="mvit3_follow_") as place:
        environment, folder = Path(place, "environment"), Path(place, "reader")
        venv.create(environment, with_pip=True)
        Path(folder, "dist").mkdir(parents=True)
        shutil.copy(wheel, folder / "dist")
        return run(environment / "bin" / "python", steps(page, (ROOT / page).read_text(), short), folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--pages", nargs="+", default=STARTS)
    parser.add_argument("--short", action="store_true", help="commands as short as in the tests")
    options = parser.parse_args()
    results = []
    for page in options.pages:
        started = time.perf_counter()
        status = follow(page, options.wheel, options.short)
        results.append((page, "followed" if status == 0 else f"FAILED ({status})", time.perf_counter() - started))
    print(*(f"{page}: {word}, {seconds:.0f} s" for page, word, seconds in results), sep="\n")
    return 1 if any(word != "followed" for _, word, _ in results) else 0


if __name__ == "__main__":
    sys.exit(main())
