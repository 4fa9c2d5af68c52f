"""Arithmetic of sizes. Products are made here: torch.Size.numel() would fix, in an exported program, a batch that is
to stay open."""

from __future__ import annotations

import math

from torch import Tensor


def values_per_channel(x: Tensor) -> int:
    """B * H * W of a map (B, H, W, C)."""
    return math.prod(x.shape[:-1])


# As of a call at batch 1. Of more rows small tiles ask for a weight more often than the idle part of a GPU is worth, by
# the model of benchmarks/gpu_model.
MOST_FEW_ROWS = 1024

MOST_SAMPLE_PARTS = 128  # parts that a sample is measured in, which every program that needs its moments joins


def most_sample_parts(rows: int) -> int:
    """Of a sample of so many rows, of at least 16 each."""
    return min(-(-rows // 16), MOST_SAMPLE_PARTS)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, of positive numbers. triton.cdiv, which kernels may call too, takes 1.4 us; a training step
    asks a thousand times."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is not less than a positive number."""
    return 1 << (n - 1).bit_length()
