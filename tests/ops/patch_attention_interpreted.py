# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""patch_attention's Triton kernels on CPU tensors, step by step; run by test_patch_attention_triton.py."""

import math

import pytest
import torch
import triton
import triton.language as tl

from mvit3_kernels import backend, ops
from mvit3_kernels.ops.random import random_words
from mvit3_kernels.ops.triton_common import pixel_of_token
from tests.ops.batch_norm_act_cases import poison
from tests.ops.inputs import Draw
from tests.ops.test_patch_attention_triton import arguments, registered
from tests.ops.triton_kernel import TritonResults
from tests.triton_tools import compute_like_a_gpu

poison()
compute_like_a_gpu()


@triton.jit
def pixels_kernel(pixel_ptr, width):
    token = tl.arange(0, 256)
    tl.store(pixel_ptr + token, pixel_of_token(token, 3, width, PATCH_H=3, PATCH_W=2, MOST_TOKENS=256))


class TestPatchAttention(TritonResults):
    op = staticmethod(ops.patch_attention)
    maps = ("qkv",)
    # Sequences of several tokens, of more than one block, and of one token.
    shapes = ((2, 2, 6, 1, 3), (1, 11, 14, 1, 20), (1, 2, 2, 1, 1))
    options = {"plain": {"patch": (1, 2)}, "dropout": {"dropout": 0.3, "patch": (1, 1)}}
    one_pixel = {"patch_size": (1, 1)}
    arguments = staticmethod(arguments)
    registered = staticmethod(registered)

    @pytest.mark.parametrize("dim", [15, 24, 30, 36, 60, 128])
    def test_head_widths(self, dim):
        arguments = self.make((1, 2, 3, 2, dim), "dropout")
        truth, found = self.results("reference", arguments, torch.float64), self.results("triton", arguments)
        for name, t in truth.items():
            torch.testing.assert_close(found[name].double(), t, rtol=1e-4, atol=1e-5)

    def test_patches_and_heads(self):
        arguments = self.arguments(Draw(), 2, 6, 4, 2, 3, (3, 2))
        truth, found = self.results("reference", arguments, torch.float64), self.results("triton", arguments)
        for name, t in truth.items():
            torch.testing.assert_close(found[name].double(), t, rtol=1e-4, atol=1e-5)

    # Groups in one row and in one column of patches, of a full tile of each size and of part of one, and a longer one.
    @pytest.mark.parametrize(
        "height, width, side", [(1, 256, 1), (256, 1, 1), (4, 8, 2), (6, 14, 2), (16, 16, 2), (26, 18, 2), (13, 20, 1)]
    )
    def test_groups_of_every_size(self, height, width, side):
        self.hold(self.arguments(Draw(), 1, height, width, 1, 20, (side, side)), torch.bfloat16)

    def test_pixels_of_few_tokens_need_no_division(self):
        """For every number of columns that at most 256 tokens may have."""
        token, found = torch.arange(256), torch.empty(256, dtype=torch.int32)
        for columns in range(1, 257):
            pixels_kernel[(1,)](found, 2 * columns)
            expected = (token // columns * 3 + 1) * 2 * columns + token % columns * 2 + 1
            assert torch.equal(found.long(), expected), columns

    @pytest.mark.parametrize("height", [2, 20, 50])
    def test_tokens_beyond_the_last_take_no_part(self, height):
        """They are zeros, whose scores lie above those of all others by hundreds."""
        arguments = self.arguments(Draw(), 1, height, 6, 1, 8)
        arguments["qkv"][..., :8] += 20
        arguments["qkv"][..., 8:16] -= 20
        self.hold(arguments, torch.bfloat16)

    def test_a_head_that_is_too_wide(self):
        with backend("triton"), pytest.raises(RuntimeError, match="heads of at most 128 channels, these have 129"):
            ops.patch_attention(torch.zeros(1, 2, 2, 3 * 129), 1)

    def test_log_sum_exp(self):
        """What is kept for backward is the binary logarithm of the sum that the softmax divides by."""
        qkv = self.make((1, 10, 4, 2, 3))["qkv"].float()
        _, lse = torch.ops.mvit3.patch_attention_forward(qkv, 2, 1, 1, 0.0, None)
        q, k, _ = qkv.view(1, 40, 3, 2, 3).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(3)
        torch.testing.assert_close(lse[:, 0], scores.logsumexp(-1) / math.log(2))

    @pytest.mark.parametrize("scale", [30.0, 1e4])
    def test_large_scores(self, scale):
        """Scores of many hundreds: one key takes all, in both directions of the sign, and in later blocks of keys as in
        the first."""
        arguments = self.make((1, 10, 10, 1, 8), "plain")
        arguments["qkv"][..., :8] *= scale
        truth, found = self.results("reference", arguments, torch.float64), self.results("triton", arguments)
        assert all(t.isfinite().all() for t in found.values())
        assert (found["y"] - truth["y"]).abs().max() < scale * 1e-4

    @pytest.mark.parametrize("p", [0.1, 0.9])
    def test_dropout_mask_is_the_reference_mask(self, p):
        """With values that are one-hot in the key, the output is the row of probabilities itself."""
        tokens, heads, batch, seed = 35, 2, 3, torch.tensor(0x0123_4567_89AB_CDEF)
        qkv = torch.zeros(batch, 5, 7, 3 * heads * tokens)
        qkv.view(batch, tokens, 3, heads, tokens)[:, :, 2] = torch.eye(tokens)[None, :, None]
        with backend("triton"):
            out = ops.patch_attention(qkv, heads, (1, 1), p, seed).view(batch, tokens, heads, tokens).transpose(1, 2)
        kept = random_words(seed, 0, batch, heads * tokens * tokens).view_as(out) >= int(p * 2**32)
        torch.testing.assert_close(out, kept / (tokens * (1 - p)))
