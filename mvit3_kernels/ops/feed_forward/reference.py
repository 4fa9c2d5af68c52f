"""What feed_forward means, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..norm_linear.reference import norm_linear
from ..pointwise_conv.reference import linear
from ..random import dropout
from ..types import LayerNorm, Linear


def feed_forward(
    x: Tensor,
    norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    hidden_dropout: float,
    output_dropout: float,
    seed: Tensor | None,
    norm_linear=norm_linear,
) -> Tensor:
    hidden = dropout(F.silu(norm_linear(x, norm, fc1)), hidden_dropout, seed, site=0)
    return x + dropout(linear(hidden, *fc2), output_dropout, seed, site=1)
