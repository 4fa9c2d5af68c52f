"""Triton kernels of pointwise_conv; triton.py launches them and says how they work together."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import (
    activate,
    dot,
    load_folded_norm,
    load_tile,
    load_vector,
    moments_from_pivot,
    pairs,
    store_tile,
    store_vector,
)
from ..triton_launch import jit_kernel
from ..triton_math import rounded

_NOT_SPECIALIZED = ["rows", "parts", "rows_per_part", "eps"]
PIVOT_ROWS = tl.constexpr(16)
PIVOT_INPUTS = tl.constexpr(32)  # at a time


@triton.jit
def add_product(
    sums, x_ptr, weight_ptr, row, valid, output,
    C: tl.constexpr, STRIDE: tl.constexpr, OUT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums + x @ weight^T for rows `row` of x (.., C) and outputs `output` of OUT. `weight_ptr` points to the first of
    the C columns that x meets in a weight whose rows have STRIDE values."""
    for first in range(0, C, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, row, valid, column, WIDTH=C)
        weight = load_tile(weight_ptr, output, output < OUT, column, WIDTH=C, STRIDE=STRIDE).to(x.dtype)
        sums = dot(x, tl.trans(weight), sums)
    return sums


@triton.jit
def _pivot(
    a_ptr, b_ptr, weight_ptr, bias_ptr, begin, length, output,
    CA: tl.constexpr, CB: tl.constexpr, OUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A value near the mean of each output in a part: the mean over PIVOT_ROWS of its rows. Of an output that is
    constant it is the constant, as it is stored."""
    row = begin + tl.arange(0, PIVOT_ROWS).to(tl.int64) * length // PIVOT_ROWS
    valid = row >= 0
    sums = tl.zeros((PIVOT_ROWS, BLOCK_N), tl.float32)
    sums = add_product(sums, a_ptr, weight_ptr, row, valid, output, C=CA, STRIDE=CA + CB, OUT=OUT, BLOCK_K=BLOCK_K)
    if b_ptr is not None:
        sums = add_product(
            sums, b_ptr, weight_ptr + CA, row, valid, output, C=CB, STRIDE=CA + CB, OUT=OUT, BLOCK_K=BLOCK_K
        )
    mean = tl.sum(sums, 0) / PIVOT_ROWS + load_vector(bias_ptr, output, WIDTH=OUT)
    return mean.to(a_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _deviations(p, pivot_ptr, output, valid, OUT: tl.constexpr):
    """How far a tile of p, as it is stored, is from the pivots; zeros in rows that are not valid."""
    return tl.where(valid[:, None], p - load_vector(pivot_ptr, output, WIDTH=OUT)[None, :], 0.0)


@triton.jit
def _store_moments(pivot_ptr, m2_ptr, total, squares, length, output, OUT: tl.constexpr):
    """The moments of a part from the sums of its deviations; means take the place of the pivots."""
    pivot = load_vector(pivot_ptr, output, WIDTH=OUT)
    mean, m2 = moments_from_pivot(total, squares, pivot, length.to(tl.float32))
    tl.debug_barrier()
    store_vector(pivot_ptr, output, mean, WIDTH=OUT)
    store_vector(m2_ptr, output, m2, WIDTH=OUT)


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def pointwise_fwd_kernel(
    a_ptr, b_ptr, residual_ptr,  # (rows, CA); (rows, CB) or None; (rows, OUT) or None
    weight_ptr, bias_ptr,  # (OUT, CA + CB); (OUT,) or None
    norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr,  # (OUT,), or None without a norm
    p_ptr, y_ptr,  # written where not None: (rows, OUT), like a
    part_ptr,  # written where not None: (2, parts, OUT), float32
    rows, parts, rows_per_part, eps,
    ACT: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """p = [a, b] weight^T + bias, and what is made of it:

        y = act(norm(p)) + residual, by the norm's known mean and variance;
        `part_ptr`: means and sums of squared deviations of p in each part of the rows, as p is stored.

    A program has BLOCK_N outputs of a part. Reads a and b once for each block of outputs, the weight once for each
    BLOCK_M rows; writes p and y once."""
    # Programs of one part side by side: they read the same rows. One axis, for a second one ends at 65,535.
    blocks: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    output, lane = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    part = tl.program_id(0) // blocks
    bias = load_vector(bias_ptr, output, WIDTH=OUT)
    begin = part * rows_per_part
    length = tl.minimum(rows - begin, rows_per_part)
    if part_ptr is not None:
        pivot = _pivot(
            a_ptr, b_ptr, weight_ptr, bias_ptr, begin, length, output,
            CA=CA, CB=CB, OUT=OUT, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        # It lies where the mean will: a program has no registers to keep it.
        part_ptr += part * OUT
        store_vector(part_ptr, output, pivot, WIDTH=OUT)
        tl.debug_barrier()
        total = pairs(tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        squares = pairs(tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    for first in range(0, length, BLOCK_M):
        start, valid = begin.to(tl.int64) + first, first + lane < length
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sums = add_product(
            sums, a_ptr + start * CA, weight_ptr, lane, valid, output, C=CA, STRIDE=CA + CB, OUT=OUT, BLOCK_K=BLOCK_K
        )
        if b_ptr is not None:
            b, weight_of_b = b_ptr + start * CB, weight_ptr + CA
            sums = add_product(
                sums, b, weight_of_b, lane, valid, output, C=CB, STRIDE=CA + CB, OUT=OUT, BLOCK_K=BLOCK_K
            )
        if bias_ptr is not None:
            sums += bias[None, :]
        if part_ptr is not None:
            sums = rounded(sums, DTYPE=p_ptr.dtype.element_ty)
            deviation = _deviations(sums, part_ptr, output, valid, OUT=OUT)
            total += pairs(deviation)
            squares += pairs(deviation * deviation)
        if p_ptr is not None:
            store_tile(p_ptr + start * OUT, lane, valid, output, sums, WIDTH=OUT)
        if y_ptr is not None:
            if norm_weight_ptr is not None:  # once: such a program has one tile
                scale, shift = load_folded_norm(
                    norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, output, eps, C=OUT, DTYPE=a_ptr.dtype.element_ty
                )
                sums = sums * scale[None, :] + shift[None, :]
            y = activate(sums, ACT=ACT, DTYPE=y_ptr.dtype.element_ty)
            if residual_ptr is not None:
                y += load_tile(residual_ptr + start * OUT, lane, valid, output, WIDTH=OUT).to(tl.float32)
            store_tile(y_ptr + start * OUT, lane, valid, output, y, WIDTH=OUT)
    if part_ptr is not None:
        _store_moments(part_ptr, part_ptr + parts * OUT, total, squares, length, output, OUT=OUT)


@triton.jit
def _tiles(ptr, row, valid, C: tl.constexpr, STRIDE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows `row` of C columns, a multiple of 16, in tiles of BLOCK_K columns, a multiple of 64; what is left over in
    tiles of 64, one of 32 and one of 16."""
    tiles = ()
    for i in tl.static_range(0, C // BLOCK_K):
        tiles += (load_tile(ptr, row, valid, i * BLOCK_K + tl.arange(0, BLOCK_K), WIDTH=C, STRIDE=STRIDE),)
    for i in tl.static_range(C // BLOCK_K * (BLOCK_K // 64), C // 64):
        tiles += (load_tile(ptr, row, valid, i * 64 + tl.arange(0, 64), WIDTH=C, STRIDE=STRIDE),)
    if C % 64 >= 32:
        tiles += (load_tile(ptr, row, valid, C // 64 * 64 + tl.arange(0, 32), WIDTH=C, STRIDE=STRIDE),)
    if C % 32 > 0:
        tiles += (load_tile(ptr, row, valid, C // 32 * 32 + tl.arange(0, 16), WIDTH=C, STRIDE=STRIDE),)
    return tiles


@triton.jit
def _add_products(sums, x, weight):
    """sums plus the products of tiles of x and of a weight."""
    for i in tl.static_range(len(x)):
        sums = dot(x[i], tl.trans(weight[i]), sums)
    return sums


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def pointwise_held_fwd_kernel(
    a_ptr, b_ptr, residual_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr,
    p_ptr, y_ptr, part_ptr, rows, parts, rows_per_part, eps,
    ACT: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """What pointwise_fwd_kernel computes, for inputs of a multiple of 16 channels and many rows.

    A program has BLOCKS blocks of BLOCK_N outputs of a part, and holds their weights. Reads a and b once for BLOCKS *
    BLOCK_N outputs, the weight once."""
    programs: tl.constexpr = (OUT + BLOCKS * BLOCK_N - 1) // (BLOCKS * BLOCK_N)
    first_output = tl.program_id(0) % programs * (BLOCKS * BLOCK_N) + tl.arange(0, BLOCK_N)
    lane, part = tl.arange(0, BLOCK_M), tl.program_id(0) // programs
    begin = part * rows_per_part
    length = tl.minimum(rows - begin, rows_per_part)
    part_of_mean, part_of_m2 = part_ptr, part_ptr
    if part_ptr is not None:
        part_of_mean, part_of_m2 = part_ptr + part * OUT, part_ptr + (parts + part) * OUT
    of_a, of_b, scale, shift, total, squares = (), (), (), (), (), ()
    for i in tl.static_range(BLOCKS):
        output = first_output + i * BLOCK_N
        of_a += (_tiles(weight_ptr, output, output < OUT, C=CA, STRIDE=CA + CB, BLOCK_K=BLOCK_K),)
        if b_ptr is not None:
            of_b += (_tiles(weight_ptr + CA, output, output < OUT, C=CB, STRIDE=CA + CB, BLOCK_K=BLOCK_K),)
        if norm_weight_ptr is not None and y_ptr is not None:
            folded = load_folded_norm(
                norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, output, eps, C=OUT, DTYPE=a_ptr.dtype.element_ty
            )
            scale += (folded[0],)
            shift += (folded[1],)
        if part_ptr is not None:
            pivot = _pivot(
                a_ptr, b_ptr, weight_ptr, bias_ptr, begin, length, output,
                CA=CA, CB=CB, OUT=OUT, BLOCK_N=BLOCK_N, BLOCK_K=PIVOT_INPUTS,
            )  # fmt: skip
            store_vector(part_of_mean, output, pivot, WIDTH=OUT)
            total += (pairs(tl.zeros((BLOCK_M, BLOCK_N), tl.float32)),)
            squares += (pairs(tl.zeros((BLOCK_M, BLOCK_N), tl.float32)),)
    if part_ptr is not None:
        tl.debug_barrier()
    for first in range(0, length, BLOCK_M):
        start, valid = begin.to(tl.int64) + first, first + lane < length
        residuals, totals, all_squares = (), (), ()
        if residual_ptr is not None:  # on its way while products are made
            for i in tl.static_range(BLOCKS):
                output = first_output + i * BLOCK_N
                residuals += (load_tile(residual_ptr + start * OUT, lane, valid, output, WIDTH=OUT),)
        a = _tiles(a_ptr + start * CA, lane, valid, C=CA, STRIDE=CA, BLOCK_K=BLOCK_K)
        if b_ptr is not None:
            b = _tiles(b_ptr + start * CB, lane, valid, C=CB, STRIDE=CB, BLOCK_K=BLOCK_K)
        for i in tl.static_range(BLOCKS):
            output = first_output + i * BLOCK_N
            sums = _add_products(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), a, of_a[i])
            if b_ptr is not None:
                sums = _add_products(sums, b, of_b[i])
            if bias_ptr is not None:
                sums += load_vector(bias_ptr, output, WIDTH=OUT)[None, :]
            if part_ptr is not None:
                sums = rounded(sums, DTYPE=p_ptr.dtype.element_ty)
            if p_ptr is not None:
                store_tile(p_ptr + start * OUT, lane, valid, output, sums, WIDTH=OUT)
            if part_ptr is not None:
                added = _deviations(sums, part_of_mean, output, valid, OUT=OUT)
                totals += (total[i] + pairs(added),)
                all_squares += (squares[i] + pairs(added * added),)
            if y_ptr is not None:
                if norm_weight_ptr is not None:
                    sums = sums * scale[i][None, :] + shift[i][None, :]
                y = activate(sums, ACT=ACT, DTYPE=y_ptr.dtype.element_ty)
                if residual_ptr is not None:
                    y += residuals[i].to(tl.float32)
                store_tile(y_ptr + start * OUT, lane, valid, output, y, WIDTH=OUT)
        total, squares = totals, all_squares
    for i in tl.static_range(len(total)):
        output = first_output + i * BLOCK_N
        _store_moments(part_of_mean, part_of_m2, total[i], squares[i], length, output, OUT=OUT)
