"""The CUDA C++ kernels of the depth-wise convolution where no GPU is: their bodies run on the launch emulation of tests/cuda against the
plain meaning in float64; their error is at most twice that of plain PyTorch in the dtype of the map."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from mvit3_kernels import _native

from ..bounds import FLOOR
from ..cuda import emulation
from .inputs import Draw

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="no C++ compiler for the launch emulation")

# (B, H, W, C), stride, dilation, dtype of x, dtype of the weight. A thread has two columns, and one channel or two to four; a block has at
# most 64 of its groups of channels, so that 264 come in several slices.
CASES = {
    "odd": ((2, 7, 13, 7), 1, 1, torch.bfloat16, torch.float32),
    "odd, stride 2": ((2, 7, 13, 7), 2, 1, torch.float16, torch.float32),
    "vectors": ((2, 9, 11, 40), 1, 1, torch.bfloat16, torch.bfloat16),
    "vectors, float16": ((1, 6, 8, 40), 1, 1, torch.float16, torch.float32),
    "vectors, stride 2": ((2, 10, 12, 40), 2, 1, torch.bfloat16, torch.float32),
    "vectors, odd, stride 2": ((1, 9, 7, 8), 2, 1, torch.float16, torch.float16),
    "float32": ((2, 7, 9, 8), 1, 1, torch.float32, torch.float32),
    "float32, stride 2": ((2, 7, 9, 8), 2, 1, torch.float32, torch.float32),
    "dilation": ((2, 7, 13, 8), 1, 2, torch.bfloat16, torch.float32),
    "dilation as large as the map": ((2, 3, 5, 7), 1, 5, torch.float16, torch.float32),
    "slices": ((1, 3, 5, 264), 1, 1, torch.bfloat16, torch.float32),
    "one channel": ((3, 5, 9, 1), 1, 1, torch.bfloat16, torch.float32),
    "one pixel": ((2, 1, 1, 8), 1, 1, torch.bfloat16, torch.float32),
    "one pixel, stride 2": ((1, 1, 1, 1), 2, 1, torch.float32, torch.float32),
}


def arguments(shape: tuple[int, ...], stride: int, dilation: int, dtype: torch.dtype, weights: torch.dtype) -> dict:
    batch, height, width, channels = shape
    draw = Draw(0)
    return dict(
        x=(draw(*shape) + 0.5).to(dtype),
        weight=(draw(channels, 1, 3, 3) / 2).to(weights),
        dz=draw(batch, -(-height // stride), -(-width // stride), channels).to(dtype),
        stride=stride, dilation=dilation,
    )  # fmt: skip


def run(name: str, a: dict, **options: int) -> dict[str, Tensor]:
    """What the kernel of that name writes; memory that it does not write stays NaN."""
    x, weight, dz = a["x"], a["weight"], a["dz"]
    batch, height, width, channels = x.shape

    def empty(like: Tensor, *shape: int) -> Tensor:
        return like.new_full(shape or like.shape, float("nan"))

    if name == "filter":
        results = dict(z=empty(dz), mean=empty(weight.float(), channels), var=empty(weight.float(), channels))
    else:
        results = dict(dx=empty(x), dweight=empty(weight))
    sizes = dict(batch=batch, height=height, width=width, channels=channels)
    emulation.call_depthwise(f"run_depthwise_{name}", **sizes, **{**a, **results}, **options)
    return results


def meaning(name: str, a: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    x, weight, dz = (a[k].to(a["x"].dtype if k != "weight" or dtype != torch.float64 else torch.float64).to(dtype) for k in ("x", "weight", "dz"))
    geometry = (a["stride"], a["dilation"], a["dilation"], len(weight))
    x, dz = x.permute(0, 3, 1, 2).contiguous(), dz.permute(0, 3, 1, 2).contiguous()
    if name == "filter":
        return dict(z=F.conv2d(x, weight, None, *geometry).permute(0, 2, 3, 1))
    dx = conv2d_input(x.shape, weight, dz, *geometry).permute(0, 2, 3, 1)
    return dict(dx=dx, dweight=conv2d_weight(x, weight.shape, dz, *geometry))


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm())


def check(name: str, a: dict, run: Callable[[str, dict], dict[str, Tensor]] = run) -> dict[str, Tensor]:
    found, peer, truth = run(name, a), meaning(name, a, a["x"].dtype), meaning(name, a, torch.float64)
    for key, true in truth.items():
        assert found[key].isfinite().all(), key
        bound = 2 * error(peer[key], true) + FLOOR * float(true.norm())
        assert error(found[key], true) <= bound, f"{key}: {error(found[key], true):.3e}, allowed {bound:.3e}"
    if name == "filter":  # the moments of z as it is stored
        rows = found["z"].double().flatten(0, 2)
        torch.testing.assert_close(found["mean"].double(), rows.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["var"].double(), rows.var(0, unbiased=False), rtol=2e-6, atol=1e-9)
    return found


@pytest.mark.parametrize("name", ["filter", "backward"])
@pytest.mark.parametrize("case", CASES)
def test_bound(name, case):
    a = arguments(*CASES[case])
    before = {k: v.clone() for k, v in a.items() if isinstance(v, Tensor)}
    check(name, a)
    assert all(torch.equal(a[k], v) for k, v in before.items())
