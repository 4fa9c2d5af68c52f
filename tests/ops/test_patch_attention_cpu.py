# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""The CPU kernel of patch_attention."""

import math

import pytest
import torch

from mvit3_kernels.ops import patch_attention
from mvit3_kernels.ops.random import random_words

from ..bounds import relative_errors
from .cpu_kernel import CpuKernel, in_float32, needs_the_kernels
from .inputs import seed
from .test_patch_attention import TestPatchAttention as Reference


@needs_the_kernels
class TestPatchAttentionCpu(CpuKernel):
    op = staticmethod(patch_attention)
    maps = ("qkv",)
    # (batch, height, width, heads, head width, patch): blocks of queries and keys that are full, short and single.
    shapes = (
        (2, 4, 6, 2, 2, (2, 2)),
        (1, 7, 13, 3, 9, (1, 1)),
        (2, 6, 4, 1, 15, (3, 2)),
        (3, 8, 8, 4, 60, (2, 2)),
        (1, 22, 12, 2, 17, (2, 1)),
        (1, 34, 30, 1, 36, (2, 2)),
        (2, 4, 2, 5, 64, (2, 2)),
        (1, 20, 30, 2, 24, (1, 2)),
        (1, 1, 33, 1, 1, (1, 1)),
        (1, 3, 1, 2, 70, (1, 1)),
    )
    options = {"plain": {}, "dropout": {"dropout": 0.3}}
    threaded = ((3, 18, 20, 2, 12, (2, 2)), (2, 4, 14, 2, 5, (2, 2)), (2, 10, 14, 2, 8, (2, 2)))
    cuts_sums = False
    arguments = staticmethod(Reference.arguments)

    @staticmethod
    def registered(arguments):
        qkv, num_heads, patch_size, *dropout = arguments.values()
        inputs = (num_heads, *patch_size, *dropout)
        yield torch.ops.mvit3.patch_attention_forward.default, (qkv, *inputs)
        out, lse = torch.ops.mvit3.patch_attention_forward(qkv, *inputs)
        yield torch.ops.mvit3.patch_attention_backward.default, (torch.ones_like(out), qkv, out, lse, *inputs)

    def test_groups_of_one_token(self, option):
        """Their softmax is 1 and the gradient of the scores 0, without an error in the reference: a few roundings are
        allowed."""
        arguments = in_float32(self.make((2, 2, 2, 5, 64, (2, 2)), option))
        errors = relative_errors(self.results("cpu", arguments), self.results("reference", arguments, torch.float64))
        assert max(errors.values()) <= 4 * torch.finfo(torch.float32).eps, errors

    @pytest.mark.parametrize("scale", [30.0, 1e4])
    def test_large_scores(self, scale):
        """Scores of many hundreds: one key takes all, in both directions of the sign, and in later blocks of keys as in
        the first."""
        arguments = self.make((1, 20, 30, 1, 8, (1, 1)))
        arguments["qkv"][..., :8] *= scale
        found, truth = self.results("cpu", arguments), self.results("reference", arguments, torch.float64)
        assert all(t.isfinite().all() for t in found.values())
        assert (found["y"] - truth["y"]).abs().max() < scale * 1e-4

    def test_equal_scores_give_the_mean(self):
        arguments = self.make((1, 16, 18, 1, 4, (1, 1)))
        arguments["qkv"][..., :4] = 0
        mean = arguments["qkv"][..., 8:].mean((1, 2), keepdim=True).float()
        torch.testing.assert_close(self.results("cpu", arguments)["y"], mean.expand(1, 16, 18, 4))

    def test_log_sum_exp(self):
        """What is kept for backward is the binary logarithm of the sum that the softmax divides by."""
        qkv = in_float32(self.make((2, 6, 4, 2, 3, (2, 2))))["qkv"]
        _, lse = torch.ops.mvit3.patch_attention_forward(qkv, 2, 2, 2, 0.0, None)
        q, k, _ = qkv.view(2, 3, 2, 2, 2, 3, 2, 3).permute(5, 0, 2, 4, 6, 1, 3, 7).reshape(3, 2, 4, 2, 6, 3)
        scores = q @ k.transpose(-2, -1) / math.sqrt(3)
        torch.testing.assert_close(lse, scores.logsumexp(-1) / math.log(2))

    @pytest.mark.parametrize("p", [0.1, 0.9])
    def test_dropout_mask_is_the_reference_mask(self, p):
        """With values that are one-hot in the key, the output is the row of probabilities itself."""
        tokens, heads, batch = 35, 2, 3
        qkv = torch.zeros(batch, 5, 7, 3 * heads * tokens)
        qkv.view(batch, tokens, 3, heads, tokens)[:, :, 2] = torch.eye(tokens)[None, :, None]
        found = self.results(
            "cpu", {"qkv": qkv, "num_heads": heads, "patch_size": (1, 1), "dropout": p, "seed": seed()}
        )["y"]
        out = found.view(batch, tokens, heads, tokens).transpose(1, 2)
        kept = random_words(seed(), 0, batch, heads * tokens * tokens).view_as(out) >= int(p * 2**32)
        torch.testing.assert_close(out, kept / (tokens * (1 - p)))

    def test_expanded_gradient(self):
        qkv = in_float32(self.make(self.shapes[0]))["qkv"].requires_grad_()
        out = patch_attention(qkv, 2)
        (found,) = torch.autograd.grad(out.sum(), qkv)
        (want,) = torch.autograd.grad(patch_attention(qkv, 2), qkv, torch.ones_like(out))
        assert torch.equal(found, want)

    @pytest.mark.parametrize("part", ["query", "key", "value"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_nan_and_infinity_reach_the_results(self, value, part):
        """A bad key spoils its group, a bad query itself, a bad value one channel of its group; other groups stay as
        they are. What PyTorch's fused attention makes of them depends on its version, so float64 tells what is
        right."""
        arguments = self.make((2, 12, 14, 2, 5, (2, 2)))
        arguments["qkv"][1, 4, 5, ("query", "key", "value").index(part) * 10 + 7] = value  # the second head
        found, exact = self.results("cpu", arguments)["y"], patch_attention(**arguments)
        assert torch.equal(found.isfinite(), exact.isfinite())
        if value != value:
            assert torch.equal(found.isnan(), exact.isnan())
        clean = exact.isfinite()
        torch.testing.assert_close(found[clean], exact[clean].float(), rtol=1e-4, atol=1e-5)

    def test_the_kernels_check_what_they_are_given(self):
        """Called directly, past the public function's checks, they refuse rather than read elsewhere."""
        qkv = in_float32(self.make((1, 4, 6, 2, 3, (2, 2))))["qkv"]
        op, back = torch.ops.mvit3.patch_attention_forward, torch.ops.mvit3.patch_attention_backward
        for arguments in ((5, 2, 2, 0.0, None), (2, 3, 2, 0.0, None), (0, 2, 2, 0.0, None), (2, 2, 2, 0.5, None)):
            with pytest.raises(RuntimeError):
                op(qkv, *arguments)
        out, lse = op(qkv, 2, 2, 2, 0.0, None)
        for dout, other_lse in ((out[:, :2], lse), (out.double(), lse), (out, lse[:, :2]), (out, lse.double())):
            with pytest.raises(RuntimeError):
                back(dout, qkv, out, other_lse, 2, 2, 2, 0.0, None)
