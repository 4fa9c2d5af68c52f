"""What conv3x3 means, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..batch_norm_act.reference import activate, batch_norm_act
from ..types import BatchNorm, Moments


def convolve(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    """The convolution alone, of maps (B, H, W, C)."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight.to(x.dtype), None, stride, dilation, dilation)
    return y.permute(0, 2, 3, 1)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    norm: BatchNorm | None,
    act: str,
    stride: int,
    dilation: int,
    batch_norm_act=batch_norm_act,
    convolve=convolve,
) -> tuple[Tensor, Moments | None]:
    y = convolve(x, weight, stride, dilation)
    return (activate(y, act), None) if norm is None else batch_norm_act(y, norm, act)
