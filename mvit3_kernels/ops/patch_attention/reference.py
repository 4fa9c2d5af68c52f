"""What patch_attention means, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..random import dropout


def patch_attention(qkv: Tensor, num_heads: int, patch_size: tuple[int, int], dropout_p: float, seed: Tensor | None) -> Tensor:
    batch, height, width, channels = qkv.shape
    (ph, pw), dim = patch_size, channels // (3 * num_heads)
    rows, columns = height // ph, width // pw
    # Unfold: pixels that share their position inside a patch form one sequence. (3, B*ph*pw, heads, patches, head_dim)
    tokens = qkv.view(batch, rows, ph, columns, pw, 3, num_heads, dim).permute(5, 0, 2, 4, 6, 1, 3, 7)
    q, k, v = tokens.reshape(3, batch * ph * pw, num_heads, rows * columns, dim).unbind()
    if dropout_p == 0:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        probabilities = torch.softmax(q @ k.transpose(-2, -1) * dim**-0.5, -1).to(v.dtype)
        samples = (batch, ph * pw, *probabilities.shape[1:])
        out = dropout(probabilities.view(samples), dropout_p, seed, site=0).view(probabilities.shape) @ v
    out = out.view(batch, ph, pw, num_heads, rows, columns, dim).permute(0, 4, 1, 5, 2, 3, 6)  # fold
    return out.reshape(batch, height, width, num_heads * dim)
