"""What pointwise_fusion means, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pointwise_conv.reference import pointwise_conv
from ..types import BatchNorm, Linear, Moments


def pointwise_fusion(
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    norm: BatchNorm,
    act: str,
    residual: Tensor | None,
    pointwise_conv=pointwise_conv,
) -> tuple[Tensor, Moments | None]:
    return pointwise_conv(torch.cat((a, b), -1), Linear(weight), norm, act, residual)
