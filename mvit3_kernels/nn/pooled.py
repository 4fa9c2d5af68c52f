"""Convolution, norm and activation of a concatenation whose last maps are pooled ones, up-sampled: what those add to
the product is taken before up-sampling (docs/algebra.md, I and J)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.types import Linear
from .conv import ConvNormAct
from .layout import to_nchw, to_nhwc
from .plans import batch_norm, measured


def pooled_misfit(conv: nn.Module, kernel_size: int) -> str | None:
    """Why `conv` is not what the functions below stand in for: a ConvNormAct with a norm, of stride 1, `kernel_size`
    and padding that keeps the size."""
    if type(conv) is not ConvNormAct:
        return f"is a {type(conv).__name__}, not a ConvNormAct"
    if reason := conv.misfit():
        return reason
    own, sides = conv.block.conv, (kernel_size, kernel_size)
    if conv.norm is None or own.bias is not None:
        return "has no norm, or a bias beside it"
    geometry = (own.kernel_size, own.stride, own.padding, own.dilation, own.groups)
    if geometry != (sides, (1, 1), (kernel_size // 2, kernel_size // 2), (1, 1), 1):
        return f"has no step for {own}"
    return None


def conv1x1_with_vector(conv: ConvNormAct, maps: Sequence[Tensor], vector: Tensor) -> Tensor:
    """conv(concat(*maps, vector spread over the map)) for maps (B, C, H, W), a vector (B, C, 1, 1) and a 1x1
    convolution: the vector's share of the product is a bias of its sample."""
    widths = [t.shape[1] for t in (*maps, vector)]
    *own, shared = conv.block.conv.weight.flatten(1).split(widths, 1)
    bias = F.linear(vector.flatten(1), shared)[:, None, None]
    product = bias.expand(-1, *maps[0].shape[2:], -1)
    for x, weight in zip(maps, own, strict=True):  # each adds to the sum in its epilogue
        product, _ = ops.pointwise_conv(to_nhwc(x), Linear(weight), residual=product)
    return _finish(conv, product)


def conv3x3_with_tokens(conv: ConvNormAct, x: Tensor, tokens: Sequence[Tensor]) -> Tensor:
    """conv(concat(x, *tokens up-sampled to the size of x)) for a map (B, C, H, W), small maps (B, c, h, w) that are
    up-sampled bilinearly with align_corners, and a 3x3 convolution: each tap's product is taken on the small maps, and
    up-sampling spreads it."""
    own, *shared = conv.block.conv.weight.split((x.shape[1], *(t.shape[1] for t in tokens)), 1)
    product = to_nhwc(F.conv2d(x, own, padding=1))
    batch, height, width, outputs = product.shape
    rows, shares = [], []
    for t, weight in zip(tokens, shared, strict=True):
        small = t.shape[2:]
        taps = F.linear(to_nhwc(t), weight.permute(2, 3, 0, 1).flatten(0, 2)).view(batch, *small, 3, 3, outputs)
        taps = taps.permute(0, 1, 3, 2, 4, 5).reshape(batch, 3 * small[0], 3 * small[1], outputs)
        rows.append(tap_shares(width, small[1], product) @ taps)  # (batch, 3 * h, width, outputs)
        shares.append(tap_shares(height, small[0], product))
    down = torch.cat(shares, 1).expand(batch, -1, -1)
    product = torch.baddbmm(product.flatten(2), down, torch.cat(rows, 1).flatten(2)).view(product.shape)
    return _finish(conv, product)


def tap_shares(side: int, small: int, like: Tensor) -> Tensor:
    """(side, 3 * small): what the three taps of a pixel read of `small` tokens that are up-sampled to `side` pixels
    with align_corners. Taps outside of the map read nothing."""
    tokens = torch.eye(small, dtype=torch.float64, device=like.device)[None, None]
    pixels = F.interpolate(tokens, (side, small), mode="bilinear", align_corners=True)[0, 0]
    return F.pad(pixels, (0, 0, 1, 1)).unfold(0, 3, 1).flatten(1).to(like.dtype)


def _finish(conv: ConvNormAct, product: Tensor) -> Tensor:
    y, moments = ops.batch_norm_act(product, batch_norm(conv.norm), conv.act)
    return to_nchw(measured(y, (conv.norm, moments, y)))
