"""The 1x1 fusion-with-residual block: 1x1 convolution over the concatenation of two feature maps."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..checks import check_activation, check_batch_norm, check_map, check_same, check_weight
from ..pointwise_conv import pointwise_conv, run
from ..registry import Call, batch_norm, batch_norm_schema, flat, register
from ..sizes import values_per_channel
from ..types import ACTIVATIONS, BatchNorm, Linear, Moments
from . import reference

__all__ = ["pointwise_fusion"]

KERNELS = (
    dispatch.Kernel("cpu", dispatch.cpu_why_not),
    dispatch.Kernel("triton", dispatch.triton_32_bit_why_not),
)  # pointwise_conv's, with a second input


def pointwise_fusion(
    a: Tensor, b: Tensor, weight: Tensor, norm: BatchNorm, act: str = "identity", residual: Tensor | None = None
) -> tuple[Tensor, Moments | None]:
    """1x1 convolution over concat(a, b), batch normalisation, activation, addition of a residual.

    Args:
        a, b: feature maps (B, H, W, Ca) and (B, H, W, Cb) of one dtype, float32, bfloat16, float16 or float64, any
            strides; cast to autocast's dtype under autocast.
        weight: (O, Ca + Cb) or (O, Ca + Cb, 1, 1), float32 or the dtype of a; its first Ca inputs belong to a.
        norm: batch normalisation over O channels.
        act: "identity", "silu" or "relu".
        residual: (B, H, W, O) of the dtype of a, or None.

    Returns:
        y = act(norm(W concat(a, b))) + residual, (B, H, W, O); and the moments of the product where `norm` is in
        training, else None.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
    Source: MobileViTv3, arXiv 2209.15159, section 3.
    """
    check_map("a", a)
    check_map("b", b)
    a, b = dispatch.autocast(a), dispatch.autocast(b)
    check_same("b", b, (*a.shape[:-1], b.shape[-1]), a)
    outputs = check_weight("weight", weight, a.shape[-1] + b.shape[-1], None, a)
    check_batch_norm("norm", norm, values_per_channel(a), outputs, a)
    check_activation(act)
    if residual is not None:
        check_map("residual", residual)
        residual = dispatch.autocast(residual)
        check_same("residual", residual, (*a.shape[:-1], outputs), a)
    if dispatch.select("pointwise_fusion", KERNELS, a) is None:
        return reference.pointwise_fusion(a, b, weight, norm, act, residual, pointwise_conv=pointwise_conv)
    return run(a, b, Linear(weight), norm, act, residual)


@register(
    "pointwise_fusion",
    f"(Tensor a, Tensor b, Tensor weight, {batch_norm_schema('norm_')}, int act, Tensor? residual) "
    "-> (Tensor y, Tensor mean, Tensor var)",
)
def _op(call: Call) -> tuple[Tensor, ...]:
    norm = batch_norm(call, "norm_")
    return flat(*pointwise_fusion(call.a, call.b, call.weight, norm, ACTIVATIONS[call.act], call.residual))
