"""What the Triton kernels of several ops share: tiles of a matrix, activations, products, dropout, statistics that stay
accurate, where a token lies, and how rows are divided among programs.

A map (B, H, W, C) is a matrix to these kernels: a row for each pixel, a column for each channel. A reduction over its
rows never uses float atomics. Each program reduces a contiguous range of rows, a part, and writes one partial result
into a float32 workspace. The kernel that needs the result adds up the parts when it starts, in a fixed order. So the
result is the same in every run, and adding up costs no launch of its own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import random
from .sizes import cdiv
from .triton_math import silu, silu_and_gradient
from .types import ACTIVATIONS

IDENTITY, SILU, RELU = (tl.constexpr(ACTIVATIONS.index(name)) for name in ("identity", "silu", "relu"))

GOLDEN, FIRST_MULTIPLIER, SECOND_MULTIPLIER = (tl.constexpr(word) for word in (random.GOLDEN, *random.MULTIPLIERS))

# Partials read at once. Two tiles of 128 x 32 float32 are 32 registers of a thread, and a GPU of 132 multiprocessors
# has at most 264 partials: three trips.
BLOCK_PARTS = tl.constexpr(128)
FEW_PARTS = 16
# Whose compiler spills a few bytes in tiles that fit with others.
OLD_TRITON = triton.__version__.startswith(("3.6.", "3.7."))


# Tiles


@triton.jit
def load_tile(ptr, row, valid, column, WIDTH: tl.constexpr, STRIDE: tl.constexpr = None, AGAIN: tl.constexpr = False):
    """Rows `row` and columns `column` of a matrix (.., WIDTH), in its dtype; zeros in rows that are not valid and in
    columns from WIDTH on. STRIDE, if not WIDTH, is the number of values from one row to the next. AGAIN: read anew,
    from cache, what was read before; without it the compiler would keep the first tile in registers."""
    ROW: tl.constexpr = WIDTH if STRIDE is None else STRIDE
    mask = valid[:, None] & (column < WIDTH)[None, :]
    policy: tl.constexpr = "evict_first" if AGAIN else ""
    return tl.load(ptr + row[:, None] * ROW + column[None, :], mask=mask, other=0.0, eviction_policy=policy)


@triton.jit
def store_tile(ptr, row, valid, column, tile, WIDTH: tl.constexpr, STRIDE: tl.constexpr = None):
    """Writes what `load_tile` reads, rounded to the dtype of the matrix."""
    ROW: tl.constexpr = WIDTH if STRIDE is None else STRIDE
    mask = valid[:, None] & (column < WIDTH)[None, :]
    tl.store(ptr + row[:, None] * ROW + column[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(ptr, column, WIDTH: tl.constexpr, OTHER: tl.constexpr = 0.0):
    """Values `column` of a parameter (WIDTH,) in float32; OTHER from WIDTH on, zeros where there is no parameter."""
    if ptr is None:
        vector = column.to(tl.float32) * 0.0
    else:
        vector = tl.load(ptr + column, mask=column < WIDTH, other=OTHER).to(tl.float32)
    return vector


@triton.jit
def store_vector(ptr, column, vector, WIDTH: tl.constexpr):
    """Writes values `column` of a vector (WIDTH,), rounded to its dtype."""
    tl.store(ptr + column, vector.to(ptr.dtype.element_ty), mask=column < WIDTH)


# Activations and products


@triton.jit
def activate(z, ACT: tl.constexpr, DTYPE: tl.constexpr):
    """The activation of float32 `z`, before it is rounded to DTYPE; NaN stays NaN."""
    if ACT == SILU:
        z = silu(z, DTYPE=DTYPE)
    elif ACT == RELU:
        z = tl.where(z <= 0, 0.0, z)
    return z


@triton.jit
def activate_both(dy, z, ACT: tl.constexpr, DTYPE: tl.constexpr):
    """(activate(z), the gradient of `z` for the gradient `dy` of that), before they are rounded to DTYPE."""
    if ACT == SILU:
        y, dz = silu_and_gradient(dy, z, DTYPE=DTYPE)
    elif ACT == RELU:
        y, dz = tl.where(z <= 0, 0.0, z), tl.where(z <= 0, 0.0, dy)  # where z is NaN dy is kept, as torch keeps it
    else:
        y, dz = z, dy
    return y, dz


@triton.jit
def activate_backward(dy, z, ACT: tl.constexpr, DTYPE: tl.constexpr):
    """The second of `activate_both`."""
    _, dz = activate_both(dy, z, ACT=ACT, DTYPE=DTYPE)
    return dz


@triton.jit
def dot(a, b, sums):
    """sums + a @ b for float32 `sums`; float32 operands are not rounded to TF32."""
    return tl.dot(a, b, sums, input_precision="ieee")


# Dropout: the hash of random.py


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
    key = dropout_key(seed_ptr, row // rows_per_sample, SITE=SITE)
    element = (row % rows_per_sample)[:, None] * WIDTH + column[None, :]
    return tile * tl.where(dropout_kept(key[:, None], element, keep), keep_scale, 0.0)  # NaN stays NaN


def dropout_threshold(p: float) -> int:
    """What a word must reach for its element to be kept."""
    return int(p * 2**32)


# Where a token lies


@triton.jit
def pixel_of_token(
    token, position, width, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, MOST_TOKENS: tl.constexpr = None
):
    """The pixel of a sample where a token lies, of those that share their position inside a patch. Where a group has at
    most 256 tokens, MOST_TOKENS, the division for each is a multiplication; pixels of tokens beyond are any."""
    columns = width // PATCH_W
    first = position // PATCH_W * width + position % PATCH_W
    if MOST_TOKENS is not None:
        tl.static_assert(MOST_TOKENS <= 256)
        # token * (1 / columns + e) with e <= 2^-16: too large by less than 1 / columns, as token * columns < 2^16
        row = (token * (65536 // columns + 1)) >> 16
    else:
        row = token // columns
    return first + row * (PATCH_H * width - columns * PATCH_W) + token * PATCH_W


@triton.jit
def token_step(width, STEP: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr):
    """What lies between a token and the one STEP further in the same row: patches beside it and pixels; and how many
    patches a row has."""
    columns = width // PATCH_W
    rest = STEP % columns
    return rest, STEP // columns * PATCH_H * width + rest * PATCH_W, columns


@triton.jit
def next_tokens(column, pixel, step, width, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr):
    """Column, in patches, and pixel of the tokens that are a `token_step` further, without a division for each."""
    rest, pixels, columns = step
    column += rest
    beyond = column >= columns
    column = tl.where(beyond, column - columns, column)
    return column, pixel + pixels + tl.where(beyond, PATCH_H * width - columns * PATCH_W, 0)


@triton.jit
def token_of_pixel(pixel, width, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr):
    """(position inside a patch, token) of a pixel of a sample: the inverse of pixel_of_token."""
    row, column = pixel // width, pixel % width
    return row % PATCH_H * PATCH_W + column % PATCH_W, row // PATCH_H * (width // PATCH_W) + column // PATCH_W


# Norms


@triton.jit
def at_least_zero(x):
    """What rounding made negative is zero; NaN stays NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def inverse_std(var, eps):
    """1 / sqrt(var + eps). Root and division are correctly rounded: they are needed once for each channel or row, so
    that costs nothing, and every element inherits their error."""
    return tl.div_rn(1.0, tl.sqrt_rn(var + eps))


@triton.jit
def load_folded_norm(
    weight_ptr, bias_ptr, mean_ptr, var_ptr, column, eps, C: tl.constexpr, DTYPE: tl.constexpr = tl.float32
):  # fmt: skip
    """Scale and shift with which a batch norm of known statistics is x * scale + shift, for channels `column` of
    parameters and statistics (C,). On the host: folding.fold_batch_norm. DTYPE is what the result is rounded to: one of
    16 bits hides an error of 2^-22, and of a small map correctly rounded roots would take longer than all the rest."""
    var = load_vector(var_ptr, column, WIDTH=C, OTHER=1.0)
    if DTYPE.primitive_bitwidth > 16:
        rstd = inverse_std(var, eps)
    else:
        rstd = tl.rsqrt(var + eps)
    scale = load_vector(weight_ptr, column, WIDTH=C) * rstd
    bias, mean = load_vector(bias_ptr, column, WIDTH=C), load_vector(mean_ptr, column, WIDTH=C)
    return scale, bias - mean * scale


@triton.jit
def merge_moments(count, mean, m2):
    """Joins the rows of tiles: row i of `mean` and `m2` has the means and sums of squared deviations of count[i] values
    of each column. Returns the number of all values, and mean and sum of squared deviations of each column.

    Chan's formula around a corrected mean: the second sum removes the rounding of the first, so that a mean of many
    standard deviations costs no accuracy.
    """
    total = tl.sum(count, 0)
    safe = tl.maximum(total, 1.0)
    rough = tl.sum(count[:, None] * mean, 0) / safe
    offset = tl.where(count[:, None] > 0, mean - rough[None, :], 0.0)
    correction = tl.sum(count[:, None] * offset, 0) / safe
    m2 = tl.sum(m2 + count[:, None] * offset * offset, 0) - total * correction * correction
    return total, rough + correction, at_least_zero(m2)


@triton.jit
def pairs(x):
    """A tile whose rows, a multiple of 16, are added up eight apart: of a tile that comes from a product each thread
    adds what it holds. Sums that go on through a loop need half of the registers so, and no exchange of threads."""
    return tl.sum(tl.reshape(x, (x.shape[0] // 16, 2, 8, x.shape[1])), 1)


@triton.jit
def sum_of_pairs(x):
    """The sums of the columns of a tile, from its `pairs`."""
    return tl.sum(tl.sum(x, 0), 0)


@triton.jit
def folded_rows(x):
    """A tile whose rows are added up as far apart as eight warps load at once, 16 bytes a thread: each thread adds what
    it holds of a tile in 16 bits. Sums that go on through a loop need fewer registers so, and no exchange of
    threads."""
    ROWS: tl.constexpr = max(2048 // x.shape[1], 16)
    if x.shape[0] > ROWS:
        x = tl.sum(tl.reshape(x, (x.shape[0] // ROWS, ROWS, x.shape[1])), 0)
    return x


@triton.jit
def moments_from_pivot(total, squares, pivot, count):
    """Mean and sum of squared deviations of `count` values of each column, from the `pairs` of their deviations from a
    pivot and of the squares of these. As exact as the pivot is close to the mean, in standard deviations."""
    mean = sum_of_pairs(total) / count
    return pivot + mean, at_least_zero(sum_of_pairs(squares) - count * mean * mean)


@triton.jit
def load_moments(
    part_ptr, parts, rows, rows_per_part, column, valid, C: tl.constexpr, BLOCK_C: tl.constexpr, count_ptr=None,
    MOST: tl.constexpr = None,
):  # fmt: skip
    """Mean and biased variance of columns `column` over all rows, from the means and sums of squared deviations of
    parts of the rows, a (2, parts, C) float32 workspace. A part has `rows_per_part` rows, the last one what is left;
    or as many as `count_ptr` says, (parts,), float32. Where there are at most MOST parts, their loads are on their way
    at once, together with those of what follows."""
    AT_ONCE: tl.constexpr = BLOCK_PARTS if MOST is None else MOST
    lane = tl.arange(0, AT_ONCE)
    count = tl.zeros((AT_ONCE,), tl.float32)
    mean = tl.zeros((AT_ONCE, BLOCK_C), tl.float32)
    m2 = tl.zeros((AT_ONCE, BLOCK_C), tl.float32)
    for first in range(0, parts if MOST is None else MOST, AT_ONCE):
        part = first + lane
        mask = (part < parts)[:, None] & valid[None, :]
        offset = part[:, None] * C + column[None, :]
        delta = tl.load(part_ptr + offset, mask=mask, other=0.0) - mean
        delta = tl.where(mask, delta, 0.0)
        if count_ptr is not None:
            added = tl.load(count_ptr + part, mask=part < parts, other=0.0)
        else:
            left = rows - part.to(tl.int64) * rows_per_part
            added = tl.where(part < parts, tl.minimum(left, rows_per_part), 0).to(tl.float32)
        share = added / tl.maximum(count + added, 1.0)
        mean += delta * share[:, None]
        m2 += tl.load(part_ptr + parts * C + offset, mask=mask, other=0.0) + delta * delta * (count * share)[:, None]
        count += added
    total, mean, m2 = merge_moments(count, mean, m2)
    return mean, m2 / tl.maximum(total, 1.0)


@triton.jit
def load_sums(part_ptr, parts, column, valid, C: tl.constexpr, BLOCK_C: tl.constexpr, MOST: tl.constexpr = None):
    """Sums of columns `column` over the parts of a (parts, C) float32 workspace, of which there are at most MOST."""
    AT_ONCE: tl.constexpr = BLOCK_PARTS if MOST is None else MOST
    lane = tl.arange(0, AT_ONCE)
    total = tl.zeros((AT_ONCE, BLOCK_C), tl.float32)
    for first in range(0, parts if MOST is None else MOST, AT_ONCE):
        part = first + lane
        mask = (part < parts)[:, None] & valid[None, :]
        total += tl.load(part_ptr + part[:, None] * C + column[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


# How rows are divided among programs


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
    """Multiprocessors of the GPU of `x`; the interpreter plays a GPU of 2, so that small tensors are split over
    programs too."""
    return _multiprocessors(x.get_device()) if x.is_cuda else 2


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def multiplies_from_shared_memory(x: Tensor) -> bool:
    """Whether the GPU of `x` is of NVIDIA's generation that multiplies 64 rows straight from shared memory (sm_90). The
    others hold the operands of a product in registers, so that their tiles must be smaller."""
    if interpreted():
        return True
    if x.is_cuda:
        return torch.version.hip is None and _capability(x.get_device()) == (9, 0)
    return triton.runtime.driver.active.get_current_target().arch == 90  # compiling for a GPU that is not there


def on_device(x: Tensor) -> AbstractContextManager[None]:
    """Makes the GPU of `x` the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda and x.get_device() != torch.cuda.current_device() else nullcontext()


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as kernels take them; None stays None."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


def multiplied(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Weights, contiguous, as products with `x` read them: rounded to its dtype once, not by every program, which would
    ask the cache for twice the bytes. A weight of that dtype costs nothing, another one a launch, which is
    more than it saves in a forward pass of few rows."""
    return tuple(t.to(x.dtype).contiguous() for t in weights)


def product_in(dtype: torch.dtype, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, its sums rounded once, to `dtype`: that of a and b, or float32. Written to `out` where given, a tensor of
    that dtype, or some columns of one."""
    if dtype is a.dtype:
        return torch.mm(a, b, out=out)
    if interpreted() or torch.version.hip:  # PyTorch has it for NVIDIA's alone
        product = (a.float() @ b.float()).to(dtype)
        return product if out is None else out.copy_(product)
    return torch.mm(a, b, out_dtype=dtype) if out is None else torch.mm(a, b, out_dtype=dtype, out=out)


def rows_at_one_distance(x: Tensor) -> tuple[Tensor, int]:
    """`x` and the number of elements from one row to the next. Some channels of a map with more, as the gradient of a
    concatenation is, stay where they are; a map whose rows do not follow each other at one distance is copied."""
    stride = x.stride(-2)
    whole = x.stride(-1) == 1 and stride >= x.shape[-1]
    for size, outer, inner in zip(x.shape[1:-1], x.stride(), x.stride()[1:-1], strict=False):
        whole = whole and outer == inner * size
    return (x, stride) if whole and x.numel() > 0 else (x.contiguous(), x.shape[-1])


def most_parts(parts: int) -> int | None:
    """A bound for so many parts that a kernel is compiled for, which reads them at once then, or None."""
    return next((most for most in (FEW_PARTS, BLOCK_PARTS.value) if parts <= most), None)


def split_rows(rows: int, programs: int, block: int) -> tuple[int, int]:
    """(number of programs, rows of each), at most `programs` of at least `block` rows; none is empty.

    The rows of a program need not be a multiple of the block: masked lanes cost no traffic, an uneven split costs time.
    """
    per_program = max(cdiv(rows, max(programs, 1)), block)
    return cdiv(rows, per_program), per_program
