"""Triton kernels of inverted_residual in training, backward; names are those of kernels.py. A "d" in front of a name is
its gradient; da is that of the activated expansion."""

from __future__ import annotations

import triton
import triton.language as tl

from ..pointwise_conv.kernels import add_product
from ..triton_common import (
    SILU,
    activate_backward,
    activate_both,
    dot,
    inverse_std,
    load_folded_norm,
    load_tile,
    load_vector,
    pairs,
    row_range,
    store_tile,
    store_vector,
    sum_of_pairs,
)
from ..triton_launch import jit_kernel
from ..triton_math import silu_of_half_and_gradient
from .kernels import (
    NOT_SPECIALIZED,
    activate_folded,
    add_up,
    exact_product,
    halved,
    load_centred_product,
    load_deviations,
    load_matrix,
    load_rounded,
    shares,
)


@triton.jit
def _hidden_gradient(dp_ptr, weight_ptr, row, valid, column, E: tl.constexpr, OUT: tl.constexpr, BLOCK_K: tl.constexpr):
    """The gradient of what the projection multiplies, a tile of dp weight."""
    sums = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for first in range(0, OUT, BLOCK_K):
        output = first + tl.arange(0, BLOCK_K)
        dp = load_tile(dp_ptr, row, valid, output, WIDTH=OUT)
        sums = dot(dp, load_tile(weight_ptr, output, output < OUT, column, WIDTH=E).to(dp.dtype), sums)
    return sums


@triton.jit
def _part(part_ptr, rows, rows_per_part, blocks, E: tl.constexpr, OUT: tl.constexpr):
    """Workspace, first row and number of rows of the part of this program, one of `blocks`."""
    part = tl.program_id(0) // blocks
    begin, length = row_range(rows, rows_per_part, part)
    return part_ptr + part * ((OUT + 2) * E), begin, length


@triton.jit
def _folded(norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, column, eps, ACT: tl.constexpr, E: tl.constexpr):
    """Scale and shift of a norm as activate_folded takes them."""
    scale, shift = load_folded_norm(norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, column, eps, C=E)
    return halved(scale, ACT=ACT), halved(shift, ACT=ACT)


@triton.jit
def _hidden_and_gradient(grad, z, scale, shift, ACT: tl.constexpr, DTYPE: tl.constexpr):
    """act(n) and the gradient of n for the gradient of that, with n = norm(z) by what `_folded` returns."""
    normal = z * scale[None, :] + shift[None, :]
    if ACT == SILU:
        hidden, grad = silu_of_half_and_gradient(grad, normal, DTYPE=DTYPE)
    else:
        hidden, grad = activate_both(grad, normal, ACT=ACT, DTYPE=DTYPE)
    return hidden, grad


@triton.jit
def _weigh(grad, z, mean, DTYPE: tl.constexpr):
    """g * (z - mean), or of maps in 16 bits g * z: what mean * sum g adds to its sums is taken off in
    project_gradient_kernel, and is no larger than what rounding z has put there."""
    return grad * (z - mean[None, :] if tl.float32 == DTYPE else z)


@triton.jit
def _store_norm_sums(part_ptr, column, total, weighted, E: tl.constexpr, OUT: tl.constexpr):
    store_vector(part_ptr + OUT * E, column, sum_of_pairs(total), WIDTH=E)
    store_vector(part_ptr + (OUT + 1) * E, column, sum_of_pairs(weighted), WIDTH=E)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def project_bwd_kernel(
    dp_ptr, z_ptr,  # (rows, OUT), (rows, E)
    weight_ptr,  # (OUT, E)
    norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr,  # of the middle norm, (E,)
    part_ptr,  # written: (parts, OUT + 2, E), float32
    rows, rows_per_part, eps,
    ACT: tl.constexpr, E: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The first read of z. Over the rows of a part, with the middle norm's output n and its gradient g:

        dp^T act(n), which is dweight;  the sums of g;  those of g * (z - mean) or g * z, as _weigh has it

    A program has BLOCK_N expanded channels of a part and all outputs, and holds their weight. Reads z once, dp once for
    each block of channels. Sums are kept for each place of the tile and added up at the end."""
    columns: tl.constexpr = (E + BLOCK_N - 1) // BLOCK_N
    dtype: tl.constexpr = dp_ptr.dtype.element_ty
    part_ptr, begin, length = _part(part_ptr, rows, rows_per_part, columns, E=E, OUT=OUT)
    column = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    output, lane = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    scale, shift = _folded(norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, column, eps, ACT=ACT, E=E)
    mean = load_vector(mean_ptr, column, WIDTH=E)
    weight = load_tile(weight_ptr, output, output < OUT, column, WIDTH=E).to(dtype)
    product = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    total = pairs(tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    weighted = pairs(tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    for first in range(0, length, BLOCK_M):
        start, valid = begin + first, first + lane < length
        z = load_tile(z_ptr + start * E, lane, valid, column, WIDTH=E).to(tl.float32)
        dp = load_tile(dp_ptr + start * OUT, lane, valid, output, WIDTH=OUT)
        grad = dot(dp, weight, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        hidden, grad = _hidden_and_gradient(grad, z, scale, shift, ACT=ACT, DTYPE=dtype)
        product = dot(tl.trans(dp), hidden.to(dtype), product)
        total += pairs(grad)
        weighted += pairs(_weigh(grad, z, mean, DTYPE=dp_ptr.dtype.element_ty))
    store_tile(part_ptr, output, output < OUT, column, product, WIDTH=E)
    _store_norm_sums(part_ptr, column, total, weighted, E=E, OUT=OUT)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def project_sums_bwd_kernel(
    dp_ptr, z_ptr, weight_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, part_ptr, rows, rows_per_part, eps,
    ACT: tl.constexpr, E: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sums of project_bwd_kernel, where the weight of all outputs does not fit a program: BLOCK_K at a time."""
    columns: tl.constexpr = (E + BLOCK_N - 1) // BLOCK_N
    part_ptr, begin, length = _part(part_ptr, rows, rows_per_part, columns, E=E, OUT=OUT)
    column, lane = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    scale, shift = _folded(norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, column, eps, ACT=ACT, E=E)
    mean = load_vector(mean_ptr, column, WIDTH=E)
    total = pairs(tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    weighted = pairs(tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    for first in range(0, length, BLOCK_M):
        start, valid = begin + first, first + lane < length
        z = load_tile(z_ptr + start * E, lane, valid, column, WIDTH=E).to(tl.float32)
        grad = _hidden_gradient(dp_ptr + start * OUT, weight_ptr, lane, valid, column, E=E, OUT=OUT, BLOCK_K=BLOCK_K)
        _, grad = _hidden_and_gradient(grad, z, scale, shift, ACT=ACT, DTYPE=dp_ptr.dtype.element_ty)
        total += pairs(grad)
        weighted += pairs(_weigh(grad, z, mean, DTYPE=dp_ptr.dtype.element_ty))
    _store_norm_sums(part_ptr, column, total, weighted, E=E, OUT=OUT)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def project_product_bwd_kernel(
    dp_ptr, z_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, part_ptr, rows, rows_per_part, eps,
    ACT: tl.constexpr, E: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The product of project_bwd_kernel in blocks of BLOCK_K outputs and BLOCK_N expanded channels."""
    columns: tl.constexpr = (E + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = (OUT + BLOCK_K - 1) // BLOCK_K
    dtype: tl.constexpr = dp_ptr.dtype.element_ty
    part_ptr, begin, length = _part(part_ptr, rows, rows_per_part, columns * blocks, E=E, OUT=OUT)
    tile, lane = tl.program_id(0) % (columns * blocks), tl.arange(0, BLOCK_M)
    column, output = tile % columns * BLOCK_N + tl.arange(0, BLOCK_N), tile // columns * BLOCK_K + tl.arange(0, BLOCK_K)
    scale, shift = _folded(norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, column, eps, ACT=ACT, E=E)
    product = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for first in range(0, length, BLOCK_M):
        start, valid = begin + first, first + lane < length
        z = load_tile(z_ptr + start * E, lane, valid, column, WIDTH=E).to(tl.float32)
        dp = load_tile(dp_ptr + start * OUT, lane, valid, output, WIDTH=OUT)
        hidden = activate_folded(z, scale, shift, ACT=ACT, DTYPE=dtype)
        product = dot(tl.trans(dp), hidden.to(dtype), product)
    store_tile(part_ptr, output, output < OUT, column, product, WIDTH=E)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def project_gradient_kernel(
    part_ptr,  # (parts, OUT + 2, E), float32, of project_bwd_kernel
    norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr,  # of the middle norm, (E,)
    first_weight_ptr, first_bias_ptr, first_mean_ptr, first_var_ptr,  # of the first norm, (E,)
    dproject_ptr, dweight_ptr, dbias_ptr,  # written: (OUT, E) and (E,), like the parameters
    coefficients_ptr,  # written: (4, E), float32
    expand_ptr, scaled_ptr,  # W, (E, C); written, if not None: (E, C), like the map
    rows, parts, eps, first_eps,
    CENTRED: tl.constexpr, C: tl.constexpr, E: tl.constexpr, OUT: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """What the parts add up to: the gradients of the projection's weight and of the middle norm's weight and bias. And
    what the passes behind it need: for each channel of the middle norm scale and shift, and offset and slope, with
    which dz = scale * g + offset + slope * z:

        dbias = sum g;  dweight = rstd * sum(g * (z - mean)), CENTRED already or not
        slope = -scale * rstd * dweight / rows;  offset = -scale * dbias / rows - slope * mean

    And W, rounded, times the scale of the first norm. The first programs have BLOCK channels of the norms each, the
    next ones BLOCK values of the projection's weight, the last ones BLOCK_W of W."""
    blocks: tl.constexpr = (E + BLOCK - 1) // BLOCK
    last: tl.constexpr = blocks + (OUT * E + BLOCK - 1) // BLOCK
    SIZE: tl.constexpr = (OUT + 2) * E
    if tl.program_id(0) < blocks:
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        valid = column < E
        scale, shift = load_folded_norm(norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, column, eps, C=E)
        rstd = inverse_std(load_vector(var_ptr, column, WIDTH=E, OTHER=1.0), eps)
        dbias = add_up(part_ptr + OUT * E, parts, column, valid, N=SIZE, FEW=FEW)
        dweight = add_up(part_ptr + (OUT + 1) * E, parts, column, valid, N=SIZE, FEW=FEW)
        mean = load_vector(mean_ptr, column, WIDTH=E)
        dweight = rstd * (dweight if CENTRED else dweight - mean * dbias)
        slope = -scale * rstd * dweight / rows
        offset = -scale * dbias / rows - slope * mean
        store_vector(dweight_ptr, column, dweight, WIDTH=E)
        store_vector(dbias_ptr, column, dbias, WIDTH=E)
        store_vector(coefficients_ptr, column, scale, WIDTH=E)
        store_vector(coefficients_ptr + E, column, shift, WIDTH=E)
        store_vector(coefficients_ptr + 2 * E, column, offset, WIDTH=E)
        store_vector(coefficients_ptr + 3 * E, column, slope, WIDTH=E)
    elif tl.program_id(0) < last:
        column = (tl.program_id(0) - blocks) * BLOCK + tl.arange(0, BLOCK)
        total = add_up(part_ptr, parts, column, column < OUT * E, N=SIZE, FEW=FEW)
        store_vector(dproject_ptr, column, total, WIDTH=OUT * E)
    elif scaled_ptr is not None:
        dtype: tl.constexpr = scaled_ptr.dtype.element_ty
        at = (tl.program_id(0) - last) * BLOCK_W + tl.arange(0, BLOCK_W)
        scale, _ = load_folded_norm(
            first_weight_ptr, first_bias_ptr, first_mean_ptr, first_var_ptr, at // C, first_eps, C=E, DTYPE=dtype
        )
        weight = load_vector(expand_ptr, at, WIDTH=E * C).to(dtype).to(tl.float32)
        store_vector(scaled_ptr, at, weight * scale, WIDTH=E * C)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def filtered_bwd_kernel(
    dp_ptr, z_ptr,  # (rows, OUT), (rows, E)
    weight_ptr, coefficients_ptr,  # (OUT, E); (4, E), float32, of project_gradient_kernel
    dz_ptr,  # written: (rows, E), like z
    rows,
    ACT: tl.constexpr, E: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The second read of z: dz = scale * g + offset + slope * z, where g = act'(z * scale + shift) * (dp weight).

    A program has BLOCK_M rows and BLOCK_N expanded channels. Reads z once, dp once for each block of channels; writes
    dz once."""
    columns: tl.constexpr = (E + BLOCK_N - 1) // BLOCK_N
    start = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M
    column, lane = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    valid = start + lane < rows
    scale = load_vector(coefficients_ptr, column, WIDTH=E)[None, :]
    shift = load_vector(coefficients_ptr + E, column, WIDTH=E)[None, :]
    z = load_tile(z_ptr + start * E, lane, valid, column, WIDTH=E).to(tl.float32)
    grad = _hidden_gradient(dp_ptr + start * OUT, weight_ptr, lane, valid, column, E=E, OUT=OUT, BLOCK_K=BLOCK_K)
    grad = activate_backward(grad, z * scale + shift, ACT=ACT, DTYPE=dp_ptr.dtype.element_ty)
    offset = load_vector(coefficients_ptr + 2 * E, column, WIDTH=E)[None, :]
    slope = load_vector(coefficients_ptr + 3 * E, column, WIDTH=E)[None, :]
    store_tile(dz_ptr + start * E, lane, valid, column, scale * grad + offset + slope * z, WIDTH=E)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def expanded_bwd_kernel(
    x_ptr,  # (rows, C)
    weight_ptr,  # W, (E, C), like x
    norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr,  # of the first norm, (E,)
    da_ptr,  # (rows, E), like x: da, replaced by G
    rows, rows_per_part, eps,
    ACT: tl.constexpr, C: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """G = act'(norm(x W^T)) * da, the gradient of the first norm's output, whose input is made again from x.

    A program has BLOCK_N expanded channels of a part, and holds their weight where BLOCK_K inputs are all. Reads da
    once, x once for each block of channels; writes G once."""
    columns: tl.constexpr = (E + BLOCK_N - 1) // BLOCK_N
    dtype: tl.constexpr = da_ptr.dtype.element_ty
    begin, length = row_range(rows, rows_per_part, tl.program_id(0) // columns)
    column, lane = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    scale, shift = _folded(norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, column, eps, ACT=ACT, E=E)
    weight = load_tile(weight_ptr, column, column < E, tl.arange(0, BLOCK_K), WIDTH=C)
    for first in range(0, length, BLOCK_M):
        start, valid = begin + first, first + lane < length
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if C <= BLOCK_K:
            x = load_tile(x_ptr + start * C, lane, valid, tl.arange(0, BLOCK_K), WIDTH=C)
            sums = dot(x, tl.trans(weight), sums)
        else:
            sums = add_product(
                sums, x_ptr + start * C, weight_ptr, lane, valid, column, C=C, STRIDE=C, OUT=E, BLOCK_K=BLOCK_K
            )
        da = load_tile(da_ptr + start * E, lane, valid, column, WIDTH=E).to(tl.float32)
        _, grad = _hidden_and_gradient(da, sums, scale, shift, ACT=ACT, DTYPE=dtype)
        store_tile(da_ptr + start * E, lane, valid, column, grad, WIDTH=E)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def products_bwd_kernel(
    grad_ptr, x_ptr, mean_ptr,  # G (rows, E), x (rows, C); the mean of x (C,), float32, or None
    part_ptr,  # written: (parts, E * C + E), float32
    rows, rows_per_part,
    C: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """G^T (x - mean), (E, C), or G^T x without a mean, and behind it the sums of G, (E,), over the rows of a part.

    A program has BLOCK_N expanded channels and BLOCK_K inputs of a part. Reads G once for each block of inputs, x once
    for each block of expanded channels. Without a mean both are multiplied from where they were copied to, and the sums
    of G are a product with ones: no number passes through a register."""
    columns: tl.constexpr = (E + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    tile, lane = tl.program_id(0) % (columns * blocks), tl.arange(0, BLOCK_M)
    column, inner = tile % columns * BLOCK_N + tl.arange(0, BLOCK_N), tile // columns * BLOCK_K + tl.arange(0, BLOCK_K)
    product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    ones = tl.full((BLOCK_M, 16), 1.0, tl.float32).to(grad_ptr.dtype.element_ty)
    total = tl.zeros((BLOCK_N, 16), tl.float32)
    begin, length = row_range(rows, rows_per_part, tl.program_id(0) // (columns * blocks))
    for first in range(0, length, BLOCK_M):
        start, valid = begin + first, first + lane < length
        grad = load_tile(grad_ptr + start * E, lane, valid, column, WIDTH=E)
        if mean_ptr is None:
            x = load_tile(x_ptr + start * C, lane, valid, inner, WIDTH=C)
            total = dot(tl.trans(grad), ones, total)
        else:
            mean = load_vector(mean_ptr, inner, WIDTH=C)
            x = load_deviations(x_ptr + start * C, mean, lane, valid, inner, C=C).to(grad.dtype)
            total += tl.sum(grad.to(tl.float32), 0)[:, None]
        product = dot(tl.trans(grad), x, product)
    part_ptr += tl.program_id(0) // (columns * blocks) * (E * (C + 1))
    store_tile(part_ptr, column, column < E, inner, product, WIDTH=C)
    if tile < columns:
        store_vector(part_ptr + E * C, column, tl.sum(total, 1) / 16, WIDTH=E)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def expand_bwd_kernel(
    da_ptr, x_ptr, mean_ptr,  # (rows, E), (rows, C), the mean of x (C,), float32
    weight_ptr,  # W, (E, C)
    norm_weight_ptr, norm_bias_ptr, expanded_mean_ptr, expanded_var_ptr,  # of the first norm, (E,)
    dx_ptr, part_ptr,  # written: (rows, C), like x; (parts, E * C + E), float32
    rows, rows_per_part, eps,
    ACT: tl.constexpr, C: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What the two kernels above and a product do, where a row and the whole weight fit a program. With
    G = act'(norm(x W^T)) * da and the scale of the first norm:

        dx = (G * scale) W, which correct_bwd_kernel completes;  G^T (x - mean) and the sums of G over a part

    A program has a part. Reads da and x once, W once for each program; writes dx once."""
    column, inner, lane = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    scale, shift = load_folded_norm(
        norm_weight_ptr, norm_bias_ptr, expanded_mean_ptr, expanded_var_ptr, column, eps, C=E
    )
    mean = load_vector(mean_ptr, inner, WIDTH=C)
    weight = load_tile(weight_ptr, column, column < E, inner, WIDTH=C).to(dtype)
    product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    begin = tl.program_id(0) * rows_per_part
    length = tl.minimum(rows - begin, rows_per_part)
    for first in range(0, length, BLOCK_M):
        start, valid = begin.to(tl.int64) + first, first + lane < length
        x = load_tile(x_ptr + start * C, lane, valid, inner, WIDTH=C)
        da = load_tile(da_ptr + start * E, lane, valid, column, WIDTH=E).to(tl.float32)
        normal = tl.dot(x, tl.trans(weight)) * scale[None, :] + shift[None, :]
        grad = activate_backward(da, normal, ACT=ACT, DTYPE=dtype)
        total += tl.sum(grad, 0)
        x = tl.where(valid[:, None], x.to(tl.float32) - mean[None, :], 0.0)
        product = dot(tl.trans(grad.to(dtype)), x.to(dtype), product)
        dx = tl.dot((grad * scale[None, :]).to(dtype), weight)
        store_tile(dx_ptr + start * C, lane, valid, inner, dx, WIDTH=C)
    part_ptr += tl.program_id(0) * (E * (C + 1))
    store_tile(part_ptr, column, column < E, inner, product, WIDTH=C)
    store_vector(part_ptr + E * C, column, total, WIDTH=E)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def expand_gradient_kernel(
    x_ptr,  # only its dtype is used
    product_ptr, sums_ptr,  # (E, C) and (E,), float32: N or, not CENTRED, G^T x; g = sum G
    weight_ptr, norm_weight_ptr,  # W, (E, C); the first norm's, (E,)
    mean_ptr, covariance_ptr, var_ptr,  # of x (C,) and (C, C), of the expansion (E,), float32
    dweight_ptr, dnorm_weight_ptr, dnorm_bias_ptr,  # written: like the parameters
    correction_ptr,  # written: (2, E), float32
    rows, eps,
    CENTRED: tl.constexpr, C: tl.constexpr, E: tl.constexpr,
    SHARES: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradients of W and of the first norm's parameters (identity B), from N = G^T (x - mean), g = sum G and the
    covariance S of x, with rstd = 1 / sqrt(var + eps) and scale = norm_weight * rstd:

        dnorm_bias = g;  dnorm_weight = rstd * the sums of the rows of W * N
        dW = scale * (N - dnorm_weight * rstd * W S)
        correction = (scale * rstd * dnorm_weight / rows, scale * g / rows), for correction_bwd_kernel

    The grid is (blocks of expanded channels, blocks of inputs): each program adds up its rows of W * N for itself."""
    output = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = load_vector(sums_ptr, output, WIDTH=E)
    rstd = inverse_std(load_vector(var_ptr, output, WIDTH=E, OTHER=1.0), eps)
    scale = load_vector(norm_weight_ptr, output, WIDTH=E) * rstd
    dnorm_weight = tl.zeros((SHARES, BLOCK_E, BLOCK_K // SHARES), tl.float32)
    weight_covariance = tl.zeros((SHARES, BLOCK_E, BLOCK_C), tl.float32)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    for first in range(0, C, BLOCK_K):
        inner, row = first + shares(BLOCK_K, SHARES), output[None, :, None]
        weight = load_rounded(weight_ptr, x_ptr, row, inner[:, None, :], E=E, C=C)
        dnorm_weight += weight * load_centred_product(
            product_ptr, total[None, :, None], mean_ptr, row, inner[:, None, :], CENTRED=CENTRED, C=C, E=E
        )
        covariance = load_matrix(covariance_ptr, inner[:, :, None], column[None, None, :], E=C, C=C)
        weight_covariance = exact_product(weight, covariance, weight_covariance, DTYPE=x_ptr.dtype.element_ty)
    dnorm_weight = tl.sum(tl.sum(dnorm_weight, 0), 1) * rstd
    weight_covariance = tl.sum(weight_covariance, 0)
    product = load_centred_product(
        product_ptr, total[:, None], mean_ptr, output[:, None], column[None, :], CENTRED=CENTRED, C=C, E=E
    )
    dweight = scale[:, None] * (product - (dnorm_weight * rstd)[:, None] * weight_covariance)
    store_tile(dweight_ptr, output, output < E, column, dweight, WIDTH=C)
    if tl.program_id(1) == 0:
        store_vector(dnorm_weight_ptr, output, dnorm_weight, WIDTH=E)
        store_vector(dnorm_bias_ptr, output, total, WIDTH=E)
        store_vector(correction_ptr, output, scale * rstd * dnorm_weight / rows, WIDTH=E)
        store_vector(correction_ptr + E, output, scale * total / rows, WIDTH=E)
