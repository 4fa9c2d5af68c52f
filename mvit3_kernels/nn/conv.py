"""Convolution, batch normalisation and activation; the inverted residual."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops import dispatch
from ..ops.checks import check_activation
from ..ops.inverted_residual import filter_and_project
from ..ops.types import ACTIVATION_FUNCTIONS, ACTIVATIONS, ConvNorm
from .guard import Block, known, tampered
from .layout import to_nchw, to_nhwc
from .plans import ConvPlan, ResidualPlan, batch_norm


def _activation(act: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if callable(act):  # a module that someone put in the place of the name
        return act
    check_activation(act)
    return ACTIVATION_FUNCTIONS[act]


@known
class ConvNormAct(Block):
    """Convolution with zero padding (k - 1) / 2 * dilation, optional batch normalisation, activation.

    (B, C, H, W) to (B, O, ceil(H / stride), ceil(W / stride)), best in channels_last memory. 1x1 and depth-wise 3x3
    convolutions run as one op, dense 3x3 ones with a norm as `ops.conv3x3`, which leaves many of them to the library;
    others run as the library's convolution and `ops.batch_norm_act`. State-dict keys: block.conv.*, block.norm.*.

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
            raise TypeError(f"act must be a name, one of {', '.join(ACTIVATIONS)}, got {type(act).__name__}")
        _activation(act)
        padding = (kernel_size - 1) // 2 * dilation
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.block = nn.Sequential(
            OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_channels)) if norm else OrderedDict(conv=conv)
        )
        self.act = act

    def extra_repr(self) -> str:
        return f"act={self.act}"

    @property
    def norm(self) -> nn.Module | None:
        return getattr(self.block, "norm", None)

    def plan(self) -> ConvPlan:
        return ConvPlan(self.block.conv, self.norm, self.act)

    def misfit(self) -> str | None:
        if type(self.block) is not nn.Sequential or tuple(self.block._modules) not in (("conv",), ("conv", "norm")):
            return "block is not made of conv and norm"
        if type(self.block.conv) is not nn.Conv2d:
            return f"block.conv is a {type(self.block.conv).__name__}"
        if self.norm is not None and type(self.norm) is not nn.BatchNorm2d:
            return f"block.norm is a {type(self.norm).__name__}"
        return self.plan().misfit()

    def forward(self, x: Tensor) -> Tensor:
        return to_nchw(self.forward_nhwc(to_nhwc(x)))

    def forward_nhwc(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, H, W, C) in and out; `residual` is added behind the activation."""
        if self.why_modules() is not None:
            y = to_nhwc(_activation(self.act)(self.block(to_nchw(x))))
            return y if residual is None else y + residual
        return self.plan().run(x, residual)


def conv_of_concat(conv: nn.Module, a: Tensor, b: Tensor, residual: Tensor | None = None) -> Tensor:
    """conv(concat(a, b)) + residual on maps (B, C, H, W). The concatenation is not built where `conv` is a 1x1
    ConvNormAct with a norm."""
    if type(conv) is ConvNormAct and conv.why_called(ahead=True) is None and conv.plan().fuses_concat():
        conv.why_modules()  # for `explain`, here as below: it runs
        a, b, residual = (None if t is None else to_nhwc(t) for t in (a, b, residual))
        return to_nchw(conv.plan().run_concat(a, b, residual))
    y = conv(torch.cat((a, b), 1))
    return y if residual is None else y + residual


def run_for_two(layers: nn.Sequential, x: Tensor, *readers: nn.Module) -> tuple[Tensor, Tensor]:
    """layers(x) for each of two readers: with gradients, where the last layer is a 1x1 convolution alone and nothing
    between it and the readers could tell, its backward pass takes the gradients of both and adds them up."""
    last = layers[-1] if type(layers) is nn.Sequential and len(layers) > 0 else None
    if (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or type(last) is not ConvNormAct
        or not all(isinstance(module, Block) for module in readers)
        or tampered(layers) is not None
        or any(module.why_called(ahead=True) is not None for module in (last, *readers))
        or not last.plan().serves_two()
    ):
        y = local_representation(layers, x)
        return y, y
    for layer in layers[:-1]:
        x = layer(x)
    last.why_modules()
    return tuple(map(to_nchw, last.plan().run_for_two(to_nhwc(x))))


def local_representation(convs: nn.Sequential, x: Tensor) -> Tensor:
    """convs(x) of a map (B, C, H, W). A depth-wise ConvNormAct and a 1x1 one without norm are one launch where the map
    is small enough for that to take less time, in evaluation on a GPU."""
    if (x.is_cuda or dispatch.INTERPRETED) and not torch.compiler.is_compiling():
        plans = _plans(convs)
        if plans is not None:
            (depthwise, norm, act), project = plans[0], plans[1].conv.weight
            part = ConvNorm(depthwise.weight, batch_norm(norm))
            y = filter_and_project(to_nhwc(x), part, project, depthwise.dilation[0], act)
            if y is not None:
                for conv in convs:
                    conv.why_modules()
                return to_nchw(y)
    return convs(x)


def _plans(convs: nn.Sequential) -> tuple[ConvPlan, ConvPlan] | None:
    """Those of a depth-wise convolution of stride 1 and a 1x1 one, which nothing else follows or watches."""
    if type(convs) is not nn.Sequential or tampered(convs) is not None or len(convs) != 2:
        return None
    if any(type(conv) is not ConvNormAct or conv.why_called(ahead=True) is not None for conv in convs):
        return None
    first, second = (conv.plan() for conv in convs)
    fits = first.is_depthwise() and first.norm is not None and first.conv.stride == (1, 1)
    fits = fits and second.is_pointwise() and second.norm is None and second.act == "identity"
    return (first, second) if fits and second.conv.bias is None else None


@known
class InvertedResidual(Block):
    """1x1 expansion, depth-wise 3x3, 1x1 projection, each with batch normalisation, SiLU behind the first two; the
    input is added where stride is 1 and the widths agree (Sandler et al., arXiv 1801.04381).

    (B, C, H, W) to (B, O, ceil(H / stride), ceil(W / stride)). State-dict keys: block.{exp_1x1, conv_3x3,
    red_1x1}.block.{conv, norm}.*.

    Args:
        hidden_channels: width of the expanded tensor.
    """

    def __init__(
        self, in_channels: int, out_channels: int, hidden_channels: int, stride: int = 1, dilation: int = 1
    ) -> None:
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
        return self.plan().misfit()

    def plan(self) -> ResidualPlan:
        return ResidualPlan(*(layer.plan() for layer in self.block), self.has_skip)

    def forward(self, x: Tensor) -> Tensor:
        if self.why_modules() is not None:
            y = self.block(x)
            return y + x if self.has_skip else y
        return to_nchw(self.plan().run(to_nhwc(x)))
