# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""norm_linear's Triton kernels on CPU tensors, step by step; run by test_norm_linear_triton.py."""

from mvit3_kernels import ops
from tests.ops.batch_norm_act_cases import poison
from tests.ops.test_norm_linear_cpu import TestNormLinearCpu as Cpu
from tests.ops.triton_kernel import TritonResults
from tests.triton_tools import compute_like_a_gpu

poison()
compute_like_a_gpu()


class TestNormLinear(TritonResults):
    op = staticmethod(ops.norm_linear)
    # Rows of two tiles that are full, short and empty; rows of several samples in one program and the other way round.
    shapes = ((2, 3, 3, 7, 9), (2, 1, 19, 33, 40))  # few rows, and more
    options = {
        "large-mean": {"mean": 30.0, "bias": False, "conv": True},
        "large-mean-per-sample": {"mean": 30.0, "per_sample": True},
    }
    arguments = staticmethod(Cpu.arguments)
    registered = staticmethod(Cpu.registered)
    test_statistics = Cpu.test_statistics


del Cpu
