# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""The CPU kernel of pointwise_conv, and what it relies on: a bias moves the mean of a norm and nothing else."""

import pytest
import torch

import mvit3_kernels
from mvit3_kernels.ops import pointwise_conv
from mvit3_kernels.ops.random import random_words
from mvit3_kernels.ops.types import ACTIVATIONS

from ..bounds import assert_bound, half_a_rounding
from .cpu_kernel import CpuKernel, in_float32, needs_the_kernels
from .inputs import Draw, mapped
from .test_pointwise_conv import TestPointwiseConv as Reference


def registered(a, b, conv, norm, act, residual, dropout=0.0, seed=None):
    """The registered ops of the kernels, each with its arguments."""
    weight, bias, mean, var, training, eps = norm or (None, None, None, None, False, 0.0)
    inputs, code = (a, b, *conv, weight, bias), ACTIVATIONS.index(act)
    if not (training or dropout):
        yield torch.ops.mvit3.pointwise_conv_inference.default, (*inputs, mean, var, eps, code, residual)
    training_inputs = (*inputs, mean, var, training, eps, code, dropout, seed, residual)
    yield torch.ops.mvit3.pointwise_conv_forward.default, training_inputs
    y, *moments, p = torch.ops.mvit3.pointwise_conv_forward(*training_inputs)
    used = moments if training else (mean, var)
    rest = (p, training, eps, code, dropout, seed)
    yield torch.ops.mvit3.pointwise_conv_backward.default, (torch.ones_like(y), *inputs, *used, *rest)


@needs_the_kernels
class TestPointwiseConvCpu(CpuKernel):
    op = staticmethod(pointwise_conv)
    maps = ("x", "residual")
    shapes = (
        (2, 3, 5, 7, 9),
        (1, 3, 4, 3, 5),
        (3, 1, 14, 17, 33),
        (2, 9, 7, 96, 50),
        (1, 8, 8, 320, 240),  # few rows: cut over outputs
        (2, 32, 20, 33, 64),
        (3, 8, 8, 144, 144),
        (1, 13, 17, 1, 23),
    )
    options = {
        "training-silu": {"act": "silu"},
        "training-bias-residual": {"bias": True, "residual": True},
        "training-large-mean": {"act": "silu", "mean": 10.0},
        "frozen-silu-residual": {"training": False, "act": "silu", "bias": True, "residual": True},
        "frozen": {"training": False},
        "plain": {"norm": False, "conv": True},
        "plain-bias-residual": {"norm": False, "bias": True, "residual": True},
        "plain-silu": {"norm": False, "bias": True, "act": "silu"},
        "plain-relu": {"norm": False, "bias": True, "act": "relu"},
        "plain-dropout": {"norm": False, "bias": True, "residual": True, "dropout": 0.3},
        "training-silu-dropout": {"act": "silu", "dropout": 0.25},
    }
    threaded = ((2, 8, 8, 64, 192), (1, 30, 20, 48, 80), (5, 16, 16, 33, 70))

    @staticmethod
    def arguments(draw, *sizes, mean=0.0, **options):
        arguments = Reference.arguments(draw, *sizes, **options)
        arguments["x"] += mean
        return arguments

    @staticmethod
    def registered(arguments):
        x, *rest = arguments.values()
        return registered(x, None, *rest)

    @pytest.mark.parametrize("case", ({"norm": False}, {"training": False}, {}), ids=("plain", "frozen", "training"))
    def test_a_bias_that_cancels_the_product(self, case, dtype):
        """What backward keeps is rounded as the sum of the two: its sign is that of the output."""
        arguments = self.arguments(Draw(), 2, 9, 7, 48, 50, act="relu", bias=True, mean=10.0, **case)
        weight, bias = arguments["conv"]
        bias[...] = -10 * weight.flatten(1).sum(1)
        self.hold(arguments, dtype)

    def test_evaluation_without_gradients(self, shape, option, dtype):
        arguments = self.make(shape, option)
        if arguments["norm"] is not None and arguments["norm"].training:
            return
        given = Reference().cast(arguments, dtype, dtype)
        truth, _ = pointwise_conv(**Reference().cast(given, torch.float64, torch.float64))
        found = {}
        for backend in ("reference", "cpu"):
            with mvit3_kernels.backend(backend), torch.no_grad():
                y, moments = pointwise_conv(**given)
            assert moments is None and y.dtype == dtype and y.is_contiguous()
            found[backend] = {"y": y}
        assert_bound(found["cpu"], found["reference"], {"y": truth}, half_a_rounding(dtype), least=0)

    def test_with_and_without_gradients_agree(self, option):
        arguments = in_float32(self.make((2, 9, 7, 48, 50), option))
        with torch.no_grad():
            want = pointwise_conv(**arguments)[0]
        arguments["x"].requires_grad_()
        torch.testing.assert_close(pointwise_conv(**arguments)[0].detach(), want, rtol=0, atol=1e-6)

    def test_some_inputs_without_gradients(self):
        """A frozen weight or input: the others' gradients are what they are."""
        arguments = in_float32(self.make((2, 4, 6, 20, 30), "frozen-silu-residual"))
        arguments["x"].requires_grad_()
        (dx,) = torch.autograd.grad(pointwise_conv(**arguments)[0].sum(), arguments["x"])
        want = self.results("reference", self.make((2, 4, 6, 20, 30), "frozen-silu-residual"))
        assert dx.shape == want["d x"].shape and dx.isfinite().all()

    def test_a_constant_channel(self):
        """Variance 0: the norm returns its bias. The weights have so few digits that sums are exact, in any order."""
        arguments = mapped(self.make((2, 9, 7, 16, 8), "training-silu"), lambda _, t: (t.float() * 64).round() / 64)
        arguments["x"][...] = 3
        y, moments = pointwise_conv(**arguments)
        assert not moments.var.any()
        torch.testing.assert_close(
            y, torch.nn.functional.silu(arguments["norm"].bias).expand_as(y), rtol=1e-3, atol=1e-3
        )

    def test_mask_is_that_of_the_hash(self, shape):
        """And backward has the same one: the gradient of a dropped element is zero, of another dy / (1 - p)."""
        arguments = in_float32(self.make(shape, "plain-dropout")) | {"residual": None}
        arguments["conv"].bias.requires_grad_()
        y, _ = pointwise_conv(**arguments)
        batch = len(y)
        words = random_words(arguments["seed"], 0, batch, y[0].numel()).view(y.shape)
        kept = words >= int(0.3 * 2**32)
        assert torch.equal(y != 0, kept)
        ones = torch.autograd.grad(y.sum(), arguments["conv"].bias)[0]
        torch.testing.assert_close(ones, kept.sum((0, 1, 2)) / 0.7)

    def test_the_kernel_checks_what_it_is_given(self):
        x, conv, norm, *_ = in_float32(self.make((2, 4, 6, 5, 7), "frozen")).values()
        fixed = (norm.weight, norm.bias, norm.running_mean, norm.running_var, 1e-5, 0)
        with pytest.raises(RuntimeError, match="weight must have 7 outputs of 5 values, got shape"):
            torch.ops.mvit3.pointwise_conv_inference(x, None, conv.weight[:, :-1], None, *fixed, None)
        with pytest.raises(RuntimeError, match=r"residual must have shape \(2, 4, 6, 7\), got"):
            torch.ops.mvit3.pointwise_conv_inference(x, None, *conv, *fixed, x)
        with pytest.raises(RuntimeError, match=r"b must have shape \(2, 4, 6, 2\), got \(1, 4, 6, 2\)"):
            torch.ops.mvit3.pointwise_conv_inference(x[..., :3], x[:1, ..., :2], *conv, *fixed, None)
        with pytest.raises(RuntimeError, match="seed must be one int64 on the CPU where dropout is positive"):
            torch.ops.mvit3.pointwise_conv_forward(x, None, *conv, *fixed[:4], False, *fixed[4:], 0.5, None, None)


def test_a_bias_before_a_batch_norm():
    """It moves the mean; variance, output and every other gradient are the same, and its own gradient is zero."""
    draw = Draw()
    arguments = Reference.arguments(draw, bias=True, act="silu")
    without = {**arguments, "conv": arguments["conv"]._replace(bias=None)}
    leaves = [arguments["x"], *arguments["conv"], *arguments["norm"][:2]]
    [t.requires_grad_() for t in leaves]
    with mvit3_kernels.backend("reference"):
        y, moments = pointwise_conv(**arguments)
        y_without, moments_without = pointwise_conv(**without)
    torch.testing.assert_close(y, y_without)
    torch.testing.assert_close(moments.mean, moments_without.mean + arguments["conv"].bias)
    torch.testing.assert_close(moments.var, moments_without.var)
    dy = draw(*y.shape)
    dx, dw, dbias, *rest = torch.autograd.grad(y, leaves, dy)
    torch.testing.assert_close(
        (dx, dw, *rest), torch.autograd.grad(y_without, [t for t in leaves if t is not leaves[2]], dy)
    )
    assert dbias.abs().max() < 1e-14
