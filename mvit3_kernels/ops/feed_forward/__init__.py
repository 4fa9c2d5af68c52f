"""The pre-norm feed-forward network with its residual."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..checks import check_dropout, check_layer_norm, check_linear, check_map
from ..norm_linear import norm_linear
from ..registry import register
from ..types import LayerNorm, Linear
from . import reference

__all__ = ["feed_forward"]

KERNELS: tuple[dispatch.Kernel, ...] = ()


def feed_forward(
    x: Tensor,
    norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    hidden_dropout: float = 0.0,
    output_dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x + dropout(fc2(dropout(SiLU(fc1(norm(x)))))).

    Args:
        x: feature map (B, H, W, D), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under autocast.
        norm: layer normalisation, weight and bias (D,).
        fc1: weight (F, D) or (F, D, 1, 1), bias (F,) or None.
        fc2: weight (D, F) or (D, F, 1, 1), bias (D,) or None.
        hidden_dropout, output_dropout: probabilities of dropping an element of the hidden tensor and of the branch's output.
        seed: int64 tensor of shape (), needed where a probability is positive; the same seed gives the same masks on every backend.

    Returns:
        (B, H, W, D) of the dtype of x.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
    Source: MobileViT (arXiv 2110.02178) and MobileViTv2 (arXiv 2206.02680); the activation is SiLU, not GELU.
    """
    check_map("x", x)
    x = dispatch.autocast(x)
    width = x.shape[-1]
    check_layer_norm("norm", norm, width, x)
    hidden = check_linear("fc1", fc1, width, None, x)
    check_linear("fc2", fc2, hidden, width, x)
    check_dropout(seed, x, hidden_dropout=hidden_dropout, output_dropout=output_dropout)
    dispatch.select("feed_forward", KERNELS, x)
    return reference.feed_forward(x, norm, fc1, fc2, hidden_dropout, output_dropout, seed, norm_linear=norm_linear)


@register(
    "feed_forward",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, bool per_sample, Tensor weight1, Tensor? bias1, "
    "Tensor weight2, Tensor? bias2, float hidden_dropout, float output_dropout, Tensor? seed) -> Tensor",
)
def _op(x, norm_weight, norm_bias, eps, per_sample, weight1, bias1, weight2, bias2, hidden_dropout, output_dropout, seed):
    norm = LayerNorm(norm_weight, norm_bias, eps, per_sample)
    return feed_forward(x, norm, Linear(weight1, bias1), Linear(weight2, bias2), hidden_dropout, output_dropout, seed)
