"""Layer normalisation, then a linear map: the query-key-value projection."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..checks import check_layer_norm, check_linear, check_map
from ..registry import register
from ..types import LayerNorm, Linear
from . import reference

__all__ = ["norm_linear"]

KERNELS: tuple[dispatch.Kernel, ...] = ()


def norm_linear(x: Tensor, norm: LayerNorm, projection: Linear) -> Tensor:
    """Layer normalisation (of each token, or of each sample as one-group group normalisation), then a linear map.

    Args:
        x: feature map (B, H, W, D), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under autocast.
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
    dispatch.select("norm_linear", KERNELS, x)
    return reference.norm_linear(x, norm, projection)


@register(
    "norm_linear", "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, bool per_sample, Tensor weight, Tensor? bias) -> Tensor"
)
def _op(x, norm_weight, norm_bias, eps, per_sample, weight, bias):
    return norm_linear(x, LayerNorm(norm_weight, norm_bias, eps, per_sample), Linear(weight, bias))
