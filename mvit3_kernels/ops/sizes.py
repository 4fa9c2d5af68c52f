"""Sizes as products: torch.Size.numel() would fix, in an exported program, a batch that is to stay open."""

from __future__ import annotations

import math

from torch import Tensor


def values_per_channel(x: Tensor) -> int:
    """B * H * W of a map (B, H, W, C)."""
    return math.prod(x.shape[:-1])
