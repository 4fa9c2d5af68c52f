"""What patch_attention means, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..random import dropout
from .attention import attention, probabilities


def patch_attention(
    qkv: Tensor, num_heads: int, patch_size: tuple[int, int], dropout_p: float, seed: Tensor | None
) -> Tensor:
    batch, height, width, channels = qkv.shape
    (ph, pw), dim = patch_size, channels // (3 * num_heads)
    rows, columns = height // ph, width // pw
    # Dimension by dimension, because an exporter cannot tell open sizes from one another in a view of them all.
    tokens = qkv.unflatten(3, (3, num_heads, dim)).unflatten(2, (columns, pw)).unflatten(1, (rows, ph))
    # Unfold: pixels that share their position inside a patch form one sequence. (3, B*ph*pw, heads, patches, head_dim)
    q, k, v = tokens.permute(5, 0, 2, 4, 6, 1, 3, 7).flatten(5, 6).flatten(1, 3).unbind()
    if dropout_p == 0:
        out = attention(q, k, v)
    else:
        kept = dropout(probabilities(q, k).unflatten(0, (batch, ph * pw)), dropout_p, seed, site=0)
        out = kept.flatten(0, 1) @ v
    # Fold: (B, H, W, heads * head_dim)
    out = out.unflatten(2, (rows, columns)).unflatten(0, (batch, ph, pw)).permute(0, 4, 1, 5, 2, 3, 6)
    return out.flatten(5, 6).flatten(3, 4).flatten(1, 2)
