"""What every benchmark shares: timing of candidates side by side, facts about the machine, checking of the timed result, one file format.

Times of candidates are taken in turns, in one process, so that a change of the machine's speed meets all of them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
SCHEMA = 1


def timed(run: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def interleaved(
    candidates: Mapping[str, Callable[[], object]], rounds: int = 15, warmup: int = 2, burst: int = 1
) -> dict[str, dict[str, float]]:
    """Median and least milliseconds of each candidate, over `rounds` turns of `burst` calls. Before a turn of several calls goes one that
    is not counted: it finds caches and sleeping threads as another candidate left them, which no user of one candidate meets."""
    for _ in range(warmup):
        for run in candidates.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            if burst > 1:
                run()
            times[name] += [timed(run) for _ in range(burst)]
    return {name: {"median_ms": statistics.median(t), "min_ms": min(t)} for name, t in times.items()}


def copy_bandwidth(megabytes: int = 256) -> float:
    """GB/s of a large copy, bytes read plus bytes written, all threads."""
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.ones_like(source)
    best = interleaved({"copy": lambda: target.copy_(source)}, rounds=7)["copy"]["min_ms"]
    return 2 * source.numel() * 4 / best / 1e6


def matmul_rate(size: int = 1024) -> float:
    """GFLOP/s of torch.mm in float32, all threads."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = interleaved({"mm": lambda: torch.mm(a, b)}, rounds=7)["mm"]["min_ms"]
    return 2 * size**3 / best / 1e6


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return names[0] if names else platform.processor()


def _revision() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../csrc", "../mvit3_kernels", ".")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def machine() -> dict[str, object]:
    """Facts that a time means nothing without."""
    from mvit3_kernels import _native

    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "instruction_set": _native.isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "revision": _revision(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "copy_gb_s": round(copy_bandwidth(), 1),
        "mm_gflop_s": round(matmul_rate(), 1),
    }


@torch.no_grad()
def errors(got: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Norm of the error of each result relative to the norm of the true one."""
    return {name: float((got[name].double() - true).norm() / true.norm().clamp(min=1e-30)) for name, true in truth.items()}


def check(ours: Mapping[str, Tensor], eager: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Errors of `ours`; raises where one passes twice that of `eager` plus half a rounding of the result's dtype."""
    found, allowed = errors(ours, truth), errors(eager, truth)
    for name, error in found.items():
        if not error <= 2 * allowed[name] + torch.finfo(ours[name].dtype).eps / 2:
            raise AssertionError(f"{name}: relative error {error:.2e}, eager {allowed[name]:.2e}")
    return found


def peak_memory(setup: str, call: str) -> float:
    """MiB that `call` adds at its peak to the resident memory after `setup`, in a fresh process (both are Python source)."""
    code = f"""
import resource
{setup}
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
before = resident()
{call}
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print((peak - before) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def table(rows: list[dict[str, object]]) -> str:
    """Rows of one set of columns, aligned."""
    if not rows:
        return ""
    cells = [list(rows[0]), *([f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def write(op: str, rows: list[dict[str, object]], facts: Mapping[str, object], name: str | None = None) -> Path:
    """Writes results/<name or op>.json: {schema, op, machine, rows}; times in milliseconds, rates in GB/s, memory in MiB."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name or op}.json"
    path.write_text(json.dumps({"schema": SCHEMA, "op": op, "machine": dict(facts), "rows": rows}, indent=2) + "\n")
    return path


def run_shapes(
    description: str, op: str, shapes: Sequence[tuple], measure: Callable[[str, int, tuple, bool, float], dict[str, object]]
) -> None:
    """The command line of a benchmark that measures each of `shapes` (the place where it stands first) in evaluation and in training:
    measure(place, batch, shape, training, GB/s of a copy) gives a row."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help=f"write results/{op}_cpu.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rate = float(facts["copy_gb_s"])
    rows = [
        measure(place, batch, tuple(shape), training, rate)
        for batch in options.batch
        for training in (False, True)
        for place, *shape in shapes
    ]
    print(table(rows))
    if options.json:
        print(write(op, rows, facts, f"{op}_cpu"))
