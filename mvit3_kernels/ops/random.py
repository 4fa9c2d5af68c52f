"""Counter-based dropout: whether an element is kept is a hash of (seed, site, sample, element), so that a backward
pass, a gradient checkpoint and every backend recompute the same mask from 8 bytes.

The hash is a 32-bit multiply-xorshift finaliser, keyed before each of its two multiplications. Philox would cost ten
multiplications per element in a kernel and a hundred passes over memory in plain PyTorch, for a decision that needs one
well-mixed word.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0x7FEB352D, 0x846CA68B)  # Wellons' "lowbias32" constants: the least biased of this form that are known
GOLDEN = 0x9E3779B1


def draw_seed(device: torch.device) -> Tensor:
    """A fresh int64 seed of shape () from torch's generator of `device`: obeys torch.manual_seed and is never read by
    the host."""
    return torch.randint(2**62, (), dtype=torch.int64, device=device)


def _mix(h: Tensor, shift: int, multiplier: int) -> Tensor:
    """One round on 32-bit words held in int64: a product may overflow into the sign, its low 32 bits stay right."""
    return ((h ^ (h >> shift)) * multiplier) & 0xFFFFFFFF


def random_words(seed: Tensor, site: int, samples: int, elements: int) -> Tensor:
    """Uniform 32-bit words as int64, (samples, elements). `site` separates the dropouts of one call."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    sample = torch.arange(samples, dtype=torch.int64, device=seed.device)[:, None]
    key = _mix(_mix((low + sample * GOLDEN) & 0xFFFFFFFF, 16, MULTIPLIERS[0]) ^ high ^ site, 15, MULTIPLIERS[1])
    h = torch.arange(elements, dtype=torch.int64, device=seed.device)[None]
    h = _mix(((h * GOLDEN) & 0xFFFFFFFF) ^ key, 16, MULTIPLIERS[0])
    h = _mix(h ^ ((key * GOLDEN) & 0xFFFFFFFF), 15, MULTIPLIERS[1])
    return h ^ (h >> 16)


def dropout(x: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor:
    """`x` with each element dropped with probability p and the others divided by 1 - p; the first dimension counts
    samples."""
    if p == 0 or x.numel() == 0:
        return x
    words = random_words(seed, site, x.shape[0], x[0].numel())
    return x * (words >= int(p * 2**32)).view(x.shape) / (1 - p)
