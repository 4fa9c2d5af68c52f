"""What every benchmark shares: timing of candidates side by side, on a CPU and on a GPU, facts about the machine,
checking of the timed result, memory, one file format, and the command line of the benchmarks of single ops.

Times of candidates are taken in turns, in one process, so that a change of the machine's speed meets all of them alike.
A benchmark of an op makes a `Case` for each of its rows; `run_cases` does the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
SCHEMA = 1
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
    candidates: Mapping[Any, Run], rounds: int = 15, warmup: int = 2, burst: int = 1
) -> dict[Any, dict[str, float]]:
    """Median and least milliseconds of each candidate, over `rounds` turns of `burst` calls. Before a turn of several
    calls goes one that is not counted: it finds caches and sleeping threads as another candidate left them, which no
    user of one candidate meets."""
    for _ in range(warmup):
        for run in candidates.values():
            run()

    def sample(_: Any, run: Run) -> list[float]:
        if burst > 1:
            run()
        return [timed(run) for _ in range(burst)]

    times = in_turns(candidates, rounds, sample)
    return {name: {"median_ms": statistics.median(t), "min_ms": min(t)} for name, t in times.items()}


def elapsed(run: Run, times: int, device: str) -> float:
    """Seconds per call of `times` calls back to back, on a GPU by its own clock."""
    if device == "cpu":
        return timed(lambda: [run() for _ in range(times)]) / 1e3 / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def interleaved_bursts(
    candidates: Mapping[str, Run], options: argparse.Namespace, budget: float = 0.05
) -> dict[str, Row]:
    """Median and range in seconds of warm candidates on `options.device`, over `options.rounds` turns of about `budget`
    seconds each; two turns of one call where `options.tiny`."""

    def calls(run: Run) -> int:
        return 1 if options.tiny else max(1, round(budget / elapsed(run, 2, options.device)))

    burst = {name: calls(run) for name, run in candidates.items()}
    times = in_turns(
        candidates,
        2 if options.tiny else options.rounds,
        lambda name, run: [elapsed(run, burst[name], options.device)],
    )
    return {name: {"seconds": statistics.median(t), "fastest": min(t), "slowest": max(t)} for name, t in times.items()}


def graphed(run: Run, device: str) -> Run:
    """A replay of `run` as a CUDA graph: what the GPU takes, without Python's share."""
    if device == "cpu":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# Facts about the machine


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


def _output_of(*command: str) -> str:
    """What a command prints; nothing where it does not run."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True, timeout=20
        ).stdout.strip()
    return ""


def _revision() -> str:
    changed = _output_of(
        *("git", "status", "--porcelain", "--untracked-files=no", "--", "../csrc", "../mvit3_kernels", ".")
    )
    return _output_of("git", "rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def machine() -> Row:
    """Facts that a time on a CPU means nothing without."""
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


def gpu_machine(device: str) -> Row:
    """Facts that a time on a GPU means nothing without; of the CPU where `device` is that."""
    from mvit3_kernels import info

    found: Row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "revision": os.environ.get("GIT_REVISION") or _output_of("git", "rev-parse", "HEAD") or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "backends": {name: b["reason"] or "available" for name, b in info.collect()["backends"].items()},
    }
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    if device != "cuda":
        return found | {"device": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(0)
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    answer = _output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0")
    return found | {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "nvidia_smi": dict(zip(fields.split(","), answer.split(", "), strict=False)),
    }


# Results


@torch.no_grad()
def errors(got: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Norm of the error of each result relative to the norm of the true one."""
    return {
        name: float((got[name].double() - true).norm() / true.norm().clamp(min=1e-30)) for name, true in truth.items()
    }


def check(ours: Mapping[str, Tensor], eager: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Errors of `ours`; raises where one passes twice that of `eager` plus half a rounding of the result's dtype."""
    found, allowed = errors(ours, truth), errors(eager, truth)
    for name, error in found.items():
        if not error <= 2 * allowed[name] + torch.finfo(ours[name].dtype).eps / 2:
            raise AssertionError(f"{name}: relative error {error:.2e}, eager {allowed[name]:.2e}")
    return found


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


def peak_gpu_memory(run: Run, device: str) -> int | None:
    """Bytes that a call takes on top of what is there before it. A CUDA graph's own pool (max-autotune) is not in
    it."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(run: Callable[[], Tensor], aside: Iterable[Tensor]) -> tuple[int, Tensor]:
    """Bytes that the graph of `run()` keeps for backward, without the memory of the tensors `aside` (parameters), and
    its result."""
    known = {t.untyped_storage().data_ptr() for t in aside}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    return sum(kept.values()), y


# Tables and files


def table(rows: list[Row]) -> str:
    """Rows under the columns of all of them, aligned."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: object) -> str:
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    cells = [columns, *([cell(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in cells)


def line(row: Mapping[str, object]) -> str:
    """A row by itself: `name value, name value`."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
    )


def replace_file(path: Path, text: str) -> None:
    """Whoever reads finds the old file or the new one, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def write(op: str, rows: list[Row], facts: Mapping[str, object], name: str | None = None) -> Path:
    """Writes results/<name or op>.json: {schema, op, machine, rows}; times in milliseconds, rates in GB/s, memory in
    MiB."""
    path = RESULTS / f"{name or op}.json"
    replace_file(path, json.dumps({"schema": SCHEMA, "op": op, "machine": dict(facts), "rows": rows}, indent=2) + "\n")
    return path


class Report:
    """Rows of a piece of the GPU measurements: each new one is printed, and the whole file gpu_<piece>.json replaced at
    once, in `folder` and in $OUT where that is set."""

    def __init__(self, piece: str, device: str, folder: str | Path | None = None) -> None:
        self.piece, self.rows, self.facts = piece, [], gpu_machine(device)
        self.folders = [Path(folder or RESULTS), *(Path(out) for out in [os.environ.get("OUT")] if out)]

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print(line(row), flush=True)
        text = json.dumps({"piece": self.piece, "facts": self.facts, "rows": self.rows}, indent=1)
        for folder in self.folders:
            replace_file(folder / f"gpu_{self.piece}.json", text)


# Benchmarks of single ops on a CPU


def nothing(_: Mapping[str, Mapping[str, float]]) -> Row:
    return {}


@dataclass
class Case:
    """One row: candidates that are timed in turns, and the least that any method has to do.

    Attributes:
        columns: what the row is about; `mode` is "evaluation" or "training".
        candidates: what is timed, by name. "ours" and "eager" return their results by name.
        truth: the results in float64. "ours" may err twice as much as "eager" does. None: too large to be computed.
        flops: of the products that no method can leave out, counted at the rate of `torch.mm`. A candidate "mm" that
            is those products takes its place.
        bytes: that no method can leave unread or unwritten, at the rate of a copy.
        overlap: whether the floor is the longer of these two times, or their sum.
        more: further columns, from the times of `interleaved`.
    """

    columns: Row
    candidates: Mapping[str, Run]
    truth: Callable[[], Mapping[str, Tensor]] | None
    rounds: int = 15
    warmup: int = 2
    flops: float = 0.0
    bytes: float = 0.0
    overlap: bool = True
    more: Callable[[Mapping[str, Mapping[str, float]]], Row] = nothing

    def measure(self, facts: Mapping[str, Any], quick: bool = False) -> Row:
        """The row: columns, the median `<candidate>_ms`, how many times as fast ours is, the floor and its share."""
        errors = {}
        if self.truth is not None:
            errors = check(self.candidates["ours"](), self.candidates["eager"](), self.truth())
        times = interleaved(self.candidates, max(3, self.rounds // 3) if quick else self.rounds, self.warmup)
        ms = {name: t["median_ms"] for name, t in times.items()}
        products = ms["mm"] if "mm" in ms else self.flops / facts["mm_gflop_s"] / 1e6
        passes = self.bytes / facts["copy_gb_s"] / 1e6
        floor = max(products, passes) if self.overlap else products + passes
        return {
            **self.columns,
            **{f"{name}_ms": time for name, time in ms.items()},
            **{f"against_{name}": ms[name] / ms["ours"] for name in ("eager", "composed") if name in ms},
            "floor_ms": floor,
            "of_floor": floor / ms["ours"],
            **self.more(times),
            **({"error": f"{max(errors.values()):.1e}"} if errors else {}),
        }


def mode(training: bool) -> str:
    return "training" if training else "evaluation"


def step(run: Callable[..., Tensor], leaves: Mapping[str, Tensor], dy: Tensor | None) -> dict[str, Tensor]:
    """A call `run(*leaves)` as a candidate: the output and, where its gradient `dy` is given, those of the leaves."""
    if dy is None:
        with torch.no_grad():
            return {"y": run(*leaves.values())}
    given = [t.detach().requires_grad_() for t in leaves.values()]
    y = run(*given)
    gradients = torch.autograd.grad(y, given, dy.to(y))
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def run_cases(
    description: str,
    op: str,
    cases: Callable[[argparse.Namespace], Iterable[Case]],
    more_options: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> None:
    """The command line of a benchmark: measures `cases(options)` one after the other and prints their table."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help=f"write results/{op}_cpu.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a third of the rounds")
    more_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = machine()
    print(line(facts))
    rows = [case.measure(facts, options.quick) for case in cases(options)]
    print(table(rows))
    if options.json:
        print(write(op, rows, facts, f"{op}_cpu"))


def batches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
