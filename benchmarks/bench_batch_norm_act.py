"""batch_norm_act on the CPU, forward and backward, beside eager `nn.BatchNorm2d` and `nn.SiLU` on channels_last
tensors.

    python benchmarks/bench_batch_norm_act.py [--json] [--quick] [--compile] [--threads 2]

The result that is timed is checked against float64 first. "GB/s" counts the eight passes that training cannot do
without: x twice and y forward, x and dy twice and dx backward. Memory is what one step adds to the resident set at its
peak, beside its inputs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import mvit3_kernels
from benchmarks.common import Case, Make, Row, compiled, run_cases
from mvit3.bench.measure import peak_memory
from mvit3_kernels.ops import BatchNorm, batch_norm_act

SHAPES = ((8, 128, 64, 64), (32, 64, 128, 128), (16, 24, 56, 56), (2, 240, 16, 16))  # as NCHW
DTYPES = (torch.float32, torch.bfloat16)
PASSES = 8

SETUP = """
import torch, mvit3_kernels
from torch import nn
from mvit3_kernels.ops import BatchNorm, batch_norm_act
torch.set_num_threads({threads})
def step(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype={dtype}).to(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn_like(x)
    net = nn.Sequential(nn.BatchNorm2d(shape[1]), nn.SiLU())
    norm = BatchNorm(net[0].weight, net[0].bias, None, None, True)
    nhwc, dy_nhwc = x.detach().permute(0, 2, 3, 1).requires_grad_(), dy.permute(0, 2, 3, 1)
    return (lambda: net(x).backward(dy)), (lambda: batch_norm_act(nhwc, norm, "silu")[0].backward(dy_nhwc))
[run() for run in step((1, {channels}, 8, 8))]  # whatever is loaded at a first call
eager, ours = step({shape})
"""


class Step:
    """One training step on random inputs; `run` keeps outputs and gradients only when asked to."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        torch.manual_seed(0)
        self.x = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
        self.dy = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
        self.net = nn.Sequential(nn.BatchNorm2d(shape[1]), nn.SiLU())
        nn.init.uniform_(self.net[0].weight, 0.5, 1.5)
        nn.init.normal_(self.net[0].bias)

    def eager(self, net: nn.Module | None = None) -> dict[str, Tensor]:
        x = self.x.detach().requires_grad_()
        self.net.zero_grad()
        y = (net or self.net)(x)
        y.backward(self.dy)
        return {"y": y, "dx": x.grad, "dweight": self.net[0].weight.grad, "dbias": self.net[0].bias.grad}

    def ours(self) -> dict[str, Tensor]:
        x = self.x.detach().permute(0, 2, 3, 1).requires_grad_()
        self.net.zero_grad()
        with mvit3_kernels.backend("cpu"):
            y, _ = batch_norm_act(x, BatchNorm(self.net[0].weight, self.net[0].bias, None, None, True), "silu")
        y.backward(self.dy.permute(0, 2, 3, 1))
        grads = {"dweight": self.net[0].weight.grad, "dbias": self.net[0].bias.grad}
        return {"y": y.permute(0, 3, 1, 2), "dx": x.grad.permute(0, 3, 1, 2), **grads}

    def truth(self) -> dict[str, Tensor]:
        exact = Step.__new__(Step)
        exact.x, exact.dy = self.x.double(), self.dy.double()
        exact.net = nn.Sequential(nn.BatchNorm2d(self.x.shape[1]), nn.SiLU()).double()
        exact.net.load_state_dict(self.net.state_dict())
        return exact.eager()


def case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    step = Step(shape, dtype)
    candidates = {"eager": step.eager, "ours": step.ours}
    setup = SETUP.format(threads=torch.get_num_threads(), dtype=dtype, shape=shape, channels=shape[1])
    size = PASSES * step.x.numel() * step.x.element_size()

    def more(times: dict[str, dict[str, float]]) -> Row:
        return {
            "ratio": times["eager"]["median_ms"] / times["ours"]["median_ms"],
            "best_ratio": times["eager"]["min_ms"] / times["ours"]["min_ms"],
            "gb_s": size / times["ours"]["median_ms"] / 1e6,
            "eager_mib": peak_memory(setup, "eager()"),
            "ours_mib": peak_memory(setup, "ours()"),
        }

    columns = {"shape": "x".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch."), "mode": "training"}
    return Case(
        columns,
        candidates,
        step.truth,
        bytes=size,
        more=more,
        compiled=lambda: partial(step.eager, compiled(step.net)),
    )


def cases(options: argparse.Namespace) -> Iterator[Make]:
    return (partial(case, shape, dtype) for dtype in DTYPES for shape in SHAPES)


if __name__ == "__main__":
    run_cases(__doc__.splitlines()[0], "batch_norm_act", cases)
