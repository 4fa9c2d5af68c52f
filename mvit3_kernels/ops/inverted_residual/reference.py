"""What inverted_residual means, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..depthwise_conv.reference import depthwise_conv
from ..pointwise_conv.reference import pointwise_conv
from ..types import ConvNorm, Linear, Moments


def inverted_residual(
    x: Tensor,
    expand: ConvNorm,
    depthwise: ConvNorm,
    project: ConvNorm,
    stride: int,
    dilation: int,
    act: str,
    skip: bool,
    pointwise_conv=pointwise_conv,
    depthwise_conv=depthwise_conv,
) -> tuple[Tensor, tuple[Moments | None, Moments | None, Moments | None]]:
    wide, expanded = pointwise_conv(x, Linear(expand.weight), expand.norm, act, None)
    wide, filtered = depthwise_conv(wide, depthwise.weight, depthwise.norm, act, stride, dilation)
    y, projected = pointwise_conv(wide, Linear(project.weight), project.norm, "identity", x if skip else None)
    return y, (expanded, filtered, projected)
