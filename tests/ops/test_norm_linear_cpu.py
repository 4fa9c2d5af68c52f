# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""The CPU kernel of norm_linear, and the identity behind it: the norm's scale and shift are part of the linear map."""

import pytest
import torch
import torch.nn.functional as F

import mvit3_kernels
from mvit3_kernels.ops import norm_linear

from .cpu_kernel import CpuKernel, in_float32, needs_the_kernels
from .inputs import Draw


@needs_the_kernels
class TestNormLinearCpu(CpuKernel):
    op = staticmethod(norm_linear)
    shapes = (
        (2, 3, 5, 7, 9),
        (1, 1, 1, 3, 5),
        (3, 1, 14, 17, 33),
        (2, 9, 7, 96, 50),
        (1, 16, 16, 40, 120),
        (2, 32, 20, 33, 64),
        (3, 8, 8, 240, 720),
        (1, 13, 17, 144, 432),
    )
    options = {
        "per-token": {},
        "per-sample": {"per_sample": True},
        "no-bias": {"bias": False, "conv": True},
        "large-mean": {"mean": 30.0},
        "large-mean-per-sample": {"mean": 30.0, "per_sample": True},
    }
    threaded = ((2, 8, 8, 64, 192), (1, 30, 20, 48, 80), (5, 16, 16, 33, 70))

    @staticmethod
    def arguments(draw, batch, height, width, channels, outputs, per_sample=False, bias=True, conv=False, mean=0.0):
        return {
            "x": draw(batch, height, width, channels, mean=mean),
            "norm": draw.layer_norm(channels, per_sample),
            "projection": draw.linear(outputs, channels, bias, conv),
        }

    @staticmethod
    def registered(arguments):
        x, norm, projection = arguments.values()
        inputs = (x, norm.weight, norm.bias, norm.eps, norm.per_sample, *projection)
        yield torch.ops.mvit3.norm_linear_forward.default, inputs
        y, mean, rstd = torch.ops.mvit3.norm_linear_forward(*inputs)
        backward = (torch.ones_like(y), x, norm.weight, norm.bias, norm.per_sample, *projection, mean, rstd)
        yield torch.ops.mvit3.norm_linear_backward.default, backward

    def test_statistics(self, shape, option):
        """What is kept for backward: mean and 1 / deviation of each token or sample."""
        x, norm, projection = in_float32(self.make(shape, option)).values()
        _, mean, rstd = torch.ops.mvit3.norm_linear_forward(x, *norm, *projection)
        values = x.double().flatten(1) if norm.per_sample else x.double().flatten(0, 2)
        torch.testing.assert_close(mean.double(), values.mean(1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rstd.double(), (values.var(1, correction=0) + norm.eps).rsqrt(), rtol=1e-6, atol=0)

    def test_a_scale_of_zero_still_has_a_gradient(self):
        """The gradient of the scale comes from that of the folded weight, without a division by the scale."""
        arguments = self.make((2, 4, 6, 20, 30))
        arguments["norm"].weight[::3] = 0
        truth, found = self.results("reference", arguments, torch.float64), self.results(self.backend, arguments)
        for name, t in truth.items():
            torch.testing.assert_close(found[name].double(), t, rtol=1e-4, atol=1e-4, msg=name)

    def test_the_kernel_checks_what_it_is_given(self):
        x, norm, projection = in_float32(self.make((2, 4, 6, 5, 7))).values()
        with pytest.raises(RuntimeError, match="weight must have 7 outputs of 5 values, got shape"):
            torch.ops.mvit3.norm_linear_forward(x, *norm, projection.weight[:, :-1], projection.bias)
        with pytest.raises(RuntimeError, match=r"norm_weight must have shape \(5,\)"):
            torch.ops.mvit3.norm_linear_forward(x, norm.weight[:-1], norm.bias, 1e-5, False, *projection)


@pytest.mark.parametrize("per_sample", [False, True])
def test_folding(per_sample):
    """Identity C with its gradients: W' = W gamma, b' = b + W beta; from dW' and db' come dW, dgamma and dbeta."""
    draw = Draw()
    x, weight, bias, gamma, beta = (draw(*size) for size in ((3, 4, 5, 7), (9, 7), (9,), (7,), (7,)))
    dims = (1, 2, 3) if per_sample else (3,)
    normalised = (x - x.mean(dims, keepdim=True)) * (x.var(dims, correction=0, keepdim=True) + 1e-5).rsqrt()
    leaves = [t.requires_grad_() for t in (weight, bias, gamma, beta)]
    y = F.linear(normalised * gamma + beta, weight, bias)
    folded, shifted = (weight * gamma).detach().requires_grad_(), (bias + weight @ beta).detach().requires_grad_()
    again = F.linear(normalised, folded, shifted)
    torch.testing.assert_close(again, y, rtol=1e-12, atol=1e-12)
    dy = draw(*y.shape)
    product, dbias = torch.autograd.grad(again, (folded, shifted), dy)
    found = (
        product * gamma + dbias[:, None] * beta,
        dbias,
        (weight * product).sum(0),
        (weight * dbias[:, None]).sum(0),
    )
    torch.testing.assert_close(found, torch.autograd.grad(y, leaves, dy), rtol=1e-11, atol=1e-11)


@needs_the_kernels
def test_free_choice_takes_the_kernel():
    arguments = in_float32(TestNormLinearCpu().make((2, 4, 6, 20, 30)))
    with mvit3_kernels.backend("reference"):
        want = norm_linear(**arguments)
    torch.testing.assert_close(norm_linear(**arguments), want, rtol=1e-5, atol=1e-5)
