# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""feed_forward's Triton kernels on CPU tensors, step by step; run by test_feed_forward_triton.py."""

from functools import partial

import pytest
import torch

from mvit3_kernels import backend, ops
from tests.ops.batch_norm_act_cases import poison
from tests.ops.inputs import mapped
from tests.ops.test_feed_forward_cpu import TestFeedForwardCpu as Cpu
from tests.ops.triton_kernel import TritonResults
from tests.triton_tools import compute_like_a_gpu

poison()
compute_like_a_gpu()


class TestFeedForward(TritonResults):
    op = staticmethod(ops.feed_forward)
    # Rows of two tiles that are full, short and empty; rows of several samples in one program and the other way round.
    shapes = ((2, 3, 3, 7, 9), (2, 1, 19, 33, 40))  # few rows, and more
    options = {
        "no-bias": {"bias": False, "conv": True},
        "dropouts-per-sample": {"mean": 30.0, "hidden_dropout": 0.1, "output_dropout": 0.5, "per_sample": True},
    }
    arguments = staticmethod(Cpu.arguments)
    registered = staticmethod(partial(Cpu.registered, keep=False))

    @pytest.mark.parametrize(("channels", "kind"), [(257, torch.float32), (513, torch.bfloat16)])
    def test_rows_that_are_too_wide(self, channels, kind):
        arguments = mapped(self.make((1, 1, 1, channels, 2)), lambda _, t: t.to(kind))
        with (
            backend("triton"),
            pytest.raises(RuntimeError, match=f"rows of at most {channels - 1} channels of {kind}, x has {channels}"),
        ):
            ops.feed_forward(**arguments)


del Cpu
