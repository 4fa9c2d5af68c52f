# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""The CPU kernel of feed_forward."""

import pytest
import torch

import mvit3_kernels
from mvit3_kernels.ops import feed_forward, norm_linear
from mvit3_kernels.ops.random import random_words

from .cpu_kernel import CpuKernel, in_float32, needs_the_kernels
from .inputs import mapped, seed
from .test_feed_forward import TestFeedForward as Reference


@needs_the_kernels
class TestFeedForwardCpu(CpuKernel):
    op = staticmethod(feed_forward)
    shapes = (
        (2, 3, 5, 7, 9),
        (1, 1, 1, 3, 5),
        (3, 1, 14, 17, 33),
        (2, 9, 7, 96, 50),
        (1, 16, 16, 40, 120),
        (2, 32, 20, 33, 64),
        (3, 8, 8, 240, 480),
        (1, 13, 17, 144, 288),
        (1, 5, 9, 40, 1100),
    )
    options = {
        "per-token": {},
        "per-sample": {"per_sample": True},
        "no-bias": {"bias": False, "conv": True},
        "large-mean-per-sample": {"mean": 30.0, "per_sample": True},
        "dropouts": {"hidden_dropout": 0.3, "output_dropout": 0.2},
        "dropouts-per-sample": {"hidden_dropout": 0.1, "output_dropout": 0.5, "per_sample": True},
    }
    threaded = ((2, 8, 8, 64, 128), (1, 30, 20, 48, 80), (5, 16, 16, 33, 70))

    @staticmethod
    def arguments(draw, *sizes, mean=0.0, **options):
        arguments = Reference.arguments(draw, *sizes, **options)
        arguments["x"] += mean
        return arguments

    @staticmethod
    def registered(arguments, keep=True):
        x, norm, fc1, fc2, *dropout = arguments.values()
        inputs = (x, norm.weight, norm.bias, norm.eps, norm.per_sample, *fc1, *fc2, *dropout, keep)
        yield torch.ops.mvit3.feed_forward_forward.default, inputs
        y, *kept = torch.ops.mvit3.feed_forward_forward(*inputs)
        backward = (torch.ones_like(y), x, norm.weight, norm.bias, norm.per_sample, *fc1, *fc2, *dropout, *kept)
        yield torch.ops.mvit3.feed_forward_backward.default, backward

    @pytest.mark.parametrize("p", [1e-11, 0.1, 0.5, 0.99])
    @pytest.mark.parametrize("start", [0, 7, 3 + 2**40, 3 - 2**62, -1])
    def test_the_mask_is_that_of_the_counter(self, p, start):
        """A branch that is 1 everywhere shows the mask: what the output adds to x."""
        channels, size = 37, (3, 5, 9)
        x = torch.zeros(*size, channels)
        ones, zeros = torch.ones(channels), torch.zeros(channels, channels)
        given = (zeros, ones, zeros, ones, 0.0, p, torch.tensor(start), False)
        y = torch.ops.mvit3.feed_forward_forward(x, ones, ones, 1e-5, False, *given)[0]
        words = random_words(torch.tensor(start), 1, size[0], 5 * 9 * channels).view(x.shape)
        torch.testing.assert_close(y, (words >= int(p * 2**32)) / torch.tensor(1 - p, dtype=torch.float32))

    def test_one_seed_serves_forward_and_backward(self):
        """The gradient of a linear probe through the output's mask alone is that mask."""
        arguments = in_float32(self.make((2, 4, 6, 20, 30), "dropouts"))
        bias = arguments["fc2"].bias.requires_grad_()
        y = feed_forward(**arguments)
        (found,) = torch.autograd.grad(y.sum(), bias)
        words = random_words(arguments["seed"], 1, 2, 4 * 6 * 20).view(2, 4, 6, 20)
        torch.testing.assert_close(found, ((words >= int(0.2 * 2**32)) / 0.8).sum((0, 1, 2)).float())

    def test_activation_of_any_size_and_its_slope(self, dtype):
        """The rough one of bfloat16 included: in backward, from a hidden tensor that is given."""
        values = torch.tensor([0.0, 0.3, 1.28, 5.0, 30.0, 87.0, 89.0, 1e4, 1e12, 1e30, 3e38])
        values = values[values < torch.finfo(dtype).max]
        hidden = torch.cat([values, -values]).to(dtype)
        x, one, count = torch.zeros(1, 1, 1, 1, dtype=dtype), torch.ones(1), len(hidden)
        linears = (torch.zeros(count, 1), torch.zeros(count), torch.ones(1, count), torch.zeros(1))
        given = (x + 1, x, one, one, False, *linears, 0.0, 0.0, None, one, one, hidden.view(1, 1, 1, -1))
        *_, slope, value, _ = torch.ops.mvit3.feed_forward_backward(*given)
        h = hidden.double().requires_grad_()
        (exact,) = torch.autograd.grad(torch.nn.functional.silu(h).sum(), h)
        tolerance = 2**-8 if dtype is torch.bfloat16 else 1e-6
        torch.testing.assert_close(slope.double(), exact, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            value[0].double(), torch.nn.functional.silu(h).detach(), rtol=tolerance, atol=tolerance
        )

    def test_the_kernel_checks_what_it_is_given(self):
        x, norm, fc1, fc2, *_ = in_float32(self.make((2, 4, 6, 5, 7))).values()
        op = torch.ops.mvit3.feed_forward_forward
        with pytest.raises(RuntimeError, match="weight2 must have 5 outputs of 7 values, got shape"):
            op(x, *norm, *fc1, fc2.weight[:-1], fc2.bias, 0.0, 0.0, None, False)
        with pytest.raises(RuntimeError, match="seed must be one int64 on the CPU where hidden_dropout is positive"):
            op(x, *norm, *fc1, *fc2, 0.5, 0.0, None, False)
        with pytest.raises(RuntimeError, match="at least 0 and below 1"):
            op(x, *norm, *fc1, *fc2, 0.0, 1.0, seed(), False)


@needs_the_kernels
def test_what_is_kept():
    """For backward: x, the norm's statistics and the hidden tensor, once."""
    arguments = mapped(TestFeedForwardCpu().make((2, 4, 6, 20, 30)), lambda _, t: t.float().requires_grad_())
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        mvit3_kernels.backend("cpu"),
    ):
        feed_forward(**arguments)
    parameters = {
        t.data_ptr() for group in ("norm", "fc1", "fc2") for t in arguments[group] if isinstance(t, torch.Tensor)
    }
    activations = [t for t in kept if t.data_ptr() not in parameters]
    assert sum(t.numel() for t in activations) == 2 * 4 * 6 * (20 + 2 + 30)


@needs_the_kernels
def test_the_hidden_tensor_is_kept_on_demand():
    x, norm, fc1, fc2, *_ = in_float32(TestFeedForwardCpu().make((2, 4, 6, 20, 30))).values()
    given = (x, *norm, *fc1, *fc2, 0.0, 0.0, None)
    *_, hidden = torch.ops.mvit3.feed_forward_forward(*given, True)
    torch.testing.assert_close(hidden, norm_linear(x, norm, fc1))
    y, mean, rstd, nothing = torch.ops.mvit3.feed_forward_forward(*given, False)
    assert nothing.numel() == 0
    with pytest.raises(RuntimeError, match=r"hidden must have shape \(2, 4, 6, 30\), got \(0,\)"):
        torch.ops.mvit3.feed_forward_backward(
            y, x, *norm[:2], norm.per_sample, *fc1, *fc2, 0.0, 0.0, None, mean, rstd, nothing
        )
