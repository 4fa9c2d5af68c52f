"""What depthwise_conv means, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..batch_norm_act.reference import batch_norm_act
from ..types import BatchNorm, Moments


def depthwise_conv(
    x: Tensor, weight: Tensor, norm: BatchNorm, act: str, stride: int, dilation: int, batch_norm_act=batch_norm_act
) -> tuple[Tensor, Moments | None]:
    y = F.conv2d(x.permute(0, 3, 1, 2), weight.to(x.dtype), None, stride, dilation, dilation, x.shape[-1])
    return batch_norm_act(y.permute(0, 2, 3, 1), norm, act)
