"""feed_forward and norm_linear on the CPU, at the shapes of mobilevitv3_s (per token) and mobilevitv3_100 (per sample),
256x256 input.

    python benchmarks/bench_feed_forward.py [--json] [--quick] [--threads 2] [--dtype float32]

"eager" is the same in plain PyTorch; "composed" is feed_forward as norm_linear's kernel and PyTorch's SiLU and product.
The floor is the bare `torch.mm` calls of the products that no method can leave out (a hidden tensor computed again is
not among them), or the bytes that must move at the rate of a copy, whichever is more. "kept" is what a training step
holds for backward, parameters aside. Results and gradients are held to twice eager's error before they are timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import mvit3_kernels
from benchmarks.common import Case, Make, Row, compiled, mode, run_cases, saved_bytes, step
from mvit3_kernels.ops import LayerNorm, Linear, feed_forward, norm_linear

# (op, network, width, outputs or hidden width, side of the map, per sample)
LAYERS = (
    ("norm_linear", "mobilevitv3_s", 144, 432, 32, False),
    ("norm_linear", "mobilevitv3_s", 192, 576, 16, False),
    ("norm_linear", "mobilevitv3_s", 240, 720, 8, False),
    ("feed_forward", "mobilevitv3_s", 144, 288, 32, False),
    ("feed_forward", "mobilevitv3_s", 192, 384, 16, False),
    ("feed_forward", "mobilevitv3_s", 240, 480, 8, False),
    ("feed_forward", "mobilevitv3_100", 128, 256, 32, True),
    ("feed_forward", "mobilevitv3_100", 192, 384, 16, True),
    ("feed_forward", "mobilevitv3_100", 256, 512, 8, True),
)
COMPOSED = sys.modules["mvit3_kernels.ops.feed_forward"]


def products(op: str, rows: int, width: int, wide: int, training: bool) -> Callable[[], None]:
    """The bare products, float32."""
    a, b, w, wt = torch.randn(rows, width), torch.randn(rows, wide), torch.randn(wide, width), torch.randn(width, wide)

    def run() -> None:
        for _ in range(2 if op == "feed_forward" else 1):
            torch.mm(a, wt)
            if training:
                torch.mm(b, w)
                torch.mm(b.t(), a)

    return run


def case(layer: tuple, batch: int, training: bool, dtype: torch.dtype) -> Case:
    op, network, width, wide, side, per_sample = layer
    torch.manual_seed(0)
    two = op == "feed_forward"
    rows, outputs = batch * side * side, width if two else wide
    leaves = {"x": torch.randn(batch, side, side, width).to(dtype)}
    leaves |= {"gamma": torch.rand(width) + 0.5, "beta": torch.randn(width)}
    leaves |= {"w1": torch.randn(wide, width) / width**0.5, "b1": torch.randn(wide)}
    if two:
        leaves |= {"w2": torch.randn(width, wide) / wide**0.5, "b2": torch.randn(width)}
    dy = torch.randn(batch, side, side, outputs) if training else None

    def call(x: Tensor, gamma: Tensor, beta: Tensor, *linears: Tensor) -> Tensor:
        norm = LayerNorm(gamma, beta, 1e-5, per_sample)
        if two:
            return feed_forward(x, norm, Linear(*linears[:2]), Linear(*linears[2:]))
        return norm_linear(x, norm, Linear(*linears))

    def eager(call: Callable[..., Tensor] = call) -> dict[str, Tensor]:
        with mvit3_kernels.backend("reference"):
            return step(call, leaves, dy)

    def composed() -> dict[str, Tensor]:
        with mock.patch.object(COMPOSED, "KERNELS", ()):
            return step(call, leaves, dy)

    def truth() -> dict[str, Tensor]:
        return step(call, {name: t.double() for name, t in leaves.items()}, dy)

    def kept(backend: str) -> float:
        x, *parameters = (t.detach().requires_grad_() for t in leaves.values())
        with mvit3_kernels.backend(backend):
            return saved_bytes(lambda: call(x, *parameters), parameters)[0] / 2**20

    def more(_: object) -> Row:
        return {f"{name}_kept_mib": kept(on) for name, on in (("eager", "reference"), ("ours", "cpu")) if training}

    maps = width + outputs if not training else 3 * (width + outputs) - (0 if two else width)
    return Case(
        {
            "op": op,
            "network": network,
            "shape": f"{batch}x{side}x{side}x{width}->{wide}",
            "dtype": str(dtype).removeprefix("torch."),
            "mode": mode(training),
        },
        {
            "eager": eager,
            **({"composed": composed} if two else {}),
            "ours": lambda: step(call, leaves, dy),
            "mm": products(op, rows, width, wide, training),
        },
        truth,
        rounds=15 if rows > 1024 else 51,
        warmup=3,
        bytes=rows * maps * dtype.itemsize,
        more=more,
        compiled=lambda: partial(eager, compiled(call)),
    )


def cases(options: argparse.Namespace) -> Iterator[Make]:
    dtype = getattr(torch, options.dtype)
    return (
        partial(case, layer, batch, training, dtype)
        for training in (False, True)
        for batch in (8, 1)
        for layer in LAYERS
    )


def more_options(parser: argparse.ArgumentParser) -> None:
    kinds = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=kinds, default="float32", help="of the feature maps")


if __name__ == "__main__":
    run_cases(__doc__.splitlines()[0], "feed_forward", cases, more_options)
