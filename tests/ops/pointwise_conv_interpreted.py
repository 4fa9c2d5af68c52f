# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""The Triton kernels of pointwise_conv on CPU tensors, step by step; run by test_pointwise_conv_triton.py."""

import pytest
import torch

from mvit3_kernels import ops
from tests.ops.batch_norm_act_cases import poison
from tests.ops.test_pointwise_conv_cpu import TestPointwiseConvCpu as Cpu
from tests.ops.triton_kernel import TritonResults
from tests.triton_tools import compute_like_a_gpu

poison()
compute_like_a_gpu()


class TestPointwiseConv(TritonResults):
    op = staticmethod(ops.pointwise_conv)
    maps = ("x", "residual")
    # Several blocks of inputs and of outputs, several parts of the rows, and less than one.
    shapes = ((2, 3, 5, 7, 9), (2, 9, 7, 33, 70))
    options = {
        name: Cpu.options[name] for name in ("training-silu", "training-bias-residual", "training-large-mean", "plain")
    }
    options |= {name: Cpu.options[name] for name in ("frozen-silu-residual", "plain-silu")}
    options |= {name: Cpu.options[name] for name in ("plain-relu", "plain-dropout", "training-silu-dropout")}
    arguments = staticmethod(Cpu.arguments)
    registered = staticmethod(Cpu.registered)
    test_with_and_without_gradients_agree = Cpu.test_with_and_without_gradients_agree
    test_a_bias_that_cancels_the_product = Cpu.test_a_bias_that_cancels_the_product
    test_a_constant_channel = Cpu.test_a_constant_channel

    @pytest.mark.parametrize("sizes", [(1, 9, 15, 17, 70), (3, 13, 14, 80, 70)], ids=["wide", "held"])
    @pytest.mark.parametrize("name", ["training-large-mean", "frozen-silu-residual", "plain-silu"])
    def test_many_rows(self, sizes, name):
        """Enough for blocks of 128 outputs, and for programs that hold the weights of several blocks of 64."""
        self.hold(self.make(sizes, name), torch.bfloat16)

    @pytest.mark.parametrize("sizes", [(2, 7, 7, 16, 80), (2, 14, 7, 48, 272)], ids=["64 rows", "128 rows"])
    @pytest.mark.parametrize("name", ["training-bias-residual", "training-large-mean"])
    def test_whole_channels(self, sizes, name):
        """Channels and rows for the kernel that multiplies the gradient of p as it makes it."""
        self.hold(self.make(sizes, name), torch.bfloat16 if sizes[-1] == 80 else torch.float16)


del Cpu
