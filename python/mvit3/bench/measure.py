"""Times of candidates that take turns, facts about the machine, and memory.

Times are taken in turns, in one process, so that a change of the machine's speed meets all candidates alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import mvit3_kernels
from mvit3_kernels import _native

SCHEMA = 1
PAUSE = 0.2  # seconds before a turn: a processor that was idle runs faster, and threads of the last candidate sleep
Row = dict[str, Any]
Run = Callable[[], Any]


# Time


def timed(run: Run) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def in_turns(
    candidates: Mapping[Any, Run], rounds: int, sample: Callable[[Any, Run], list[float]]
) -> dict[Any, list[float]]:
    """All times that `sample(name, run)` takes of each candidate, in `rounds` turns."""
    times: dict[Any, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name] += sample(name, run)
    return times


def interleaved(
    candidates: Mapping[Any, Run],
    rounds: int = 15,
    warmup: int = 2,
    burst: int = 1,
    told: Callable[[Any], object] = lambda name: None,
) -> dict[Any, dict[str, float]]:
    """Median, least, 20th and 80th percentile of the milliseconds of each candidate, over `rounds` turns of `burst`
    calls. Before a turn of several calls go a pause and one that is not counted: it finds caches and threads as another
    candidate left them, which no user of one candidate meets. `told` hears of every turn that is over."""
    for _ in range(warmup):
        for run in candidates.values():
            run()

    def sample(name: Any, run: Run) -> list[float]:
        if burst > 1:
            time.sleep(PAUSE)
            run()
        taken = [timed(run) for _ in range(burst)]
        told(name)
        return taken

    times = in_turns(candidates, rounds, sample)
    return {name: spread(t) for name, t in times.items()}


def spread(times: list[float]) -> dict[str, float]:
    low, *_, high = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 2
    return {"median_ms": statistics.median(times), "min_ms": min(times), "p20_ms": low, "p80_ms": high}


# The machine


def copy_bandwidth(megabytes: int = 256) -> float:
    """GB/s of a large copy, bytes read plus bytes written, all threads."""
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.ones_like(source)
    best = interleaved({"copy": lambda: target.copy_(source)}, rounds=7)["copy"]["min_ms"]
    return 2 * source.numel() * 4 / best / 1e6


def matmul_rate(size: int = 1024, dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of torch.mm, all threads."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
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


def _checkout() -> Path | None:
    """The folder of the sources where this file lies in them; an installed package has none."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "csrc").is_dir() and (root / ".git").exists() else None


def output_of(*command: str) -> str:
    """What a command prints; nothing where it does not run."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            command, cwd=_checkout(), check=True, capture_output=True, text=True, timeout=20
        ).stdout.strip()
    return ""


def revision() -> str:
    """Of the sources, or the version of an installed package."""
    if _checkout() is None:
        return mvit3_kernels.__version__
    watched = ("csrc", "mvit3_kernels", "benchmarks", "python/mvit3/bench")
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no", "--", *watched)
    return output_of("git", "rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def machine() -> Row:
    """Facts that a time on a CPU means nothing without."""
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "instruction_set": _native.isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "revision": revision(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "copy_gb_s": round(copy_bandwidth(), 1),
        "mm_gflop_s": round(matmul_rate(), 1),
    }


# Memory


def peak_memory(setup: str, call: str) -> float:
    """MiB that `call` adds at its peak to the resident memory after `setup`, in a fresh process (both are Python
    source)."""
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


# Files


def replace_file(path: Path, text: str) -> None:
    """Whoever reads finds the old file or the new one, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def document(op: str, rows: list[Row], facts: Mapping[str, object]) -> str:
    """Results as JSON: times in milliseconds, rates in GB/s, memory in MiB."""
    return json.dumps({"schema": SCHEMA, "op": op, "machine": dict(facts), "rows": rows}, indent=2) + "\n"
