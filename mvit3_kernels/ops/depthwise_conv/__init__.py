"""Depth-wise 3x3 convolution, batch normalisation and activation."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..batch_norm_act import batch_norm_act
from ..checks import check_activation, check_batch_norm, check_depthwise, check_map
from ..registry import batch_norm_schema, flat, register
from ..types import ACTIVATIONS, BatchNorm, Moments
from . import reference

__all__ = ["depthwise_conv"]

KERNELS: tuple[dispatch.Kernel, ...] = ()


def depthwise_conv(
    x: Tensor, weight: Tensor, norm: BatchNorm, act: str = "identity", stride: int = 1, dilation: int = 1
) -> tuple[Tensor, Moments | None]:
    """Depth-wise 3x3 convolution with zero padding of `dilation`, batch normalisation, activation: y = act(norm(conv(x))).

    Args:
        x: feature map (B, H, W, C), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under autocast.
        weight: (C, 1, 3, 3), float32 or the dtype of x.
        norm: batch normalisation over C channels.
        act: "identity", "silu" or "relu".
        stride: 1 or 2.
        dilation: distance between taps, at least 1.

    Returns:
        y, (B, ceil(H / stride), ceil(W / stride), C); and the moments of conv(x) where `norm` is in training, else None.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
    Source: Sandler et al., arXiv 1801.04381; MobileViTv3's local representation, arXiv 2209.15159.
    """
    check_map("x", x)
    x = dispatch.autocast(x)
    rows = check_depthwise("weight", weight, x, stride, dilation)
    check_batch_norm("norm", norm, rows, x.shape[-1], x)
    check_activation(act)
    dispatch.select("depthwise_conv", KERNELS, x)
    return reference.depthwise_conv(x, weight, norm, act, stride, dilation, batch_norm_act=batch_norm_act)


@register(
    "depthwise_conv",
    f"(Tensor x, Tensor weight, {batch_norm_schema('norm_')}, int act, int stride, int dilation) -> (Tensor, Tensor, Tensor)",
)
def _op(x, weight, norm_weight, norm_bias, running_mean, running_var, training, eps, act, stride, dilation):
    norm = BatchNorm(norm_weight, norm_bias, running_mean, running_var, training, eps)
    return flat(*depthwise_conv(x, weight, norm, ACTIVATIONS[act], stride, dilation))
