"""The single ops under pytest-benchmark: the cases of bench_*.py, float32 and what else they list.

    pytest benchmarks/ [-k "conv3x3 and not compile"] [--few 2] [--threads 2] [--benchmark-json FILE]
        [--benchmark-compare=benchmarks/results/pytest_cpu.json]

Evaluation is forward, training forward and backward, `backward` the second half of that alone. Every case checks its
result before it is timed; `ours` stands beside `eager`, `compile` (eager under torch.compile, seconds to a minute for
each case) and, where the case has it, the library's own op or what PyTorch's parts make of it. Here each is timed by
itself; for candidates in turns, which a change of the machine's speed meets alike, run bench_*.py.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import Case, Make, Run, backward_of, mode, peak_cpu_memory
from mvit3.bench.measure import Row, machine, matmul_rate

# The files with lists of cases, and what they time beside ours, eager and compile.
OPS = {
    "batch_norm_act": (),
    "conv3x3": ("composed",),
    "depthwise_conv": ("composed",),
    "dropout": ("library",),
    "feed_forward": (),
    "inverted_residual": ("composed",),
    "patch_attention": ("sdpa",),
    "pointwise": ("composed",),
    "separable_attention": ("composed",),
    "upsample": (),
}
OPTIONS = argparse.Namespace(batch=[8, 1], dtype="float32", bfloat16=False, width=1.0)


def arguments(make: Make) -> Mapping[str, object]:
    """What a case is made from, by name."""
    return inspect.signature(make.func).bind(*make.args).arguments


def name(make: Make, trains: str) -> str:
    """A case by what makes it: shapes, dtype, mode; of what trains, the mode is `trains`."""

    def word(value: object) -> str:
        if isinstance(value, tuple):
            return "x".join(word(one) for one in value)
        return str(value).removeprefix("torch.").replace(" ", "_")

    given = {"training": True} | dict(arguments(make))
    words = [word(value) for key, value in given.items() if key != "training"]
    words.append(trains if given["training"] else mode(False))
    return "-".join([make.func.__name__.removesuffix("case").removesuffix("_"), *words]).removeprefix("-")


def parameters() -> Iterator[object]:
    for op, more in OPS.items():
        for make in importlib.import_module(f"benchmarks.bench_{op}").cases(OPTIONS):
            for candidate in ("ours", "eager", "compile", *more):
                for backward in (False, True) if arguments(make).get("training", True) else (False,):
                    shape = name(make, "backward" if backward else "training")
                    yield pytest.param(make, candidate, backward, id=f"{op}-{shape}-{candidate}")


@lru_cache(maxsize=1)
def prepared(make: Make) -> tuple[Case, float | None]:
    """The case, and the largest error of our results."""
    case = make()
    return case, max(case.checked().values(), default=None)


@cache
def facts(threads: int) -> Row:
    torch.set_num_threads(threads)
    return machine()


@cache
def product_rate(threads: int, dtype: str) -> float:
    """GFLOP/s of torch.mm in this dtype."""
    return facts(threads)["mm_gflop_s"] if dtype == "float32" else matmul_rate(dtype=getattr(torch, dtype))


def rates(case: Case, seconds: float, here: Row) -> Row:
    """GB/s and GFLOP/s, and their shares of what a copy and torch.mm reach; nothing for what the case does not count.
    The products are the least that any method has to do, so a share says how much of the machine that least uses."""
    found: Row = {}
    if case.bytes:
        found["gb_s"] = case.bytes / seconds / 1e9
        found["of_copy"] = found["gb_s"] / here["copy_gb_s"]
    if flops := products(case):
        found["gflop_s"] = flops / seconds / 1e9
        found["of_product"] = found["gflop_s"] / product_rate(here["threads"], case.columns.get("dtype", "float32"))
    return found


def products(case: Case) -> float:
    """Operations that no method can leave out; 0 where the case counts none."""
    if "mm" not in case.candidates:
        return case.flops
    with FlopCounterMode(display=False) as counter:
        case.candidates["mm"]()
    return counter.get_total_flops()


@pytest.mark.parametrize(("make", "candidate", "backward"), list(parameters()))
def test_op(benchmark, request, make, candidate, backward):
    here = facts(request.config.getoption("threads"))
    case, error = prepared(make)
    if candidate == "compile":
        case = case.with_compiled()
    benchmark.group = request.node.callspec.id.removesuffix(f"-{candidate}")
    run = case.candidates[candidate]
    if backward:  # each round has its own forward pass, which is not timed

        def forward() -> tuple[tuple[Run], Row]:
            return (backward_of(run),), {}

        benchmark.pedantic(lambda rest: rest(), setup=forward, rounds=case.rounds, warmup_rounds=case.warmup)
    else:
        benchmark.pedantic(run, rounds=case.rounds, warmup_rounds=case.warmup)
    file = make.func.__module__.rpartition("bench_")[2]
    info = {**here, "device": "cpu", "op": file, **case.columns, "candidate": candidate, "case": name(make, "")}
    info |= {"error": error if candidate == "ours" else None}
    info["memory_mib"] = peak_cpu_memory(backward_of(run) if backward else run)
    if backward:
        info["mode"] = "backward"
    elif benchmark.stats is not None:  # --benchmark-disable times nothing
        info |= rates(case, benchmark.stats.stats.median, here)
    benchmark.extra_info.update(info)
