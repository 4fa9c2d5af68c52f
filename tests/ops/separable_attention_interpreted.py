# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""separable_attention's Triton kernels on CPU tensors, step by step; run by test_separable_attention_triton.py."""

import pytest
import torch

from mvit3_kernels import backend, ops
from tests.bounds import assert_bound, half_a_rounding
from tests.ops.batch_norm_act_cases import poison
from tests.ops.inputs import mapped
from tests.ops.test_separable_attention_cpu import TestSeparableAttentionCpu as Cpu
from tests.ops.triton_kernel import TritonResults
from tests.triton_tools import compute_like_a_gpu

poison()
compute_like_a_gpu()


class TestSeparableAttention(TritonResults):
    op = staticmethod(ops.separable_attention)
    shapes = (
        (2, 4, 6, 5, (2, 2)),  # several groups in a block
        (1, 5, 13, 33, (1, 1)),  # a group in several blocks and programs
    )
    options = {
        "per-token": {"mean": 30.0, "per_sample": False, "bias": False, "conv": True},
        "dropouts": {"mean": 5.0, "attention_dropout": 0.3, "output_dropout": 0.2},
    }
    one_pixel = {"patch_size": (1, 1)}
    arguments = staticmethod(Cpu.arguments)
    registered = staticmethod(Cpu.registered)

    def holds(self, arguments):
        found, reference = (self.results(kind, arguments) for kind in ("triton", "reference"))
        truth = self.results("reference", arguments, torch.float64)
        assert_bound(found, reference, truth, half_a_rounding(torch.float32))

    @pytest.mark.parametrize(
        "sizes", [(1, 1, 1, 3, (1, 1)), (2, 6, 4, 17, (3, 2)), (2, 3, 5, 16, (3, 5)), (1, 16, 16, 9, (2, 2))], ids=str
    )
    def test_groups(self, sizes):
        """A token a group, positions that are no power of 2, a patch as large as the map, groups of as many tokens as a
        block has."""
        self.holds(self.make(sizes, "dropouts"))

    def test_scores_far_apart(self, option):
        """Largest scores that grow from tile to tile and from part to part, and exponentials that vanish."""
        arguments = self.make((1, 14, 10, 40, (1, 1)), option)
        arguments["qkv"].weight[0] *= 40
        arguments["x"] *= torch.linspace(0.1, 10, 14)[:, None, None]
        self.holds(arguments)

    def test_inference_is_training_without_gradients(self):
        arguments = mapped(self.make(self.shapes[0], "per-token"), lambda _, t: t.float())
        with torch.no_grad(), backend("triton"):
            found = ops.separable_attention(**arguments)
        assert torch.equal(found, self.results("triton", arguments)["y"])

    @pytest.mark.parametrize(("channels", "kind"), [(257, torch.float32), (513, torch.bfloat16)])
    def test_rows_that_are_too_wide(self, channels, kind):
        arguments = mapped(self.make((1, 1, 1, channels, (1, 1))), lambda _, t: t.to(kind))
        with (
            backend("triton"),
            pytest.raises(RuntimeError, match=f"rows of at most {channels - 1} channels of {kind}, x has {channels}"),
        ):
            ops.separable_attention(**arguments)


del Cpu
