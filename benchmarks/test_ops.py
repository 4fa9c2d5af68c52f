"""The single ops under pytest-benchmark: the cases of bench_*.py, float32 and what else they list.

    pytest benchmarks/ [-k "conv3x3 and ours"] [--threads 2] [--benchmark-json FILE] [--benchmark-compare ...]

Evaluation is forward, training forward and backward. Every case checks its result before it is timed; `ours` stands
beside `eager` and, where the case has it, the library's own op or what PyTorch's parts make of it. Here each is timed
by itself; for candidates in turns, which a change of the machine's speed meets alike, run bench_*.py.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Iterator
from functools import cache, lru_cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import Case, Make, mode
from mvit3.bench.measure import Row, machine

# The files with lists of cases, and what they time beside ours and eager.
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
OPTIONS = argparse.Namespace(batch=[8, 1], dtype="float32", bfloat16=False, compile=False, width=1.0)


def name(make: Make) -> str:
    """A case by what makes it: shapes, dtype, mode."""

    def word(value: object) -> str:
        if isinstance(value, tuple):
            return "x".join(word(one) for one in value)
        return str(value).removeprefix("torch.").replace(" ", "_")

    given = inspect.signature(make.func).bind(*make.args).arguments
    words = [mode(value) if key == "training" else word(value) for key, value in given.items() if key != "compiled"]
    return "-".join([make.func.__name__.removesuffix("case").removesuffix("_"), *words]).removeprefix("-")


def parameters() -> Iterator[object]:
    for op, more in OPS.items():
        for make in importlib.import_module(f"benchmarks.bench_{op}").cases(OPTIONS):
            for candidate in ("ours", "eager", *more):
                yield pytest.param(make, candidate, id=f"{op}-{name(make)}-{candidate}")


@lru_cache(maxsize=1)
def prepared(make: Make) -> tuple[Case, float | None]:
    """The case, and the largest error of our results."""
    case = make()
    return case, max(case.checked().values(), default=None)


@cache
def facts(threads: int) -> Row:
    torch.set_num_threads(threads)
    return machine()


def products(case: Case) -> float:
    """Operations that no method can leave out; 0 where the case counts none."""
    if "mm" not in case.candidates:
        return case.flops
    with FlopCounterMode(display=False) as counter:
        case.candidates["mm"]()
    return counter.get_total_flops()


@pytest.mark.parametrize(("make", "candidate"), list(parameters()))
def test_op(benchmark, request, make, candidate):
    here = facts(request.config.getoption("threads"))
    case, error = prepared(make)
    benchmark.group = request.node.callspec.id.removesuffix(f"-{candidate}")
    benchmark.pedantic(case.candidates[candidate], rounds=case.rounds, warmup_rounds=case.warmup)
    info = {**here, "device": "cpu", **case.columns, "candidate": candidate, "error": error}
    if benchmark.stats is not None:  # --benchmark-disable times nothing
        seconds = benchmark.stats.stats.median
        info["gb_s"] = case.bytes / seconds / 1e9 if case.bytes else None
        info["gflop_s"] = flops / seconds / 1e9 if (flops := products(case)) else None
    benchmark.extra_info.update(info)
