"""What norm_linear means, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pointwise_conv.reference import linear
from ..types import LayerNorm, Linear


def layer_norm(x: Tensor, norm: LayerNorm) -> Tensor:
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    if norm.per_sample:
        # not F.group_norm, which refuses a sample of one value
        return torch.group_norm(x.permute(0, 3, 1, 2), 1, weight, bias, norm.eps).permute(0, 2, 3, 1).to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps).to(x.dtype)  # autocast would hand back float32


def norm_linear(x: Tensor, norm: LayerNorm, projection: Linear) -> Tensor:
    return linear(layer_norm(x, norm), *projection)
