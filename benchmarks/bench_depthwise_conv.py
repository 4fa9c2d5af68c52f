"""depthwise_conv on the CPU: evaluation, and training forward and backward, beside plain modules in channels_last.

    python benchmarks/bench_depthwise_conv.py [--json] [--quick] [--threads 2]

"composed" is the same op as PyTorch's convolution and batch_norm_act: what runs where the kernel does not. Results are
held to twice eager's error, both
against float64, before they are timed. The floor is the bytes that a kernel must move, at the rate of a large
copy: x and y once in evaluation; in training x twice and y forward, x and dy twice and dx backward. Below the size of
the caches arithmetic is the limit, not the floor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Case, Make, compiled, mode, run_cases, step
from mvit3_kernels.ops import BatchNorm, depthwise_conv

OP = sys.modules["mvit3_kernels.ops.depthwise_conv"]
EPS = 1e-5

# (batch, channels, side of the map, stride): blocks of mobilevitv3_s and mobilevitv3_100, then parts of wide inverted
# residuals.
SHAPES = [
    *(
        (batch, channels, side, 1)
        for batch in (8, 1)
        for channels, side in ((128, 32), (256, 16), (320, 8), (256, 32), (384, 16), (512, 8))
    ),
    (8, 256, 64, 1),
    (8, 256, 64, 2),
    (8, 512, 32, 1),
    (8, 512, 32, 2),
    (8, 1024, 16, 1),
    (8, 1024, 16, 2),
]


def case(dtype: torch.dtype, batch: int, channels: int, side: int, stride: int, training: bool) -> Case:
    torch.manual_seed(0)
    x = torch.randn(batch, side, side, channels).to(dtype)
    learned = (torch.randn(channels, 1, 3, 3) / 3, torch.rand(channels) + 0.5, torch.randn(channels))
    leaves = dict(zip(("x", "weight", "gamma", "beta"), (x, *learned), strict=True))
    mean, var = torch.zeros(channels), torch.ones(channels)
    y = torch.randn(batch, -(-side // stride), -(-side // stride), channels).to(dtype)
    dy = y if training else None

    def eager(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        z = F.conv2d(x.permute(0, 3, 1, 2), weight.to(x.dtype), None, stride, 1, 1, channels)
        running = (mean.to(gamma.dtype), var.to(gamma.dtype))
        return F.silu(F.batch_norm(z, *running, gamma, beta, training, 0.0, EPS)).permute(0, 2, 3, 1)

    def ours(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return depthwise_conv(x, weight, BatchNorm(gamma, beta, mean, var, training, EPS), "silu", stride)[0]

    def composed() -> dict[str, Tensor]:
        with mock.patch.object(OP, "KERNELS", ()):
            return step(ours, leaves, dy)

    return Case(
        {
            "dtype": str(dtype).removeprefix("torch."),
            "shape": f"{batch}x{channels}x{side}x{side}",
            "stride": stride,
            "mode": mode(training),
        },
        {"eager": lambda: step(eager, leaves, dy), "composed": composed, "ours": lambda: step(ours, leaves, dy)},
        lambda: step(eager, {name: t.double() for name, t in leaves.items()}, dy),
        rounds=7 if batch > 1 else 25,
        bytes=((5 if training else 1) * x.numel() + (3 if training else 1) * y.numel()) * x.element_size(),
        compiled=lambda: partial(step, compiled(eager), leaves, dy),
    )


def cases(options: argparse.Namespace) -> Iterator[Make]:
    torch.empty(31 << 18)  # as in a network: once something large was freed, the allocator keeps what is below 32 MiB
    for dtype, shapes in ((torch.float32, SHAPES), (torch.bfloat16, SHAPES[:2])):
        for shape in shapes:
            yield from (partial(case, dtype, *shape, training) for training in (False, True))


if __name__ == "__main__":
    run_cases(__doc__.splitlines()[0], "depthwise_conv", cases)
