"""What upsample_cross_entropy means, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    align_corners: bool,
    ignore_index: int,
    weight: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    nchw = logits.permute(0, 3, 1, 2).to(dtype)
    large = F.interpolate(nchw, target.shape[1:], mode="bilinear", align_corners=align_corners)
    weight = None if weight is None else weight.to(dtype)
    return F.cross_entropy(large, target, weight, ignore_index=ignore_index, label_smoothing=label_smoothing)
