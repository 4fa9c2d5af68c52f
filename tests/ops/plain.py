"""The ops once more, written from the published description with explicit loops, slices and formulas, in NCHW and
float64.

Nothing here calls the library but its counter-based random words, whose order inside a mask is part of an op's meaning.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mvit3_kernels.ops import BatchNorm, Layer, LayerNorm, Linear
from mvit3_kernels.ops.random import random_words


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def activate(x: Tensor, act: str) -> Tensor:
    return {"identity": x, "silu": x * torch.sigmoid(x), "relu": x.clamp(min=0)}[act]


def normalise(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return (x - mean) / (var + eps).sqrt() * weight[:, None, None] + bias[:, None, None]


def batch_norm(x: Tensor, norm: BatchNorm) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    mean, var = norm.running_mean, norm.running_var
    if norm.training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    y = normalise(x, mean[:, None, None], var[:, None, None], norm.weight, norm.bias, norm.eps)
    return y, (mean.detach(), var.detach()) if norm.training else None


def layer_norm(x: Tensor, norm: LayerNorm) -> Tensor:
    dims = (1, 2, 3) if norm.per_sample else (1,)
    return normalise(
        x, x.mean(dims, keepdim=True), x.var(dims, correction=0, keepdim=True), norm.weight, norm.bias, norm.eps
    )


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight.reshape(*weight.shape[:2], 1, 1), bias)


def dropped(x: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor:
    if p == 0:
        return x
    words = random_words(seed, site, x.shape[0], x[0].numel()).reshape(x.shape)
    return torch.where(words < int(p * 2**32), 0.0, x / (1 - p))


def unfold(x: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, ph * pw, patches, C): patch pixel index i * pw + j, patches in row-major order."""
    ph, pw = patch_size
    return torch.stack([x[:, :, i::ph, j::pw].flatten(2).transpose(1, 2) for i in range(ph) for j in range(pw)], 1)


def fold(tokens: Tensor, patch_size: tuple[int, int], height: int, width: int) -> Tensor:
    ph, pw = patch_size
    x = tokens.new_zeros(tokens.shape[0], tokens.shape[-1], height, width)
    for i in range(ph):
        for j in range(pw):
            x[:, :, i::ph, j::pw] = tokens[:, i * pw + j].transpose(1, 2).unflatten(2, (height // ph, width // pw))
    return x


def patch_attention(
    qkv: Tensor, num_heads: int, patch_size: tuple[int, int], dropout: float, seed: Tensor | None
) -> Tensor:
    q, k, v = unfold(qkv, patch_size).chunk(3, -1)
    dim = q.shape[-1] // num_heads
    heads = [slice(h * dim, (h + 1) * dim) for h in range(num_heads)]
    probabilities = torch.stack([((q[..., h] * dim**-0.5) @ k[..., h].transpose(-2, -1)).softmax(-1) for h in heads], 2)
    probabilities = dropped(probabilities, dropout, seed, 0)  # (B, ph * pw, heads, queries, keys)
    out = torch.cat([probabilities[:, :, i] @ v[..., h] for i, h in enumerate(heads)], -1)
    return fold(out, patch_size, *qkv.shape[2:])


def separable_attention(
    x: Tensor,
    norm: LayerNorm,
    qkv: Linear,
    out_proj: Linear,
    patch_size: tuple[int, int],
    attention_dropout: float,
    output_dropout: float,
    seed: Tensor | None,
) -> Tensor:
    query, key, value = unfold(conv1x1(layer_norm(x, norm), *qkv), patch_size).split((1, x.shape[1], x.shape[1]), -1)
    scores = dropped(query.softmax(2), attention_dropout, seed, 0)
    context = (key * scores).sum(2, keepdim=True)
    attended = fold(value.clamp(min=0) * context, patch_size, *x.shape[2:])
    return x + branch_dropped(conv1x1(attended, *out_proj), output_dropout, seed, 1)


def branch_dropped(x: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor:
    """Dropout of a feature map, whose elements are counted in NHWC order."""
    return nchw(dropped(nhwc(x).contiguous(), p, seed, site))


def feed_forward(
    x: Tensor,
    norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    hidden_dropout: float,
    output_dropout: float,
    seed: Tensor | None,
) -> Tensor:
    hidden = branch_dropped(activate(conv1x1(layer_norm(x, norm), *fc1), "silu"), hidden_dropout, seed, 0)
    return x + branch_dropped(conv1x1(hidden, *fc2), output_dropout, seed, 1)


def transformer_layer(
    x: Tensor,
    layer: Layer,
    num_heads: int,
    patch_size: tuple[int, int],
    dropout: tuple[float, float, float, float],
    seeds: list,
) -> Tensor:
    """The pre-norm layer of MobileViTv1."""
    attention, hidden, output, ffn_output = dropout
    tokens = patch_attention(
        conv1x1(layer_norm(x, layer.norm1), *layer.qkv), num_heads, patch_size, attention, seeds[0]
    )
    x = x + branch_dropped(conv1x1(tokens, *layer.out_proj), output, seeds[1], 0)
    return feed_forward(x, layer.norm2, layer.fc1, layer.fc2, hidden, ffn_output, seeds[2])


def separable_layer(
    x: Tensor, layer: Layer, patch_size: tuple[int, int], dropout: tuple[float, float, float, float], seeds: list
) -> Tensor:
    """The layer of MobileViTv2."""
    attention, hidden, output, ffn_output = dropout
    x = separable_attention(x, layer.norm1, layer.qkv, layer.out_proj, patch_size, attention, output, seeds[0])
    return feed_forward(x, layer.norm2, layer.fc1, layer.fc2, hidden, ffn_output, seeds[2])
