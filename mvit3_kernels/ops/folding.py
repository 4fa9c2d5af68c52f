"""A batch norm of known statistics as one multiplication and one addition."""

from __future__ import annotations

import torch
from torch import Tensor


def fold_batch_norm(
    weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Scale and shift with which norm(x) is x * scale + shift; all tensors are (C,), the results of `dtype`."""
    scale = weight.to(dtype) * (var.to(dtype) + eps).rsqrt()
    return scale, bias.to(dtype) - mean.to(dtype) * scale
