"""Convolution, batch normalisation and activation; the inverted residual."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.sizes import values_per_channel
from ..ops.types import BatchNorm, ConvNorm, Linear, Moments
from .guard import Block, known
from .layout import to_nchw, to_nhwc

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda y: y, "silu": F.silu, "relu": F.relu}


def _activation(act: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if callable(act):  # a module that someone put in the place of the name
        return act
    if act not in _ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(_ACTIVATIONS)}, got {act!r}")
    return _ACTIVATIONS[act]


def _parameters(norm: nn.BatchNorm2d | None) -> BatchNorm | None:
    if norm is None:
        return None
    training = norm.training or norm.running_mean is None
    return BatchNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, training, norm.eps)


@torch.no_grad()
def _update_running(norm: nn.BatchNorm2d, moments: Moments | None, y: Tensor) -> None:
    """What nn.BatchNorm2d does to its buffers after a batch that gave these moments and the map y (B, H, W, C)."""
    if moments is None or not (norm.training and norm.track_running_stats) or y.numel() == 0:
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if norm.running_mean is None:
        return
    momentum = norm.momentum
    if momentum is None:  # a cumulative average, which stands still where nobody counts
        count = norm.num_batches_tracked
        momentum = 0.0 if count is None else 1.0 / count.to(norm.running_mean.dtype)
    rows = values_per_channel(y)
    norm.running_mean.lerp_(moments.mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_((moments.var * (rows / (rows - 1))).to(norm.running_var.dtype), momentum)


@known
class ConvNormAct(Block):
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
        if not isinstance(act, str):
            raise TypeError(f"act must be a name, one of {', '.join(_ACTIVATIONS)}, got {type(act).__name__}")
        _activation(act)
        padding = (kernel_size - 1) // 2 * dilation
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.block = nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_channels)) if norm else OrderedDict(conv=conv))
        self.act = act

    def extra_repr(self) -> str:
        return f"act={self.act}"

    @property
    def norm(self) -> nn.Module | None:
        return getattr(self.block, "norm", None)

    def is_pointwise(self) -> bool:
        """Whether the convolution is a product with each pixel."""
        conv = self.block.conv
        return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)

    def is_depthwise(self) -> bool:
        """Whether the convolution is one that `ops.depthwise_conv` knows: 3x3 on each channel, padded to keep the size at stride 1."""
        conv = self.block.conv
        return (
            conv.groups == conv.in_channels == conv.out_channels
            and conv.kernel_size == (3, 3)
            and conv.bias is None
            and conv.stride in ((1, 1), (2, 2))
            and conv.padding == conv.dilation == (conv.dilation[0], conv.dilation[0])
        )

    def misfit(self) -> str | None:
        if type(self.block) is not nn.Sequential or tuple(self.block._modules) not in (("conv",), ("conv", "norm")):
            return "block is not made of conv and norm"
        if type(self.block.conv) is not nn.Conv2d:
            return f"block.conv is a {type(self.block.conv).__name__}"
        if self.norm is not None and type(self.norm) is not nn.BatchNorm2d:
            return f"block.norm is a {type(self.norm).__name__}"
        if not isinstance(self.act, str) or self.act not in _ACTIVATIONS:
            return f"act {self.act!r} has no kernel"
        if self.norm is None and not self.is_pointwise():
            return "a convolution without norm is fused with its activation where it is 1x1 only"
        return None

    def forward(self, x: Tensor) -> Tensor:
        return to_nchw(self.forward_nhwc(to_nhwc(x)))

    def forward_nhwc(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, H, W, C) in and out; `residual` is added behind the activation."""
        if self.why_modules() is not None:
            y = to_nhwc(_activation(self.act)(self.block(to_nchw(x))))
            return y if residual is None else y + residual
        conv, norm = self.block.conv, self.norm
        if self.is_pointwise():
            y, moments = ops.pointwise_conv(x, Linear(conv.weight, conv.bias), _parameters(norm), self.act, residual)
        elif residual is None and self.is_depthwise():
            y, moments = ops.depthwise_conv(x, conv.weight, _parameters(norm), self.act, conv.stride[0], conv.dilation[0])
        else:
            y, moments = ops.batch_norm_act(to_nhwc(conv(to_nchw(x))), _parameters(norm), self.act, residual)
        if norm is not None:
            _update_running(norm, moments, y)
        return y


def conv_of_concat(conv: nn.Module, a: Tensor, b: Tensor, residual: Tensor | None = None) -> Tensor:
    """conv(concat(a, b)) + residual on maps (B, C, H, W). The concatenation is not built where `conv` is a 1x1 ConvNormAct with a norm."""
    if (
        type(conv) is ConvNormAct
        and conv.why_called() is None
        and conv.norm is not None
        and conv.is_pointwise()
        and conv.block.conv.bias is None
    ):
        a, b, residual = (None if t is None else to_nhwc(t) for t in (a, b, residual))
        y, moments = ops.pointwise_fusion(a, b, conv.block.conv.weight, _parameters(conv.norm), conv.act, residual)
        _update_running(conv.norm, moments, y)
        return to_nchw(y)
    y = conv(torch.cat((a, b), 1))
    return y if residual is None else y + residual


@known
class InvertedResidual(Block):
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

    def misfit(self) -> str | None:
        if type(self.block) is not nn.Sequential or tuple(self.block._modules) != ("exp_1x1", "conv_3x3", "red_1x1"):
            return "block is not made of exp_1x1, conv_3x3 and red_1x1"
        for name, layer in self.block.named_children():
            if type(layer) is not ConvNormAct:
                return f"block.{name} is a {type(layer).__name__}"
            if reason := layer.misfit():
                return f"block.{name}: {reason}"
            if layer.norm is None or layer.block.conv.bias is not None:
                return f"block.{name} has no norm, or a bias beside it"
        expand, depthwise, project = self.block
        if not (expand.is_pointwise() and depthwise.is_depthwise() and project.is_pointwise()):
            return "its convolutions are not 1x1, depth-wise 3x3 and 1x1"
        if (expand.act, project.act) != (depthwise.act, "identity"):
            return f"its activations are {expand.act}, {depthwise.act} and {project.act}, where the op knows act, act and identity"
        stride, inputs, outputs = depthwise.block.conv.stride[0], expand.block.conv.in_channels, project.block.conv.out_channels
        if self.has_skip is not (stride == 1 and inputs == outputs):
            return f"has_skip is {self.has_skip} at stride {stride} from {inputs} to {outputs} channels"
        return None

    def forward(self, x: Tensor) -> Tensor:
        if self.why_modules() is not None:
            y = self.block(x)
            return y + x if self.has_skip else y
        return to_nchw(self._fused(to_nhwc(x)))

    def _fused(self, x: Tensor) -> Tensor:
        layers = tuple(self.block)
        convs = (ConvNorm(layer.block.conv.weight, _parameters(layer.norm)) for layer in layers)
        depthwise = layers[1].block.conv
        y, moments = ops.inverted_residual(x, *convs, stride=depthwise.stride[0], dilation=depthwise.dilation[0], act=layers[0].act)
        for layer, measured, like in zip(layers, moments, (x, y, y), strict=True):
            _update_running(layer.norm, measured, like)
        return y
