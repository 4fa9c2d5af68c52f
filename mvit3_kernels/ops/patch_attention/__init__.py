"""Unfold, multi-head softmax attention and fold, without moving a token."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, registry
from ..checks import check_dropout, check_map, check_patches
from ..registry import register
from . import reference

__all__ = ["patch_attention"]

WIDEST_HEAD = 128  # of the Triton kernels: two tiles of wider heads do not fit the registers


def _triton_why_not(qkv: Tensor, num_heads: int) -> str | None:
    dim = qkv.shape[-1] // (3 * num_heads)
    if dim > WIDEST_HEAD:
        return f"its kernels take heads of at most {WIDEST_HEAD} channels, these have {dim}"
    return dispatch.triton_32_bit_why_not(qkv)


KERNELS = (
    dispatch.Kernel("cpu", lambda qkv, num_heads: dispatch.cpu_why_not(qkv)),
    dispatch.Kernel("triton", _triton_why_not),
)


def patch_attention(
    qkv: Tensor, num_heads: int, patch_size: tuple[int, int] = (2, 2), dropout: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """Multi-head softmax attention among the pixels that share their position inside a patch.

    The pixel (y, x) attends to every (y', x') with y' = y mod ph and x' = x mod pw: (H / ph) * (W / pw) keys for each query, scaled by
    head_dim**-0.5. This is MobileViT's unfold, attention, fold.

    Args:
        qkv: (B, H, W, 3D), float32, bfloat16, float16 or float64, any strides. Channels 0..D-1 are the query, D..2D-1 the key,
            2D..3D-1 the value; in each, head h owns the channels h * D / num_heads onwards.
        num_heads: divides D.
        patch_size: (ph, pw); H and W are multiples of them.
        dropout: probability of dropping an attention probability.
        seed: int64 tensor of shape (), needed where dropout is positive; the same seed gives the same mask on every backend.

    Returns:
        (B, H, W, D) of the dtype of qkv.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
    Source: MobileViT, arXiv 2110.02178, section 3.1.
    """
    check_map("qkv", qkv)
    if num_heads < 1 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(f"num_heads must be positive and 3 * num_heads must divide the {qkv.shape[-1]} channels of qkv, got {num_heads}")
    check_patches("qkv", qkv, patch_size)
    check_dropout(seed, qkv, dropout=dropout)
    qkv = dispatch.autocast(qkv)
    if dispatch.select("patch_attention", KERNELS, qkv, num_heads) is None:
        return reference.patch_attention(qkv, num_heads, patch_size, dropout, seed)
    return torch.ops.mvit3.patch_attention_forward(qkv, num_heads, *patch_size, dropout, seed)[0]


@register("patch_attention", "(Tensor qkv, int num_heads, int[2] patch_size, float dropout, Tensor? seed) -> Tensor")
def _op(qkv, num_heads, patch_size, dropout, seed):
    return patch_attention(qkv, num_heads, tuple(patch_size), dropout, seed)


# The kernels. Backward needs qkv, out and, of the probabilities, the log-sum-exp of each query's scores.

_GEOMETRY = "int num_heads, int patch_height, int patch_width, float dropout, Tensor? seed"

for _name, _schema in {
    "forward": f"(Tensor qkv, {_GEOMETRY}) -> (Tensor, Tensor)",
    "backward": f"(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_GEOMETRY}) -> Tensor",
}.items():
    torch.library.define(f"mvit3::patch_attention_{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
    dispatch.register_triton(f"patch_attention_{_name}", __name__)


@torch.library.register_fake("mvit3::patch_attention_forward")
def _forward_fake(qkv, num_heads, patch_height, patch_width, dropout, seed):
    batch, height, width, channels = qkv.shape
    tokens = (height // patch_height) * (width // patch_width)
    lse = qkv.new_empty(batch, patch_height * patch_width, num_heads, tokens, dtype=torch.float32)
    return qkv.new_empty(batch, height, width, channels // 3), lse


@torch.library.register_fake("mvit3::patch_attention_backward")
def _backward_fake(dout, qkv, *_):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    qkv, *ctx.geometry, seed = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, seed)


def _gradients(ctx, dout, _):
    if dout is None:
        return (None,) * 6
    *saved, seed = ctx.saved_tensors
    return torch.ops.mvit3.patch_attention_backward(dout, *saved, *ctx.geometry, seed), *(None,) * 5


registry.register_gradient("patch_attention_forward", _gradients, _setup_context)
registry.forbid_second_derivative("patch_attention_backward")
