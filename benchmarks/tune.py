"""Times the configurations that the Triton kernels offer, on this GPU, and records the fastest in
mvit3_kernels/ops/tuned.json.

    python benchmarks/tune.py [--ops feed_forward ...] [--again]

Every call of gpu_cases.py is timed as a CUDA graph, with one kernel's configuration changed at a time. A
kernel keeps its first configuration unless another one makes the whole call at least 2 % faster. The file is written
after every kernel, and what is recorded for this architecture already is left alone (--again: timed anew), so that a
run which is cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import graphed, interleaved_bursts, replace_file
from benchmarks.gpu_cases import on_backend, op_cases
from mvit3_kernels.ops import tuning

LEAST_GAIN = 0.02


def write(records: dict[str, dict[str, tuning.Configuration]]) -> None:
    text = (
        json.dumps({name: dict(sorted(entries.items())) for name, entries in sorted(records.items())}, indent=1) + "\n"
    )
    folders = [tuning.FILE.parent, *([Path(os.environ["OUT"])] if os.environ.get("OUT") else [])]
    for folder in folders:
        replace_file(folder / tuning.FILE.name, text)


def tune_call(
    call: Callable[[], object],
    measure: Callable[[dict[str, Callable]], dict[str, float]],
    done: dict[str, tuning.Configuration],
) -> dict[str, tuning.Configuration]:
    """The best configuration of each kernel that `call` launches and that is not in `done`; `measure` gives seconds of
    calls by name.

    A configuration that fails (it may not fit the GPU) is left out."""
    with tuning.watch() as seen:
        call()
    found: dict[str, tuning.Configuration] = {}
    for choice in seen:
        if choice.key in done or choice.key in found:
            continue
        calls = {}
        for number, config in enumerate(choice.offered):

            def tried(choice: tuning.Choice = choice, config: tuning.Configuration = config) -> object:
                with tuning.trial(choice, config):
                    return call()

            try:
                tried()
            except Exception as failure:
                print(f"{choice.key}: {config} fails: {type(failure).__name__}: {failure}"[:300])
                continue
            calls[str(number)] = tried
        seconds = measure(calls)
        best = min(seconds, key=seconds.get)
        if "0" in seconds and seconds[best] > (1 - LEAST_GAIN) * seconds["0"]:
            best = "0"
        found[choice.key] = choice.offered[int(best)]
        times = ", ".join(f"{1e6 * s:.1f}" for s in seconds.values())
        print(f"{choice.key}: {found[choice.key]} of {times} us", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    options.device, options.tiny = "cuda", False

    def measure(calls: dict[str, Callable]) -> dict[str, float]:
        times = interleaved_bursts({name: graphed(call, "cuda") for name, call in calls.items()}, options, 0.01)
        return {name: timing["seconds"] for name, timing in times.items()}

    architecture = tuning.architecture(torch.empty(0, device="cuda"))
    records = {name: dict(entries) for name, entries in tuning.recorded().items()}
    mine = records.setdefault(architecture, {})
    if options.again:
        mine.clear()
    for case in op_cases(options.batch, "cuda"):
        if options.ops is None or case.op in options.ops:
            found = tune_call(case.step(on_backend(case.backends[0], case.call)), measure, mine)
            if found:
                mine |= found
                write(records)


if __name__ == "__main__":
    main()
