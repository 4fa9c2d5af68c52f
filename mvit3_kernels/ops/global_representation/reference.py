"""What global_representation means, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..feed_forward.reference import feed_forward
from ..norm_linear.reference import norm_linear
from ..patch_attention.reference import patch_attention
from ..pointwise_conv.reference import pointwise_conv
from ..random import dropout
from ..separable_attention.reference import separable_attention
from ..types import Layer, LayerNorm


def _final_norm(x: Tensor, norm: LayerNorm) -> Tensor:
    # Of a sample not by group_norm, which on a GPU wants the other layout and hands it back: two copies of the map.
    shape = x.shape[1:] if norm.per_sample else x.shape[-1:]
    weight, bias = (t.to(x.dtype).expand(shape) for t in norm[:2])
    return F.layer_norm(x, shape, weight, bias, norm.eps).to(x.dtype)  # autocast would hand back float32


def global_representation(
    x: Tensor,
    layers: Sequence[Layer],
    norm: LayerNorm | None,
    num_heads: int | None,
    patch_size: tuple[int, int],
    attention_dropout: float,
    hidden_dropout: float,
    output_dropout: float,
    seed: Tensor | None,
    norm_linear=norm_linear,
    patch_attention=patch_attention,
    pointwise_conv=pointwise_conv,
    separable_attention=separable_attention,
    feed_forward=feed_forward,
) -> Tensor:
    for i, layer in enumerate(layers):
        seeds = [None if seed is None else seed + 3 * i + branch for branch in range(3)]
        if num_heads is None:
            x = separable_attention(x, layer.norm1, layer.qkv, layer.out_proj, patch_size, attention_dropout, output_dropout, seeds[0])
        else:
            tokens = patch_attention(norm_linear(x, layer.norm1, layer.qkv), num_heads, patch_size, attention_dropout, seeds[0])
            if output_dropout == 0:
                x, _ = pointwise_conv(tokens, layer.out_proj, None, "identity", x)
            else:
                branch, _ = pointwise_conv(tokens, layer.out_proj, None, "identity", None)
                x = x + dropout(branch, output_dropout, seeds[1], site=0)
        x = feed_forward(x, layer.norm2, layer.fc1, layer.fc2, hidden_dropout, output_dropout, seeds[2])
    return x if norm is None else _final_norm(x, norm)
