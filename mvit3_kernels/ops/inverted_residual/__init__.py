"""The MobileNetV2 block: 1x1 expansion, depth-wise 3x3, 1x1 projection, each with batch normalisation."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..checks import check_activation, check_batch_norm, check_depthwise, check_group, check_map, check_weight
from ..depthwise_conv import depthwise_conv
from ..pointwise_conv import pointwise_conv
from ..registry import batch_norm_schema, flat, register
from ..types import ACTIVATIONS, BatchNorm, ConvNorm, Moments
from . import reference

__all__ = ["inverted_residual"]

KERNELS: tuple[dispatch.Kernel, ...] = ()


def inverted_residual(
    x: Tensor, expand: ConvNorm, depthwise: ConvNorm, project: ConvNorm, stride: int = 1, dilation: int = 1, act: str = "silu"
) -> tuple[Tensor, tuple[Moments | None, Moments | None, Moments | None]]:
    """1x1 expansion (norm, act), depth-wise 3x3 (norm, act), 1x1 projection (norm); + x where stride is 1 and the widths agree.

    Args:
        x: feature map (B, H, W, C), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under autocast.
        expand: weight (E, C) or (E, C, 1, 1) and its batch normalisation over E channels.
        depthwise: weight (E, 1, 3, 3) and its batch normalisation over E channels.
        project: weight (O, E) or (O, E, 1, 1) and its batch normalisation over O channels.
        stride, dilation: of the depth-wise convolution; stride 1 or 2.
        act: "identity", "silu" or "relu".

    Returns:
        y, (B, ceil(H / stride), ceil(W / stride), O); and the moments of the three convolutions, each None unless its norm is in training.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
    Source: Sandler et al., arXiv 1801.04381.
    """
    check_map("x", x)
    x = dispatch.autocast(x)
    for name, part in (("expand", expand), ("depthwise", depthwise), ("project", project)):
        check_group(name, part, ConvNorm)
    wide = check_weight("expand.weight", expand.weight, x.shape[-1], None, x)
    check_batch_norm("expand.norm", expand.norm, x.shape[:-1].numel(), wide, x)
    rows = check_depthwise("depthwise.weight", depthwise.weight, x, stride, dilation, wide)
    check_batch_norm("depthwise.norm", depthwise.norm, rows, wide, x)
    outputs = check_weight("project.weight", project.weight, wide, None, x)
    check_batch_norm("project.norm", project.norm, rows, outputs, x)
    check_activation(act)
    dispatch.select("inverted_residual", KERNELS, x)
    return reference.inverted_residual(
        x, expand, depthwise, project, stride, dilation, act, pointwise_conv=pointwise_conv, depthwise_conv=depthwise_conv
    )


@register(
    "inverted_residual",
    f"(Tensor x, Tensor expand, {batch_norm_schema('expand_')}, Tensor depthwise, {batch_norm_schema('depthwise_')}, "
    f"Tensor project, {batch_norm_schema('project_')}, int stride, int dilation, int act) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _op(x, *args):
    expand, depthwise, project = (ConvNorm(args[i], BatchNorm(*args[i + 1 : i + 7])) for i in (0, 7, 14))
    stride, dilation, act = args[21:]
    y, moments = inverted_residual(x, expand, depthwise, project, stride, dilation, ACTIVATIONS[act])
    return flat(y, *moments)
