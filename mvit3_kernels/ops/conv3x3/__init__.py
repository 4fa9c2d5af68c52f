"""Dense 3x3 convolution, batch normalisation and activation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, registry
from ..batch_norm_act import batch_norm_act
from ..checks import check_activation, check_batch_norm, check_conv3x3, check_map
from ..registry import Call, batch_norm_schema, flat, register
from ..types import ACTIVATIONS, BatchNorm, Moments
from . import reference

__all__ = ["conv3x3"]


def _cpu_why_not(x: Tensor, weight: Tensor, stride: int, dilation: int, training: bool) -> str | None:
    if reason := dispatch.cpu_why_not(x):
        return reason
    if stride != 1:
        return f"its kernel takes stride 1, got {stride}"
    return _slower(x, weight, dilation, training) if dispatch.forced_backend() is None else None


# Channels below which PyTorch's convolution is faster, in evaluation and in training; and pixels of a map above which
# it is as fast in training, undilated; and input channels above which it is as fast undilated.
LEAST_CHANNELS = {False: 32, True: 96}
MOST_PIXELS = 256
MOST_INPUTS = 512


def _slower(x: Tensor, weight: Tensor, dilation: int, training: bool) -> str | None:
    """Why PyTorch's convolution is at least as fast, as measured (benchmarks/NOTES.md)."""
    if x.dtype is torch.float16:  # PyTorch's backward pass of it takes some forty times as long
        return None
    if x.dtype is torch.bfloat16:
        return "PyTorch's convolution of bfloat16 is faster"
    least = LEAST_CHANNELS[training]
    if min(weight.shape[:2]) < least:
        return f"PyTorch's convolution of fewer than {least} channels is faster, weight is {tuple(weight.shape)}"
    if training and dilation == 1 and x.shape[1] * x.shape[2] > MOST_PIXELS:
        return f"in training PyTorch's convolution is as fast on more than {MOST_PIXELS} pixels, x is {tuple(x.shape)}"
    if dilation == 1 and weight.shape[1] > MOST_INPUTS:
        return f"PyTorch's convolution of more than {MOST_INPUTS} channels is as fast, weight is {tuple(weight.shape)}"
    return None


# What a Triton kernel reads and writes in one program, as of an image and a first convolution.
MOST_IMAGE_CHANNELS, MOST_IMAGE_OUTPUTS = 4, 64


def _image_why_not(x: Tensor, weight: Tensor, stride: int, dilation: int, training: bool) -> str | None:
    if reason := dispatch.triton_32_bit_why_not(x):
        return reason
    if x.dtype is torch.float32:
        return "its Triton kernel makes maps of 16 bits"
    if training:
        return "its Triton kernel is of evaluation"
    if dilation != 1:
        return f"its Triton kernel is not dilated, got {dilation}"
    outputs, channels = weight.shape[:2]
    if channels > MOST_IMAGE_CHANNELS or outputs > MOST_IMAGE_OUTPUTS:
        most = f"{MOST_IMAGE_CHANNELS} channels to {MOST_IMAGE_OUTPUTS}"
        return f"its Triton kernel takes up to {most}, weight is {tuple(weight.shape)}"
    return None


IMAGE = dispatch.Kernel("triton", _image_why_not)
KERNELS = (dispatch.Kernel("cpu", _cpu_why_not), IMAGE)


def _in_training(x: Tensor, weight: Tensor, norm: BatchNorm | None) -> bool:
    """Whether a call has gradients, or measures its batch."""
    learned = (weight,) if norm is None else (weight, norm.weight, norm.bias)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *learned))
    return needs_grad or (norm is not None and norm.training)


def reads_image(x: Tensor, weight: Tensor, norm: BatchNorm | None, stride: int, dilation: int) -> bool:
    """Whether a call runs on the Triton kernel."""
    if weight.shape[1] > MOST_IMAGE_CHANNELS or dispatch.forced_backend() not in (None, "triton"):
        return False
    training = _in_training(x, weight, norm)
    plain = dispatch.writes_aten() or dispatch.transform() is not None
    return not plain and IMAGE.can_run(dispatch.as_autocast(x), weight, stride, dilation, training)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    norm: BatchNorm | None = None,
    act: str = "identity",
    stride: int = 1,
    dilation: int = 1,
) -> tuple[Tensor, Moments | None]:
    """Dense 3x3 convolution with zero padding of `dilation`, optional batch normalisation, activation: y =
    act(norm(conv(x))).

    Args:
        x: feature map (B, H, W, C), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under
            autocast.
        weight: (O, C, 3, 3), float32 or the dtype of x.
        norm: batch normalisation over O channels, or None.
        act: "identity", "silu" or "relu".
        stride: 1 or 2.
        dilation: distance between taps, at least 1.

    Returns:
        y, (B, ceil(H / stride), ceil(W / stride), O); and the moments of conv(x), each (O,), where `norm` is in
        training, else None.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
    Kernels: on the CPU, for stride 1; on a GPU, in evaluation, for images: up to 4 channels to 64, to maps in 16 bits,
    undilated. PyTorch's convolution runs elsewhere (cuDNN on a GPU), for stride 2 on the CPU, and where it is as fast
    there (`explain` tells): in bfloat16; in float32 with fewer than 32 channels, in training with
    fewer than 96, and undilated from more than 512 channels or, in training, on maps of more than 256 pixels.
    Products: those of taps inside of the map alone, (H - dilation) * (W - dilation) pixels for a corner tap, in forward
    and backward; a library that pads multiplies H * W pixels at each tap.
    Source: Chen et al., arXiv 1706.05587 (the dilated branches of ASPP); the ConvLayer of the MobileViT releases.
    """
    check_map("x", x)
    cast = dispatch.as_autocast(x)
    outputs, rows = check_conv3x3("weight", weight, cast, stride, dilation)
    if norm is not None:
        check_batch_norm("norm", norm, rows, outputs, cast)
    check_activation(act)
    training = _in_training(x, weight, norm)
    kernel = dispatch.select("conv3x3", KERNELS, cast, weight, stride, dilation, training)
    gamma, beta, mean, var, _, eps = norm or (None, None, None, None, False, 0.0)
    fixed = (gamma, beta, mean, var, eps, ACTIVATIONS.index(act))
    if kernel is IMAGE:
        op = torch.ops.mvit3.conv3x3_image_inference
        return registry.run_without_gradient(op, x, weight, *fixed, stride, cast.dtype), None
    x = dispatch.autocast(x)
    if kernel is None:
        return reference.conv3x3(x, weight, norm, act, stride, dilation, batch_norm_act=batch_norm_act)
    if training:
        return reference.conv3x3(
            x, weight, norm, act, stride, dilation, batch_norm_act=batch_norm_act, convolve=_convolve
        )
    return registry.run_without_gradient(torch.ops.mvit3.conv3x3_inference, x, weight, *fixed, dilation), None


def _convolve(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    return torch.ops.mvit3.conv3x3_forward(x, weight, dilation)


@register(
    "conv3x3",
    f"(Tensor x, Tensor weight, {batch_norm_schema('norm_', optional=True)}, int act, int stride, int dilation) "
    "-> (Tensor y, Tensor mean, Tensor var)",
)
def _op(call: Call) -> tuple[Tensor, ...]:
    norm = None if call.norm_weight is None else registry.batch_norm(call, "norm_")
    return flat(*conv3x3(call.x, call.weight, norm, ACTIVATIONS[call.act], call.stride, call.dilation))


# The kernels. In training the convolution alone: `batch_norm_act` follows it.


@registry.kernel(
    "conv3x3_inference",
    "(Tensor x, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, Tensor? running_mean, Tensor? running_var, "
    "float eps, int act, int dilation) -> Tensor y",
)
@registry.forward("conv3x3_forward", "(Tensor x, Tensor weight, int dilation) -> Tensor y")
def _fake(call: Call) -> Tensor:
    return call.x.new_empty(*call.x.shape[:-1], call.weight.shape[0])


@registry.kernel(
    "conv3x3_image_inference",
    "(Tensor x, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, Tensor? running_mean, Tensor? running_var, "
    "float eps, int act, int stride, ScalarType dtype) -> Tensor y",
    triton=__name__,
)
def _image_fake(call: Call) -> Tensor:
    batch, height, width, _ = call.x.shape
    sides = -(-height // call.stride), -(-width // call.stride)
    return call.x.new_empty(batch, *sides, call.weight.shape[0], dtype=call.dtype)


registry.backward(
    "conv3x3_backward", "(Tensor dy, Tensor x, Tensor weight, int dilation) -> (Tensor dx, Tensor dweight)"
)
