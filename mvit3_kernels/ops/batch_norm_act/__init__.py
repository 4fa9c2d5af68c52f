"""Batch normalisation, activation and residual in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, registry
from ..checks import check_activation, check_batch_norm, check_map, check_same
from ..registry import Call, batch_norm_schema, flat, register
from ..sizes import values_per_channel
from ..types import ACTIVATIONS, BatchNorm, Moments
from . import reference

__all__ = ["batch_norm_act"]

KERNELS = (
    dispatch.Kernel("cpu", dispatch.cpu_why_not),
    dispatch.Kernel("triton", dispatch.triton_why_not),
)


def batch_norm_act(
    x: Tensor, norm: BatchNorm, act: str = "identity", residual: Tensor | None = None
) -> tuple[Tensor, Moments | None]:
    """Batch normalisation, then an activation, then the addition of a residual: y = act(batch_norm(x)) + residual.

    Args:
        x: feature map (B, H, W, C), float32, bfloat16, float16 or float64 (float64 runs on the reference), any strides.
        norm: weight, bias and running statistics, each (C,), float32 or the dtype of x. In training the statistics are
            the batch's, accumulated in float32; nothing is mutated, the caller updates its running buffers from the
            returned moments.
        act: "identity", "silu" or "relu".
        residual: (B, H, W, C) of the dtype of x, or None.

    Returns:
        y, (B, H, W, C), contiguous, of the dtype of x; and `Moments` (mean and biased variance, each (C,), float32) in
        training, else None. With batch 0 the moments are zeros.

    Raises:
        TypeError, ValueError: an argument does not fit; training with one value per channel.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64, for y and for all gradients.
    Passes over memory: training reads x twice and writes y, backward reads x and dy twice and writes dx; nothing but x
    is saved.
    Source: Ioffe and Szegedy, arXiv 1502.03167; SiLU as in the MobileViT papers (arXiv 2110.02178, section 4).
    """
    check_map("x", x)
    check_batch_norm("norm", norm, values_per_channel(x), x.shape[-1], x)
    check_activation(act)
    if residual is not None:
        check_same("residual", residual, x.shape, x)
    if dispatch.select("batch_norm_act", KERNELS, x) is None:
        y, moments = reference.batch_norm_act(x, norm, act, residual)
        return y.contiguous(), moments
    y, mean, var = torch.ops.mvit3.batch_norm_act_forward(x, *norm, ACTIVATIONS.index(act), residual)
    return y, Moments(mean, var) if norm.training else None


@register(
    "batch_norm_act",
    f"(Tensor x, {batch_norm_schema()}, int act, Tensor? residual) -> (Tensor y, Tensor mean, Tensor var)",
)
def _op(call: Call) -> tuple[Tensor, ...]:
    return flat(*batch_norm_act(call.x, registry.batch_norm(call), ACTIVATIONS[call.act], call.residual))


# The kernels. Backward needs x alone, and the moments.


@registry.forward(
    "batch_norm_act_forward",
    f"(Tensor x, {batch_norm_schema()}, int act, Tensor? residual) -> (Tensor y, Tensor mean, Tensor var)",
    triton=__name__,
)
def _forward_fake(call: Call) -> tuple[Tensor, ...]:
    moments = (call.x.new_empty(call.x.shape[-1] if call.training else 0, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(call.x, memory_format=torch.contiguous_format), *moments


registry.backward(
    "batch_norm_act_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, bool training, float eps, int act) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    triton=__name__,
    choices=registry.BATCH_STATISTICS,
    residual="residual",
)
