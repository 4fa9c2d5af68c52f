"""Triton kernels of inverted_residual in training: the correction of dx, which is what the statistics of the first norm
contribute to the gradient (identity B); names are those of backward_kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import dot, load_tile, load_vector, row_range, store_tile, store_vector
from ..triton_launch import jit_kernel
from .kernels import NOT_SPECIALIZED, exact_product, load_rounded, load_rounded_weight, shares


@triton.jit
def _correction(
    x_ptr, weight_ptr, correction_ptr, left, right, SAME: tl.constexpr, C: tl.constexpr, E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Rows `left` and columns `right` of K = W^T diag(k) W, and those of s W; SAME: left is right.

    Of maps in 16 bits the factors are rounded to them as K is afterwards, and of float16 as shares of the largest k,
    which is of the order of 1 / rows."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    largest = 1.0
    if dtype == tl.float16:
        most = tl.zeros((BLOCK_E,), tl.float32)
        for first in range(0, E, BLOCK_E):
            most = tl.maximum(most, tl.abs(load_vector(correction_ptr, first + tl.arange(0, BLOCK_E), WIDTH=E)))
        largest = tl.max(most)
        largest = tl.where(largest > 1e-30, largest, 1.0)
    matrix = tl.zeros((left.shape[0], right.shape[0]), tl.float32)
    shift = tl.zeros((right.shape[0],), tl.float32)
    for first in range(0, E, BLOCK_E):
        output = first + tl.arange(0, BLOCK_E)
        weight = load_rounded_weight(weight_ptr, x_ptr, output, right, OUT=E, WIDTH=C)
        scaled = weight if SAME else load_rounded_weight(weight_ptr, x_ptr, output, left, OUT=E, WIDTH=C)
        scaled *= (load_vector(correction_ptr, output, WIDTH=E) * (1.0 / largest))[:, None]
        matrix = dot(tl.trans(scaled.to(dtype)), weight.to(dtype), matrix)
        shift += tl.sum(weight * load_vector(correction_ptr + E, output, WIDTH=E)[:, None], 0)
    return matrix * largest, shift


@jit_kernel
def correction_bwd_kernel(
    x_ptr,  # only its dtype is used
    weight_ptr, correction_ptr,  # W, (E, C); k and s, (2, E), float32, of expand_gradient_kernel
    matrix_ptr, shift_ptr,  # written: (C, C), like x but float32 where x is float16; (C,), float32
    C: tl.constexpr, E: tl.constexpr, SHARES: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """K = W^T diag(k) W and shift = s W, with which correct_bwd_kernel completes dx. A program has a tile of K."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    left = tl.program_id(0) // blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    right = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    matrix = tl.zeros((SHARES, BLOCK_C, BLOCK_C), tl.float32)
    shift = tl.zeros((SHARES, BLOCK_E // SHARES, BLOCK_C), tl.float32)
    for first in range(0, E, BLOCK_E):
        output = (first + shares(BLOCK_E, SHARES))[:, :, None]
        weight = load_rounded(weight_ptr, x_ptr, output, right[None, None, :], E=E, C=C)
        other = load_rounded(weight_ptr, x_ptr, output, left[None, None, :], E=E, C=C)
        shift += weight * load_vector(correction_ptr + E, output, WIDTH=E)
        scaled = weight * load_vector(correction_ptr, output, WIDTH=E)
        other = tl.permute(other, (0, 2, 1))
        if x_ptr.dtype.element_ty == tl.bfloat16:  # as which K is stored
            matrix = tl.dot(other.to(tl.bfloat16), scaled.to(tl.bfloat16), matrix)
        else:
            matrix = exact_product(other, scaled, matrix, DTYPE=x_ptr.dtype.element_ty)
    store_tile(matrix_ptr, left, left < C, right, tl.sum(matrix, 0), WIDTH=C)
    if tl.program_id(0) < blocks:
        store_vector(shift_ptr, right, tl.sum(tl.sum(shift, 0), 0), WIDTH=C)


@triton.jit
def _multiplied_correction(matrix, DTYPE: tl.constexpr):
    """A tile of K in the dtype of x, and what its product is to be multiplied by."""
    largest = 1.0
    if tl.float16 == DTYPE:
        largest = tl.max(tl.abs(matrix))
        largest = tl.where(largest > 1e-30, largest, 1.0)
        matrix *= 1.0 / largest
    return matrix.to(DTYPE), largest


@triton.jit
def _load_correction(matrix_ptr, x_ptr, inner, column, C: tl.constexpr):
    matrix = load_tile(matrix_ptr, inner, inner < C, column, WIDTH=C)
    return _multiplied_correction(matrix, DTYPE=x_ptr.dtype.element_ty)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def correct_bwd_kernel(
    x_ptr, residual_ptr,  # (rows, C); (rows, C) or None
    mean_ptr,  # of x (C,), float32
    matrix_ptr, shift_ptr,  # K (C, C) and shift (C,) of correction_bwd_kernel; or None, and instead of them
    weight_ptr, correction_ptr,  # W, (E, C); k and s, (2, E), float32, of expand_gradient_kernel
    dx_ptr,  # read and written: (rows, C), like x
    rows, rows_per_part,
    C: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dx -= (x - mean) K + shift, what the first norm's statistics contribute; then a residual's gradient is added.

    It is x K + offset for offset = shift - mean K with K as it is multiplied, so that x needs no subtraction.
    A program has BLOCK_N inputs of a part, and holds their K where BLOCK_K are all; makes it itself, where BLOCK_N are
    all too and no launch has made it. Reads dx and the residual once, x once for each block of inputs; writes dx
    once."""
    columns: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    begin, length = row_range(rows, rows_per_part, tl.program_id(0) // columns)
    column, lane = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    if matrix_ptr is None:
        matrix, offset = _correction(
            x_ptr, weight_ptr, correction_ptr, column, column, SAME=True, C=C, E=E, BLOCK_E=BLOCK_E
        )
        matrix, largest = _multiplied_correction(matrix, DTYPE=x_ptr.dtype.element_ty)
        offset -= tl.sum(matrix.to(tl.float32) * load_vector(mean_ptr, column, WIDTH=C)[:, None], 0) * largest
    else:
        offset = load_vector(shift_ptr, column, WIDTH=C)
        matrix, largest = _load_correction(matrix_ptr, x_ptr, tl.arange(0, BLOCK_K), column, C=C)
        for first in range(0, C, BLOCK_K):
            inner = first + tl.arange(0, BLOCK_K)
            tile, scale = _load_correction(matrix_ptr, x_ptr, inner, column, C=C)
            offset -= tl.sum(tile.to(tl.float32) * load_vector(mean_ptr, inner, WIDTH=C)[:, None], 0) * scale
    for first in range(0, length, BLOCK_M):
        start, valid = begin + first, first + lane < length
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if C <= BLOCK_K:
            x = load_tile(x_ptr + start * C, lane, valid, tl.arange(0, BLOCK_K), WIDTH=C)
            sums = dot(x, matrix, sums) * largest
        else:
            for second in range(0, C, BLOCK_K):
                inner = second + tl.arange(0, BLOCK_K)
                tile, scale = _load_correction(matrix_ptr, x_ptr, inner, column, C=C)
                x = load_tile(x_ptr + start * C, lane, valid, inner, WIDTH=C)
                if x.dtype == tl.float16:
                    sums += tl.dot(x, tile) * scale
                else:
                    sums = dot(x, tile, sums)
        dx = load_tile(dx_ptr + start * C, lane, valid, column, WIDTH=C).to(tl.float32)
        dx -= sums + offset[None, :]
        if residual_ptr is not None:
            dx += load_tile(residual_ptr + start * C, lane, valid, column, WIDTH=C).to(tl.float32)
        store_tile(dx_ptr + start * C, lane, valid, column, dx, WIDTH=C)
