"""dropout's Triton kernel on CPU tensors, step by step; run by test_dropout_triton.py."""

from mvit3_kernels import ops
from tests.ops.batch_norm_act_cases import poison
from tests.ops.test_dropout_cpu import TestDropoutCpu as Cpu
from tests.ops.triton_kernel import TritonResults
from tests.triton_tools import compute_like_a_gpu

poison()
compute_like_a_gpu()


class TestDropout(TritonResults):
    op = staticmethod(ops.dropout)
    maps = Cpu.maps
    # Samples of less than a block, and of a few and a rest.
    shapes = ((2, 3, 3, 7), (2, 5, 9, 33))
    options = Cpu.options
    arguments = staticmethod(Cpu.arguments)
    registered = staticmethod(Cpu.registered)


del Cpu
