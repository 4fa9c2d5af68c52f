"""MobileViTv2's layer branch: separable attention of linear cost, with its norm and residual."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..checks import check_dropout, check_layer_norm, check_linear, check_map, check_patches
from ..norm_linear import norm_linear
from ..registry import register
from ..types import LayerNorm, Linear
from . import reference

__all__ = ["separable_attention"]

KERNELS: tuple[dispatch.Kernel, ...] = ()


def separable_attention(
    x: Tensor,
    norm: LayerNorm,
    qkv: Linear,
    out_proj: Linear,
    patch_size: tuple[int, int] = (2, 2),
    attention_dropout: float = 0.0,
    output_dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x + out_proj(ReLU(value) * context), where context is the mean of the keys weighted by the softmax of the scores.

    Scores, keys and values are qkv(norm(x)). The softmax and the weighted sum run over the patches, separately for each of the ph * pw
    positions inside a patch.

    Args:
        x: feature map (B, H, W, D), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under autocast.
        norm: layer normalisation (MobileViTv2: per_sample), weight and bias (D,).
        qkv: weight (1 + 2D, D) or with (1, 1) behind it, bias (1 + 2D,) or None: output 0 is the score, 1..D the key, D+1..2D the value.
        out_proj: weight (D, D) or with (1, 1) behind it, bias (D,) or None.
        patch_size: (ph, pw); H and W are multiples of them.
        attention_dropout, output_dropout: probabilities of dropping a score and an element of the branch's output.
        seed: int64 tensor of shape (), needed where a probability is positive; the same seed gives the same masks on every backend.

    Returns:
        (B, H, W, D) of the dtype of x.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
    Source: MobileViTv2, arXiv 2206.02680, section 3.2.
    """
    check_map("x", x)
    x = dispatch.autocast(x)
    width = x.shape[-1]
    check_layer_norm("norm", norm, width, x)
    check_linear("qkv", qkv, width, 1 + 2 * width, x)
    check_linear("out_proj", out_proj, width, width, x)
    check_patches("x", x, patch_size)
    check_dropout(seed, x, attention_dropout=attention_dropout, output_dropout=output_dropout)
    dispatch.select("separable_attention", KERNELS, x)
    return reference.separable_attention(
        x, norm, qkv, out_proj, patch_size, attention_dropout, output_dropout, seed, norm_linear=norm_linear
    )


@register(
    "separable_attention",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, bool per_sample, Tensor qkv_weight, Tensor? qkv_bias, Tensor out_weight, "
    "Tensor? out_bias, int[2] patch_size, float attention_dropout, float output_dropout, Tensor? seed) -> Tensor",
)
def _op(x, norm_weight, norm_bias, eps, per_sample, qkv_weight, qkv_bias, out_weight, out_bias, patch_size, *dropout):
    norm = LayerNorm(norm_weight, norm_bias, eps, per_sample)
    return separable_attention(x, norm, Linear(qkv_weight, qkv_bias), Linear(out_weight, out_bias), tuple(patch_size), *dropout)
