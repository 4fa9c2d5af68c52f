"""Triton kernels of inverted_residual in training, forward; triton.py launches them and says how they work together.

Rows are pixels. There are C inputs, E expanded channels and OUT outputs. The expansion is e = x W^T for the weight W
(E, C) of the first convolution; z is what the depth-wise convolution makes of the activated expansion, and p the
projection of z after norm and activation. Norms have weight, bias and the batch's mean and var.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import (
    activate,
    at_least_zero,
    dot,
    inverse_std,
    load_folded_norm,
    load_sums,
    load_tile,
    load_vector,
    moments_from_pivot,
    pairs,
    store_tile,
    store_vector,
)

NOT_SPECIALIZED = ["rows", "parts", "rows_per_part", "eps"]
PIVOT_ROWS = tl.constexpr(32)


@triton.jit
def load_deviations(x_ptr, center, row, valid, column, C: tl.constexpr):
    """x - center for rows `row` of x (.., C), in float32; zeros where a row is not valid."""
    x = load_tile(x_ptr, row, valid, column, WIDTH=C).to(tl.float32)
    return tl.where(valid[:, None], x - center[None, :], 0.0)


@triton.jit
def load_rounded_weight(weight_ptr, x_ptr, output, column, OUT: tl.constexpr, WIDTH: tl.constexpr):
    """A tile of a weight (OUT, WIDTH) as the products see it, rounded to the dtype of x, in float32."""
    weight = load_tile(weight_ptr, output, output < OUT, column, WIDTH=WIDTH)
    return weight.to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def add_up(part_ptr, parts, column, valid, N: tl.constexpr, FEW: tl.constexpr):
    """The sums of columns `column` of (parts, N), float32; where there are FEW parts one after the other, else many at
    a time."""
    if FEW:
        total = tl.zeros((column.shape[0],), tl.float32)
        for part in tl.range(0, parts, loop_unroll_factor=4):
            total += tl.load(part_ptr + part * N + column, mask=valid, other=0.0)
    else:
        total = load_sums(part_ptr, parts, column, valid, C=N, BLOCK_C=column.shape[0])
    return total


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def add_parts_kernel(
    part_ptr,  # (parts, N), float32
    total_ptr,  # written: (N,), float32
    parts,
    N: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of the parts. A program has BLOCK columns."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    store_vector(total_ptr, column, add_up(part_ptr, parts, column, column < N, N=N, FEW=FEW), WIDTH=N)


@triton.jit
def _pivot(x_ptr, rows, column, C: tl.constexpr):
    """A value near the mean of each column, taken from rows all over the map. It is rounded to the dtype of x, so that
    x - pivot is nearly exact; of a column that is constant it is the constant."""
    row = tl.arange(0, PIVOT_ROWS).to(tl.int64) * rows // PIVOT_ROWS
    first = load_vector(x_ptr, column, WIDTH=C)
    x = tl.load(x_ptr + row[:, None] * C + column[None, :], mask=(column < C)[None, :], other=0.0).to(tl.float32)
    return (first + tl.sum(x - first[None, :], 0) / PIVOT_ROWS).to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def moments_fwd_kernel(
    x_ptr,  # (rows, C)
    pivot_ptr, part_ptr,  # written: (C,) and (parts, C + 1, C), float32
    rows, rows_per_part,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d^T d and, the last row, the sums of d over the rows of a part, where d = x - pivot.

    A program has a tile of d^T d of a part; below the diagonal it has none, because d^T d is symmetric and the program
    above writes both. Reads x about once for each block of columns."""
    blocks: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    part, tile = tl.program_id(0) // (blocks * blocks), tl.program_id(0) % (blocks * blocks)
    lane = tl.arange(0, BLOCK_M)
    left, right = tile // blocks * BLOCK_N + tl.arange(0, BLOCK_N), tile % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    if tile // blocks <= tile % blocks:
        left_pivot, right_pivot = _pivot(x_ptr, rows, left, C=C), _pivot(x_ptr, rows, right, C=C)
        product = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)
        begin = part * rows_per_part
        length = tl.minimum(rows - begin, rows_per_part)
        for first in range(0, length, BLOCK_M):
            at, valid = x_ptr + (begin.to(tl.int64) + first) * C, first + lane < length
            x = load_deviations(at, left_pivot, lane, valid, left, C=C)
            total += tl.sum(x, 0)
            other = x if blocks == 1 else load_deviations(at, right_pivot, lane, valid, right, C=C)
            product = dot(tl.trans(x.to(x_ptr.dtype.element_ty)), other.to(x_ptr.dtype.element_ty), product)
        part_ptr += part * ((C + 1) * C)
        store_tile(part_ptr, left, left < C, right, product, WIDTH=C)
        if tile // blocks == tile % blocks:
            store_vector(part_ptr + C * C, left, total, WIDTH=C)
            if part == 0:
                store_vector(pivot_ptr, left, left_pivot, WIDTH=C)
        else:
            store_tile(part_ptr, right, right < C, left, tl.trans(product), WIDTH=C)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def expanded_moments_kernel(
    x_ptr,  # only its dtype is used
    weight_ptr, norm_weight_ptr, norm_bias_ptr,  # W, (E, C); of the first norm, (E,)
    total_ptr, pivot_ptr,  # (C + 1, C) and (C,), float32, of moments_fwd_kernel
    mean_ptr, covariance_ptr,  # written: (C,) and (C, C), float32
    expanded_mean_ptr, expanded_var_ptr, folded_ptr,  # written: (E,), (E,), (2, E), float32
    rows, eps,
    C: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean m and covariance S of x, and from them those of the expansion (identity A): channel w x, for a row w of W,
    has the mean w m and the variance w S w^T. And scale and shift of the norm of these.

    A program has BLOCK_E expanded channels. Reads the moments of x once for each program, and W C / BLOCK_C times."""
    output = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    mean = tl.zeros((BLOCK_E,), tl.float32)
    var = tl.zeros((BLOCK_E,), tl.float32)
    for first in range(0, C, BLOCK_C):
        right = first + tl.arange(0, BLOCK_C)
        right_offset = load_vector(total_ptr + C * C, right, WIDTH=C) / rows
        right_mean = load_vector(pivot_ptr, right, WIDTH=C) + right_offset
        product = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
        for second in range(0, C, BLOCK_C):
            left = second + tl.arange(0, BLOCK_C)
            left_offset = load_vector(total_ptr + C * C, left, WIDTH=C) / rows
            covariance = load_tile(total_ptr, left, left < C, right, WIDTH=C) / rows
            covariance -= left_offset[:, None] * right_offset[None, :]
            product = dot(load_rounded_weight(weight_ptr, x_ptr, output, left, OUT=E, WIDTH=C), covariance, product)
            if tl.program_id(0) == 0:
                store_tile(covariance_ptr, left, left < C, right, covariance, WIDTH=C)
        weight = load_rounded_weight(weight_ptr, x_ptr, output, right, OUT=E, WIDTH=C)
        mean += tl.sum(weight * right_mean[None, :], 1)
        var += tl.sum(weight * product, 1)
        if tl.program_id(0) == 0:
            store_vector(mean_ptr, right, right_mean, WIDTH=C)
    var = at_least_zero(var)
    store_vector(expanded_mean_ptr, output, mean, WIDTH=E)
    store_vector(expanded_var_ptr, output, var, WIDTH=E)
    scale = load_vector(norm_weight_ptr, output, WIDTH=E) * inverse_std(var, eps)
    store_vector(folded_ptr, output, scale, WIDTH=E)
    store_vector(folded_ptr + E, output, load_vector(norm_bias_ptr, output, WIDTH=E) - mean * scale, WIDTH=E)


@triton.jit
def prepare_project_kernel(
    norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr,  # of the middle norm, (E,)
    weight_ptr,  # (OUT, E)
    folded_ptr, pivot_ptr,  # written: (2, E) and (OUT,), float32
    packed_ptr,  # written: the weight, (OUT, E), as it is multiplied
    eps,
    ACT: tl.constexpr, E: tl.constexpr, OUT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """What project_fwd_kernel needs many times: scale and shift of the norm, the weight in the dtype of the map, and a
    value near the mean of each output, the product of a pixel whose channels are all at their means.

    The first programs have BLOCK_E channels of the norm each, the others BLOCK_O outputs."""
    blocks: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    if tl.program_id(0) < blocks:
        column = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
        scale, shift = load_folded_norm(norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, column, eps, C=E)
        store_vector(folded_ptr, column, scale, WIDTH=E)
        store_vector(folded_ptr + E, column, shift, WIDTH=E)
    else:
        output = (tl.program_id(0) - blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
        pivot = tl.zeros((BLOCK_O,), tl.float32)
        for first in range(0, E, BLOCK_E):
            column = first + tl.arange(0, BLOCK_E)
            weight = load_tile(weight_ptr, output, output < OUT, column, WIDTH=E).to(packed_ptr.dtype.element_ty)
            store_tile(packed_ptr, output, output < OUT, column, weight, WIDTH=E)
            hidden = activate(load_vector(norm_bias_ptr, column, WIDTH=E), ACT=ACT, DTYPE=tl.float32)
            pivot += tl.sum(weight.to(tl.float32) * hidden[None, :], 1)
        store_vector(pivot_ptr, output, pivot, WIDTH=OUT)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def project_fwd_kernel(
    z_ptr,  # (rows, E)
    folded_ptr, pivot_ptr, weight_ptr,  # (2, E), (OUT,), (OUT, E) of prepare_project_kernel
    p_ptr, part_ptr,  # written: (rows, OUT), like z; (2, parts, OUT), float32
    rows, parts, rows_per_part,
    ACT: tl.constexpr, E: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """p = act(norm(z)) weight^T, and the means and sums of squared deviations of parts of p as it is stored.

    A program has BLOCK_N outputs of a part. Reads z once for each block of outputs, the weight once for each BLOCK_M
    rows; writes p once. Deviations are added up place by place of the tile, and places at the end: adding up rows in
    each pass would take as many instructions as the products."""
    blocks: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    part, output = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_M)
    total = pairs(tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    squares = pairs(tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    begin = part * rows_per_part
    length = tl.minimum(rows - begin, rows_per_part)
    for first in range(0, length, BLOCK_M):
        start, valid = begin.to(tl.int64) + first, first + lane < length
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for second in range(0, E, BLOCK_K):
            column = second + tl.arange(0, BLOCK_K)
            scale = load_vector(folded_ptr, column, WIDTH=E)
            shift = load_vector(folded_ptr + E, column, WIDTH=E)
            z = load_tile(z_ptr + start * E, lane, valid, column, WIDTH=E).to(tl.float32)
            hidden = activate(z * scale[None, :] + shift[None, :], ACT=ACT, DTYPE=z_ptr.dtype.element_ty)
            weight = load_tile(weight_ptr, output, output < OUT, column, WIDTH=E)
            sums = dot(hidden.to(weight.dtype), tl.trans(weight), sums)
        p = sums.to(p_ptr.dtype.element_ty)
        store_tile(p_ptr + start * OUT, lane, valid, output, p, WIDTH=OUT)
        pivot = load_vector(pivot_ptr, output, WIDTH=OUT)
        deviation = tl.where(valid[:, None], p.to(tl.float32) - pivot[None, :], 0.0)
        total += pairs(deviation)
        squares += pairs(deviation * deviation)
    pivot = load_vector(pivot_ptr, output, WIDTH=OUT)
    mean, m2 = moments_from_pivot(total, squares, pivot, length.to(tl.float32))
    store_vector(part_ptr + part * OUT, output, mean, WIDTH=OUT)
    store_vector(part_ptr + (parts + part) * OUT, output, m2, WIDTH=OUT)
