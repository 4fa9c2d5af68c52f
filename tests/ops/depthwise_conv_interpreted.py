# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""depthwise_conv's Triton kernels on CPU tensors, step by step; run by test_depthwise_conv_triton.py."""

import importlib

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl

from mvit3_kernels import ops
from mvit3_kernels.ops import triton_common
from tests.ops.batch_norm_act_cases import poison
from tests.ops.inputs import Draw
from tests.ops.test_depthwise_conv_triton import arguments, registered
from tests.ops.triton_kernel import TritonResults
from tests.triton_tools import compute_like_a_gpu

poison()
compute_like_a_gpu()
kernels = importlib.import_module("mvit3_kernels.ops.depthwise_conv.triton")


class TestDepthwiseConv(TritonResults):
    op = staticmethod(ops.depthwise_conv)
    # Columns of several samples in one block, and of one sample in several; channels of less than one block, and of
    # more.
    shapes = ((2, 5, 4, 9), (1, 3, 17, 34))
    options = {
        "silu": {"act": "silu"},
        "large-mean-stride": {"act": "relu", "mean": 10.0, "stride": 2},
        "frozen-dilation": {"training": False, "dilation": 2},
        "frozen-stride": {"training": False, "stride": 2},
        "frozen-stride-dilation": {"training": False, "stride": 2, "dilation": 3},
    }
    arguments = staticmethod(arguments)
    registered = staticmethod(lambda given: registered(**given))


@torch.library.impl("mvit3::depthwise_conv_filter", "CPU")
def _filter(x, weight, stride, dilation, parts):
    """Stands for the CUDA C++ op, which has the same meaning; calls are counted."""
    assert x.is_contiguous() and weight.is_contiguous()
    counted.append(("filter", stride))
    return kernels.depthwise(x, weight, stride, dilation)


@torch.library.impl("mvit3::depthwise_conv_filter_backward", "CPU")
def _filter_backward(dz, x, weight, stride, dilation):
    assert dz.is_contiguous() and x.is_contiguous()
    counted.append(("backward", stride))
    return kernels.depthwise_backward(dz, x, weight, stride, dilation)


def measured(x, weight, stride, dilation):
    """z, its mean and its variance."""
    z, *moments = kernels.depthwise(x, weight, stride, dilation)
    return z, *kernels._joined(*moments)


counted = []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", ["silu", "large-mean-stride", "frozen-dilation"])
def test_the_way_with_cuda(monkeypatch, option, dtype):
    """Both convolutions are other kernels, in training; the choice is that of forward."""
    op = importlib.import_module("mvit3_kernels.ops.depthwise_conv")
    monkeypatch.setattr(op._native, "cuda_why_not", lambda x: None)
    tester = TestDepthwiseConv()
    monkeypatch.setattr(tester, "backend", "cuda")
    given = tester.make((2, 5, 4, 9), option)
    counted.clear()
    tester.hold(given, dtype)
    training, stride = given["norm"].training, given["stride"]
    once = [("filter", stride), ("backward", stride)] if training else [("backward", stride)]
    assert counted == once * (1 if dtype is torch.float32 else 2)  # with parameters in the dtype, and in float32


@pytest.mark.parametrize("training", [True, False])
def test_the_way_with_cuda_keeps_the_filtered_map_in_training(training):
    x, weight, one, zero = torch.ones(2, 3, 3, 4), torch.ones(4, 1, 3, 3), torch.ones(4), torch.zeros(4)
    found = torch.ops.mvit3.depthwise_conv_forward_cuda(x, weight, one, zero, zero, one, training, 1e-5, 0, 1, 1)
    assert found[3].shape == ((2, 3, 3, 4) if training else (0,))


def test_what_the_way_with_cuda_refuses(monkeypatch):
    op = importlib.import_module("mvit3_kernels.ops.depthwise_conv")
    monkeypatch.setattr(op._native, "cuda_why_not", lambda x: None)
    x = torch.zeros(1, 2, 2, 3)
    assert op._cuda_why_not(x, 1, 1024) is None and op._cuda_why_not(x, 2, 1) is None
    assert "got 2 with stride 2" in op._cuda_why_not(x, 2, 2) and "at most 1024" in op._cuda_why_not(x, 1, 1025)
    assert "float64" in op._cuda_why_not(x.double(), 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (1, 4), (2, 2), (2, 3), (1, 20)])
@pytest.mark.parametrize("shape", [(2, 7, 13, 5), (1, 1, 9, 40)], ids=str)
def test_the_convolution_by_itself(shape, stride, dilation, dtype):
    """Exact but for the rounding of what is stored, whatever the dtype: sums are float32."""
    draw, channels = Draw(), shape[-1]
    x, weight = draw(*shape, mean=1.0).to(dtype), draw(channels, 1, 3, 3, scale=1 / 3).float()
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = F.conv2d(exact_x.permute(0, 3, 1, 2), exact_weight, None, stride, dilation, dilation, channels).permute(
        0, 2, 3, 1
    )
    dz = draw(*exact.shape).to(dtype)
    exact_dx, exact_dweight = torch.autograd.grad(exact, (exact_x, exact_weight), dz.double())

    z, mean, var = measured(x, weight, stride, dilation)
    dx, dweight = kernels.depthwise_backward(dz, x, weight, stride, dilation)
    assert z.dtype == dx.dtype == dtype and mean.dtype == var.dtype == dweight.dtype == torch.float32

    def error(found, truth):
        return float((found.double() - truth).norm() / truth.norm().clamp(min=1e-3))

    for found, truth in ((z, exact.detach()), (dx, exact_dx)):
        assert error(found, truth) <= torch.finfo(dtype).eps / 2 + 1e-6
    stored = z.double().flatten(0, 2)
    for found, truth in ((mean, stored.mean(0)), (var, stored.var(0, correction=0)), (dweight, exact_dweight)):
        assert error(found, truth) <= 2e-6


def test_moments_of_a_large_mean():
    """A mean of 100 deviations, and one value that is far from all others."""
    x = Draw()(2, 8, 9, 6, mean=100.0).float()
    x[0, 0, 0, 1] = 1e6
    weight = torch.zeros(6, 1, 3, 3)
    weight[:, 0, 1, 1] = 1
    z, mean, var = measured(x, weight, 1, 1)
    assert torch.equal(z, x)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 1, 2)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), x.double().var((0, 1, 2), correction=0), rtol=1e-5, atol=0)


def test_more_parts_than_one_read_takes(monkeypatch):
    monkeypatch.setattr(triton_common, "BLOCK_PARTS", tl.constexpr(4))
    monkeypatch.setattr(kernels, "MIN_ROWS", 1)
    x, weight = Draw()(2, 9, 19, 5, mean=3.0).float(), Draw(1)(5, 1, 3, 3).float()
    z, mean, var = measured(x, weight, 1, 2)
    torch.testing.assert_close(mean, z.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var, z.var((0, 1, 2), correction=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_batch_0(stride):
    x, weight = torch.empty(0, 5, 4, 3), torch.ones(3, 1, 3, 3)
    z, *moments = kernels.depthwise(x, weight, stride, 1)
    dx, dweight = kernels.depthwise_backward(z, x, weight, stride, 1)
    assert z.shape[0] == 0 and dx.shape == x.shape and not any(t.any() for t in (*moments, dweight))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_configuration_computes_the_same(monkeypatch, dtype, backward):
    x, weight = Draw()(2, 5, 6, 40).to(dtype), Draw(1)(40, 1, 3, 3).float()
    listed = kernels.configurations(40, dtype.itemsize, backward)
    for stride in (1, 2):
        found = []
        for config in [None, *listed]:  # first that of a map which fills no GPU
            if config is not None:
                monkeypatch.setattr(kernels, "MIN_ROWS", 0)
                monkeypatch.setattr(kernels, "configurations", lambda *_, config=config: [config])
            z, mean, var = measured(x, weight, stride, 1)
            found.append((z, mean, var, *kernels.depthwise_backward(z, x, weight, stride, 1)))
        monkeypatch.undo()
        assert len(found) > 2
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)
