# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""separable_attention's Triton kernels on CPU tensors, step by step; run by test_separable_attention_triton.py."""

from mvit3_kernels import ops
from tests.ops.batch_norm_act_cases import poison
from tests.ops.test_separable_attention_cpu import TestSeparableAttentionCpu as Cpu
from tests.ops.triton_kernel import TritonResults
from tests.triton_tools import compute_like_a_gpu

poison()
compute_like_a_gpu()


class TestSeparableAttention(TritonResults):
    op = staticmethod(ops.separable_attention)
    shapes = (
        (2, 4, 6, 5, (2, 2)),  # several groups in a block
        (1, 7, 13, 33, (1, 1)),  # a group in several blocks, and parts
    )
    options = {
        "no-bias": {"bias": False, "conv": True},
        "large-mean-per-token": {"mean": 30.0, "per_sample": False},
        "dropouts": {"mean": 5.0, "attention_dropout": 0.3, "output_dropout": 0.2},
    }
    one_pixel = {"patch_size": (1, 1)}
    arguments = staticmethod(Cpu.arguments)
    registered = staticmethod(Cpu.registered)


del Cpu
