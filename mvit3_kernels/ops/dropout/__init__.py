"""Dropout by a hash of the position, and the addition of a residual, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, registry
from ..checks import check_dropout, check_map, check_same
from ..registry import Call, register
from . import reference

__all__ = ["dropout"]

KERNELS = (dispatch.Kernel("cpu", dispatch.cpu_why_not), dispatch.Kernel("triton", dispatch.triton_32_bit_why_not))


def dropout(x: Tensor, p: float, seed: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Drops each element with probability p, divides the others by 1 - p, adds a residual: y = dropout(x) + residual.

    Args:
        x: feature map (B, H, W, C), float32, bfloat16, float16 or float64 (float64 runs on the reference), any strides.
        p: at least 0 and below 1.
        seed: int64 tensor of shape (), needed where p is positive; the same seed gives the same mask on every backend.
        residual: (B, H, W, C) of the dtype of x, or None.

    Returns:
        y, (B, H, W, C), contiguous, of the dtype of x.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64, for y and for all gradients.
    Passes over memory: reads x and the residual, writes y; backward reads dy and writes dx. Only the seed is saved.
    Source: Srivastava et al., JMLR 15 (2014); the hash is that of `mvit3_kernels/ops/random.py`.
    """
    check_map("x", x)
    check_dropout(seed, x, p=p)
    if residual is not None:
        check_map("residual", residual)
        check_same("residual", residual, x.shape, x)
    if dispatch.select("dropout", KERNELS, x) is None:
        return reference.dropout(x, p, seed, residual).contiguous()
    return torch.ops.mvit3.dropout_forward(x, p, seed, residual)


@register("dropout", "(Tensor x, float p, Tensor? seed, Tensor? residual) -> Tensor y")
def _op(call: Call) -> Tensor:
    return dropout(*call)


# The kernels. Backward computes the mask again.


@registry.forward("dropout_forward", "(Tensor x, float p, Tensor? seed, Tensor? residual) -> Tensor y", triton=__name__)
def _forward_fake(call: Call) -> Tensor:
    return torch.empty_like(call.x, memory_format=torch.contiguous_format)


registry.backward(
    "dropout_backward", "(Tensor dy, float p, Tensor? seed) -> Tensor dx", triton=__name__, residual="residual"
)
