"""Unfold, multi-head softmax attention and fold, without moving a token."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, registry
from ..checks import check_dropout, check_map, check_patches
from ..registry import Call, register
from . import reference

__all__ = ["patch_attention"]

WIDEST_HEAD = 128  # of the Triton kernels: two tiles of wider heads do not fit the registers


def triton_why_not(x: Tensor, num_heads: int, width: int) -> str | None:
    """Why the Triton kernels cannot take heads of maps of `width` channels; `x`: such a map, or that of the queries,
    keys and values."""
    dim = width // num_heads
    if dim > WIDEST_HEAD:
        return f"its kernels take heads of at most {WIDEST_HEAD} channels, these have {dim}"
    return dispatch.triton_32_bit_why_not(x)


KERNELS = (
    dispatch.Kernel("cpu", lambda qkv, num_heads: dispatch.cpu_why_not(qkv)),
    dispatch.Kernel("triton", lambda qkv, num_heads: triton_why_not(qkv, num_heads, qkv.shape[-1] // 3)),
)


def patch_attention(
    qkv: Tensor, num_heads: int, patch_size: tuple[int, int] = (2, 2), dropout: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """Multi-head softmax attention among the pixels that share their position inside a patch.

    The pixel (y, x) attends to every (y', x') with y' = y mod ph and x' = x mod pw: (H / ph) * (W / pw) keys for each
    query, scaled by head_dim**-0.5. This is MobileViT's unfold, attention, fold.

    Args:
        qkv: (B, H, W, 3D), float32, bfloat16, float16 or float64, any strides. Channels 0..D-1 are the query, D..2D-1
            the key, 2D..3D-1 the value; in each, head h owns the channels h * D / num_heads onwards.
        num_heads: divides D.
        patch_size: (ph, pw); H and W are multiples of them.
        dropout: probability of dropping an attention probability.
        seed: int64 tensor of shape (), needed where dropout is positive; the same seed gives the same mask on every
            backend.

    Returns:
        (B, H, W, D) of the dtype of qkv.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
    Source: MobileViT, arXiv 2110.02178, section 3.1.
    """
    check_map("qkv", qkv)
    if num_heads < 1 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"num_heads must be positive and 3 * num_heads must divide the {qkv.shape[-1]} channels of qkv, got "
            f"{num_heads}"
        )
    check_patches("qkv", qkv, patch_size)
    check_dropout(seed, qkv, dropout=dropout)
    qkv = dispatch.autocast(qkv)
    if dispatch.select("patch_attention", KERNELS, qkv, num_heads) is None:
        return reference.patch_attention(qkv, num_heads, patch_size, dropout, seed)
    return torch.ops.mvit3.patch_attention_forward(qkv, num_heads, *patch_size, dropout, seed)[0]


@register(
    "patch_attention", "(Tensor qkv, int num_heads, int[2] patch_size, float dropout, Tensor? seed) -> Tensor out"
)
def _op(call: Call) -> Tensor:
    return patch_attention(call.qkv, call.num_heads, tuple(call.patch_size), call.dropout, call.seed)


# The kernels. Backward needs qkv, out and, of the probabilities, the log-sum-exp of each query's scores.

_GEOMETRY = "int num_heads, int patch_height, int patch_width, float dropout, Tensor? seed"


@registry.forward("patch_attention_forward", f"(Tensor qkv, {_GEOMETRY}) -> (Tensor out, Tensor lse)", triton=__name__)
def _forward_fake(call: Call) -> tuple[Tensor, Tensor]:
    batch, height, width, channels = call.qkv.shape
    positions = call.patch_height * call.patch_width
    patches = (height // call.patch_height) * (width // call.patch_width)
    lse = call.qkv.new_empty(batch, positions, call.num_heads, patches, dtype=torch.float32)
    return call.qkv.new_empty(batch, height, width, channels // 3), lse


registry.backward(
    "patch_attention_backward",
    f"(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_GEOMETRY}) -> Tensor dqkv",
    triton=__name__,
)
