"""What dropout means, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from .. import random


def dropout(x: Tensor, p: float, seed: Tensor | None, residual: Tensor | None) -> Tensor:
    y = random.dropout(x, p, seed, site=0)
    return y if residual is None else residual + y
