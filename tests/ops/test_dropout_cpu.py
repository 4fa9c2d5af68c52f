# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""The CPU kernel of dropout."""

import pytest
import torch

from mvit3_kernels.ops import dropout
from mvit3_kernels.ops.random import random_words

from .cpu_kernel import CpuKernel, in_float32, needs_the_kernels
from .inputs import seed
from .test_dropout import TestDropout as Reference


@needs_the_kernels
class TestDropoutCpu(CpuKernel):
    op = staticmethod(dropout)
    maps = ("x", "residual")
    # Samples of less and more than a vector and than a block, and of a whole number of blocks.
    shapes = ((2, 3, 5, 7), (1, 1, 1, 1), (3, 7, 13, 33), (2, 16, 16, 16), (5, 8, 8, 129))
    options = {
        "dropout": {"p": 0.3},
        "residual": {"p": 0.5, "residual": True},
        "nothing-is-dropped": {"residual": True},
    }
    threaded = ((3, 32, 32, 48), (1, 64, 61, 33))
    cuts_sums = False
    arguments = staticmethod(Reference.arguments)

    @staticmethod
    def registered(arguments):
        x, p, seed, _ = arguments.values()
        yield torch.ops.mvit3.dropout_forward.default, tuple(arguments.values())
        yield torch.ops.mvit3.dropout_backward.default, (torch.ones_like(x), p, seed)

    def test_mask_is_that_of_the_hash(self):
        arguments = in_float32(self.make((3, 7, 13, 33), "dropout"))
        words = random_words(arguments["seed"], 0, 3, 7 * 13 * 33).view(3, 7, 13, 33)
        assert torch.equal(dropout(**arguments) == 0, words < int(0.3 * 2**32))

    def test_seed_alone_is_saved(self):
        x = torch.randn(2, 3, 5, 7, requires_grad=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            dropout(x, 0.5, seed(), x)
        assert [t.shape for t in saved] == [()]

    def test_the_kernel_checks_what_it_is_given(self):
        x = torch.randn(2, 3, 5, 7)
        with pytest.raises(RuntimeError, match="seed must be one int64 on the CPU where p is positive"):
            torch.ops.mvit3.dropout_forward(x, 0.5, None, None)
        with pytest.raises(RuntimeError, match="p must be at least 0 and below 1"):
            torch.ops.mvit3.dropout_backward(x, 1.0, seed())


del Reference
