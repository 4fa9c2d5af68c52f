"""Unfold, multi-head softmax attention and fold, without moving a token."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..checks import check_dropout, check_map, check_patches
from ..registry import register
from . import reference

__all__ = ["patch_attention"]

KERNELS: tuple[dispatch.Kernel, ...] = ()


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
    dispatch.select("patch_attention", KERNELS, qkv)
    return reference.patch_attention(qkv, num_heads, patch_size, dropout, seed)


@register("patch_attention", "(Tensor qkv, int num_heads, int[2] patch_size, float dropout, Tensor? seed) -> Tensor")
def _op(qkv, num_heads, patch_size, dropout, seed):
    return patch_attention(qkv, num_heads, tuple(patch_size), dropout, seed)
