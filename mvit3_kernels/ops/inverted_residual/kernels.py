"""Triton kernels of inverted_residual in training, forward; triton.py launches them and says how they work together.

Rows are pixels. There are C inputs, E expanded channels and OUT outputs. The expansion is e = x W^T for the weight W
(E, C) of the first convolution; z is what the depth-wise convolution makes of the activated expansion, and p the
projection of z after norm and activation. Norms have weight, bias and the batch's mean and var.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import (
    SILU,
    activate,
    at_least_zero,
    dot,
    inverse_std,
    load_moments,
    load_sums,
    load_tile,
    load_vector,
    row_range,
    store_tile,
    store_vector,
)
from ..triton_launch import jit_kernel
from ..triton_math import add_rounded, rounded, silu_of_half

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
def load_matrix(ptr, output, column, E: tl.constexpr, C: tl.constexpr):
    """Values of a matrix (E, C) for rows and columns that broadcast; zeros outside."""
    return tl.load(ptr + output * C + column, mask=(output < E) & (column < C), other=0.0)


@triton.jit
def load_centred_product(
    product_ptr, total, mean_ptr, output, column, CENTRED: tl.constexpr, C: tl.constexpr, E: tl.constexpr
):
    """Values of N = G^T (x - mean) for rows and columns that broadcast, as `total` does; where the matrix (E, C) is not
    CENTRED, it is G^T x."""
    product = load_matrix(product_ptr, output, column, E=E, C=C)
    if not CENTRED:
        product -= total * load_vector(mean_ptr, column, WIDTH=C)
    return product


@triton.jit
def load_rounded(weight_ptr, x_ptr, output, column, E: tl.constexpr, C: tl.constexpr):
    """The same of a weight as the products see it, rounded to the dtype of x, in float32."""
    return load_matrix(weight_ptr, output, column, E=E, C=C).to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def shares(BLOCK: tl.constexpr, SHARES: tl.constexpr):
    """0 to BLOCK - 1 as (SHARES, BLOCK / SHARES). A product of three dimensions has a warp for each share of what is
    summed over, where one of few rows and columns would have all warps make the same."""
    each: tl.constexpr = BLOCK // SHARES
    return tl.arange(0, SHARES)[:, None] * each + tl.arange(0, each)[None, :]


@triton.jit
def halved(factor, ACT: tl.constexpr):
    """Scale or shift of a norm as activate_folded takes it: SiLU is a function of half its argument."""
    if ACT == SILU:
        factor = 0.5 * factor
    return factor


@triton.jit
def activate_folded(z, scale, shift, ACT: tl.constexpr, DTYPE: tl.constexpr):
    """act(norm(z)) of a tile of z, float32, for scale and shift of its columns, `halved`."""
    normal = z * scale[None, :] + shift[None, :]
    return silu_of_half(normal, DTYPE=DTYPE) if ACT == SILU else activate(normal, ACT=ACT, DTYPE=DTYPE)


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


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
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


@triton.jit
def _moments_step(
    left_ptr, right_ptr, length, left, right, left_pivot, right_pivot, product, total,
    MASKED: tl.constexpr, SAME: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """d^T d and the sums of d with those of BLOCK_M rows; MASKED: of the first `length` of them."""
    dtype: tl.constexpr = left_ptr.dtype.element_ty
    lane = tl.arange(0, BLOCK_M)
    valid = lane < (length if MASKED else BLOCK_M)
    x = load_tile(left_ptr, lane, valid, left, WIDTH=WIDTH, STRIDE=C)
    x = add_rounded(x, (-left_pivot).to(dtype)[None, :])
    x = tl.where(valid[:, None], x, 0.0) if MASKED else x
    if SAME:
        other = x
    else:
        other = load_tile(right_ptr, lane, valid, right, WIDTH=WIDTH, STRIDE=C)
        other = add_rounded(other, (-right_pivot).to(dtype)[None, :])
    if dtype == tl.float32:
        total += tl.sum(x, 0)[:, None]
    else:  # a product with ones: no number passes through a register
        total = dot(tl.trans(x), tl.full((BLOCK_M, 16), 1.0, tl.float32).to(dtype), total)
    return dot(tl.trans(x), other, product), total


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
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
    left, right = tile // blocks * BLOCK_N + tl.arange(0, BLOCK_N), tile % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    if tile // blocks <= tile % blocks:
        left_pivot, right_pivot = _pivot(x_ptr, rows, left, C=C), _pivot(x_ptr, rows, right, C=C)
        if part == 0 and tile // blocks == tile % blocks:
            store_vector(pivot_ptr, left, left_pivot, WIDTH=C)
        product = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
        total = tl.zeros((BLOCK_N, 16), tl.float32)
        begin, length = row_range(rows, rows_per_part, part)
        whole = length // BLOCK_M * BLOCK_M
        # Where blocks are whole, pointers go to the program's columns, which need no masks then.
        WIDTH: tl.constexpr = C if C % BLOCK_N else BLOCK_N
        near, far = (left, right) if C % BLOCK_N else (tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_N))
        left_ptr, right_ptr = x_ptr, x_ptr
        if C % BLOCK_N == 0:
            left_ptr += tile // blocks * BLOCK_N
            right_ptr += tile % blocks * BLOCK_N
        for first in range(0, whole, BLOCK_M):
            at = (begin + first) * C  # pointers that go through a loop are too much for Triton 3.6 on AMD
            product, total = _moments_step(
                left_ptr + at, right_ptr + at, BLOCK_M, near, far, left_pivot, right_pivot, product, total,
                MASKED=False, SAME=blocks == 1, C=C, WIDTH=WIDTH, BLOCK_M=BLOCK_M,
            )  # fmt: skip
        if whole < length:
            at = (begin + whole) * C
            product, total = _moments_step(
                left_ptr + at, right_ptr + at, length - whole, near, far, left_pivot, right_pivot, product, total,
                MASKED=True, SAME=blocks == 1, C=C, WIDTH=WIDTH, BLOCK_M=BLOCK_M,
            )  # fmt: skip
        part_ptr += part * ((C + 1) * C)
        store_tile(part_ptr, left, left < C, right, product, WIDTH=C)
        if tile // blocks == tile % blocks:
            store_vector(part_ptr + C * C, left, tl.sum(total, 1) / 16, WIDTH=C)
        else:
            store_tile(part_ptr, right, right < C, left, tl.trans(product), WIDTH=C)


@triton.jit
def exact_product(weight, s, sums, DTYPE: tl.constexpr):
    """sums + weight @ s for float32 tiles, the weight rounded to DTYPE. Tensor cores add up in float32 what they
    multiply in 16 bits, and three numbers of bfloat16 have all digits of one of float32, two those of float16."""
    if tl.float32 == DTYPE:
        return dot(weight, s, sums)
    high = rounded(s, DTYPE=tl.bfloat16)
    middle = rounded(s - high, DTYPE=tl.bfloat16)
    low = (s - high - middle).to(tl.bfloat16)
    high, middle = high.to(tl.bfloat16), middle.to(tl.bfloat16)
    most = weight.to(tl.bfloat16)
    sums = tl.dot(most, high, tl.dot(most, middle, tl.dot(most, low, sums)))
    if tl.float16 == DTYPE:
        left = (weight - most.to(tl.float32)).to(tl.bfloat16)
        sums = tl.dot(left, high, tl.dot(left, middle, tl.dot(left, low, sums)))
    return sums


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
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
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    programs: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    share = tl.div_rn(1.0, rows.to(tl.float32))
    output = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    mean = tl.zeros((BLOCK_E,), tl.float32)
    var = tl.zeros((BLOCK_E,), tl.float32)
    for first in range(0, C, BLOCK_C):
        right = first + tl.arange(0, BLOCK_C)
        right_offset = load_vector(total_ptr + C * C, right, WIDTH=C) * share
        right_mean = load_vector(pivot_ptr, right, WIDTH=C) + right_offset
        product = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
        for second in range(0, C, BLOCK_C):
            left = second + tl.arange(0, BLOCK_C)
            left_offset = load_vector(total_ptr + C * C, left, WIDTH=C) * share
            covariance = load_tile(total_ptr, left, left < C, right, WIDTH=C) * share
            covariance -= left_offset[:, None] * right_offset[None, :]
            weight = load_rounded_weight(weight_ptr, x_ptr, output, left, OUT=E, WIDTH=C)
            product = exact_product(weight, covariance, product, DTYPE=dtype)
            if (first // BLOCK_C * blocks + second // BLOCK_C) % programs == tl.program_id(0):
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


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def prepare_project_kernel(
    norm_weight_ptr, norm_bias_ptr,  # of the middle norm, (E,)
    part_ptr, count_ptr,  # moments of parts of z, (2, parts, E) and (parts,), float32
    weight_ptr,  # (OUT, E)
    mean_ptr, var_ptr, folded_ptr, pivot_ptr,  # written: of z, (E,); (2, E) and (OUT,), float32
    packed_ptr,  # written: the weight, (OUT, E), as it is multiplied
    parts, eps,
    ACT: tl.constexpr, E: tl.constexpr, OUT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What project_fwd_kernel needs many times: scale and shift of the norm, `halved`, the weight in the dtype of the
    map, and a value near the mean of each output, the product of a pixel whose channels are all at their means. And the
    moments of z.

    The first programs have BLOCK channels of the norm each, the others BLOCK outputs, for BLOCK_E channels at a
    time."""
    blocks: tl.constexpr = (E + BLOCK - 1) // BLOCK
    if tl.program_id(0) < blocks:
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mean, var = load_moments(part_ptr, parts, 0, 0, column, column < E, C=E, BLOCK_C=BLOCK, count_ptr=count_ptr)
        store_vector(mean_ptr, column, mean, WIDTH=E)
        store_vector(var_ptr, column, var, WIDTH=E)
        scale = load_vector(norm_weight_ptr, column, WIDTH=E) * inverse_std(var, eps)
        shift = load_vector(norm_bias_ptr, column, WIDTH=E) - mean * scale
        store_vector(folded_ptr, column, halved(scale, ACT=ACT), WIDTH=E)
        store_vector(folded_ptr + E, column, halved(shift, ACT=ACT), WIDTH=E)
    else:
        output = (tl.program_id(0) - blocks) * BLOCK + tl.arange(0, BLOCK)
        pivot = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, E, BLOCK_E):
            column = first + tl.arange(0, BLOCK_E)
            weight = load_tile(weight_ptr, output, output < OUT, column, WIDTH=E).to(packed_ptr.dtype.element_ty)
            store_tile(packed_ptr, output, output < OUT, column, weight, WIDTH=E)
            hidden = activate(load_vector(norm_bias_ptr, column, WIDTH=E), ACT=ACT, DTYPE=tl.float32)
            pivot += tl.sum(weight.to(tl.float32) * hidden[None, :], 1)
        store_vector(pivot_ptr, output, pivot, WIDTH=OUT)


@triton.jit
def across(x):
    """A tile whose columns, a multiple of 16, are added up eight apart, for up to 64 rows in each half: of a tile that
    comes from a product each thread adds what it holds. (`pairs` is the same for rows.)"""
    HALVES: tl.constexpr = 2 if x.shape[0] <= 64 else 1
    return tl.sum(tl.reshape(x, (x.shape[0], HALVES, x.shape[1] // (8 * HALVES), 8)), 2)


@triton.jit
def sum_across(x):
    """The sums of the rows of a tile, from what is left of it `across`."""
    return tl.sum(tl.sum(x, 2), 1)


@triton.jit
def moments_from_pivot(total, squares, pivot, count):
    mean = sum_across(total) / count
    return pivot + mean, at_least_zero(sum_across(squares) - count * mean * mean)


@triton.jit
def _project_tile(
    z_ptr, folded_ptr, weight_ptr, pivot, p_ptr, start, length, output,
    ACT: tl.constexpr, E: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Writes `length` rows of p, BLOCK_M at most, from row `start`; returns their deviations from the pivot."""
    lane = tl.arange(0, BLOCK_M)
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    z_ptr += start * E
    p_ptr += start * OUT
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for second in range(0, E, BLOCK_K):
        column = second + tl.arange(0, BLOCK_K)
        scale = load_vector(folded_ptr, column, WIDTH=E)
        shift = load_vector(folded_ptr + E, column, WIDTH=E)
        z = load_tile(z_ptr, lane, lane < length, column, WIDTH=E).to(tl.float32)
        hidden = activate_folded(z, scale, shift, ACT=ACT, DTYPE=dtype)
        weight = load_tile(weight_ptr, output, output < WIDTH, column, WIDTH=E)
        sums = dot(weight, tl.trans(hidden.to(weight.dtype)), sums)
    p = rounded(sums, DTYPE=p_ptr.dtype.element_ty)
    p_tile = tl.trans(p.to(p_ptr.dtype.element_ty))
    store_tile(p_ptr, lane, lane < length, output, p_tile, WIDTH=WIDTH, STRIDE=OUT)
    return p - pivot[:, None]


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
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
    rows; writes p once. The product is made with outputs as its rows: so each thread has many pixels of few outputs,
    whose deviations it adds up in few registers, and hidden channels, which lie in shared memory then, are computed
    eight neighbours at a time."""
    blocks: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    part, start = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_N
    # Where blocks are whole, pointers go to the program's outputs, which need no masks then.
    WIDTH: tl.constexpr = OUT if OUT % BLOCK_N else BLOCK_N
    output = tl.arange(0, BLOCK_N)
    if OUT % BLOCK_N:
        output += start
    else:
        pivot_ptr += start
        weight_ptr += start * E
        p_ptr += start
        part_ptr += start
    total = across(tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
    squares = across(tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
    pivot = load_vector(pivot_ptr, output, WIDTH=WIDTH)
    begin, length = row_range(rows, rows_per_part, part)
    whole = length // BLOCK_M * BLOCK_M
    for first in range(0, whole, BLOCK_M):
        deviation = _project_tile(
            z_ptr, folded_ptr, weight_ptr, pivot, p_ptr, begin + first, BLOCK_M, output,
            ACT=ACT, E=E, OUT=OUT, WIDTH=WIDTH, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        total += across(deviation)
        squares += across(deviation * deviation)
    if whole < length:
        deviation = _project_tile(
            z_ptr, folded_ptr, weight_ptr, pivot, p_ptr, begin + whole, length - whole, output,
            ACT=ACT, E=E, OUT=OUT, WIDTH=WIDTH, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        deviation = tl.where((whole + tl.arange(0, BLOCK_M) < length)[None, :], deviation, 0.0)
        total += across(deviation)
        squares += across(deviation * deviation)
    mean, m2 = moments_from_pivot(total, squares, pivot, length.to(tl.float32))
    store_vector(part_ptr + part * OUT, output, mean, WIDTH=WIDTH)
    store_vector(part_ptr + (parts + part) * OUT, output, m2, WIDTH=WIDTH)
