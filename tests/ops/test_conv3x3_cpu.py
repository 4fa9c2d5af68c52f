"""Dense 3x3 convolution for inference: held to twice the library's error against float64; one input or two, NHWC or, for images, NCHW."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mvit3_kernels
from mvit3_kernels import _native
from mvit3_kernels.nn import ConvNormAct
from mvit3_kernels.ops import BatchNorm
from mvit3_kernels.ops import conv3x3 as op
from mvit3_kernels.ops.conv3x3 import conv3x3_inference
from mvit3_kernels.ops.types import ACTIVATIONS

pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))

# (batch, height, width, channels, channels of the second map, outputs, stride)
SHAPES = [
    (2, 16, 20, 3, 0, 16, 2),
    (1, 33, 31, 3, 0, 32, 2),
    (1, 9, 14, 3, 0, 20, 1),
    (2, 5, 1, 3, 0, 8, 2),
    (1, 1, 1, 4, 0, 3, 1),
    (1, 7, 9, 1, 2, 5, 1),
    (1, 32, 32, 96, 0, 96, 1),
    (1, 16, 16, 128, 128, 128, 1),
    (3, 7, 13, 9, 0, 40, 2),
    (2, 8, 8, 37, 11, 50, 1),
    (1, 1, 6, 16, 16, 33, 2),
    (1, 20, 12, 24, 0, 1, 1),
]


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(op, "MOST_PIXELS", 10**9)


def make(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor, list[Tensor]]:
    batch, height, width, channels, others, outputs, _ = shape
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, height, width, channels, generator=draw)
    other = torch.randn(batch, height, width, others, generator=draw) if others else None
    weight = torch.randn(outputs, channels + others, 3, 3, generator=draw) / (3 * (channels + others) ** 0.5)
    return x, other, weight, [torch.rand(outputs, generator=draw) + 0.5 for _ in range(4)]


def library(x: Tensor, other: Tensor | None, weight: Tensor, norm: list[Tensor], act: str, stride: int) -> Tensor:
    x = x if other is None else torch.cat((x, other), -1)
    gamma, beta, mean, var = norm
    y = F.conv2d(x.permute(0, 3, 1, 2), weight.to(x.dtype), None, stride, 1)
    y = F.batch_norm(y, mean, var, gamma, beta, False)
    return {"silu": F.silu, "relu": F.relu, "identity": lambda t: t}[act](y).permute(0, 2, 3, 1)


def run(x: Tensor, other: Tensor | None, weight: Tensor, norm: list[Tensor], act: str, stride: int) -> Tensor:
    gamma, beta, mean, var = norm
    y = conv3x3_inference(x, other, weight, BatchNorm(gamma, beta, mean, var, False), act, stride)
    assert y is not None
    return y


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bound(shape, layout, dtype):
    x, other, weight, norm = make(shape)
    x, other = x.to(dtype), None if other is None else other.to(dtype)
    if layout == "nchw":
        x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for act in ACTIVATIONS:
        wide = None if other is None else other.double()
        exact = library(x.double(), wide, weight.double(), [t.double() for t in norm], act, shape[-1])
        found = run(x, other, weight, norm, act, shape[-1])
        assert found.shape == exact.shape and found.dtype == dtype and found.is_contiguous()
        allowed = error(library(x, other, weight, norm, act, shape[-1]), exact)
        assert error(found, exact) <= 2 * allowed + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_strides_and_memory_of_the_weight(shape):
    x, other, weight, norm = make(shape)
    want = run(x, other, weight, norm, "silu", shape[-1])
    wide = torch.full((x.shape[0], x.shape[1], 2 * x.shape[2], x.shape[3] + 3), float("nan"))
    wide[:, :, ::2, 1:-2] = x
    assert torch.equal(run(wide[:, :, ::2, 1:-2], other, weight, norm, "silu", shape[-1]), want)
    assert torch.equal(run(x, other, weight.to(memory_format=torch.channels_last), norm, "silu", shape[-1]), want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("channels", [3, 16])
def test_nan_and_infinity_reach_what_they_touch_and_nothing_else(value, channels):
    x, other, weight, norm = make((1, 9, 9, channels, 0, 24, 2))
    x[0, 4, 5, 1] = value
    found, want = (f(x, other, weight, norm, "identity", 2) for f in (run, library))
    assert torch.equal(found.isfinite(), want.isfinite())


def test_results_repeat_and_threads_agree():
    x, other, weight, norm = make((2, 16, 16, 48, 16, 96, 1))
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 2, 7):
            torch.set_num_threads(n)
            found.append(run(x, other, weight, norm, "silu", 1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], t) for t in found)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[7]], ids=str)
def test_registration(shape):
    x, other, weight, (gamma, beta, mean, var) = make(shape)
    arguments = (x, other, weight.permute(0, 2, 3, 1), gamma, beta, mean, var, 1e-5, 1, shape[-1])
    torch.library.opcheck(torch.ops.mvit3.conv3x3_inference.default, arguments)


def test_where_the_library_is_taken(monkeypatch):
    monkeypatch.setattr(op, "MOST_PIXELS", 2048)
    x, other, weight, (gamma, beta, mean, var) = make((1, 64, 64, 8, 0, 8, 1))
    norm = BatchNorm(gamma, beta, mean, var, False)
    assert "more than 2048 pixels" in op.why_not(x, other, weight, norm, 1)
    x = x[:, :32, :32]
    assert op.why_not(x, other, weight, norm, 1) is None
    assert "no gradients" in op.why_not(x, other, weight.requires_grad_(), norm, 1)
    assert "in training" in op.why_not(x, other, weight, norm._replace(training=True), 1)
    assert "at least one pixel" in op.why_not(x[:0], other, weight.detach(), norm, 1)
    assert "float64" in op.why_not(x.double(), other, weight.detach(), norm, 1)
    with mvit3_kernels.backend("reference"):
        assert "another backend" in op.why_not(x, other, weight.detach(), norm, 1)


@torch.no_grad()
@pytest.mark.parametrize("channels, stride", [(3, 2), (24, 1)])
def test_layer(channels, stride, monkeypatch):
    """ConvNormAct in evaluation, with one input and with two, takes the kernel and agrees with its modules."""
    layer = ConvNormAct(2 * channels, 16, 3, stride).eval()
    layer.norm.running_mean.normal_(), layer.norm.running_var.uniform_(0.5, 2)
    a, b = torch.randn(2, 12, 10, channels), torch.randn(2, 12, 10, channels)
    want = layer._forward_modules(torch.cat((a, b), -1), None)
    monkeypatch.setattr(mvit3_kernels.ops, "batch_norm_act", None)  # the other way would need it
    for found in (layer.forward_concat_nhwc(a, b), layer.forward_nhwc(torch.cat((a, b), -1))):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(layer.forward_concat_nhwc, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), want, rtol=1e-4, atol=1e-5)
