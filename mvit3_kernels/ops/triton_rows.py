"""Whole rows of a map in a program: what the Triton kernels of a layer norm in front of a linear map share.

A row is two tiles, each a power of 2 wide, for few widths of the networks are one: 144 channels are 128 + 16, 192 are 128 + 64, and nothing
is multiplied in vain, where one tile of 256 would be half empty. With the whole row at hand the statistics of a token cost no pass, and its
gradient needs no second one. Gradients of parameters are partial sums of a range of rows for each program, in a float32 workspace, which
one small launch adds up in a fixed order: no atomics, the same result in every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .triton_common import (
    at_least_zero,
    dot,
    dropout_threshold,
    dropped,
    inverse_std,
    merge_moments,
    multiplies_from_shared_memory,
    multiprocessors,
    on_device,
    split_rows,
)

# A sample is measured in at most so many parts, which every program that needs its statistics joins for itself.
MOST_SAMPLE_PARTS = tl.constexpr(32)

NOT_SPECIALIZED = ["rows", "rows_per_sample", "rows_per_part", "parts", "outputs_per_program", "eps", "keep", "keep_scale"]


def two_tiles(channels: int, even: bool) -> tuple[int, int]:
    """Widths of the tiles of a row, at least 16 each, which a product needs."""
    head = max(triton.next_power_of_2(channels) // 2, 16)
    return head, head if even else max(triton.next_power_of_2(max(channels - head, 1)), 16)


@triton.jit
def load_tile(ptr, lane, valid, column, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `lane` of a matrix with rows of STRIDE values, as it is stored; zeros from WIDTH on and where a row is not valid."""
    mask = valid[:, None] & (column < WIDTH)[None, :]
    return tl.load(ptr + lane[:, None] * STRIDE + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, lane, valid, column, tile, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    mask = valid[:, None] & (column < WIDTH)[None, :]
    tl.store(ptr + lane[:, None] * STRIDE + column[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(ptr, column, WIDTH: tl.constexpr):
    """Part of a parameter in float32, one value a column; zeros where there is no parameter."""
    if ptr is None:
        vector = column.to(tl.float32) * 0.0
    else:
        vector = tl.load(ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    return vector


@triton.jit
def row_statistics(head, tail, head_column, tail_column, eps, C: tl.constexpr):
    """Mean and 1 / deviation of each row of float32 tiles. Distances are summed to a mean that their own sum corrects."""
    mean = (tl.sum(head, 1) + tl.sum(tail, 1)) / C
    head = tl.where((head_column < C)[None, :], head - mean[:, None], 0.0)
    tail = tl.where((tail_column < C)[None, :], tail - mean[:, None], 0.0)
    offset = (tl.sum(head, 1) + tl.sum(tail, 1)) / C
    var = (tl.sum(head * head, 1) + tl.sum(tail * tail, 1)) / C - offset * offset
    return mean + offset, inverse_std(at_least_zero(var), eps)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _sample_statistics_kernel(
    x_ptr, mean_ptr, spread_ptr, rows_per_sample, rows_per_part, parts, eps,
    PARTIAL: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Of a part of a sample: the mean, and 1 / deviation or, where PARTIAL, the sum of squared distances to the mean."""
    head_column, tail_column = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    lane = tl.arange(0, BLOCK_M)
    sample, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    x_ptr += (sample.to(tl.int64) * rows_per_sample + part * rows_per_part) * C
    rows = tl.minimum(rows_per_sample - part * rows_per_part, rows_per_part)
    count = rows.to(tl.float32) * C
    # Distances to the mean of the first rows: a large mean costs no accuracy.
    valid = lane < rows
    head = load_tile(x_ptr, lane, valid, head_column, C, C).to(tl.float32)
    tail = load_tile(x_ptr, lane, valid, tail_column, C, C).to(tl.float32)
    pivot = (tl.sum(head) + tl.sum(tail)) / (tl.minimum(rows, BLOCK_M).to(tl.float32) * C)
    total = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, rows, BLOCK_M):
        valid = first + lane < rows
        head = load_tile(x_ptr + first * C, lane, valid, head_column, C, C).to(tl.float32)
        tail = load_tile(x_ptr + first * C, lane, valid, tail_column, C, C).to(tl.float32)
        head = tl.where(valid[:, None] & (head_column < C)[None, :], head - pivot, 0.0)
        tail = tl.where(valid[:, None] & (tail_column < C)[None, :], tail - pivot, 0.0)
        total += tl.sum(head, 1) + tl.sum(tail, 1)
        squares += tl.sum(head * head, 1) + tl.sum(tail * tail, 1)
    offset = tl.sum(total) / count
    spread = at_least_zero(tl.sum(squares) / count - offset * offset)
    tl.store(mean_ptr + tl.program_id(0), pivot + offset)
    tl.store(spread_ptr + tl.program_id(0), spread * count if PARTIAL else inverse_std(spread, eps))


@triton.jit
def load_sample_statistics(part_mean_ptr, part_spread_ptr, sample, rows_per_sample, rows_per_part, parts, eps, C: tl.constexpr):
    """Mean and 1 / deviation of a sample from those of its parts, at most MOST_SAMPLE_PARTS."""
    part = tl.arange(0, MOST_SAMPLE_PARTS)
    valid = part < parts
    at = sample * parts + part
    rows = tl.where(valid, tl.minimum(rows_per_sample - part * rows_per_part, rows_per_part), 0)
    mean = tl.load(part_mean_ptr + at, mask=valid, other=0.0)
    spread = tl.load(part_spread_ptr + at, mask=valid, other=0.0)
    total, mean, spread = merge_moments(rows.to(tl.float32) * C, mean[:, None], spread[:, None])
    return tl.sum(mean, 0), inverse_std(tl.sum(spread, 0) / total, eps)


@triton.jit
def load_row_statistics(mean_ptr, rstd_ptr, row, valid, rows_per_sample, PER_SAMPLE: tl.constexpr):
    if PER_SAMPLE:
        row = row // rows_per_sample
    return tl.load(mean_ptr + row, mask=valid, other=0.0)[:, None], tl.load(rstd_ptr + row, mask=valid, other=0.0)[:, None]


@triton.jit
def normalise_rows(
    x_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, lane, row, valid, rows_per_sample, eps,
    MEASURE: tl.constexpr, PER_SAMPLE: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The normalised rows in the dtype of x, and zeros from C on. `x_ptr` points to the first row of the program. With MEASURE tokens are
    measured, and their statistics stored; samples are measured already."""
    head_column, tail_column = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    head = load_tile(x_ptr, lane, valid, head_column, C, C).to(tl.float32)
    tail = load_tile(x_ptr, lane, valid, tail_column, C, C).to(tl.float32)
    if MEASURE and not PER_SAMPLE:
        row_mean, row_rstd = row_statistics(head, tail, head_column, tail_column, eps, C)
        if tl.program_id(1) == 0:
            tl.store(mean_ptr + row, row_mean, mask=valid)
            tl.store(rstd_ptr + row, row_rstd, mask=valid)
        mean, rstd = row_mean[:, None], row_rstd[:, None]
    else:
        mean, rstd = load_row_statistics(mean_ptr, rstd_ptr, row, valid, rows_per_sample, PER_SAMPLE)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    scale, shift = load_vector(norm_weight_ptr, head_column, C), load_vector(norm_bias_ptr, head_column, C)
    head = ((head - mean) * rstd * scale[None, :] + shift[None, :]).to(dtype)
    scale, shift = load_vector(norm_weight_ptr, tail_column, C), load_vector(norm_bias_ptr, tail_column, C)
    tail = ((tail - mean) * rstd * scale[None, :] + shift[None, :]).to(dtype)
    return head, tail


@triton.jit
def load_weight(ptr, output, like, C: tl.constexpr, OUT: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """The rows `output` of a weight (OUT, C) as two tiles, in the dtype of `like`."""
    head = load_tile(ptr, output, output < OUT, tl.arange(0, HEAD), C, C).to(like.dtype)
    return head, load_tile(ptr, output, output < OUT, HEAD + tl.arange(0, TAIL), C, C).to(like.dtype)


@triton.jit
def multiply_rows(head, tail, head_weight, tail_weight):
    """rows @ weight^T in float32."""
    sums = tl.zeros((head.shape[0], head_weight.shape[0]), tl.float32)
    return dot(tail, tl.trans(tail_weight), dot(head, tl.trans(head_weight), sums))


@triton.jit
def store_norm_gradient(
    dx_ptr, sums_ptr, residual_ptr, lane, row, valid, head_column, tail_column, head, tail, head_normal, tail_normal, rstd, rows,
    PER_SAMPLE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Takes the gradients of the normalised rows to those of the rows, plus a residual's. Per sample the means that this needs are known
    only when all rows are: dx holds the gradients of the normalised rows until then, and `sums_ptr` their row sums, (2, rows)."""
    total = tl.sum(head, 1) + tl.sum(tail, 1)
    product = tl.sum(head * head_normal, 1) + tl.sum(tail * tail_normal, 1)
    if PER_SAMPLE:
        tl.store(sums_ptr + row, total, mask=valid)
        tl.store(sums_ptr + rows + row, product, mask=valid)
    else:
        head = rstd * (head - (total / C)[:, None] - head_normal * (product / C)[:, None])
        tail = rstd * (tail - (total / C)[:, None] - tail_normal * (product / C)[:, None])
        if residual_ptr is not None:
            head += load_tile(residual_ptr, lane, valid, head_column, C, C).to(tl.float32)
            tail += load_tile(residual_ptr, lane, valid, tail_column, C, C).to(tl.float32)
    store_tile(dx_ptr, lane, valid, head_column, head, C, C)
    store_tile(dx_ptr, lane, valid, tail_column, tail, C, C)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _input_bwd_kernel(
    dy_ptr, x_ptr, residual_ptr, norm_weight_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, sums_ptr, rows, rows_per_sample,
    PER_SAMPLE: tl.constexpr, OUT: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head_column, tail_column, lane = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL), tl.arange(0, BLOCK_M)
    row = tl.program_id(0) * BLOCK_M + lane
    start, valid = tl.program_id(0).to(tl.int64) * BLOCK_M, row < rows
    head = tl.zeros((BLOCK_M, HEAD), tl.float32)
    tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    for first in range(0, OUT, BLOCK_N):
        output = first + tl.arange(0, BLOCK_N)
        dy = load_tile(dy_ptr + start * OUT, lane, valid, output, OUT, OUT)
        head_weight, tail_weight = load_weight(weight_ptr, output, dy, C, OUT, HEAD, TAIL)
        head = dot(dy, head_weight, head)
        tail = dot(dy, tail_weight, tail)
    mean, rstd = load_row_statistics(mean_ptr, rstd_ptr, row, valid, rows_per_sample, PER_SAMPLE)
    head_normal = (load_tile(x_ptr + start * C, lane, valid, head_column, C, C).to(tl.float32) - mean) * rstd
    tail_normal = (load_tile(x_ptr + start * C, lane, valid, tail_column, C, C).to(tl.float32) - mean) * rstd
    head *= load_vector(norm_weight_ptr, head_column, C)[None, :]
    tail *= load_vector(norm_weight_ptr, tail_column, C)[None, :]
    if residual_ptr is not None:
        residual_ptr += start * C
    store_norm_gradient(
        dx_ptr + start * C, sums_ptr, residual_ptr, lane, row, valid, head_column, tail_column, head, tail, head_normal, tail_normal,
        rstd, rows, PER_SAMPLE, C,
    )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _sample_gradient_kernel(
    dx_ptr, x_ptr, residual_ptr, mean_ptr, rstd_ptr, sums_ptr, rows, rows_per_sample,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    sample, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_M)
    wide = tl.arange(0, 1024)
    sums_ptr += sample * rows_per_sample
    total = tl.zeros((1024,), tl.float32)
    product = tl.zeros((1024,), tl.float32)
    for first in range(0, rows_per_sample, 1024):
        valid = first + wide < rows_per_sample
        total += tl.load(sums_ptr + first + wide, mask=valid, other=0.0)
        product += tl.load(sums_ptr + rows + first + wide, mask=valid, other=0.0)
    count = rows_per_sample.to(tl.float32) * C
    offset, slope = tl.sum(total) / count, tl.sum(product) / count
    mean, rstd = tl.load(mean_ptr + sample), tl.load(rstd_ptr + sample)

    first = tl.program_id(1) * BLOCK_M
    valid = first + lane < rows_per_sample
    at = (sample * rows_per_sample + first) * C
    for part in tl.static_range(2):
        column = tl.arange(0, HEAD) if part == 0 else HEAD + tl.arange(0, TAIL)
        normal = (load_tile(x_ptr + at, lane, valid, column, C, C).to(tl.float32) - mean) * rstd
        grad = load_tile(dx_ptr + at, lane, valid, column, C, C).to(tl.float32)
        grad = rstd * (grad - offset - normal * slope)
        if residual_ptr is not None:
            grad += load_tile(residual_ptr + at, lane, valid, column, C, C).to(tl.float32)
        store_tile(dx_ptr + at, lane, valid, column, grad, C, C)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _row_products_kernel(
    a_ptr, extra_ptr, x_ptr, mean_ptr, rstd_ptr, seed_ptr, product_ptr, sums_ptr, rows, rows_per_sample, rows_per_part, keep, keep_scale,
    PER_SAMPLE: tl.constexpr, OUT: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A part of a^T x and of a sum. With statistics x is normalised, and the sum is that of a; without them x goes through the dropout of
    site 1, if there is a seed, and the sum is that of x. `extra_ptr`, with statistics only, is one more column of a, in float32."""
    head_column, tail_column, lane = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL), tl.arange(0, BLOCK_M)
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    head = tl.zeros((BLOCK_N, HEAD), tl.float32)
    tail = tl.zeros((BLOCK_N, TAIL), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    extra_total = tl.zeros((BLOCK_M,), tl.float32)
    head_total = tl.zeros((HEAD,), tl.float32)
    tail_total = tl.zeros((TAIL,), tl.float32)
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, rows)
    for first in range(0, end - begin, BLOCK_M):
        start, row = begin.to(tl.int64) + first, begin + first + lane
        a = load_tile(a_ptr + start * OUT, lane, row < end, output, OUT, OUT)
        head_x = load_tile(x_ptr + start * C, lane, row < end, head_column, C, C)
        tail_x = load_tile(x_ptr + start * C, lane, row < end, tail_column, C, C)
        if mean_ptr is not None:
            total += a.to(tl.float32)
            mean, rstd = load_row_statistics(mean_ptr, rstd_ptr, row, row < end, rows_per_sample, PER_SAMPLE)
            head_normal = (head_x.to(tl.float32) - mean) * rstd
            tail_normal = (tail_x.to(tl.float32) - mean) * rstd
            if extra_ptr is not None and tl.program_id(0) == 0:
                extra = tl.load(extra_ptr + row, mask=row < end, other=0.0)
                extra_total += extra
                head_total += tl.sum(extra[:, None] * head_normal, 0)
                tail_total += tl.sum(extra[:, None] * tail_normal, 0)
            head_x = head_normal.to(a.dtype)
            tail_x = tail_normal.to(a.dtype)
        else:
            if seed_ptr is not None:
                head_x = dropped(head_x.to(tl.float32), seed_ptr, row, head_column, rows_per_sample, keep, keep_scale, 1, C).to(a.dtype)
                tail_x = dropped(tail_x.to(tl.float32), seed_ptr, row, tail_column, rows_per_sample, keep, keep_scale, 1, C).to(a.dtype)
            if tl.program_id(0) == 0:
                head_total += tl.sum(head_x.to(tl.float32), 0)
                tail_total += tl.sum(tail_x.to(tl.float32), 0)
        head = dot(tl.trans(a), head_x, head)
        tail = dot(tl.trans(a), tail_x, tail)
    OUTPUTS: tl.constexpr = OUT if extra_ptr is None else OUT + 1
    product_ptr += part * (OUTPUTS * C)
    store_tile(product_ptr, output, output < OUT, head_column, head, C, C)
    store_tile(product_ptr, output, output < OUT, tail_column, tail, C, C)
    if mean_ptr is not None:
        tl.store(sums_ptr + part * OUTPUTS + output, tl.sum(total, 0), mask=output < OUT)
        if extra_ptr is not None and tl.program_id(0) == 0:
            tl.store(product_ptr + OUT * C + head_column, head_total, mask=head_column < C)
            tl.store(product_ptr + OUT * C + tail_column, tail_total, mask=tail_column < C)
            tl.store(sums_ptr + part * OUTPUTS + OUT, tl.sum(extra_total, 0))
    elif tl.program_id(0) == 0:
        tl.store(sums_ptr + part * C + head_column, head_total, mask=head_column < C)
        tl.store(sums_ptr + part * C + tail_column, tail_total, mask=tail_column < C)


# Loops over parts are unrolled: a load that waits for the one before it takes half a microsecond.


@triton.jit
def add_up_outputs(
    dscale, dshift, product_ptr, parts, sums_ptr, sums_parts, weight_ptr, dweight_ptr, dbias_ptr, column, scale, shift,
    FIRST: tl.constexpr, OUT: tl.constexpr, PART: tl.constexpr, STRIDE: tl.constexpr, SUMS: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of OUT outputs, from FIRST on, of a linear map behind a norm, and adds their shares of those of scale and shift
    to tiles (BLOCK_O, BLOCK_C), which the caller sums over rows at its end: what lives through a loop as a vector is spilled. A part of the
    products holds PART outputs of STRIDE values each, one of the sums SUMS outputs.

    With G = dy^T (normalised x) and s = sum dy the gradients are: of the weight G * scale + s shift, of scale the column sums of
    weight * G, of shift weight^T s.
    """
    for first in range(0, OUT, BLOCK_O):
        output = first + tl.arange(0, BLOCK_O)
        valid = output < OUT
        product = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
        total = tl.zeros((BLOCK_O,), tl.float32)
        for part in tl.range(0, parts, loop_unroll_factor=2):
            product += load_tile(product_ptr + part * (PART * STRIDE), output, valid, column, STRIDE, C)
        for part in tl.range(0, sums_parts, loop_unroll_factor=2):
            total += tl.load(sums_ptr + part * SUMS + output, mask=valid, other=0.0)
        weight = load_tile(weight_ptr + FIRST * C, output, valid, column, C, C).to(tl.float32)
        dscale += weight * product
        dshift += weight * total[:, None]
        store_tile(dweight_ptr + FIRST * C, output, valid, column, product * scale[None, :] + total[:, None] * shift[None, :], C, C)
        if dbias_ptr is not None and tl.program_id(0) == 0:
            tl.store(dbias_ptr + FIRST + output, total.to(dbias_ptr.dtype.element_ty), mask=valid)
    return dscale, dshift


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _norm_linear_gradient_kernel(
    product_ptr, sums_ptr, weight_ptr, norm_weight_ptr, norm_bias_ptr, dweight_ptr, dbias_ptr, dnorm_weight_ptr, dnorm_bias_ptr, parts,
    C: tl.constexpr, OUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale, shift = load_vector(norm_weight_ptr, column, C), load_vector(norm_bias_ptr, column, C)
    nothing = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    dscale, dshift = add_up_outputs(
        nothing, nothing, product_ptr, parts, sums_ptr, parts, weight_ptr, dweight_ptr, dbias_ptr, column, scale, shift,
        0, OUT, OUT, C, OUT, C, BLOCK_C, BLOCK_O,
    )  # fmt: skip
    valid = column < C
    tl.store(dnorm_weight_ptr + column, tl.sum(dscale, 0).to(dnorm_weight_ptr.dtype.element_ty), mask=valid)
    tl.store(dnorm_bias_ptr + column, tl.sum(dshift, 0).to(dnorm_bias_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _second_gradient_kernel(
    product_ptr, sums_ptr, dweight_ptr, dbias_ptr, parts, C: tl.constexpr, F: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    """Adds up the parts of the second weight's gradient, which are (F, C), and turns them round."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    hidden = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    product = tl.zeros((BLOCK_F, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for part in tl.range(0, parts, loop_unroll_factor=2):
        product += load_tile(product_ptr + part * (F * C), hidden, hidden < F, column, C, C)
        total += load_vector(sums_ptr + part * C, column, C)
    store_tile(dweight_ptr, column, column < C, hidden, tl.trans(product), F, F)
    if dbias_ptr is not None and tl.program_id(1) == 0:
        tl.store(dbias_ptr + column, total.to(dbias_ptr.dtype.element_ty), mask=column < C)


def products_configurations(rows: Rows) -> list[dict[str, int]]:
    """Of the sums over rows: BLOCK_M rows at a time, BLOCK_N outputs of a program."""
    if rows.x.dtype is torch.float32:
        return [{"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}]
    narrow = rows.width() <= 256
    # With operands in registers two stages spill a few bytes on Triton 3.6 (norm_linear), three too (separable_attention).
    stages = 1 if narrow and not rows.wide else 2
    first = {"BLOCK_M": 32, "BLOCK_N": 64 if rows.wide and narrow else 32, "num_warps": 8, "num_stages": stages}
    others = ({"num_stages": 3 - stages}, {"num_warps": 4}, {"BLOCK_M": 16}, {"BLOCK_M": 64, "num_stages": 1})
    return [first, *(first | other for other in others)]


def products_configuration(rows: Rows, outputs: int) -> dict[str, int]:
    return tuning.choose("row_products_bwd", rows.x, (rows.channels, outputs), lambda: products_configurations(rows))


class Rows(NamedTuple):
    """A map as rows, for the launchers: contiguous, with its tiles."""

    x: Tensor
    rows: int
    rows_per_sample: int
    channels: int
    tiles: dict[str, int]  # C, HEAD, TAIL
    wide: bool  # multiplies_from_shared_memory

    @staticmethod
    def of(x: Tensor) -> Rows:
        batch, height, width, channels = x.shape
        wide = multiplies_from_shared_memory(x)
        head, tail = two_tiles(channels, even=not wide)  # operands of two shapes in registers make a kernel spill
        tiles = {"C": channels, "HEAD": head, "TAIL": tail}
        return Rows(x.contiguous(), batch * height * width, height * width, channels, tiles, wide)

    def block(self) -> int:
        """Rows of a program. Float32 has no matrix units of its own precision; its products are made in registers."""
        if self.x.dtype is torch.float32:
            return 16
        return 64 if self.wide and self.width() <= 256 else 32

    def width(self) -> int:
        return self.tiles["HEAD"] + self.tiles["TAIL"]

    def statistics(self, eps: float, per_sample: bool) -> tuple[Tensor, Tensor]:
        """mean and rstd: filled for samples; for tokens to be written by the kernel that reads the rows."""
        count = self.rows // self.rows_per_sample if per_sample and self.rows else self.rows
        mean, rstd = (torch.empty(self.x.shape[0] if per_sample else count, dtype=torch.float32, device=self.x.device) for _ in range(2))
        if per_sample and self.rows:
            with on_device(self.x):
                _sample_statistics_kernel[(count,)](
                    self.x,
                    mean,
                    rstd,
                    self.rows_per_sample,
                    self.rows_per_sample,
                    1,
                    eps,
                    PARTIAL=False,
                    BLOCK_M=32,
                    num_warps=8,
                    **self.tiles,
                )
        return mean, rstd

    def partial_statistics(self) -> tuple[Tensor, Tensor, int, int]:
        """Of each sample in parts, as many as fill the GPU: means and sums of squared distances (samples * parts,), the rows of a part, and
        the number of parts."""
        samples = self.rows // self.rows_per_sample
        programs = min(2 * multiprocessors(self.x) // samples, MOST_SAMPLE_PARTS.value)
        parts, rows_per_part = split_rows(self.rows_per_sample, programs, 32)
        mean, spread = (torch.empty(samples * parts, dtype=torch.float32, device=self.x.device) for _ in range(2))
        with on_device(self.x):
            _sample_statistics_kernel[(samples * parts,)](
                self.x, mean, spread, self.rows_per_sample, rows_per_part, parts, 0.0, PARTIAL=True, BLOCK_M=32, num_warps=8, **self.tiles
            )
        return mean, spread, rows_per_part, parts

    def input_gradient(
        self, dy: Tensor, residual: Tensor | None, norm_weight: Tensor, per_sample: bool, weight: Tensor, mean: Tensor, rstd: Tensor
    ) -> Tensor:
        """The gradient of x where `dy` is that of weight @ norm(x), and that of a residual on top."""
        dx = torch.empty_like(self.x)
        if not self.rows:
            return dx
        narrow = self.x.dtype is torch.float32
        block = self.block()
        sums = torch.empty((2, self.rows), dtype=torch.float32, device=self.x.device) if per_sample else None
        _input_bwd_kernel[(triton.cdiv(self.rows, block),)](
            dy, self.x, residual, norm_weight, weight, mean, rstd, dx, sums, self.rows, self.rows_per_sample, PER_SAMPLE=per_sample,
            OUT=weight.shape[0], BLOCK_M=block, BLOCK_N=16 if narrow or self.width() > 256 else 32, num_warps=8, num_stages=2, **self.tiles,
        )  # fmt: skip
        if per_sample:
            self.finish_input_gradient(dx, residual, mean, rstd, sums)
        return dx

    def finish_input_gradient(self, dx: Tensor, residual: Tensor | None, mean: Tensor, rstd: Tensor, sums: Tensor) -> None:
        """What store_norm_gradient leaves to do where the norm is of samples."""
        grid = (self.rows // self.rows_per_sample, triton.cdiv(self.rows_per_sample, 32))
        _sample_gradient_kernel[grid](
            dx, self.x, residual, mean, rstd, sums, self.rows, self.rows_per_sample, BLOCK_M=32, num_warps=8, **self.tiles
        )

    def products(
        self,
        a: Tensor,
        outputs: int,
        mean: Tensor | None,
        rstd: Tensor | None,
        per_sample: bool,
        dropout: float = 0.0,
        seed: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Partial products a^T x, (parts, outputs, C), and sums: with statistics x is normalised, and the sums are those of a; without them
        x goes through the dropout, and the sums are those of x. `extra` is one more column of a, float32, and the last output then."""
        config = products_configuration(self, outputs)
        pieces = triton.cdiv(outputs, config["BLOCK_N"])
        parts, rows_per_part = split_rows(self.rows, 2 * multiprocessors(self.x) // pieces, config["BLOCK_M"])
        columns = outputs if extra is None else outputs + 1
        product = torch.empty((parts, columns, self.channels), dtype=torch.float32, device=self.x.device)
        sums = torch.empty((parts, columns if mean is not None else self.channels), dtype=torch.float32, device=self.x.device)
        if self.rows:
            keep = (dropout_threshold(dropout), 1 / (1 - dropout))
            _row_products_kernel[(pieces, parts)](
                a, extra, self.x, mean, rstd, seed if dropout > 0 else None, product, sums, self.rows, self.rows_per_sample, rows_per_part,
                *keep, PER_SAMPLE=per_sample, OUT=outputs, **self.tiles, **config,
            )  # fmt: skip
        return product, sums

    def norm_linear_backward(
        self, dy: Tensor, residual: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, per_sample: bool, weight: Tensor,
        bias: Tensor | None, mean: Tensor, rstd: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """The gradients of x (with that of a residual on top), norm weight, norm bias, weight and bias (empty without one)."""
        norm_weight, norm_bias, weight = norm_weight.contiguous(), norm_bias.contiguous(), weight.contiguous()
        dweight, dnorm_weight, dnorm_bias = (torch.empty_like(t) for t in (weight, norm_weight, norm_bias))
        dbias = None if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
        outputs = weight.shape[0]
        with on_device(self.x):
            dx = self.input_gradient(dy, residual, norm_weight, per_sample, weight, mean, rstd)
            product, sums = self.products(dy, outputs, mean, rstd, per_sample)
            _norm_linear_gradient_kernel[(triton.cdiv(self.channels, 16),)](
                product, sums, weight, norm_weight, norm_bias, dweight, dbias, dnorm_weight, dnorm_bias, product.shape[0],
                C=self.channels, OUT=outputs, BLOCK_C=16, BLOCK_O=64, num_warps=4,
            )  # fmt: skip
        return dx, dnorm_weight, dnorm_bias, dweight, self.x.new_empty(0) if dbias is None else dbias

    def second_weight_backward(
        self, dy: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, per_sample: bool, dropout: float, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The gradients of weight and bias (empty without one) of dropout(weight @ hidden + bias), `hidden` being (rows, F)."""
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        dbias = None if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
        outputs = hidden.shape[1]
        with on_device(self.x):
            product, sums = self._replace(x=dy).products(hidden, outputs, None, None, per_sample, dropout, seed)
            _second_gradient_kernel[(triton.cdiv(self.channels, 32), triton.cdiv(outputs, 32))](
                product, sums, dweight, dbias, product.shape[0], C=self.channels, F=outputs, BLOCK_C=32, BLOCK_F=32, num_warps=4
            )
        return dweight, self.x.new_empty(0) if dbias is None else dbias
