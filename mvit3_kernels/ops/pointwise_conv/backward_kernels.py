"""Triton kernel of pointwise_conv's backward pass; triton.py launches it and says when."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import (
    activate_backward,
    dot,
    inverse_std,
    load_tile,
    load_vector,
    store_tile,
    store_vector,
)
from ..triton_launch import jit_kernel
from ..triton_math import add_rounded

# Values of the parts that a program loads at once: of 8 warps 64 registers of a thread.
PARTS_AT_ONCE = tl.constexpr(8192)


@triton.jit
def _store_coefficients(
    coefficient_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, part_ptr, dnorm_weight_ptr, dnorm_bias_ptr,
    rows, parts, eps, OUT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds up the parts, and writes what the gradient of p is made of, with z = p * scale + shift behind the norm:

        dp = act'(z) * dy * scale + p * slope + offset.

    A program has no registers to keep these numbers. WIDTH: OUT, rounded up to a power of two."""
    output = tl.arange(0, WIDTH)
    lane = tl.arange(0, PARTS_AT_ONCE // WIDTH)
    dbias = tl.zeros((PARTS_AT_ONCE // WIDTH, WIDTH), tl.float32)
    dweight = tl.zeros((PARTS_AT_ONCE // WIDTH, WIDTH), tl.float32)
    for first in range(0, parts, PARTS_AT_ONCE // WIDTH):
        dbias += load_tile(part_ptr + first * OUT, lane, first + lane < parts, output, WIDTH=OUT)
        dweight += load_tile(part_ptr + (parts + first) * OUT, lane, first + lane < parts, output, WIDTH=OUT)
    dbias, dweight = tl.sum(dbias, 0), tl.sum(dweight, 0)
    if tl.program_id(0) == 0:
        store_vector(dnorm_bias_ptr, output, dbias, WIDTH=OUT)
        store_vector(dnorm_weight_ptr, output, dweight, WIDTH=OUT)
    mean, rstd = (
        load_vector(mean_ptr, output, WIDTH=OUT),
        inverse_std(load_vector(var_ptr, output, WIDTH=OUT, OTHER=1.0), eps),
    )
    scale = load_vector(norm_weight_ptr, output, WIDTH=OUT) * rstd
    shift = load_vector(norm_bias_ptr, output, WIDTH=OUT) - mean * scale
    slope = -scale * rstd * (dweight / rows)
    store_vector(coefficient_ptr, output, scale, WIDTH=OUT)
    store_vector(coefficient_ptr + OUT, output, shift, WIDTH=OUT)
    store_vector(coefficient_ptr + 2 * OUT, output, slope, WIDTH=OUT)
    store_vector(coefficient_ptr + 3 * OUT, output, -scale * (dbias / rows) - mean * slope, WIDTH=OUT)
    tl.debug_barrier()


@triton.jit
def _gradient_of_product(dy, p, coefficient_ptr, output, ACT: tl.constexpr, OUT: tl.constexpr, DTYPE: tl.constexpr):
    """dp, rounded to DTYPE, by the numbers of _store_coefficients."""
    scale = load_vector(coefficient_ptr, output, WIDTH=OUT)[None, :]
    shift = load_vector(coefficient_ptr + OUT, output, WIDTH=OUT)[None, :]
    slope = load_vector(coefficient_ptr + 2 * OUT, output, WIDTH=OUT)[None, :]
    offset = load_vector(coefficient_ptr + 3 * OUT, output, WIDTH=OUT)[None, :]
    dz = activate_backward(dy, p * scale + shift, ACT=ACT, DTYPE=DTYPE)
    return (dz * scale + (p * slope + offset)).to(DTYPE)


@triton.jit
def _store_product(
    dx_ptr, weight_ptr, dp, lane, valid,
    C: tl.constexpr, STRIDE: tl.constexpr, OUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx = dp @ weight for C columns of a weight whose rows have STRIDE values."""
    for first in range(0, C, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        sums = tl.zeros((dp[0].shape[0], BLOCK_N), tl.float32)
        for i in tl.static_range(len(dp)):
            output = i * BLOCK_K + tl.arange(0, BLOCK_K)
            weight = load_tile(weight_ptr, output, output < OUT, column, WIDTH=C, STRIDE=STRIDE)
            sums = dot(dp[i], weight, sums)
        store_tile(dx_ptr, lane, valid, column, sums, WIDTH=C)


@jit_kernel(do_not_specialize=["rows", "parts", "rows_per_program", "eps"])
def inputs_bwd_kernel(
    dy_ptr, more_ptr, p_ptr,  # (rows, OUT), the rows of dy DY_STRIDE values apart; more or p is None
    norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr,  # (OUT,); None without p, as all else of the norm
    part_ptr,  # (2, parts, OUT), float32: of batch_norm_act's sums_bwd_kernel
    weight_ptr,  # (OUT, CA + CB), like dy
    coefficient_ptr,  # (programs, 4, OUT), float32, a workspace
    dp_ptr, da_ptr, db_ptr,  # written: (rows, OUT); (rows, CA); (rows, CB) or None
    dnorm_weight_ptr, dnorm_bias_ptr,  # written: (OUT,)
    rows, parts, rows_per_program, eps,
    ACT: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr, OUT: tl.constexpr, DY_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of p, for y = act(norm(p)) with the batch's statistics or, without p, for y = p with two readers,
    dp = dy + more; and from it [da, db] = dp @ weight.

    Reads dy, and more or p, once, the parts once for each program, the weight once for each BLOCK_M rows; writes dp, da
    and db once."""
    if p_ptr is not None:
        coefficient_ptr += tl.program_id(0) * 4 * OUT
        _store_coefficients(
            coefficient_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, part_ptr,
            dnorm_weight_ptr, dnorm_bias_ptr, rows, parts, eps, OUT=OUT, WIDTH=WIDTH,
        )  # fmt: skip
    begin, lane = tl.program_id(0).to(tl.int64) * rows_per_program, tl.arange(0, BLOCK_M)
    length = tl.minimum(rows - begin, rows_per_program).to(tl.int32)
    for first in range(0, length, BLOCK_M):
        start, valid, dp = begin + first, first + lane < length, ()
        for i in tl.static_range((OUT + BLOCK_K - 1) // BLOCK_K):
            output = i * BLOCK_K + tl.arange(0, BLOCK_K)
            tile = load_tile(dy_ptr + start * DY_STRIDE, lane, valid, output, WIDTH=OUT, STRIDE=DY_STRIDE)
            if p_ptr is None:
                tile = add_rounded(tile, load_tile(more_ptr + start * OUT, lane, valid, output, WIDTH=OUT))
            else:
                p = load_tile(p_ptr + start * OUT, lane, valid, output, WIDTH=OUT).to(tl.float32)
                tile = _gradient_of_product(
                    tile.to(tl.float32), p, coefficient_ptr, output, ACT=ACT, OUT=OUT, DTYPE=dp_ptr.dtype.element_ty
                )
            store_tile(dp_ptr + start * OUT, lane, valid, output, tile, WIDTH=OUT)
            dp += (tile,)
        _store_product(
            da_ptr + start * CA, weight_ptr, dp, lane, valid,
            C=CA, STRIDE=CA + CB, OUT=OUT, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        if db_ptr is not None:
            _store_product(
                db_ptr + start * CB, weight_ptr + CA, dp, lane, valid,
                C=CB, STRIDE=CA + CB, OUT=OUT, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
            )  # fmt: skip
