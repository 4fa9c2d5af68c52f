"""dropout and the addition of a residual on the CPU, at the maps behind the attention of mobilevitv3_s and
mobilevitv3_xxs, 256x256 input.

    python benchmarks/bench_dropout.py [--json] [--quick] [--threads 2] [--dtype float32]

"eager" is the hash in plain PyTorch; "library" is `residual + F.dropout(x)`, whose mask PyTorch keeps for backward: it
has another mask, so only its time is comparable. The floor is the bytes that must move at the rate of a copy. Results
and gradients are held to twice eager's error before they are timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

import mvit3_kernels
from benchmarks.common import Case, Make, compiled, mode, run_cases, step
from mvit3_kernels.ops import dropout

# (network, width, side of the map)
MAPS = (
    ("mobilevitv3_s", 144, 32),
    ("mobilevitv3_s", 192, 16),
    ("mobilevitv3_s", 240, 8),
    ("mobilevitv3_xxs", 64, 32),
)
P = 0.1


def case(place: tuple, batch: int, training: bool, dtype: torch.dtype) -> Case:
    network, width, side = place
    torch.manual_seed(0)
    leaves = {name: torch.randn(batch, side, side, width).to(dtype) for name in ("x", "residual")}
    seed = torch.tensor(7)
    dy = torch.randn(batch, side, side, width) if training else None

    def ours(x: Tensor, residual: Tensor) -> Tensor:
        return dropout(x, P, seed, residual)

    def library(x: Tensor, residual: Tensor) -> Tensor:
        return residual + F.dropout(x, P)

    def eager(call: Callable = ours) -> dict[str, Tensor]:
        with mvit3_kernels.backend("reference"):
            return step(call, leaves, dy)

    def run(call: Callable, kind: torch.dtype | None = None) -> dict[str, Tensor]:
        return step(call, {name: t.to(kind or dtype) for name, t in leaves.items()}, dy)

    return Case(
        {
            "network": network,
            "shape": f"{batch}x{side}x{side}x{width}",
            "dtype": str(dtype).removeprefix("torch."),
            "mode": mode(training),
        },
        {"eager": eager, "library": lambda: run(library), "ours": lambda: run(ours)},
        lambda: run(ours, torch.float64),
        rounds=31,
        warmup=3,
        bytes=batch * side * side * width * (5 if training else 3) * dtype.itemsize,
        compiled=lambda: partial(eager, compiled(ours)),
    )


def cases(options: argparse.Namespace) -> Iterator[Make]:
    dtype = getattr(torch, options.dtype)
    return (
        partial(case, place, batch, training, dtype) for training in (False, True) for batch in (8, 1) for place in MAPS
    )


def more_options(parser: argparse.ArgumentParser) -> None:
    kinds = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=kinds, default="float32", help="of the feature maps")


if __name__ == "__main__":
    run_cases(__doc__.splitlines()[0], "dropout", cases, more_options)
