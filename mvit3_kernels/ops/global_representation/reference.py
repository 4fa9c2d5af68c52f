"""What global_representation means, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..feed_forward.reference import feed_forward
from ..norm_linear.reference import norm_linear
from ..patch_attention.reference import patch_attention
from ..pointwise_conv.reference import pointwise_conv
from ..separable_attention.reference import separable_attention
from ..types import Layer, LayerNorm


class Ops(NamedTuple):
    """The ops that a stage is made of: their references, or the public functions."""

    norm_linear: Callable
    patch_attention: Callable
    pointwise_conv: Callable
    separable_attention: Callable
    feed_forward: Callable


class Dropouts(NamedTuple):
    """The probabilities of dropping, as `global_representation` names them."""

    attention: float
    hidden: float
    output: float
    ffn_output: float


REFERENCES = Ops(norm_linear, patch_attention, pointwise_conv, separable_attention, feed_forward)


def final_norm(x: Tensor, norm: LayerNorm) -> Tensor:
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
    p: Dropouts,
    seed: Tensor | None,
    ops: Ops = REFERENCES,
) -> Tensor:
    for i, layer in enumerate(layers):
        seeds = [None if seed is None else seed + 3 * i + branch for branch in range(3)]
        if num_heads is None:
            x = ops.separable_attention(
                x, layer.norm1, layer.qkv, layer.out_proj, patch_size, p.attention, p.output, seeds[0]
            )
        else:
            tokens = ops.patch_attention(
                ops.norm_linear(x, layer.norm1, layer.qkv), num_heads, patch_size, p.attention, seeds[0]
            )
            x, _ = ops.pointwise_conv(tokens, layer.out_proj, None, "identity", x, p.output, seeds[1])
        x = ops.feed_forward(x, layer.norm2, layer.fc1, layer.fc2, p.hidden, p.ffn_output, seeds[2])
    return x if norm is None else final_norm(x, norm)
