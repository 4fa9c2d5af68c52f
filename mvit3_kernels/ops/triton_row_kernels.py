"""Triton kernels on whole rows, for a layer norm in front of a linear map: what reads rows, measures and normalises
them. triton_row_gradients.py has those of the gradients, triton_rows.py launches both.

A map (B, H, W, C) is a matrix (rows, C) here, a row for each token, and a program holds whole rows. It holds them as
two tiles, the head of HEAD columns and the tail of TAIL columns, because Triton's tiles have widths that are powers of
2: 144 channels are 128 + 16 columns and 192 are 128 + 64, where one tile would have 256, nearly half of them for
nothing. As the whole row is at hand, measuring a token costs no pass over memory of its own, and neither does the
gradient of its norm.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import sizes
from .triton_common import (
    at_least_zero,
    dot,
    dropped,
    inverse_std,
    load_tile,
    load_vector,
    merge_moments,
    store_tile,
)
from .triton_launch import jit_kernel

MOST_SAMPLE_PARTS = tl.constexpr(sizes.MOST_SAMPLE_PARTS)

NOT_SPECIALIZED = [
    "rows",
    "rows_per_sample",
    "rows_per_part",
    "parts",
    "samples",
    "most_parts",
    "norm_parts",
    "blocks_per_program",
    "eps",
    "keep",
    "keep_scale",
]


# Rows as two tiles


@triton.jit
def row_columns(HEAD: tl.constexpr, TAIL: tl.constexpr):
    """The columns of head and tail."""
    return tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)


@triton.jit
def load_rows(ptr, row, valid, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Rows `row` of a matrix (.., C) in its dtype; zeros where a row is not valid and from column C on."""
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    head = load_tile(ptr, row, valid, head_column, WIDTH=C)
    return head, load_tile(ptr, row, valid, tail_column, WIDTH=C)


@triton.jit
def load_rows_in_float32(
    ptr, row, valid, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, AGAIN: tl.constexpr = False
):
    """The same in float32."""
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    head = load_tile(ptr, row, valid, head_column, WIDTH=C, AGAIN=AGAIN).to(tl.float32)
    return head, load_tile(ptr, row, valid, tail_column, WIDTH=C, AGAIN=AGAIN).to(tl.float32)


@triton.jit
def store_rows(ptr, row, valid, head, tail, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Writes rows `row` of a matrix (.., C), rounded to its dtype."""
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    store_tile(ptr, row, valid, head_column, head, WIDTH=C)
    store_tile(ptr, row, valid, tail_column, tail, WIDTH=C)


@triton.jit
def load_row_vector(ptr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """A parameter (C,) in float32 as the head and the tail of one row; zeros where there is none."""
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    head = load_vector(ptr, head_column, WIDTH=C)
    return head[None, :], load_vector(ptr, tail_column, WIDTH=C)[None, :]


@triton.jit
def load_weight(ptr, output, like, C: tl.constexpr, OUT: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """The rows `output` of a weight (OUT, C), in the dtype of `like`."""
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    head = load_tile(ptr, output, output < OUT, head_column, WIDTH=C).to(like.dtype)
    return head, load_tile(ptr, output, output < OUT, tail_column, WIDTH=C).to(like.dtype)


@triton.jit
def multiply_rows(head, tail, head_weight, tail_weight):
    """rows @ weight^T in float32."""
    sums = tl.zeros((head.shape[0], head_weight.shape[0]), tl.float32)
    return dot(tail, tl.trans(tail_weight), dot(head, tl.trans(head_weight), sums))


@triton.jit
def add_columns_product(
    head, tail, block, weight_ptr, column,
    WIDTH: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """rows + block @ weight^T in float32, for a block of the columns `column` of what a weight (C, WIDTH)
    multiplies."""
    head_row, tail_row = row_columns(HEAD=HEAD, TAIL=TAIL)
    weight = load_tile(weight_ptr, head_row, head_row < C, column, WIDTH=WIDTH).to(block.dtype)
    head = dot(block, tl.trans(weight), head)
    weight = load_tile(weight_ptr, tail_row, tail_row < C, column, WIDTH=WIDTH).to(block.dtype)
    return head, dot(block, tl.trans(weight), tail)


@triton.jit
def multiply_by_columns(
    head, tail, weight_ptr, column, WIDTH: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr
):
    """rows @ weight in float32, for the columns `column` of a weight (C, WIDTH)."""
    head_row, tail_row = row_columns(HEAD=HEAD, TAIL=TAIL)
    sums = tl.zeros((head.shape[0], column.shape[0]), tl.float32)
    sums = dot(head, load_tile(weight_ptr, head_row, head_row < C, column, WIDTH=WIDTH).to(head.dtype), sums)
    return dot(tail, load_tile(weight_ptr, tail_row, tail_row < C, column, WIDTH=WIDTH).to(tail.dtype), sums)


@triton.jit
def drop_rows(
    head, tail, seed_ptr, row, rows_per_sample, keep, keep_scale,
    SITE: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Rows `row` of a map of C channels after dropout, in float32 as they come; `row` counts over all samples."""
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    head = dropped(head, seed_ptr, row, head_column, rows_per_sample, keep, keep_scale, SITE=SITE, WIDTH=C)
    return head, dropped(tail, seed_ptr, row, tail_column, rows_per_sample, keep, keep_scale, SITE=SITE, WIDTH=C)


# Statistics of a layer norm


@triton.jit
def row_statistics(head, tail, eps, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of each row of float32 tiles. The squares are of distances to a first mean,
    which the sum of these distances then corrects."""
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    mean = (tl.sum(head, 1) + tl.sum(tail, 1)) / C
    head = tl.where((head_column < C)[None, :], head - mean[:, None], 0.0)
    tail = tl.where((tail_column < C)[None, :], tail - mean[:, None], 0.0)
    offset = (tl.sum(head, 1) + tl.sum(tail, 1)) / C
    var = (tl.sum(head * head, 1) + tl.sum(tail * tail, 1)) / C - offset * offset
    return mean + offset, inverse_std(at_least_zero(var), eps)


@triton.jit
def _measure(x_ptr, rows, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr):
    """Number, mean and biased variance of all values of the first `rows` rows of x (.., C), which are read once.

    The sums are of distances to the mean of the first rows, so that a large mean costs no accuracy."""
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    lane = tl.arange(0, BLOCK_M)
    count = rows.to(tl.float32) * C
    head, tail = load_rows_in_float32(x_ptr, lane, lane < rows, C=C, HEAD=HEAD, TAIL=TAIL)
    pivot = (tl.sum(head) + tl.sum(tail)) / (tl.minimum(rows, BLOCK_M).to(tl.float32) * C)
    total = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, rows, BLOCK_M):
        valid = first + lane < rows
        head, tail = load_rows_in_float32(x_ptr + first * C, lane, valid, C=C, HEAD=HEAD, TAIL=TAIL)
        head = tl.where(valid[:, None] & (head_column < C)[None, :], head - pivot, 0.0)
        tail = tl.where(valid[:, None] & (tail_column < C)[None, :], tail - pivot, 0.0)
        total += tl.sum(head, 1) + tl.sum(tail, 1)
        squares += tl.sum(head * head, 1) + tl.sum(tail * tail, 1)
    offset = tl.sum(total) / count
    var = at_least_zero(tl.sum(squares) / count - offset * offset)
    return count, pivot + offset, var


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def sample_statistics_kernel(
    x_ptr,  # (samples * rows_per_sample, C)
    mean_ptr, rstd_ptr,  # written: (samples,), float32
    rows_per_sample, eps,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """mean and rstd = 1 / sqrt(variance + eps) of all values of a sample, a program for each. Reads x once."""
    sample = tl.program_id(0)
    x_ptr += sample.to(tl.int64) * rows_per_sample * C
    _, mean, var = _measure(x_ptr, rows_per_sample, C=C, HEAD=HEAD, TAIL=TAIL, BLOCK_M=BLOCK_M)
    tl.store(mean_ptr + sample, mean)
    tl.store(rstd_ptr + sample, inverse_std(var, eps))


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def part_statistics_kernel(
    x_ptr,  # (samples * rows_per_sample, C)
    moments_ptr,  # written: (3, samples, most_parts), float32
    rows_per_sample, rows_per_part, parts, most_parts,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Number, mean and sum of squared deviations of all values of a part of a sample, a program for each. Reads x
    once."""
    sample, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    x_ptr += (sample.to(tl.int64) * rows_per_sample + part * rows_per_part) * C
    rows = tl.minimum(rows_per_sample - part * rows_per_part, rows_per_part)
    count, mean, var = _measure(x_ptr, rows, C=C, HEAD=HEAD, TAIL=TAIL, BLOCK_M=BLOCK_M)
    _store_part(moments_ptr, sample, tl.num_programs(0) // parts, part, most_parts, count, mean, var * count)


@triton.jit
def _store_part(moments_ptr, sample, samples, part, most_parts, count, mean, m2):
    at, stride = moments_ptr + sample * most_parts + part, samples * most_parts
    tl.store(at, count)
    tl.store(at + stride, mean)
    tl.store(at + 2 * stride, m2)


@triton.jit
def store_moments_of_rows(
    moments_ptr,  # written: (3, samples, most_parts), float32
    sample, samples, part, most_parts, head, tail, valid, pivot,
    EXACT: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """What part_statistics_kernel finds in rows, from the tiles that are about to be rounded and stored, whose rounding
    moves a mean of many values by next to nothing; as exact as `pivot` is close to their mean, in standard deviations,
    unless deviations from the mean itself are summed: EXACT."""
    count = tl.sum(valid.to(tl.float32), 0) * C
    if EXACT:
        head_total, tail_total, _ = _sums_of_rows(head, tail, valid, C=C, HEAD=HEAD, TAIL=TAIL)
        pivot = (head_total + tail_total) / tl.maximum(count, 1.0)
    head_total, tail_total, squares = _sums_of_rows(head - pivot, tail - pivot, valid, C=C, HEAD=HEAD, TAIL=TAIL)
    offset = (head_total + tail_total) / tl.maximum(count, 1.0)
    m2 = at_least_zero(squares - count * offset * offset)
    _store_part(moments_ptr, sample, samples, part, most_parts, count, pivot + offset, m2)


@triton.jit
def _sums_of_rows(head, tail, valid, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Of both tiles, and of all squares."""
    if HEAD + TAIL > C:
        head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
        head = tl.where((head_column < C)[None, :], head, 0.0)
        tail = tl.where((tail_column < C)[None, :], tail, 0.0)
    head_total = tl.sum(tl.where(valid, tl.sum(head, 1), 0.0), 0)
    tail_total = tl.sum(tl.where(valid, tl.sum(tail, 1), 0.0), 0)
    return head_total, tail_total, tl.sum(tl.where(valid, tl.sum(head * head, 1) + tl.sum(tail * tail, 1), 0.0), 0)


@triton.jit
def load_sample_statistics(moments_ptr, sample, samples, parts, most_parts, eps):
    """Mean and 1 / sqrt(variance + eps) of a sample from the moments of its parts."""
    part = tl.arange(0, MOST_SAMPLE_PARTS)
    at, stride = moments_ptr + sample * most_parts + part, samples * most_parts
    count = tl.load(at, mask=part < parts, other=0.0)
    mean = tl.load(at + stride, mask=part < parts, other=0.0)
    m2 = tl.load(at + 2 * stride, mask=part < parts, other=0.0)
    total, mean, m2 = merge_moments(count, mean[:, None], m2[:, None])
    return tl.sum(mean, 0), inverse_std(tl.sum(m2, 0) / total, eps)


@triton.jit
def load_row_statistics(mean_ptr, rstd_ptr, row, valid, rows_per_sample, PER_SAMPLE: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of rows `row`, or of the samples that they belong to, as (rows, 1)."""
    if PER_SAMPLE:
        row = row // rows_per_sample
    mean = tl.load(mean_ptr + row, mask=valid, other=0.0)
    return mean[:, None], tl.load(rstd_ptr + row, mask=valid, other=0.0)[:, None]


# The norm forward


@triton.jit
def normalise(
    head, tail, mean, rstd, norm_weight_ptr, norm_bias_ptr, DTYPE: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """(rows - mean) * rstd * weight + bias of float32 tiles, rounded to `DTYPE`."""
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    weight, bias = load_vector(norm_weight_ptr, head_column, WIDTH=C), load_vector(norm_bias_ptr, head_column, WIDTH=C)
    head = ((head - mean) * rstd * weight[None, :] + bias[None, :]).to(DTYPE)
    weight, bias = load_vector(norm_weight_ptr, tail_column, WIDTH=C), load_vector(norm_bias_ptr, tail_column, WIDTH=C)
    tail = ((tail - mean) * rstd * weight[None, :] + bias[None, :]).to(DTYPE)
    return head, tail


@triton.jit
def normalise_rows(
    x_ptr,  # (.., C), read at `at`
    norm_weight_ptr, norm_bias_ptr,  # (C,)
    mean_ptr, rstd_ptr,  # (rows,) or, PER_SAMPLE, (samples,), float32, read for `row`
    at, row, valid, rows_per_sample,
    PER_SAMPLE: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """norm(x) for rows whose statistics are known, rounded to the dtype of x; zeros from column C on. `at` are rows
    from `x_ptr` on, `row` the same rows counted from the first one of the map."""
    head, tail = load_rows_in_float32(x_ptr, at, valid, C=C, HEAD=HEAD, TAIL=TAIL)
    mean, rstd = load_row_statistics(mean_ptr, rstd_ptr, row, valid, rows_per_sample, PER_SAMPLE=PER_SAMPLE)
    return normalise(
        head, tail, mean, rstd, norm_weight_ptr, norm_bias_ptr, DTYPE=x_ptr.dtype.element_ty, C=C, HEAD=HEAD, TAIL=TAIL
    )


@triton.jit
def measure_and_normalise_rows(
    x_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, at, row, valid, rows_per_sample, eps,
    PER_SAMPLE: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The same in a forward pass, where statistics of samples are known and those of tokens are measured here. The
    first of the programs that share rows writes them to `mean_ptr` and `rstd_ptr`."""
    head, tail = load_rows_in_float32(x_ptr, at, valid, C=C, HEAD=HEAD, TAIL=TAIL)
    if PER_SAMPLE:
        mean, rstd = load_row_statistics(mean_ptr, rstd_ptr, row, valid, rows_per_sample, PER_SAMPLE=True)
    else:
        row_mean, row_rstd = row_statistics(head, tail, eps, C=C, HEAD=HEAD, TAIL=TAIL)
        if tl.program_id(1) == 0:
            tl.store(mean_ptr + row, row_mean, mask=valid)
            tl.store(rstd_ptr + row, row_rstd, mask=valid)
        mean, rstd = row_mean[:, None], row_rstd[:, None]
        head, tail = load_rows_in_float32(x_ptr, at, valid, C=C, HEAD=HEAD, TAIL=TAIL, AGAIN=True)
    return normalise(
        head, tail, mean, rstd, norm_weight_ptr, norm_bias_ptr, DTYPE=x_ptr.dtype.element_ty, C=C, HEAD=HEAD, TAIL=TAIL
    )
