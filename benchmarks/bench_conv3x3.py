"""conv3x3 on the CPU: evaluation, and training forward and backward, beside plain modules in channels_last.

    python benchmarks/bench_conv3x3.py [--json] [--quick] [--threads 2] [--bfloat16]

"ours" is the op as it runs; the column "runs" tells whether that is the kernel, or PyTorch's convolution and
batch_norm_act. "kernel" and "composed" are these two, forced: what the choice rests on. Results are held to twice
eager's error, both against float64, before they are timed; SiLU, for a value on the other side of ReLU's kink by its
last bit would have another gradient. The floor is the products of the taps inside of the map, at
the rate of `torch.mm`; "inside" is their share of those that zero padding makes.
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
from mvit3_kernels.ops import BatchNorm, conv3x3, dispatch

OP = sys.modules["mvit3_kernels.ops.conv3x3"]
EPS = 1e-5

# (where it stands, batch, side of the map, inputs, outputs, dilation)
SHAPES = (
    *(("ASPP v3-S", 4, 32, 320, 256, rate) for rate in (6, 12, 18)),
    *(("ASPP v3-1.0", 4, 32, 512, 512, rate) for rate in (6, 12, 18)),
    *(("ASPP ADE20K v3-0.5", 1, 64, 256, 512, rate) for rate in (12, 24, 36)),
    ("PSP fusion v3-1.0", 4, 32, 1024, 512, 1),
    ("auxiliary v3-1.0", 4, 32, 384, 128, 1),
    ("v1-S local", 8, 32, 96, 96, 1),
    ("v1-S fusion", 8, 32, 192, 96, 1),
    ("v1-S local", 8, 16, 128, 128, 1),
    ("v1-S fusion", 8, 16, 256, 128, 1),
    ("v1-S local", 8, 8, 160, 160, 1),
    ("v1-S fusion", 8, 8, 320, 160, 1),
    ("v1-XXS local", 8, 32, 48, 48, 1),
    *(("ASPP v3-S", 1, 32, 320, 256, rate) for rate in (6, 12, 18)),
    ("v1-S local", 1, 32, 96, 96, 1),
    ("v1-S local", 1, 8, 160, 160, 1),
)


def met(side: int, dilation: int) -> int:
    """The taps inside of the map, over all pixels of a side: of nine a pixel, squared."""
    return side + 2 * max(side - dilation, 0)


def case(dtype: torch.dtype, place: str, shape: tuple[int, ...], training: bool) -> Case:
    torch.manual_seed(0)
    batch, side, inputs, outputs, dilation = shape
    x = torch.randn(batch, side, side, inputs).to(dtype)
    weight = torch.randn(outputs, inputs, 3, 3) / (9 * inputs) ** 0.5
    learned = (weight, torch.rand(outputs) + 0.5, torch.randn(outputs))
    leaves = dict(zip(("x", "weight", "gamma", "beta"), (x, *learned), strict=True))
    mean, var = torch.zeros(outputs), torch.ones(outputs)
    dy = torch.randn(batch, side, side, outputs).to(dtype) if training else None

    def eager(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        z = F.conv2d(x.permute(0, 3, 1, 2), weight.to(x.dtype), None, 1, dilation, dilation)
        running = (mean.to(gamma.dtype), var.to(gamma.dtype))
        return F.silu(F.batch_norm(z, *running, gamma, beta, training, 0.0, EPS)).permute(0, 2, 3, 1)

    def op(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return conv3x3(x, weight, BatchNorm(gamma, beta, mean, var, training, EPS), "silu", 1, dilation)[0]

    def forced(kernels: tuple[dispatch.Kernel, ...]) -> dict[str, Tensor]:
        with mock.patch.object(OP, "KERNELS", kernels):
            return step(op, leaves, dy)

    always = (dispatch.Kernel("cpu", lambda *_: None),)
    share = met(side, dilation) ** 2 / (9 * side * side)
    chosen = dispatch.select("conv3x3", OP.KERNELS, x, weight, 1, dilation, training)
    return Case(
        {
            "dtype": str(dtype).removeprefix("torch."),
            "place": place,
            "map": f"{batch}x{side}x{side}",
            "channels": f"{inputs}->{outputs}",
            "rate": dilation,
            "inside": round(share, 2),
            "mode": mode(training),
            "runs": "library" if chosen is None else "ours",
        },
        {
            "eager": lambda: step(eager, leaves, dy),
            "composed": lambda: forced(()),
            "kernel": lambda: forced(always),
            "ours": lambda: step(op, leaves, dy),
        },
        lambda: step(eager, {name: t.double() for name, t in leaves.items()}, dy),
        rounds=9,
        flops=(3 if training else 1) * 2 * 9 * share * batch * side * side * inputs * outputs,
        compiled=lambda: partial(step, compiled(eager), leaves, dy),
    )


def cases(options: argparse.Namespace) -> Iterator[Make]:
    torch.empty(31 << 18)  # as in a network: once something large was freed, the allocator keeps what is below 32 MiB
    dtype = torch.bfloat16 if options.bfloat16 else torch.float32
    for place, *shape in SHAPES:
        yield from (partial(case, dtype, place, tuple(shape), training) for training in (False, True))


if __name__ == "__main__":
    run_cases(
        __doc__.splitlines()[0],
        "conv3x3",
        cases,
        lambda parser: parser.add_argument("--bfloat16", action="store_true", help="instead of float32"),
    )
