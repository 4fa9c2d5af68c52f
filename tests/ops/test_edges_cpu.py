"""Numbers at the edge of their types, on whatever instruction set is loaded: test_native.py runs this file on all of
them."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

import mvit3_kernels
from mvit3_kernels.ops import (
    BatchNorm,
    ConvNorm,
    LayerNorm,
    Linear,
    batch_norm_act,
    depthwise_conv,
    feed_forward,
    inverted_residual,
    norm_linear,
    patch_attention,
    pointwise_conv,
    separable_attention,
)
from mvit3_kernels.ops.types import ACTIVATIONS

from .cpu_kernel import needs_the_kernels
from .inputs import DTYPES

pytestmark = needs_the_kernels

INVERTED_RESIDUAL = sys.modules["mvit3_kernels.ops.inverted_residual"]
FAR = (1e18, 1e19, 1e25, 1e36)  # float32 cannot hold the square of the second


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm(channels: int, training: bool = True) -> BatchNorm:
    one, zero = torch.ones(channels), torch.zeros(channels)
    return BatchNorm(
        one, zero + 0.25, None if training else zero, None if training else one, training, 0.0 if not training else 1e-5
    )


def every_bit_pattern(dtype: torch.dtype) -> Tensor:
    """All values of a 16-bit type; of float32 all exponents and signs, each with payloads of one bit, of all and of
    none, and of two."""
    if dtype is not torch.float32:
        return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    mantissas = torch.tensor(
        [0, 2**23 - 1, *(1 << i for i in range(23)), *(1 << 22 | 1 << i for i in range(22)), 0x555555, 0x2AAAAA]
    )
    bits = torch.arange(512)[:, None] << 23 | mantissas
    return bits.flatten().to(torch.int32).view(torch.float32)


def kinds(t: Tensor) -> Tensor:
    """0 for a number, 1 and -1 for infinities, 2 for NaN."""
    t = t.detach().float()
    return torch.where(t.isnan(), 2, torch.where(t.isinf(), t.sign(), 0)).to(torch.int8)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_through_an_activation(dtype, act):
    """NaN stays NaN whatever it carries, infinity what the reference makes of it; forward and backward, whole vectors
    and the rest."""
    values = every_bit_pattern(dtype)
    for channels in (1, 16, 24):
        count = -(-len(values) // channels) * channels
        results = {}
        for backend in ("cpu", "reference"):
            x = torch.cat((values, values[: count - len(values)])).view(1, -1, 1, channels).clone().requires_grad_()
            with mvit3_kernels.backend(backend):
                y, _ = batch_norm_act(x, norm(channels, training=False)._replace(bias=torch.zeros(channels)), act)
            results[backend] = (y, torch.autograd.grad(y, x, torch.ones_like(y))[0])
        for found, want in zip(results["cpu"], results["reference"], strict=True):
            wrong = kinds(found) != kinds(want)
            bits = x.detach().view(torch.int32 if dtype is torch.float32 else torch.int16)[wrong]
            assert not wrong.any(), [hex(b & 0xFFFFFFFF) for b in bits[:8].tolist()]


NANS = [0x7FC00001, 0x7FFFFFFF, 0x7F800001, 0x7FC001FF, 0x7FC00100, -1, -0x400000, -0x7FFFFF]


@pytest.mark.parametrize("bits", NANS, ids=lambda b: hex(b & 0xFFFFFFFF))
def test_nan_with_a_payload_reaches_every_result(bits):
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    x = draw(2, 4, 6, 12)
    x[1, 2, 3, 5] = nan
    layer, square = LayerNorm(torch.ones(12), torch.zeros(12), 1e-5, False), Linear(draw(12, 12), None)
    calls = {
        "norm_linear": lambda: norm_linear(x, layer, square),
        "feed_forward": lambda: feed_forward(x, layer, square, square),
        "separable_attention": lambda: separable_attention(x, layer, Linear(draw(25, 12), None), square),
        "patch_attention": lambda: patch_attention(x, 2),
        "pointwise_conv": lambda: pointwise_conv(x, square, norm(12), "silu"),
        "depthwise_conv": lambda: depthwise_conv(x, draw(12, 1, 3, 3), norm(12), "silu"),
    }
    for name, call in calls.items():
        with mvit3_kernels.backend("cpu"):
            found = call()
        with mvit3_kernels.backend("reference"):
            want = call()
        found, want = (result[0] if isinstance(result, tuple) else result for result in (found, want))
        assert want.isnan().any() and torch.equal(found.isnan(), want.isnan()), name


def test_a_key_infinitely_far_off_weighs_nothing():
    """Its value may be infinite: zero times that is NaN, as in the reference."""
    qkv = torch.ones(1, 1, 4, 3)
    qkv[0, 0, 2] = torch.tensor([1.0, -float("inf"), float("inf")])
    with mvit3_kernels.backend("cpu"):
        found = patch_attention(qkv, 1, (1, 1))
    with mvit3_kernels.backend("reference"):
        assert torch.equal(found.isnan(), patch_attention(qkv, 1, (1, 1)).isnan())


def moments_of(op: str, x: Tensor, positive: bool = False) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """y of an op in training, and the moments of each of its norms; with any or with positive weights."""
    channels = x.shape[-1]
    to = lambda t: (t.abs() if positive else t).to(x.dtype)  # noqa: E731
    taps, weight = to(draw(channels, 1, 3, 3)), to(draw(channels, channels, seed=1))
    n = BatchNorm(*(to(t) for t in norm(channels)[:2]), None, None, True)
    if op == "batch_norm_act":
        y, moments = batch_norm_act(x, n, "silu")
    elif op == "depthwise_conv":
        y, moments = depthwise_conv(x, taps, n, "silu")
    elif op == "pointwise_conv":
        y, moments = pointwise_conv(x, Linear(weight), n, "silu")
    else:
        y, moments = inverted_residual(x, *(ConvNorm(w, n) for w in (weight, taps, weight)), stride=2)
    return y, list(moments) if op == "inverted_residual" else [moments]


TRAINED = ("batch_norm_act", "depthwise_conv", "pointwise_conv", "inverted_residual")


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("scale", FAR)
@pytest.mark.parametrize("op", TRAINED)
def test_batch_moments_of_large_values(op, scale, stored, monkeypatch):
    """y and the moments as in float64; PyTorch in float32 takes the deviation for infinite from 1e19 on. The variance
    of a norm is returned in float32: infinite where that cannot hold it."""
    monkeypatch.setattr(INVERTED_RESIDUAL, "_stores", lambda *_: stored)
    x = draw(2, 9, 11, 20) * scale * (1 if op == "batch_norm_act" else 0.05)
    exact, exact_moments = moments_of(op, x.double())
    with mvit3_kernels.backend("cpu"):
        y, moments = moments_of(op, x)
    torch.testing.assert_close(y.double(), exact, rtol=2e-5, atol=2e-5)
    for (mean, var), (exact_mean, exact_var) in zip(moments, exact_moments, strict=True):
        torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-4, atol=1e-6 * exact_var.max().sqrt().item())
        torch.testing.assert_close(var, exact_var.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("op", TRAINED)
def test_gradients_of_large_values(op, stored, monkeypatch):
    """Where the variance is just below the end of float32: the inverse of it, a factor of the gradient, would lose its
    digits there."""
    monkeypatch.setattr(INVERTED_RESIDUAL, "_stores", lambda *_: stored)
    scale = 2.0**62 if op == "batch_norm_act" else 2.0**59
    x, grads = draw(2, 9, 11, 20) * scale, {}
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        with mvit3_kernels.backend(backend):
            y, _ = moments_of(op, leaf)
        if op == "inverted_residual":
            assert y.shape == (2, 5, 6, 20)
        grads[backend] = torch.autograd.grad(y, leaf, draw(*y.shape).to(dtype))[0].double() * scale
    error = (grads["cpu"] - grads["reference"]).norm() / grads["reference"].norm()
    assert error < 5e-6, error


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("scale", FAR)
@pytest.mark.parametrize("channels", [13, 32, 250])
def test_layer_norms_of_large_values(channels, scale, per_sample):
    """Of tokens and of samples, forward and backward."""
    x, weight = draw(2, 8, 10, channels) * scale, draw(9, channels)
    results = {}
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        layer = LayerNorm(torch.ones(channels, dtype=dtype), torch.zeros(channels, dtype=dtype), 1e-5, per_sample)
        leaf = x.to(dtype).requires_grad_()
        with mvit3_kernels.backend(backend):
            y = norm_linear(leaf, layer, Linear(weight.to(dtype)))
        results[backend] = (y.double(), torch.autograd.grad(y, leaf, draw(*y.shape).to(dtype))[0].double() * scale)
    for found, want in zip(results["cpu"], results["reference"], strict=True):
        assert (found - want).norm() < 3e-6 * want.norm(), (found - want).norm() / want.norm()


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("scale", FAR[:3])
def test_layers_of_large_values(scale, per_sample):
    """The branch of a layer is what its norm makes of x: beside a huge x it does not show, so x is taken away."""
    x, layer = draw(2, 8, 10, 20) * scale, LayerNorm(torch.ones(20), torch.zeros(20), 1e-5, per_sample)
    fc1, fc2, qkv, out = (
        Linear(draw(30, 20)),
        Linear(draw(20, 30) * scale),
        Linear(draw(41, 20)),
        Linear(draw(20, 20) * scale),
    )
    calls = (
        lambda x, n, to: feed_forward(x, n, to(fc1), to(fc2)),
        lambda x, n, to: separable_attention(x, n, to(qkv), to(out)),
    )
    for call in calls:
        with mvit3_kernels.backend("cpu"):
            found = call(x, layer, lambda linear: linear).double() - x.double()
        double = LayerNorm(layer.weight.double(), layer.bias.double(), 1e-5, per_sample)
        want = call(x.double(), double, lambda linear: Linear(linear.weight.double())) - x.double()
        assert (found - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [(0, 0, 0), (1, 4, 5), (1, 8, 10)], ids=str)
@pytest.mark.parametrize("op", TRAINED[:3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_channel_with_infinity_has_an_infinite_mean(op, where, value, dtype):
    """First, in the middle or last: as in the reference, the mean is infinite and the variance NaN."""
    x = draw(2, 9, 11, 20).to(dtype)
    x[(*where, 3)] = value
    with mvit3_kernels.backend("cpu"):
        y, [found] = moments_of(op, x, positive=True)
    with mvit3_kernels.backend("reference"):
        wanted_y, [want] = moments_of(op, x, positive=True)
    assert want.mean.isinf().any()
    assert torch.equal(kinds(found.mean), kinds(want.mean))
    assert torch.equal(kinds(found.var), kinds(want.var))
    assert torch.equal(kinds(y), kinds(wanted_y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_of_a_constant_token_stays_out_of_it(dtype):
    """(0 - mean) / deviation of the lanes behind the last channel can be infinite, and zero times that is NaN."""
    x = torch.full((1, 2, 2, 13), 6e4 if dtype is torch.float16 else 3e38, dtype=dtype)
    layer, eps = (torch.ones(13), torch.full((13,), 0.5)), 1e-12 if dtype is torch.float16 else 1e-5
    for per_sample in (False, True):
        n = LayerNorm(*layer, eps, per_sample)
        with mvit3_kernels.backend("cpu"):
            found = norm_linear(x, n, Linear(torch.ones(3, 13)))
            assert separable_attention(x, n, Linear(torch.zeros(27, 13)), Linear(torch.zeros(13, 13))).isfinite().all()
        assert torch.equal(found, torch.full_like(found, 6.5)), per_sample


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e10, 1e40, 1e300, float("inf")])
@pytest.mark.parametrize("training", [True, False])
def test_any_eps(training, eps):
    """As large as it likes: the norm then leaves the shift alone."""
    if training and eps == 0:
        eps = 1e-300  # PyTorch takes no zero in training
    x, n = draw(2, 5, 7, 20), norm(20, training)._replace(eps=eps)
    for call in (
        lambda: batch_norm_act(x, n, "silu"),
        lambda: depthwise_conv(x, draw(20, 1, 3, 3), n, "silu"),
        lambda: pointwise_conv(x, Linear(draw(20, 20)), n, "silu"),
    ):
        with mvit3_kernels.backend("cpu"):
            found, _ = call()
        with mvit3_kernels.backend("reference"):
            want, _ = call()
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
