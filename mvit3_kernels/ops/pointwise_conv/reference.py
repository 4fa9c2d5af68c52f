"""What pointwise_conv means, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import random
from ..batch_norm_act.reference import activate, batch_norm_act
from ..types import BatchNorm, Linear, Moments


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias in the dtype of x."""
    return F.linear(x, weight.flatten(1).to(x.dtype), None if bias is None else bias.to(x.dtype))


def pointwise_conv(
    x: Tensor,
    conv: Linear,
    norm: BatchNorm | None,
    act: str,
    residual: Tensor | None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    batch_norm_act=batch_norm_act,
) -> tuple[Tensor, Moments | None]:
    y, moments = linear(x, *conv), None
    if norm is not None and dropout == 0:
        return batch_norm_act(y, norm, act, residual)
    if norm is None:
        y = activate(y, act)
    else:
        y, moments = batch_norm_act(y, norm, act, None)
    y = random.dropout(y, dropout, seed, site=0)
    return (y if residual is None else residual + y), moments
