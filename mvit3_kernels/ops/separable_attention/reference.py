"""What separable_attention means, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..norm_linear.reference import norm_linear
from ..pointwise_conv.reference import linear
from ..random import dropout
from ..types import LayerNorm, Linear


def separable_attention(
    x: Tensor,
    norm: LayerNorm,
    qkv: Linear,
    out_proj: Linear,
    patch_size: tuple[int, int],
    attention_dropout: float,
    output_dropout: float,
    seed: Tensor | None,
    norm_linear=norm_linear,
) -> Tensor:
    (batch, height, width, dim), (ph, pw) = x.shape, patch_size
    rows, columns = height // ph, width // pw
    query, key, value = norm_linear(x, norm, qkv).split((1, dim, dim), -1)
    # Softmax over the patches, separately for each position inside a patch.
    query = query.reshape(batch, rows, ph, columns, pw).permute(0, 2, 4, 1, 3)
    scores = query.reshape(batch, ph, pw, rows * columns).softmax(-1).to(x.dtype)
    scores = dropout(scores, attention_dropout, seed, site=0).view(batch, ph, pw, rows, columns).permute(0, 3, 1, 4, 2)
    key = key.reshape(batch, rows, ph, columns, pw, dim)
    context = (key * scores[..., None]).sum((1, 3), keepdim=True)  # (B, 1, ph, 1, pw, D)
    attended = F.relu(value).reshape(key.shape) * context
    return x + dropout(linear(attended.reshape(x.shape), *out_proj), output_dropout, seed, site=1)
