"""What upsample_argmax means, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample_argmax(
    logits: Tensor, size: Sequence[int], align_corners: bool, target: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    nchw = logits.permute(0, 3, 1, 2).to(dtype)
    found = F.interpolate(nchw, tuple(size), mode="bilinear", align_corners=align_corners).argmax(1)
    classes = logits.shape[-1]
    if target is None:
        return found, found.new_zeros(0, 0)
    counted = (target >= 0) & (target < classes)
    pairs = torch.where(counted, target * classes + found, classes**2).flatten()
    confusion = torch.zeros(classes**2 + 1, dtype=torch.int64, device=logits.device)
    return found, confusion.scatter_add(0, pairs, torch.ones_like(pairs))[:-1].view(classes, classes)
