"""Depth-wise 3x3 convolution, batch normalisation and activation."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from .. import dispatch, registry
from ..batch_norm_act import batch_norm_act
from ..checks import check_activation, check_batch_norm, check_depthwise, check_map
from ..registry import Call, batch_norm_schema, flat, register
from ..types import ACTIVATIONS, BatchNorm, Moments
from . import reference

__all__ = ["depthwise_conv"]


def _cuda_why_not(x: Tensor, stride: int, dilation: int) -> str | None:
    if dilation > (1024 if stride == 1 else 1):
        return (
            f"its CUDA kernels take a dilation of at most 1024, and of 1 with stride 2, got {dilation} with stride "
            f"{stride}"
        )
    return _native.cuda_why_not(x) or dispatch.triton_32_bit_why_not(x)  # what comes before them


KERNELS = (
    dispatch.Kernel("cpu", lambda x, *_: dispatch.cpu_why_not(x)),
    dispatch.Kernel("cuda", _cuda_why_not),
    dispatch.Kernel("triton", lambda x, *_: dispatch.triton_32_bit_why_not(x)),
)


def depthwise_conv(
    x: Tensor, weight: Tensor, norm: BatchNorm, act: str = "identity", stride: int = 1, dilation: int = 1
) -> tuple[Tensor, Moments | None]:
    """Depth-wise 3x3 convolution with zero padding of `dilation`, batch normalisation, activation: y =
    act(norm(conv(x))).

    Args:
        x: feature map (B, H, W, C), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under
            autocast.
        weight: (C, 1, 3, 3), float32 or the dtype of x.
        norm: batch normalisation over C channels.
        act: "identity", "silu" or "relu".
        stride: 1 or 2.
        dilation: distance between taps, at least 1.

    Returns:
        y, (B, ceil(H / stride), ceil(W / stride), C); and the moments of conv(x) where `norm` is in training, else
        None.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
    Passes over memory: training reads x twice and writes y, backward reads x and dy twice and writes dx (on a GPU it
    also writes the gradient of conv(x), and reads that and x once more); nothing but x is saved. With the CUDA kernels
    training writes conv(x) and saves it too: reading it takes a third of the instructions of filtering again.
    Source: Sandler et al., arXiv 1801.04381; MobileViTv3's local representation, arXiv 2209.15159.
    """
    check_map("x", x)
    x = dispatch.autocast(x)
    rows = check_depthwise("weight", weight, x, stride, dilation)
    check_batch_norm("norm", norm, rows, x.shape[-1], x)
    check_activation(act)
    kernel = dispatch.select("depthwise_conv", KERNELS, x, stride, dilation)
    if kernel is None:
        return reference.depthwise_conv(x, weight, norm, act, stride, dilation, batch_norm_act=batch_norm_act)
    forward = (
        torch.ops.mvit3.depthwise_conv_forward_cuda
        if kernel.backend == "cuda"
        else torch.ops.mvit3.depthwise_conv_forward
    )
    y, mean, var, *_ = forward(x, weight, *norm, ACTIVATIONS.index(act), stride, dilation)
    return y, Moments(mean, var) if norm.training else None


_GEOMETRY = "int stride, int dilation"


@register(
    "depthwise_conv",
    f"(Tensor x, Tensor weight, {batch_norm_schema('norm_')}, int act, {_GEOMETRY}) "
    "-> (Tensor y, Tensor mean, Tensor var)",
)
def _op(call: Call) -> tuple[Tensor, ...]:
    norm = registry.batch_norm(call, "norm_")
    return flat(*depthwise_conv(call.x, call.weight, norm, ACTIVATIONS[call.act], call.stride, call.dilation))


# The kernels. They compute the filtered map z again wherever they need it, so that x is all that backward keeps; those
# with `_cuda` store it in training. There the convolution and its gradient are the CUDA C++ ops below, all else is
# Triton.


def _empty_map(x: Tensor, stride: int) -> Tensor:
    return x.new_empty(x.shape[0], -(-x.shape[1] // stride), -(-x.shape[2] // stride), x.shape[3])


def _forward_fake(call: Call) -> tuple[Tensor, ...]:
    moments = (call.x.new_empty(call.x.shape[3] if call.training else 0, dtype=torch.float32) for _ in range(2))
    return _empty_map(call.x, call.stride), *moments


def _storing_forward_fake(call: Call) -> tuple[Tensor, ...]:
    return *_forward_fake(call), _empty_map(call.x, call.stride) if call.training else call.x.new_empty(0)


for _way, _stored, _fake in (("", "", _forward_fake), ("_cuda", ", Tensor z", _storing_forward_fake)):
    registry.forward(
        f"depthwise_conv_forward{_way}",
        f"(Tensor x, Tensor weight, Tensor norm_weight, Tensor norm_bias, Tensor? running_mean, Tensor? running_var, "
        f"bool training, float eps, int act, {_GEOMETRY}) -> (Tensor y, Tensor mean, Tensor var{_stored})",
        triton=__name__,
    )(_fake)
    registry.backward(
        f"depthwise_conv_backward{_way}",
        f"(Tensor dy, Tensor x, Tensor weight, Tensor norm_weight, Tensor norm_bias, Tensor mean, Tensor var{_stored}, "
        f"bool training, float eps, int act, {_GEOMETRY}) "
        "-> (Tensor dx, Tensor dweight, Tensor dnorm_weight, Tensor dnorm_bias)",
        triton=__name__,
        choices=registry.BATCH_STATISTICS,
    )


# Ops of csrc/cuda/depthwise_conv*.cu, with the meaning of `depthwise` and `depthwise_backward` of triton.py: z and the
# moments of so many parts of it as stored, float32; the gradients of x and of the weight from that of z.
@registry.kernel(
    "depthwise_conv_filter",
    f"(Tensor x, Tensor weight, {_GEOMETRY}, int parts) -> (Tensor z, Tensor moments, Tensor counts)",
)
def _filter_fake(call: Call) -> tuple[Tensor, ...]:
    shapes = (2, call.parts, call.x.shape[3]), (call.parts,)
    return _empty_map(call.x, call.stride), *(call.x.new_empty(shape, dtype=torch.float32) for shape in shapes)


@registry.kernel(
    "depthwise_conv_filter_backward",
    f"(Tensor dz, Tensor x, Tensor weight, {_GEOMETRY}) -> (Tensor dx, Tensor dweight)",
)
def _filter_backward_fake(call: Call) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (call.x, call.weight))
