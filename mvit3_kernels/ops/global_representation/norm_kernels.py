"""Triton kernels of the final norm, on whole rows as in triton_row_kernels.py."""

from __future__ import annotations

import triton.language as tl

from ..triton_common import load_sums, store_vector
from ..triton_launch import jit_kernel
from ..triton_row_kernels import (
    NOT_SPECIALIZED,
    load_row_statistics,
    load_row_vector,
    load_rows_in_float32,
    measure_and_normalise_rows,
    normalise_rows,
    row_columns,
    store_rows,
)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def norm_fwd_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr,  # (rows, C), (C,), (C,)
    y_ptr, mean_ptr, rstd_ptr,  # written: (rows, C), like x; (rows,), float32
    rows, eps,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) * rstd * norm_weight + norm_bias of each row. A program has BLOCK_M rows. Reads x once, writes y
    once."""
    lane = tl.arange(0, BLOCK_M)
    row = tl.program_id(0) * BLOCK_M + lane
    start, valid = tl.program_id(0).to(tl.int64) * BLOCK_M, row < rows
    head, tail = measure_and_normalise_rows(
        x_ptr + start * C, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, lane, row, valid, rows, eps,
        PER_SAMPLE=False, C=C, HEAD=HEAD, TAIL=TAIL,
    )  # fmt: skip
    store_rows(y_ptr + start * C, lane, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def sample_norm_fwd_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr,  # (rows, C), (C,), (C,), (samples,), (samples,)
    y_ptr,  # written: (rows, C), like x
    rows, rows_per_sample,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The same where mean and rstd are of samples, and known. A program has BLOCK_M rows. Reads x once, writes y
    once."""
    lane = tl.arange(0, BLOCK_M)
    row = tl.program_id(0) * BLOCK_M + lane
    start, valid = tl.program_id(0).to(tl.int64) * BLOCK_M, row < rows
    head, tail = normalise_rows(
        x_ptr + start * C, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, lane, row, valid, rows_per_sample,
        PER_SAMPLE=True, C=C, HEAD=HEAD, TAIL=TAIL,
    )  # fmt: skip
    store_rows(y_ptr + start * C, lane, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def norm_bwd_kernel(
    dy_ptr, x_ptr, norm_weight_ptr, mean_ptr, rstd_ptr,  # (rows, C), (rows, C), (C,), (rows,), (rows,)
    dx_ptr, part_ptr,  # written: (rows, C), like x; (parts, 2, C), float32
    rows, rows_per_part,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """With n = (x - mean) * rstd and g = dy * norm_weight:

        dx = rstd * (g - mean(g) - n * mean(g * n)), and the sums of dy * n and of dy over the rows of a part

    A program has a part. Reads dy and x once, writes dx once."""
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    head_weight, tail_weight = load_row_vector(norm_weight_ptr, C=C, HEAD=HEAD, TAIL=TAIL)
    lane = tl.arange(0, BLOCK_M)
    head_sums, tail_sums = tl.zeros((BLOCK_M, HEAD), tl.float32), tl.zeros((BLOCK_M, TAIL), tl.float32)
    head_product, tail_product = tl.zeros((BLOCK_M, HEAD), tl.float32), tl.zeros((BLOCK_M, TAIL), tl.float32)
    begin = tl.program_id(0) * rows_per_part
    length = tl.minimum(rows - begin, rows_per_part)
    for first in range(0, length, BLOCK_M):
        start, valid = begin.to(tl.int64) + first, first + lane < length
        head_x, tail_x = load_rows_in_float32(x_ptr + start * C, lane, valid, C=C, HEAD=HEAD, TAIL=TAIL)
        head, tail = load_rows_in_float32(dy_ptr + start * C, lane, valid, C=C, HEAD=HEAD, TAIL=TAIL)
        row = begin + first + lane
        mean, rstd = load_row_statistics(mean_ptr, rstd_ptr, row, valid, rows, PER_SAMPLE=False)
        head_normal, tail_normal = (head_x - mean) * rstd, (tail_x - mean) * rstd
        head_sums += head
        tail_sums += tail
        head_product += head * head_normal
        tail_product += tail * tail_normal
        head *= head_weight
        tail *= tail_weight
        total = ((tl.sum(head, 1) + tl.sum(tail, 1)) / C)[:, None]
        product = ((tl.sum(head * head_normal, 1) + tl.sum(tail * tail_normal, 1)) / C)[:, None]
        head = rstd * (head - total - head_normal * product)
        tail = rstd * (tail - total - tail_normal * product)
        store_rows(dx_ptr + start * C, lane, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)
    part_ptr += tl.program_id(0) * (2 * C)
    store_vector(part_ptr, head_column, tl.sum(head_product, 0), WIDTH=C)
    store_vector(part_ptr, tail_column, tl.sum(tail_product, 0), WIDTH=C)
    store_vector(part_ptr + C, head_column, tl.sum(head_sums, 0), WIDTH=C)
    store_vector(part_ptr + C, tail_column, tl.sum(tail_sums, 0), WIDTH=C)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def norm_gradient_kernel(
    part_ptr,  # (parts, 2, C), float32, of norm_bwd_kernel
    dweight_ptr, dbias_ptr,  # written: (C,), like the parameters
    parts,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of the parts. A program has BLOCK channels."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dweight = load_sums(part_ptr, parts, column, column < C, C=2 * C, BLOCK_C=BLOCK)
    dbias = load_sums(part_ptr + C, parts, column, column < C, C=2 * C, BLOCK_C=BLOCK)
    store_vector(dweight_ptr, column, dweight, WIDTH=C)
    store_vector(dbias_ptr, column, dbias, WIDTH=C)
