"""What every benchmark shares: timing of candidates side by side, on a CPU and on a GPU, facts about the machine,
checking of the timed result, memory, one file format, and the command line of the benchmarks of single ops. Turns and
facts about the CPU are those of `mvit3 bench` (python/mvit3/bench/measure.py).

Times of candidates are taken in turns, in one process, so that a change of the machine's speed meets all of them alike.
A benchmark of an op makes a `Case` for each of its rows; `run_cases` does the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mvit3.bench.candidates import PEER_TIMES
from mvit3.bench.measure import Row, Run, document, in_turns, interleaved, machine, output_of, replace_file, timed
from mvit3_kernels import release_memory

RESULTS = Path(__file__).parent / "results"


# Time


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


def gpu_machine(device: str) -> Row:
    """Facts that a time on a GPU means nothing without; of the CPU where `device` is that."""
    from mvit3_kernels import info

    found: Row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "revision": os.environ.get("GIT_REVISION") or output_of("git", "rev-parse", "HEAD") or None,
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
    answer = output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0")
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


def check(
    ours: Mapping[str, Tensor], eager: Mapping[str, Tensor], truth: Mapping[str, Tensor], times: float = 2.0
) -> dict[str, float]:
    """Errors of `ours`; raises where one passes so many times that of `eager` plus half a rounding of the result's
    dtype."""
    found, allowed = errors(ours, truth), errors(eager, truth)
    for name, error in found.items():
        if not error <= times * allowed[name] + torch.finfo(ours[name].dtype).eps / 2:
            raise AssertionError(f"{name}: relative error {error:.2e}, eager {allowed[name]:.2e}")
    return found


# Memory


def peak_cpu_memory(run: Run) -> float | None:
    """MiB that a call adds at its peak to the resident memory once what is free has gone back to the system; None where
    that tells neither."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None

    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    gc.collect()
    release_memory()
    with contextlib.suppress(AttributeError, OSError):  # of the GNU C library
        ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")  # the peak starts again from here
    before = resident("VmRSS:")
    run()
    return (resident("VmHWM:") - before) / 2**10


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


def write(op: str, rows: list[Row], facts: Mapping[str, object], name: str | None = None) -> Path:
    """Writes results/<name or op>.json: {schema, op, machine, rows}; times in milliseconds, rates in GB/s, memory in
    MiB."""
    path = RESULTS / f"{name or op}.json"
    replace_file(path, document(op, rows, facts))
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
        compiled: makes "eager" under torch.compile, which takes seconds to minutes: a candidate where asked for.
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
    compiled: Callable[[], Run] | None = None

    def checked(self) -> dict[str, float]:
        """Errors of our results, none where the truth is too large; AssertionError where they are too large."""
        if self.truth is None:
            return {}
        return check(self.candidates["ours"](), self.candidates["eager"](), self.truth())

    def with_compiled(self) -> Case:
        """With torch.compile of eager as the candidate "compile", after its first call; AssertionError where that is
        wrong."""
        if self.compiled is None:
            raise ValueError("this case has nothing to compile")
        run = self.compiled()
        found = run()
        if self.truth is not None:
            check(found, self.candidates["eager"](), self.truth(), PEER_TIMES)
        return replace(self, candidates={**self.candidates, "compile": run})

    def measure(self, facts: Mapping[str, Any], quick: bool = False) -> Row:
        """The row: columns, the median `<candidate>_ms`, how many times as fast ours is, the floor and its share."""
        errors = self.checked()
        times = interleaved(self.candidates, max(3, self.rounds // 3) if quick else self.rounds, self.warmup)
        ms = {name: t["median_ms"] for name, t in times.items()}
        products = ms["mm"] if "mm" in ms else self.flops / facts["mm_gflop_s"] / 1e6
        passes = self.bytes / facts["copy_gb_s"] / 1e6
        floor = max(products, passes) if self.overlap else products + passes
        return {
            **self.columns,
            **{f"{name}_ms": time for name, time in ms.items()},
            **{f"against_{name}": ms[name] / ms["ours"] for name in ("eager", "compile", "composed") if name in ms},
            "floor_ms": floor,
            "of_floor": floor / ms["ours"],
            **self.more(times),
            **({"error": f"{max(errors.values()):.1e}"} if errors else {}),
        }


Make = Callable[[], Case]  # a case whose tensors are made when it is its turn


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


class _Reached(Exception):
    """A step has come to its backward pass."""

    def __init__(self, backward: Run) -> None:
        self.backward = backward


def backward_of(step: Run) -> Run:
    """Runs a training step as far as its backward pass, and returns that: what it does with the gradients of its
    results is left out."""

    def stop(function: Callable[..., Any]) -> Callable[..., Any]:
        def reached(*arguments: Any, **more: Any) -> None:
            raise _Reached(lambda: function(*arguments, **more))

        return reached

    with (
        mock.patch.object(torch.autograd, "grad", stop(torch.autograd.grad)),
        mock.patch.object(Tensor, "backward", stop(Tensor.backward)),
    ):
        try:
            step()
        except _Reached as reached:
            return reached.backward
    raise ValueError("this step has no backward pass")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under torch.compile, which forgets earlier cases: beyond a number of shapes of one function it would run eager
    without a word."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def run_cases(
    description: str,
    op: str,
    cases: Callable[[argparse.Namespace], Iterable[Make]],
    more_options: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> None:
    """The command line of a benchmark: measures `cases(options)` one after the other and prints their table."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help=f"write results/{op}_cpu.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a third of the rounds")
    parser.add_argument("--compile", action="store_true", help="time torch.compile of eager too, which takes minutes")
    more_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = machine()
    print(line(facts))
    made = (make() for make in cases(options))
    rows = [(case.with_compiled() if options.compile else case).measure(facts, options.quick) for case in made]
    print(table(rows))
    if options.json:
        print(write(op, rows, facts, f"{op}_cpu"))


def batches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
