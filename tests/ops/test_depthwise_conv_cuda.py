"""The CUDA C++ kernels of the depth-wise convolution where no GPU is: their bodies run on the launch emulation of
tests/cuda against the plain meaning in float64; their error is at most twice that of plain PyTorch in the dtype of the
map."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from mvit3_kernels import _native

from ..bounds import FLOOR, assert_bound, each
from ..cuda import emulation
from .inputs import Draw

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="no C++ compiler for the launch emulation")

# (B, H, W, C), stride, dilation, dtype of x, dtype of the weight. A thread has two columns, and one channel or up to
# four; a block has at most 64 such groups of channels: 65 single ones come in two slices.
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
    "slices": ((1, 3, 5, 65), 1, 1, torch.bfloat16, torch.float32),
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
    parts = options.get("processors", 3)  # more than some maps have strips

    def empty(like: Tensor, *shape: int) -> Tensor:
        return like.new_full(shape or like.shape, float("nan"))

    if name == "filter":
        shapes = {"moments": (2, parts, channels), "counts": (parts,)}
        results = dict(z=empty(dz), **{key: empty(weight.float(), *shape) for key, shape in shapes.items()})
    else:
        results = dict(dx=empty(x), dweight=empty(weight))
    sizes = dict(batch=batch, height=height, width=width, channels=channels)
    emulation.call_depthwise(f"run_depthwise_{name}", **sizes, parts=parts, **{**a, **results}, **options)
    return (
        {"z": results["z"], **emulation.joined(results["moments"], results["counts"])} if name == "filter" else results
    )


def meaning(name: str, a: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """The plain meaning with every step in `dtype`, which is that of the products: parameters too are rounded to it, as
    under autocast."""
    x, weight, dz = (a[k].to(dtype) for k in ("x", "weight", "dz"))
    geometry = (a["stride"], a["dilation"], a["dilation"], len(weight))
    x, dz = x.permute(0, 3, 1, 2).contiguous(), dz.permute(0, 3, 1, 2).contiguous()
    if name == "filter":
        return dict(z=F.conv2d(x, weight, None, *geometry).permute(0, 2, 3, 1))
    dx = conv2d_input(x.shape, weight, dz, *geometry).permute(0, 2, 3, 1)
    return dict(dx=dx, dweight=conv2d_weight(x, weight.shape, dz, *geometry))


def check(name: str, a: dict, run: Callable[[str, dict], dict[str, Tensor]] = run) -> dict[str, Tensor]:
    found, peer, truth = run(name, a), meaning(name, a, a["x"].dtype), meaning(name, a, torch.float64)
    assert all(t.isfinite().all() for t in found.values())
    assert_bound({key: found[key] for key in truth}, peer, truth, FLOOR, group=each, least=0)
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


@pytest.mark.parametrize("name", ["filter", "backward"])
@pytest.mark.parametrize("shape, stride", [((2, 17, 9, 24), 1), ((2, 17, 9, 7), 2)], ids=str)
def test_blocks_and_the_order_of_warps(name, shape, stride):
    """Sums go through more or fewer blocks; a missing barrier would show in the order of the warps."""
    a = arguments(shape, stride, 1, torch.bfloat16, torch.float32)
    first = run(name, a)
    for key, value in run(name, a, backwards=True).items():
        assert torch.equal(value, first[key]), key
    for processors in (1, 7):
        for key, value in run(name, a, processors=processors).items():
            if value.dtype is torch.bfloat16 and key == "z":
                assert torch.equal(value, first[key]), key
            else:
                torch.testing.assert_close(value, first[key], rtol=1e-5 if key != "dx" else 1e-2, atol=1e-5)


def test_moments_of_large_and_of_constant_channels():
    a = arguments((2, 9, 11, 8), 1, 1, torch.float32, torch.float32)
    a["weight"].zero_()[:, 0, 1, 1] = 1.0
    a["x"][..., :4] = 100.0
    a["x"][..., 4:] += 2000.0
    a["x"][0, 0, 0, 4] = 1e6  # far from all others
    found = run("filter", a)
    rows = a["x"].double().flatten(0, 2)
    assert torch.equal(found["z"], a["x"]) and torch.equal(found["var"][:4], torch.zeros(4))
    # What a difference of squares would leave of the variance is noise of its own size.
    torch.testing.assert_close(found["var"].double(), rows.var(0, unbiased=False), rtol=1e-3, atol=0)
    torch.testing.assert_close(found["mean"].double(), rows.mean(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["filter", "backward"])
def test_unaligned_memory(name):
    a = arguments((1, 6, 7, 16), 1, 1, torch.bfloat16, torch.float32)
    first = run(name, a)

    def moved(t: Tensor) -> Tensor:
        memory = t.new_empty(t.numel() + 1)
        memory[1:] = t.flatten()
        return memory[1:].view(t.shape)

    for key, value in run(name, {k: moved(v) if isinstance(v, Tensor) else v for k, v in a.items()}).items():
        torch.testing.assert_close(value, first[key], rtol=1e-5 if value.dtype is torch.float32 else 1e-2, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("at", [(0, 0), (4, 2), (5, 6)], ids=str)
def test_not_finite(stride, at):
    """A bad value reaches what it meets in the plain meaning, also at the border, and nothing else."""
    for argument in ("x", "dz"):
        a = arguments((1, 6, 7, 8), stride, 1, torch.float32, torch.float32)
        row, column = (i // stride if argument == "dz" else i for i in at)
        a[argument][0, row, column, 3] = float("nan")
        for name in ("filter", "backward"):
            found, truth = run(name, a), meaning(name, a, torch.float32)
            for key, true in truth.items():
                assert torch.equal(found[key].isfinite(), true.isfinite()), (argument, key)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sanitizers are loaded with LD_PRELOAD")
def test_under_the_sanitizers():
    emulation.run_sanitized(
        "from tests.ops.test_depthwise_conv_cuda import CASES, arguments, check\n"
        "for case in ('odd', 'odd, stride 2', 'vectors', 'vectors, odd, stride 2', 'dilation', 'slices'):\n"
        "    for name in ('filter', 'backward'):\n"
        "        check(name, arguments(*CASES[case]))\n"
    )


@pytest.mark.skipif(_native.cuda_why_not() is not None, reason=str(_native.cuda_why_not()))
def test_resources_of_the_compiled_kernels():
    """Of the built extension, for every device that it holds code for: a kernel that spills has a stack."""
    found = emulation.resources("Depthwise")
    assert {part for name, *_ in found for part in re.findall("DepthwiseFilter|DepthwiseBackward", name)} == {
        "DepthwiseFilter",
        "DepthwiseBackward",
    }
    for name, registers, stack in found:
        assert stack == 0, name
        blocks = 1 if "DepthwiseBackward" in name and "Li1ELb1" in name else 2  # of 256 threads
        assert registers <= (255 if blocks == 1 else 128), name


@pytest.mark.skipif(_native.cuda_why_not() is not None, reason=str(_native.cuda_why_not()))
@pytest.mark.parametrize("op", ["filter", "filter_backward"])
def test_registration(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mvit3::depthwise_conv_{op}", "CUDA")
