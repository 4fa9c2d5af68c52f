"""Depth-wise 3x3 convolution, batch normalisation and activation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, registry
from ..batch_norm_act import batch_norm_act
from ..checks import check_activation, check_batch_norm, check_depthwise, check_map
from ..registry import batch_norm_schema, flat, register
from ..types import ACTIVATIONS, BatchNorm, Moments
from . import reference

__all__ = ["depthwise_conv"]

KERNELS = (dispatch.Kernel("cpu", dispatch.cpu_why_not), dispatch.Kernel("triton", dispatch.triton_32_bit_why_not))


def depthwise_conv(
    x: Tensor, weight: Tensor, norm: BatchNorm, act: str = "identity", stride: int = 1, dilation: int = 1
) -> tuple[Tensor, Moments | None]:
    """Depth-wise 3x3 convolution with zero padding of `dilation`, batch normalisation, activation: y = act(norm(conv(x))).

    Args:
        x: feature map (B, H, W, C), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under autocast.
        weight: (C, 1, 3, 3), float32 or the dtype of x.
        norm: batch normalisation over C channels.
        act: "identity", "silu" or "relu".
        stride: 1 or 2.
        dilation: distance between taps, at least 1.

    Returns:
        y, (B, ceil(H / stride), ceil(W / stride), C); and the moments of conv(x) where `norm` is in training, else None.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
    Passes over memory: training reads x twice and writes y, backward reads x and dy twice and writes dx (on a GPU it
    also writes the gradient of conv(x), and reads that and x once more); nothing but x is saved.
    Source: Sandler et al., arXiv 1801.04381; MobileViTv3's local representation, arXiv 2209.15159.
    """
    check_map("x", x)
    x = dispatch.autocast(x)
    rows = check_depthwise("weight", weight, x, stride, dilation)
    check_batch_norm("norm", norm, rows, x.shape[-1], x)
    check_activation(act)
    if dispatch.select("depthwise_conv", KERNELS, x) is None:
        return reference.depthwise_conv(x, weight, norm, act, stride, dilation, batch_norm_act=batch_norm_act)
    y, mean, var = torch.ops.mvit3.depthwise_conv_forward(x, weight, *norm, ACTIVATIONS.index(act), stride, dilation)
    return y, Moments(mean, var) if norm.training else None


@register(
    "depthwise_conv",
    f"(Tensor x, Tensor weight, {batch_norm_schema('norm_')}, int act, int stride, int dilation) -> (Tensor, Tensor, Tensor)",
)
def _op(x, weight, norm_weight, norm_bias, running_mean, running_var, training, eps, act, stride, dilation):
    norm = BatchNorm(norm_weight, norm_bias, running_mean, running_var, training, eps)
    return flat(*depthwise_conv(x, weight, norm, ACTIVATIONS[act], stride, dilation))


# The kernels. They compute the filtered map again wherever they need it, so that x is all that backward keeps.

torch.library.define(
    "mvit3::depthwise_conv_forward",
    f"(Tensor x, Tensor weight, {batch_norm_schema('norm_')}, int act, int stride, int dilation) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "mvit3::depthwise_conv_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor norm_weight, Tensor norm_bias, Tensor mean, Tensor var, bool training, float eps, "
    "int act, int stride, int dilation) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
dispatch.register_triton("depthwise_conv_forward", __name__)
dispatch.register_triton("depthwise_conv_backward", __name__)


@torch.library.register_fake("mvit3::depthwise_conv_forward")
def _forward_fake(x, weight, norm_weight, norm_bias, running_mean, running_var, training, eps, act, stride, dilation):
    y = x.new_empty(x.shape[0], -(-x.shape[1] // stride), -(-x.shape[2] // stride), x.shape[3])
    channels = x.shape[3] if training else 0
    return y, x.new_empty(channels, dtype=torch.float32), x.new_empty(channels, dtype=torch.float32)


@torch.library.register_fake("mvit3::depthwise_conv_backward")
def _backward_fake(dy, x, weight, norm_weight, norm_bias, *_):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight, norm_weight, norm_bias))


def _setup_context(ctx, inputs, output):
    x, weight, norm_weight, norm_bias, running_mean, running_var, training, eps, *geometry = inputs
    _, mean, var = output
    ctx.options = (training, eps, *geometry)
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, norm_weight, norm_bias, *((mean, var) if training else (running_mean, running_var)))


def _gradients(ctx, dy, *_):
    if dy is None:
        return (None,) * 11
    grads = torch.ops.mvit3.depthwise_conv_backward(dy, *ctx.saved_tensors, *ctx.options)
    return *grads, *(None,) * 7


torch.library.register_autograd("mvit3::depthwise_conv_forward", _gradients, setup_context=_setup_context)
registry.forbid_second_derivative("depthwise_conv_backward")
