# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""The Triton kernels of pointwise_fusion on CPU tensors, step by step; run by test_pointwise_fusion_triton.py."""

import torch

from mvit3_kernels import ops
from tests.ops.batch_norm_act_cases import poison
from tests.ops.test_pointwise_fusion_cpu import TestPointwiseFusionCpu as Cpu
from tests.ops.triton_kernel import TritonResults
from tests.triton_tools import compute_like_a_gpu

poison()
compute_like_a_gpu()


class TestPointwiseFusion(TritonResults):
    op = staticmethod(ops.pointwise_fusion)
    maps = ("a", "b", "residual")
    shapes = ((1, 9, 7, 17, 40, 33),)
    options = {name: Cpu.options[name] for name in ("training-silu-residual", "frozen-silu-residual")}
    arguments = staticmethod(Cpu.arguments)
    registered = staticmethod(Cpu.registered)

    def test_many_rows(self):
        """Enough for programs that hold the weights of two blocks of outputs."""
        self.hold(self.make((3, 13, 14, 16, 48, 70), "training-silu-residual"), torch.bfloat16)

    def test_whole_channels(self):
        """Rows for the kernel that multiplies 256 of the gradient of p as it makes them."""
        self.hold(self.make((3, 13, 14, 16, 48, 80), "training-silu-residual"), torch.bfloat16)


del Cpu
