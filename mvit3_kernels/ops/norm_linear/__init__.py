"""Layer normalisation, then a linear map: the query-key-value projection."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, registry
from ..checks import check_layer_norm, check_linear, check_map
from ..registry import LAYER_NORM, Call, register
from ..types import LayerNorm, Linear
from . import reference

__all__ = ["norm_linear"]

WIDEST_ROW = 512  # of the Triton kernels, which hold whole rows in registers and shared memory


def triton_why_not(x: Tensor, widest: int = WIDEST_ROW) -> str | None:
    """Why the Triton kernels of a norm in front of a linear map cannot take a call on `x`."""
    if x.shape[-1] > widest:
        return f"its kernels take rows of at most {widest} channels of {x.dtype}, x has {x.shape[-1]}"
    return dispatch.triton_32_bit_why_not(x)


KERNELS = (dispatch.Kernel("cpu", dispatch.cpu_why_not), dispatch.Kernel("triton", triton_why_not))


def norm_linear(x: Tensor, norm: LayerNorm, projection: Linear) -> Tensor:
    """Layer normalisation (of each token, or of each sample as one-group group normalisation), then a linear map.

    Args:
        x: feature map (B, H, W, D), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under
            autocast.
        norm: weight and bias (D,), float32 or the dtype of x.
        projection: weight (O, D) or (O, D, 1, 1), bias (O,) or None.

    Returns:
        (B, H, W, O) of the dtype of x.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
    Source: pre-norm attention of MobileViT (arXiv 2110.02178) and MobileViTv2 (arXiv 2206.02680).
    """
    check_map("x", x)
    x = dispatch.autocast(x)
    check_layer_norm("norm", norm, x.shape[-1], x)
    check_linear("projection", projection, x.shape[-1], None, x)
    if dispatch.select("norm_linear", KERNELS, x) is None:
        return reference.norm_linear(x, norm, projection)
    return torch.ops.mvit3.norm_linear_forward(x, *norm, *projection)[0]


@register("norm_linear", f"(Tensor x, {LAYER_NORM}, Tensor weight, Tensor? bias) -> Tensor y")
def _op(call: Call) -> Tensor:
    norm = LayerNorm(call.norm_weight, call.norm_bias, call.eps, call.per_sample)
    return norm_linear(call.x, norm, Linear(call.weight, call.bias))


# The kernel. mean and rstd, of each token or of each sample, are all that backward needs beside the inputs.


def empty_statistics(x: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    """mean and rstd of layer normalisation, of each token or of each sample."""
    count = x.shape[0] if per_sample else x.shape[0] * x.shape[1] * x.shape[2]
    return x.new_empty(count, dtype=torch.float32), x.new_empty(count, dtype=torch.float32)


@registry.forward(
    "norm_linear_forward",
    f"(Tensor x, {LAYER_NORM}, Tensor weight, Tensor? bias) -> (Tensor y, Tensor mean, Tensor rstd)",
    triton=__name__,
)
def _forward_fake(call: Call) -> tuple[Tensor, ...]:
    y = call.x.new_empty(*call.x.shape[:-1], call.weight.shape[0])
    return y, *empty_statistics(call.x, call.per_sample)


registry.backward(
    "norm_linear_backward",
    "(Tensor dy, Tensor x, Tensor norm_weight, Tensor norm_bias, bool per_sample, Tensor weight, Tensor? bias, "
    "Tensor mean, Tensor rstd) -> (Tensor dx, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dweight, Tensor dbias)",
    triton=__name__,
)
