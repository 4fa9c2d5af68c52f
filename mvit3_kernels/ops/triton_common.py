"""What the Triton kernels of several ops share: activations, products, dropout, statistics that stay accurate, where a token lies, and the
split of rows over programs.

A per-channel reduction over the rows of a map never uses float atomics. Each program reduces a contiguous range of rows and writes one
partial result; the kernel that consumes the statistic combines the partials in its prologue, in a fixed order. So the result is the
same in every run, and the combination costs no launch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import random

IDENTITY, SILU, RELU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # positions in types.ACTIVATIONS

GOLDEN, FIRST_MULTIPLIER, SECOND_MULTIPLIER = (tl.constexpr(word) for word in (random.GOLDEN, *random.MULTIPLIERS))

# Partials read at once. Two tiles of 128 x 32 float32 are 32 registers of a thread, and a GPU of 132 multiprocessors has at most 264
# partials: three trips.
BLOCK_PARTS = tl.constexpr(128)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def activate(z, ACT: tl.constexpr):
    """The activation of float32 `z`; NaN stays NaN."""
    if ACT == SILU:
        z = z * sigmoid(z)
    elif ACT == RELU:
        z = tl.where(z <= 0, 0.0, z)
    return z


@triton.jit
def activate_backward(dy, z, ACT: tl.constexpr):
    """The gradient of `z` for the gradient `dy` of activate(z)."""
    if ACT == SILU:
        s = sigmoid(z)
        dy = dy * (s * (1 + z * (1 - s)))
    elif ACT == RELU:
        dy = tl.where(z > 0, dy, 0.0)
    return dy


@triton.jit
def dot(a, b, sums):
    """sums + a @ b for float32 `sums`; float32 operands are not rounded to TF32."""
    return tl.dot(a, b, sums, input_precision="ieee")


# Dropout: the hash of random.py.


@triton.jit
def _mix(word, shift, multiplier):
    return (word ^ (word >> shift)) * multiplier


@triton.jit
def dropout_key(seed_ptr, sample, SITE: tl.constexpr):
    """The key of a sample's mask; `seed_ptr` points to one int64."""
    seed = tl.load(seed_ptr)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    return _mix(_mix(low + sample.to(tl.uint32) * GOLDEN, 16, FIRST_MULTIPLIER) ^ high ^ SITE, 15, SECOND_MULTIPLIER)


@triton.jit
def dropout_kept(key, element, threshold):
    """Whether the elements at these positions of the sample with this key are kept; positions count modulo 2^32."""
    word = _mix((element.to(tl.uint32) * GOLDEN) ^ key, 16, FIRST_MULTIPLIER)
    word = _mix(word ^ (key * GOLDEN), 15, SECOND_MULTIPLIER)
    return (word ^ (word >> 16)) >= threshold.to(tl.uint32)


@triton.jit
def dropped(tile, seed_ptr, row, column, rows_per_sample, keep, keep_scale, SITE: tl.constexpr, WIDTH: tl.constexpr):
    """A tile of a map of WIDTH channels after dropout; `row` counts over all samples, `keep` is the threshold."""
    key = dropout_key(seed_ptr, row // rows_per_sample, SITE)
    element = (row % rows_per_sample)[:, None] * WIDTH + column[None, :]
    return tile * tl.where(dropout_kept(key[:, None], element, keep), keep_scale, 0.0)  # NaN stays NaN


def dropout_threshold(p: float) -> int:
    """What a word must reach for its element to be kept."""
    return int(p * 2**32)


@triton.jit
def pixel_of_token(token, position, width, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr):
    """The pixel of a sample where a token lies, of those that share their position inside a patch."""
    columns = width // PATCH_W
    row = token // columns * PATCH_H + position // PATCH_W
    return row * width + token % columns * PATCH_W + position % PATCH_W


@triton.jit
def at_least_zero(x):
    """What rounding made negative is zero; NaN stays NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def inverse_std(var, eps):
    # Rounded root and division: they are per channel, so exactness is free, and every element inherits their error.
    return tl.div_rn(1.0, tl.sqrt_rn(var + eps))


@triton.jit
def merge_moments(count, mean, m2):
    """Moments (value count, mean, sum of squared deviations) of each column of tiles `mean`, `m2` whose row i stands for count[i] values.

    Chan's formula around a corrected mean: the second sum removes the rounding of the first, so that a mean of many standard
    deviations costs no accuracy.
    """
    total = tl.sum(count, 0)
    safe = tl.maximum(total, 1.0)
    rough = tl.sum(count[:, None] * mean, 0) / safe
    offset = tl.where(count[:, None] > 0, mean - rough[None, :], 0.0)
    correction = tl.sum(count[:, None] * offset, 0) / safe
    m2 = tl.sum(m2 + count[:, None] * offset * offset, 0) - total * correction * correction
    return total, rough + correction, at_least_zero(m2)


@triton.jit
def load_moments(part_ptr, parts, rows, rows_per_part, column, valid, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and biased variance of columns `column` over all rows, from partial (mean, m2) pairs in a (2, parts, C) float32 workspace."""
    lane = tl.arange(0, BLOCK_PARTS)
    count = tl.zeros((BLOCK_PARTS,), tl.float32)
    mean = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        part = first + lane
        mask = (part < parts)[:, None] & valid[None, :]
        offset = part[:, None] * C + column[None, :]
        delta = tl.load(part_ptr + offset, mask=mask, other=0.0) - mean
        delta = tl.where(mask, delta, 0.0)
        left = rows - part.to(tl.int64) * rows_per_part
        added = tl.where(part < parts, tl.minimum(left, rows_per_part), 0).to(tl.float32)
        share = added / tl.maximum(count + added, 1.0)
        mean += delta * share[:, None]
        m2 += tl.load(part_ptr + parts * C + offset, mask=mask, other=0.0) + delta * delta * (count * share)[:, None]
        count += added
    total, mean, m2 = merge_moments(count, mean, m2)
    return mean, m2 / tl.maximum(total, 1.0)


@triton.jit
def load_sums(part_ptr, parts, column, valid, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums of columns `column`, from partial sums in a (parts, C) float32 workspace."""
    lane = tl.arange(0, BLOCK_PARTS)
    total = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        part = first + lane
        mask = (part < parts)[:, None] & valid[None, :]
        total += tl.load(part_ptr + part[:, None] * C + column[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def row_range(rows, rows_per_program, program):
    """First row (int64, for a map may hold more than 2^31 elements) and number of rows of a program."""
    start = program.to(tl.int64) * rows_per_program
    return start, tl.minimum(rows - start, rows_per_program).to(tl.int32)


def interpreted() -> bool:
    return triton.knobs.runtime.interpret


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(x: Tensor) -> int:
    """Multiprocessors of the GPU of `x`; the interpreter plays a GPU of 2, so that small tensors are split over programs too."""
    return _multiprocessors(x.get_device()) if x.is_cuda else 2


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def multiplies_from_shared_memory(x: Tensor) -> bool:
    """Whether the GPU of `x` is of NVIDIA's generation that multiplies 64 rows straight from shared memory (sm_90). The others hold the
    operands of a product in registers, so that their tiles must be smaller."""
    if interpreted():
        return True
    if x.is_cuda:
        return torch.version.hip is None and _capability(x.get_device()) == (9, 0)
    return triton.runtime.driver.active.get_current_target().arch == 90  # compiling for a GPU that is not there


def on_device(x: Tensor) -> AbstractContextManager[None]:
    """Makes the GPU of `x` the current one, where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda and x.get_device() != torch.cuda.current_device() else nullcontext()


def rows_at_one_distance(x: Tensor) -> tuple[Tensor, int]:
    """`x` and the elements from one row to the next. Some channels of a wider map, as the gradient of a concatenation is, stay in place;
    what does not lie like this is copied."""
    stride = x.stride(-2)
    whole = x.stride(-1) == 1 and stride >= x.shape[-1]
    for size, outer, inner in zip(x.shape[1:-1], x.stride(), x.stride()[1:-1], strict=False):
        whole = whole and outer == inner * size
    return (x, stride) if whole and x.numel() > 0 else (x.contiguous(), x.shape[-1])


def split_rows(rows: int, programs: int, block: int) -> tuple[int, int]:
    """(number of programs, rows of each), at most `programs` of at least `block` rows; none is empty.

    The rows of a program need not be a multiple of the block: masked lanes cost no traffic, an uneven split costs time.
    """
    per_program = max(triton.cdiv(rows, max(programs, 1)), block)
    return triton.cdiv(rows, per_program), per_program
