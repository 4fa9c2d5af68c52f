"""Dense 3x3 convolution, batch normalisation with constant statistics and activation, without gradients: what the networks' stem and
MobileViTv1's blocks run in evaluation. Internal: not one of the public ops, which all have gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..types import ACTIVATIONS, BatchNorm

__all__ = ["conv3x3_inference"]


# Above this many pixels a wide input's convolution is as fast in the library, which packs no weight (benchmarks/NOTES.md).
MOST_PIXELS = 2048
FEW_CHANNELS = 8


def why_not(x: Tensor, other: Tensor | None, weight: Tensor, norm: BatchNorm, stride: int) -> str | None:
    """Why the CPU kernel cannot, or should not, take the call."""
    if dispatch.writes_aten() or dispatch.forced_backend() not in (None, "cpu"):
        return "another backend is asked for"
    if norm.training:
        return "its norm is in training"
    given = [t for t in (x, other, weight, norm.weight, norm.bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return "its CPU kernel has no gradients"
    if stride not in (1, 2) or x.numel() == 0:
        return "its CPU kernel has strides 1 and 2, and at least one pixel"
    if any(t.dtype not in (*dispatch.KERNEL_DTYPES, x.dtype) for t in given) or (other is not None and other.dtype != x.dtype):
        return "its CPU kernel takes maps of one dtype"
    if weight.shape[1] >= FEW_CHANNELS and x.shape[:-1].numel() > MOST_PIXELS:
        return f"x has more than {MOST_PIXELS} pixels, where the library's convolution is as fast"
    return dispatch.cpu_why_not(x)


def conv3x3_inference(x: Tensor, other: Tensor | None, weight: Tensor, norm: BatchNorm, act: str, stride: int = 1) -> Tensor | None:
    """act(norm(conv(concat(x, other)))) with zero padding of 1, NHWC, or None where the library's convolution is to be taken.

    Args:
        x, other: feature maps (B, H, W, C) and (B, H, W, D) or None, of one dtype; cast to autocast's dtype under autocast.
        weight: (O, C + D, 3, 3); best in channels_last memory, which is the order that the kernel packs.
        norm: with running statistics, not in training.
    """
    x, other = dispatch.autocast(x), None if other is None else dispatch.autocast(other)
    if why_not(x, other, weight, norm, stride) is not None:
        return None
    parameters = (norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    return torch.ops.mvit3.conv3x3_inference(x, other, weight.permute(0, 2, 3, 1), *parameters, ACTIVATIONS.index(act), stride)


torch.library.define(
    "mvit3::conv3x3_inference",
    "(Tensor x, Tensor? other, Tensor weight, Tensor norm_weight, Tensor norm_bias, Tensor running_mean, Tensor running_var, float eps, "
    "int act, int stride) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("mvit3::conv3x3_inference")
def _fake(x, other, weight, norm_weight, norm_bias, running_mean, running_var, eps, act, stride):
    return x.new_empty(x.shape[0], -(-x.shape[1] // stride), -(-x.shape[2] // stride), weight.shape[0])
