"""All pre-norm layers of a stage and the final norm: the global representation of a MobileViT block."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import dispatch
from ..checks import check_dropout, check_group, check_layer_norm, check_linear, check_map, check_patches
from ..feed_forward import feed_forward
from ..norm_linear import norm_linear
from ..patch_attention import patch_attention
from ..pointwise_conv import pointwise_conv
from ..registry import register
from ..separable_attention import separable_attention
from ..types import Layer, LayerNorm, Linear
from . import reference

__all__ = ["global_representation"]

KERNELS: tuple[dispatch.Kernel, ...] = ()


def global_representation(
    x: Tensor,
    layers: Sequence[Layer],
    norm: LayerNorm | None = None,
    num_heads: int | None = None,
    patch_size: tuple[int, int] = (2, 2),
    attention_dropout: float = 0.0,
    hidden_dropout: float = 0.0,
    output_dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Every layer of a stage, then the final norm; tokens stay at their pixels throughout.

    A layer is attention and feed-forward network, each behind a norm and inside a residual: `patch_attention` with `num_heads` heads
    (MobileViTv1 and MobileViTv3-XXS/XS/S) or, with num_heads None, `separable_attention` (MobileViTv2 and MobileViTv3-w).

    Args:
        x: feature map (B, H, W, D), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under autocast.
        layers: the parameters of each layer; shapes as in the ops named above and in `feed_forward`.
        norm: the final norm, weight and bias (D,), or None.
        num_heads: divides D; None for separable attention.
        patch_size: (ph, pw); H and W are multiples of them.
        attention_dropout: probability of dropping an attention probability or a score.
        hidden_dropout: of dropping an element of the feed-forward network's hidden tensor.
        output_dropout: of dropping an element of a branch's output.
        seed: int64 tensor of shape (), needed where a probability is positive; the same seed gives the same masks on every backend.

    Returns:
        (B, H, W, D) of the dtype of x.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
    Source: MobileViT (arXiv 2110.02178), MobileViTv2 (arXiv 2206.02680), MobileViTv3 (arXiv 2209.15159).
    """
    check_map("x", x)
    x = dispatch.autocast(x)
    width = x.shape[-1]
    for i, layer in enumerate(layers):
        check_group(f"layers[{i}]", layer, Layer)
        check_layer_norm(f"layers[{i}].norm1", layer.norm1, width, x)
        check_linear(f"layers[{i}].qkv", layer.qkv, width, 1 + 2 * width if num_heads is None else 3 * width, x)
        check_linear(f"layers[{i}].out_proj", layer.out_proj, width, width, x)
        check_layer_norm(f"layers[{i}].norm2", layer.norm2, width, x)
        hidden = check_linear(f"layers[{i}].fc1", layer.fc1, width, None, x)
        check_linear(f"layers[{i}].fc2", layer.fc2, hidden, width, x)
    if norm is not None:
        check_layer_norm("norm", norm, width, x)
    if num_heads is not None and (num_heads < 1 or width % num_heads):
        raise ValueError(f"num_heads must be positive and divide the {width} channels of x, got {num_heads}")
    check_patches("x", x, patch_size)
    check_dropout(seed, x, attention_dropout=attention_dropout, hidden_dropout=hidden_dropout, output_dropout=output_dropout)
    dispatch.select("global_representation", KERNELS, x)
    return reference.global_representation(
        x,
        layers,
        norm,
        num_heads,
        patch_size,
        attention_dropout,
        hidden_dropout,
        output_dropout,
        seed,
        norm_linear=norm_linear,
        patch_attention=patch_attention,
        pointwise_conv=pointwise_conv,
        separable_attention=separable_attention,
        feed_forward=feed_forward,
    )


@register(
    "global_representation",
    "(Tensor x, Tensor?[] layers, Tensor? norm_weight, Tensor? norm_bias, float eps, bool per_sample, int? num_heads, int[2] patch_size, "
    "float attention_dropout, float hidden_dropout, float output_dropout, Tensor? seed) -> Tensor",
)
def _op(x, layers, norm_weight, norm_bias, eps, per_sample, num_heads, patch_size, *dropout):
    """`layers` holds weight and bias of norm1, qkv, out_proj, norm2, fc1 and fc2 of each layer in turn."""

    def norm(weight: Tensor, bias: Tensor) -> LayerNorm:
        return LayerNorm(weight, bias, eps, per_sample)

    parts = (norm, Linear, Linear, norm, Linear, Linear)
    unpacked = [Layer(*(part(layers[i + 2 * k], layers[i + 2 * k + 1]) for k, part in enumerate(parts))) for i in range(0, len(layers), 12)]
    final = None if norm_weight is None else norm(norm_weight, norm_bias)
    return global_representation(x, unpacked, final, num_heads, tuple(patch_size), *dropout)
