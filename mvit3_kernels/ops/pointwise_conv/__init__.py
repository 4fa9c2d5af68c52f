"""1x1 convolution, batch normalisation, activation and residual."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..batch_norm_act import batch_norm_act
from ..checks import check_activation, check_batch_norm, check_linear, check_map, check_same
from ..registry import batch_norm_schema, flat, register
from ..types import ACTIVATIONS, BatchNorm, Linear, Moments
from . import reference

__all__ = ["pointwise_conv"]

KERNELS: tuple[dispatch.Kernel, ...] = ()


def pointwise_conv(
    x: Tensor, conv: Linear, norm: BatchNorm | None = None, act: str = "identity", residual: Tensor | None = None
) -> tuple[Tensor, Moments | None]:
    """1x1 convolution, optional batch normalisation, activation, addition of a residual: y = act(norm(conv(x))) + residual.

    Args:
        x: feature map (B, H, W, C), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under autocast.
        conv: weight (O, C) or (O, C, 1, 1) and bias (O,) or None, float32 or the dtype of x.
        norm: batch normalisation over O channels, or None.
        act: "identity", "silu" or "relu".
        residual: (B, H, W, O) of the dtype of y, or None.

    Returns:
        y, (B, H, W, O); and the moments of conv(x), each (O,), where `norm` is in training, else None.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
    Source: the ConvLayer of the MobileViT releases (arXiv 2110.02178, 2206.02680, 2209.15159).
    """
    check_map("x", x)
    x = dispatch.autocast(x)
    outputs = check_linear("conv", conv, x.shape[-1], None, x)
    shape = (*x.shape[:-1], outputs)
    if norm is not None:
        check_batch_norm("norm", norm, x.shape[:-1].numel(), outputs, x)
    check_activation(act)
    if residual is not None:
        check_map("residual", residual)
        residual = dispatch.autocast(residual)
        check_same("residual", residual, shape, x)
    dispatch.select("pointwise_conv", KERNELS, x)
    return reference.pointwise_conv(x, conv, norm, act, residual, batch_norm_act=batch_norm_act)


@register(
    "pointwise_conv",
    f"(Tensor x, Tensor weight, Tensor? bias, {batch_norm_schema('norm_', optional=True)}, int act, Tensor? residual) "
    "-> (Tensor, Tensor, Tensor)",
)
def _op(x, weight, bias, norm_weight, norm_bias, running_mean, running_var, training, eps, act, residual):
    norm = None if norm_weight is None else BatchNorm(norm_weight, norm_bias, running_mean, running_var, training, eps)
    return flat(*pointwise_conv(x, Linear(weight, bias), norm, ACTIVATIONS[act], residual))
