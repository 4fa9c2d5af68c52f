"""Convolution, batch normalisation and activation; the inverted residual."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.sizes import values_per_channel
from ..ops.types import BatchNorm, ConvNorm, Linear, Moments
from .layout import to_nchw, to_nhwc

_ACTIVATIONS = {"identity": lambda y: y, "silu": F.silu, "relu": F.relu}


def _is_plain(norm: nn.Module | None) -> bool:
    """Whether an op may compute the norm. Others (SyncBatchNorm, a frozen or replaced norm, affine=False) run as the module they are."""
    return norm is None or (type(norm) is nn.BatchNorm2d and norm.affine)


def _parameters(norm: nn.BatchNorm2d | None) -> BatchNorm | None:
    if norm is None:
        return None
    training = norm.training or norm.running_mean is None
    return BatchNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, training, norm.eps)


@torch.no_grad()
def _update_running(norm: nn.BatchNorm2d, moments: Moments, rows: int) -> None:
    """What nn.BatchNorm2d does to its buffers after a batch of `rows` values per channel."""
    if norm.running_mean is None or rows == 0:
        return
    norm.num_batches_tracked.add_(1)
    momentum = 1.0 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(moments.mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_((moments.var * (rows / (rows - 1))).to(norm.running_var.dtype), momentum)


class ConvNormAct(nn.Module):
    """Convolution with zero padding (k - 1) / 2 * dilation, optional batch normalisation, activation.

    (B, C, H, W) to (B, O, ceil(H / stride), ceil(W / stride)), best in channels_last memory. 1x1 and depth-wise 3x3 convolutions run as
    one op; dense ones run as the library's convolution and `ops.batch_norm_act`. State-dict keys: block.conv.*, block.norm.*.

    Args:
        act: "identity", "silu" or "relu".
        norm: with batch normalisation (eps 1e-5, momentum 0.1); the convolution then needs no bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        *,
        bias: bool = False,
        norm: bool = True,
        act: str = "silu",
    ) -> None:
        super().__init__()
        if act not in _ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(_ACTIVATIONS)}, got {act!r}")
        padding = (kernel_size - 1) // 2 * dilation
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.block = nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_channels)) if norm else OrderedDict(conv=conv))
        self.act = act

    def extra_repr(self) -> str:
        return f"act={self.act}"

    @property
    def norm(self) -> nn.Module | None:
        return getattr(self.block, "norm", None)

    def forward(self, x: Tensor) -> Tensor:
        return to_nchw(self.forward_nhwc(to_nhwc(x)))

    def forward_nhwc(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, H, W, C) in and out; `residual` is added behind the activation."""
        conv, norm = self.block.conv, self.norm
        if not _is_plain(norm):
            return self._forward_modules(x, residual)
        params, moments = _parameters(norm), None
        depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.kernel_size == (3, 3) and conv.bias is None
        if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1:
            y, moments = ops.pointwise_conv(x, Linear(conv.weight, conv.bias), params, self.act, residual)
        elif depthwise and norm is not None and residual is None:
            y, moments = ops.depthwise_conv(x, conv.weight, params, self.act, conv.stride[0], conv.dilation[0])
        elif norm is not None:
            y, moments = ops.batch_norm_act(to_nhwc(conv(to_nchw(x))), params, self.act, residual)
        else:
            return self._forward_modules(x, residual)
        if moments is not None:
            _update_running(norm, moments, values_per_channel(y))
        return y

    def forward_concat_nhwc(self, a: Tensor, b: Tensor, residual: Tensor | None = None) -> Tensor:
        """`forward_nhwc` of concat(a, b), which is not built where the convolution is 1x1."""
        conv, norm = self.block.conv, self.norm
        if conv.kernel_size != (1, 1) or norm is None or not _is_plain(norm):
            return self.forward_nhwc(torch.cat((a, b), -1), residual)
        y, moments = ops.pointwise_fusion(a, b, conv.weight, _parameters(norm), self.act, residual)
        if moments is not None:
            _update_running(norm, moments, values_per_channel(y))
        return y

    def _forward_modules(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = _ACTIVATIONS[self.act](to_nhwc(self.block(to_nchw(x))))
        return y if residual is None else y + residual


class InvertedResidual(nn.Module):
    """1x1 expansion, depth-wise 3x3, 1x1 projection, each with batch normalisation, SiLU behind the first two; the input is added where
    stride is 1 and the widths agree (Sandler et al., arXiv 1801.04381).

    (B, C, H, W) to (B, O, ceil(H / stride), ceil(W / stride)). State-dict keys: block.{exp_1x1, conv_3x3, red_1x1}.block.{conv, norm}.*.

    Args:
        hidden_channels: width of the expanded tensor.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden_channels: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.block = nn.Sequential(
            OrderedDict(
                exp_1x1=ConvNormAct(in_channels, hidden_channels),
                conv_3x3=ConvNormAct(hidden_channels, hidden_channels, 3, stride, dilation, groups=hidden_channels),
                red_1x1=ConvNormAct(hidden_channels, out_channels, act="identity"),
            )
        )
        self.has_skip = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return to_nchw(self.forward_nhwc(to_nhwc(x)))

    def forward_nhwc(self, x: Tensor) -> Tensor:
        layers = tuple(self.block)
        if not all(_is_plain(layer.norm) for layer in layers):
            expand, depthwise, project = layers
            return project.forward_nhwc(depthwise.forward_nhwc(expand.forward_nhwc(x)), x if self.has_skip else None)
        convs = (ConvNorm(layer.block.conv.weight, _parameters(layer.norm)) for layer in layers)
        depthwise = layers[1].block.conv
        y, moments = ops.inverted_residual(x, *convs, stride=depthwise.stride[0], dilation=depthwise.dilation[0], act=layers[0].act)
        for layer, measured, normalised in zip(layers, moments, (x, y, y), strict=True):
            if measured is not None:
                _update_running(layer.norm, measured, values_per_channel(normalised))
        return y
