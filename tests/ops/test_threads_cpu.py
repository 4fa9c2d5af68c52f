"""The CPU kernels on many threads, whose cuts are others than those of two: forward the same sums, backward the same
gradients up to the order of their sums."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mvit3_kernels import _native, backend, ops
from mvit3_kernels.ops.types import LayerNorm, Linear
from tests.bounds import assert_bound, each

pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason="the compiled kernels are not built")

COUNTS = (2, 16, 64)


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).requires_grad_()


def linear(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    return normal(outputs, inputs, scale=inputs**-0.5), normal(outputs, scale=0.1)


def feed_forward(per_sample: bool, rate: float) -> tuple[list[Tensor], Callable[..., Tensor]]:
    dim, hidden = 93, 201
    tensors = [normal(2, 6, 8, dim), normal(dim), normal(dim), *linear(dim, hidden), *linear(hidden, dim)]
    seed = torch.tensor(5)

    def call(x, norm_weight, norm_bias, w1, b1, w2, b2):
        norm = LayerNorm(norm_weight, norm_bias, 1e-5, per_sample)
        return ops.feed_forward(x, norm, Linear(w1, b1), Linear(w2, b2), rate, rate, seed)

    return tensors, call


def separable_attention(per_sample: bool, rate: float) -> tuple[list[Tensor], Callable[..., Tensor]]:
    dim = 147
    tensors = [normal(2, 8, 10, dim), normal(dim), normal(dim), *linear(dim, 1 + 2 * dim), *linear(dim, dim)]
    seed = torch.tensor(5)

    def call(x, norm_weight, norm_bias, w1, b1, w2, b2):
        norm = LayerNorm(norm_weight, norm_bias, 1e-5, per_sample)
        return ops.separable_attention(x, norm, Linear(w1, b1), Linear(w2, b2), (2, 2), rate, rate, seed)

    return tensors, call


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("op", [feed_forward, separable_attention])
def test_few_rows(op, per_sample, rate):
    """So few that a part has products of its own instead of rows."""
    torch.manual_seed(0)
    tensors, call = op(per_sample, rate)
    names = ("y", "dx", "dnorm_weight", "dnorm_bias", "dw1", "db1", "dw2", "db2")

    def results(of: list[Tensor]) -> dict[str, Tensor]:
        y = call(*of)
        slope = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        return dict(zip(names, (y.detach(), *torch.autograd.grad((y * slope).sum(), of)), strict=True))

    before = torch.get_num_threads()
    with backend("reference"):
        exact = results([t.detach().double().requires_grad_() for t in tensors])
        reference = results(tensors)
    try:
        for count in COUNTS:
            torch.set_num_threads(count)
            with backend("cpu"):
                assert_bound(results(tensors), reference, exact, 2e-6, group=each)
    finally:
        torch.set_num_threads(before)
