"""Triton kernels of inverted_residual in training, and the launchers of both GPU ways through it.

    stored (Triton)   the activated expansion a is written once and read twice: by the taps, and by their gradient.
    fused (CUDA C++)  a exists on chip only: two ops of csrc/cuda, `inverted_residual_filter` and `.._filter_backward`, hold it in shared
                      memory and make it again in backward. What comes before and after them is the same.

In both ways the statistics of the expansion come from the moments of its narrow input (identity A of the design), so the product is written
behind its norm and activation; and the gradient of that norm is a correction on the narrow side (identity B). The expansion before its
activation is never stored: where backward needs it, it is the product of narrow rows again. The filtered map z leaves with its moments; the
middle norm and activation happen in the prologue of whoever reads it. Gradients of parameters are partial sums for a range of rows each, in
a float32 workspace, which one launch adds up in a fixed order.

Evaluation needs no kernel from here: each of the three convolutions is one launch of its own op.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..batch_norm_act.triton import batch_norm_act_backward, normalize
from ..depthwise_conv.triton import filter, filter_backward
from ..pointwise_conv.triton import add_product, pointwise_conv_inference
from ..triton_common import (
    activate,
    activate_backward,
    add_moments,
    at_least_zero,
    dot,
    inverse_std,
    load_sums,
    multiprocessors,
    on_device,
    split_rows,
)
from ..triton_rows import load_tile, load_vector, store_tile
from ..types import ACTIVATIONS
from .cost import fits_a_program, values_moved

IDENTITY = ACTIVATIONS.index("identity")

_NOT_SPECIALIZED = ["rows", "parts", "rows_per_part", "eps"]
PIVOT_ROWS = tl.constexpr(32)
SUMS_BLOCK = 32  # columns of partial sums in a program


def configurations(kernel: str, x: Tensor, columns: int, inner: int) -> list[dict[str, int]]:
    """Of a kernel, the shipped one first: BLOCK_M rows at a time, BLOCK_N of `columns` columns of its tile, and BLOCK_K of the `inner`
    columns that it multiplies or, where it sums over rows, of the other side of its product."""

    def tile(rows: int, most_columns: int, most_inner: int, warps: int, stages: int = 2) -> dict[str, int]:
        n, k = (max(16, min(triton.next_power_of_2(width), most)) for width, most in ((columns, most_columns), (inner, most_inner)))
        return {"BLOCK_M": rows, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}

    if x.dtype is torch.float32:  # no matrix units of this precision: products are made in registers
        if kernel in _OUTER:
            return [tile(16, 32, 32, 4)]
        return [tile(32, 32, 16, 8 if kernel == "project" else 4)]
    return [tile(*shape) for shape in _TILES[kernel]]


# Rows, columns, inner columns, warps.
_TILES = {
    "moments": ((128, 64, 64, 8), (64, 64, 64, 4)),
    "project": ((128, 128, 32, 8), (64, 128, 64, 8)),
    "project_bwd": ((32, 64, 128, 8), (64, 64, 64, 8), (64, 64, 128, 8, 1)),
    "filtered_bwd": ((64, 64, 64, 8), (128, 64, 32, 8)),
    "expanded_bwd": ((128, 64, 32, 8), (64, 64, 64, 8)),
    "expand_bwd": ((16, 256, 64, 8),),
    "products_bwd": ((64, 64, 64, 4), (64, 128, 64, 8)),
    "correct_bwd": ((64, 64, 64, 4), (128, 64, 32, 8)),
}
_OUTER = ("moments", "project_bwd", "products_bwd")  # sums over rows


def configuration(kernel: str, x: Tensor, columns: int, inner: int) -> dict[str, int]:
    return tuning.choose(f"inverted_residual_{kernel}", x, (columns, inner), lambda: configurations(kernel, x, columns, inner))


def bytes_moved(x: Tensor, wide: int, outputs: int, stride: int, store: bool) -> tuple[int, int]:
    """Bytes of maps that the forward and the backward pass of a training step read and write; `store` is the Triton way, not the fused."""
    batch, height, width, inputs = x.shape
    pixels, out_pixels = batch * height * width, batch * -(-height // stride) * -(-width // stride)
    moved = values_moved(inputs, wide, outputs, stride == 1 and inputs == outputs, store, fits_a_program(x, wide))
    forward, backward = (pixels * moved[i] + out_pixels * moved[i + 1] for i in (0, 2))
    return x.element_size() * forward, x.element_size() * backward


# Sums over rows


@triton.jit
def _pivot(x_ptr, rows, column, C: tl.constexpr):
    """About the mean of each column, in the dtype of x so that a distance to it is nearly exact: from rows spread over the map. A column
    that is constant gives itself."""
    row = tl.arange(0, PIVOT_ROWS).to(tl.int64) * rows // PIVOT_ROWS
    first = tl.load(x_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row[:, None] * C + column[None, :], mask=(column < C)[None, :], other=0.0).to(tl.float32)
    return (first + tl.sum(x - first[None, :], 0) / PIVOT_ROWS).to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _load_distances(x_ptr, center, lane, valid, column, C: tl.constexpr):
    x = load_tile(x_ptr, lane, valid, column, C, C).to(tl.float32)
    return tl.where(valid[:, None], x - center[None, :], 0.0)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _moments_fwd_kernel(
    x_ptr, pivot_ptr, part_ptr, rows, rows_per_part,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products (C, C) and sums (C,) of the distances of a part's rows to the pivot."""
    blocks: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    part, tile = tl.program_id(0) // (blocks * blocks), tl.program_id(0) % (blocks * blocks)
    lane = tl.arange(0, BLOCK_M)
    left, right = tile // blocks * BLOCK_N + tl.arange(0, BLOCK_N), tile % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    if tile // blocks <= tile % blocks:  # the other half is the same
        left_pivot, right_pivot = _pivot(x_ptr, rows, left, C), _pivot(x_ptr, rows, right, C)
        product = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)
        begin = part * rows_per_part
        length = tl.minimum(rows - begin, rows_per_part)
        for first in range(0, length, BLOCK_M):
            at, valid = x_ptr + (begin.to(tl.int64) + first) * C, first + lane < length
            x = _load_distances(at, left_pivot, lane, valid, left, C)
            total += tl.sum(x, 0)
            other = x if blocks == 1 else _load_distances(at, right_pivot, lane, valid, right, C)
            product = dot(tl.trans(x.to(x_ptr.dtype.element_ty)), other.to(x_ptr.dtype.element_ty), product)
        part_ptr += part * ((C + 1) * C)
        store_tile(part_ptr, left, left < C, right, product, C, C)
        if tile // blocks == tile % blocks:
            tl.store(part_ptr + C * C + left, total, mask=left < C)
            if part == 0:
                tl.store(pivot_ptr + left, left_pivot, mask=left < C)
        else:
            store_tile(part_ptr, right, right < C, left, tl.trans(product), C, C)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _add_parts_kernel(part_ptr, total_ptr, parts, N: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(total_ptr + column, load_sums(part_ptr, parts, column, column < N, N, BLOCK), mask=column < N)


def _add_parts(part: Tensor) -> Tensor:
    """(parts, N) to (N,)."""
    parts, count = part.shape
    total = torch.empty(count, dtype=torch.float32, device=part.device)
    _add_parts_kernel[(triton.cdiv(count, SUMS_BLOCK),)](part, total, parts, N=count, BLOCK=SUMS_BLOCK, num_warps=4)
    return total


def _parts(x: Tensor, rows: int, config: dict[str, int], blocks: int, count: int) -> tuple[Tensor, int]:
    """A workspace for `count` values of each part of the rows, and the rows of a part, where a part is `blocks` programs."""
    parts, rows_per_part = split_rows(rows, max(2 * multiprocessors(x) // blocks, 1), config["BLOCK_M"])
    return torch.empty((parts, count), dtype=torch.float32, device=x.device), rows_per_part


# Forward


@triton.jit
def _load_weight(ptr, x_ptr, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of a weight as the products see it, rounded to the dtype of x, in float32."""
    return load_tile(ptr, row, row < ROWS, column, COLUMNS, COLUMNS).to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _expanded_moments_kernel(
    x_ptr, total_ptr, pivot_ptr, weight_ptr, mean_ptr, covariance_ptr, expanded_mean_ptr, expanded_var_ptr, rows,
    C: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Identity A: with mean and covariance S of x, channel w x of the expansion has the mean w mean and the variance w S w."""
    output = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    mean = tl.zeros((BLOCK_E,), tl.float32)
    var = tl.zeros((BLOCK_E,), tl.float32)
    for first in range(0, C, BLOCK_C):
        right = first + tl.arange(0, BLOCK_C)
        right_offset = load_vector(total_ptr + C * C, right, C) / rows
        right_mean = load_vector(pivot_ptr, right, C) + right_offset
        product = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
        for second in range(0, C, BLOCK_C):
            left = second + tl.arange(0, BLOCK_C)
            left_offset = load_vector(total_ptr + C * C, left, C) / rows
            covariance = load_tile(total_ptr, left, left < C, right, C, C) / rows - left_offset[:, None] * right_offset[None, :]
            product = dot(_load_weight(weight_ptr, x_ptr, output, left, E, C), covariance, product)
            if tl.program_id(0) == 0:
                store_tile(covariance_ptr, left, left < C, right, covariance, C, C)
        weight = _load_weight(weight_ptr, x_ptr, output, right, E, C)
        mean += tl.sum(weight * right_mean[None, :], 1)
        var += tl.sum(weight * product, 1)
        if tl.program_id(0) == 0:
            tl.store(mean_ptr + right, right_mean, mask=right < C)
    tl.store(expanded_mean_ptr + output, mean, mask=output < E)
    tl.store(expanded_var_ptr + output, at_least_zero(var), mask=output < E)


@triton.jit
def _load_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, column, WIDTH: tl.constexpr):
    """Scale and shift of a batch norm whose statistics are known."""
    var = tl.load(var_ptr + column, mask=column < WIDTH, other=1.0)
    scale = load_vector(weight_ptr, column, WIDTH) * inverse_std(var, eps)
    return scale, load_vector(bias_ptr, column, WIDTH) - load_vector(mean_ptr, column, WIDTH) * scale


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _project_fwd_kernel(
    z_ptr, weight_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, p_ptr, part_ptr, rows, parts, rows_per_part, eps,
    ACT: tl.constexpr, E: tl.constexpr, OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """p, the product of act(norm(z)), and the moments of parts of it."""
    blocks: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    part, output = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_M)
    count = tl.zeros((BLOCK_N,), tl.float32)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    m2 = tl.zeros((BLOCK_N,), tl.float32)
    begin = part * rows_per_part
    length = tl.minimum(rows - begin, rows_per_part)
    for first in range(0, length, BLOCK_M):
        start, valid = begin.to(tl.int64) + first, first + lane < length
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for second in range(0, E, BLOCK_K):
            column = second + tl.arange(0, BLOCK_K)
            scale, shift = _load_affine(norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, eps, column, E)
            z = load_tile(z_ptr + start * E, lane, valid, column, E, E).to(tl.float32)
            hidden = activate(z * scale[None, :] + shift[None, :], ACT).to(z_ptr.dtype.element_ty)
            weight = load_tile(weight_ptr, output, output < OUT, column, E, E).to(hidden.dtype)
            sums = dot(hidden, tl.trans(weight), sums)
        store_tile(p_ptr + start * OUT, lane, valid, output, sums, OUT, OUT)
        count, mean, m2 = add_moments(sums.to(p_ptr.dtype.element_ty).to(tl.float32), valid, count, mean, m2)
    tl.store(part_ptr + part * OUT + output, mean, mask=output < OUT)
    tl.store(part_ptr + (parts + part) * OUT + output, at_least_zero(m2), mask=output < OUT)


# Backward


@triton.jit
def _filtered_gradient(
    dp_ptr, weight_ptr, lane, valid, column, normal, ACT: tl.constexpr, E: tl.constexpr, OUT: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The gradient of the middle norm's output `normal`, columns `column`, from that of p."""
    sums = tl.zeros(normal.shape, tl.float32)
    for first in range(0, OUT, BLOCK_K):
        output = first + tl.arange(0, BLOCK_K)
        dp = load_tile(dp_ptr, lane, valid, output, OUT, OUT)
        sums = dot(dp, load_tile(weight_ptr, output, output < OUT, column, E, E).to(dp.dtype), sums)
    return activate_backward(sums, normal, ACT)


@triton.jit
def _add_norm_sums(
    total, weighted, dp_ptr, weight_ptr, lane, valid, column, z, mean, normal,
    ACT: tl.constexpr, E: tl.constexpr, OUT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    grad = _filtered_gradient(dp_ptr, weight_ptr, lane, valid, column, normal, ACT, E, OUT, BLOCK_K)
    return total + tl.sum(grad, 0), weighted + tl.sum(grad * (z - mean[None, :]), 0)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _project_bwd_kernel(
    dp_ptr, z_ptr, weight_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, part_ptr, rows, rows_per_part, eps,
    ACT: tl.constexpr, E: tl.constexpr, OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The first read of z: a part's share of the projection's gradient (OUT, E) and, two more rows, of the sums that the middle norm needs:
    of the gradient of its output, and of that times z - mean."""
    columns: tl.constexpr = (E + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = (OUT + BLOCK_K - 1) // BLOCK_K
    part, tile = tl.program_id(0) // (columns * blocks), tl.program_id(0) % (columns * blocks)
    column, output = tile % columns * BLOCK_N + tl.arange(0, BLOCK_N), tile // columns * BLOCK_K + tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_M)
    scale, shift = _load_affine(norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, eps, column, E)
    mean = load_vector(mean_ptr, column, E)
    product = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    begin = part * rows_per_part
    length = tl.minimum(rows - begin, rows_per_part)
    for first in range(0, length, BLOCK_M):
        start, valid = begin.to(tl.int64) + first, first + lane < length
        z = load_tile(z_ptr + start * E, lane, valid, column, E, E).to(tl.float32)
        dp = load_tile(dp_ptr + start * OUT, lane, valid, output, OUT, OUT)
        normal = z * scale[None, :] + shift[None, :]
        product = dot(tl.trans(dp), activate(normal, ACT).to(dp.dtype), product)
        at = dp_ptr + start * OUT
        if blocks == 1:  # noqa: SIM114 -- known when this is compiled, so that the loop can be pipelined
            total, weighted = _add_norm_sums(total, weighted, at, weight_ptr, lane, valid, column, z, mean, normal, ACT, E, OUT, BLOCK_K)
        elif tile < columns:
            total, weighted = _add_norm_sums(total, weighted, at, weight_ptr, lane, valid, column, z, mean, normal, ACT, E, OUT, BLOCK_K)
    part_ptr += part * ((OUT + 2) * E)
    store_tile(part_ptr, output, output < OUT, column, product, E, E)
    if tile < columns:
        tl.store(part_ptr + OUT * E + column, total, mask=column < E)
        tl.store(part_ptr + (OUT + 1) * E + column, weighted, mask=column < E)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _middle_norm_bwd_kernel(
    sums_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, dweight_ptr, dbias_ptr, coefficient_ptr, rows, eps,
    E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the two sums the gradients of weight and bias, and the coefficients (4, E): scale and shift of the norm; the gradient of z is
    scale * grad + the third + the fourth * z."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = column < E
    scale, shift = _load_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, column, E)
    rstd = inverse_std(tl.load(var_ptr + column, mask=valid, other=1.0), eps)
    dbias, dweight = load_vector(sums_ptr, column, E), load_vector(sums_ptr + E, column, E) * rstd
    slope = -scale * rstd * dweight / rows
    tl.store(dweight_ptr + column, dweight.to(dweight_ptr.dtype.element_ty), mask=valid)
    tl.store(dbias_ptr + column, dbias.to(dbias_ptr.dtype.element_ty), mask=valid)
    tl.store(coefficient_ptr + column, scale, mask=valid)
    tl.store(coefficient_ptr + E + column, shift, mask=valid)
    tl.store(coefficient_ptr + 2 * E + column, -scale * dbias / rows - slope * load_vector(mean_ptr, column, E), mask=valid)
    tl.store(coefficient_ptr + 3 * E + column, slope, mask=valid)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _filtered_bwd_kernel(
    dp_ptr, z_ptr, weight_ptr, coefficient_ptr, dz_ptr, rows,
    ACT: tl.constexpr, E: tl.constexpr, OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The second read of z: its gradient."""
    columns: tl.constexpr = (E + BLOCK_N - 1) // BLOCK_N
    start = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M
    column, lane = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    valid = start + lane < rows
    scale, shift = load_vector(coefficient_ptr, column, E)[None, :], load_vector(coefficient_ptr + E, column, E)[None, :]
    z = load_tile(z_ptr + start * E, lane, valid, column, E, E).to(tl.float32)
    grad = _filtered_gradient(dp_ptr + start * OUT, weight_ptr, lane, valid, column, z * scale + shift, ACT, E, OUT, BLOCK_K)
    offset, slope = load_vector(coefficient_ptr + 2 * E, column, E)[None, :], load_vector(coefficient_ptr + 3 * E, column, E)[None, :]
    store_tile(dz_ptr + start * E, lane, valid, column, scale * grad + offset + slope * z, E, E)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _expanded_bwd_kernel(
    da_ptr, x_ptr, weight_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, rows, eps,
    ACT: tl.constexpr, C: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Replaces the gradient of the activated expansion by that of the first norm's output, which is made again from x."""
    columns: tl.constexpr = (E + BLOCK_N - 1) // BLOCK_N
    start = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M
    column, lane = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    valid = start + lane < rows
    scale, shift = _load_affine(norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, eps, column, E)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = add_product(sums, x_ptr + start * C, weight_ptr, lane, valid, column, C, C, E, BLOCK_K)
    da = load_tile(da_ptr + start * E, lane, valid, column, E, E).to(tl.float32)
    grad = activate_backward(da, sums * scale[None, :] + shift[None, :], ACT)
    store_tile(da_ptr + start * E, lane, valid, column, grad, E, E)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _products_bwd_kernel(
    grad_ptr, x_ptr, mean_ptr, part_ptr, rows, rows_per_part,
    C: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A part's share of grad^T (x - mean), (E, C), and behind it of the sums of grad."""
    columns: tl.constexpr = (E + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    part, tile = tl.program_id(0) // (columns * blocks), tl.program_id(0) % (columns * blocks)
    column, inner = tile % columns * BLOCK_N + tl.arange(0, BLOCK_N), tile // columns * BLOCK_K + tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_M)
    mean = load_vector(mean_ptr, inner, C)
    product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    begin = part * rows_per_part
    length = tl.minimum(rows - begin, rows_per_part)
    for first in range(0, length, BLOCK_M):
        start, valid = begin.to(tl.int64) + first, first + lane < length
        grad = load_tile(grad_ptr + start * E, lane, valid, column, E, E)
        x = _load_distances(x_ptr + start * C, mean, lane, valid, inner, C)
        product = dot(tl.trans(grad), x.to(grad.dtype), product)
        total += tl.sum(grad.to(tl.float32), 0)
    part_ptr += part * (E * (C + 1))
    store_tile(part_ptr, column, column < E, inner, product, C, C)
    if tile < columns:
        tl.store(part_ptr + E * C + column, total, mask=column < E)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _expand_bwd_kernel(
    da_ptr, x_ptr, weight_ptr, norm_weight_ptr, norm_bias_ptr, expanded_mean_ptr, var_ptr, mean_ptr, dx_ptr, part_ptr, rows, rows_per_part,
    eps, ACT: tl.constexpr, C: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What the two kernels above and a product do, in one read of the gradient da, where a row and the whole weight fit a program: dx
    without the first norm's correction, and a part's share of grad^T (x - mean) and sum grad."""
    column, inner, lane = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    scale, shift = _load_affine(norm_weight_ptr, norm_bias_ptr, expanded_mean_ptr, var_ptr, eps, column, E)
    mean = load_vector(mean_ptr, inner, C)
    weight = load_tile(weight_ptr, column, column < E, inner, C, C).to(dtype)
    product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    begin = tl.program_id(0) * rows_per_part
    length = tl.minimum(rows - begin, rows_per_part)
    for first in range(0, length, BLOCK_M):
        start, valid = begin.to(tl.int64) + first, first + lane < length
        x = load_tile(x_ptr + start * C, lane, valid, inner, C, C)
        da = load_tile(da_ptr + start * E, lane, valid, column, E, E).to(tl.float32)
        normal = tl.dot(x, tl.trans(weight)) * scale[None, :] + shift[None, :]
        grad = activate_backward(da, normal, ACT)
        total += tl.sum(grad, 0)
        x = tl.where(valid[:, None], x.to(tl.float32) - mean[None, :], 0.0)
        product = dot(tl.trans(grad.to(dtype)), x.to(dtype), product)
        store_tile(dx_ptr + start * C, lane, valid, inner, tl.dot((grad * scale[None, :]).to(dtype), weight), C, C)
    part_ptr += tl.program_id(0) * (E * (C + 1))
    store_tile(part_ptr, column, column < E, inner, product, C, C)
    tl.store(part_ptr + E * C + column, total, mask=column < E)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _expand_gradient_kernel(
    x_ptr, product_ptr, sums_ptr, weight_ptr, norm_weight_ptr, mean_ptr, covariance_ptr, var_ptr, dweight_ptr, dnorm_weight_ptr,
    dnorm_bias_ptr, correction_ptr, rows, eps,
    CENTRED: tl.constexpr, C: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Identity B, from N = G^T (x - mean) and g = sum G for the gradient G of the first norm's output: dbias = g, dscale = r rowsum(W N),
    dW = scale r (N - dscale r W S); and what each channel weighs in the correction of dx, (2, E). Without CENTRED N is G^T x."""
    output = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    valid = output < E
    total = load_vector(sums_ptr, output, E)
    rstd = inverse_std(tl.load(var_ptr + output, mask=valid, other=1.0), eps)
    scale = load_vector(norm_weight_ptr, output, E) * rstd
    dscale = tl.zeros((BLOCK_E,), tl.float32)
    for first in range(0, C, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        product = load_tile(product_ptr, output, valid, column, C, C)
        if not CENTRED:
            product -= total[:, None] * load_vector(mean_ptr, column, C)[None, :]
        dscale += tl.sum(product * _load_weight(weight_ptr, x_ptr, output, column, E, C), 1)
    dscale *= rstd
    for first in range(0, C, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        product = load_tile(product_ptr, output, valid, column, C, C)
        if not CENTRED:
            product -= total[:, None] * load_vector(mean_ptr, column, C)[None, :]
        spread = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
        for second in range(0, C, BLOCK_C):
            inner = second + tl.arange(0, BLOCK_C)
            covariance = load_tile(covariance_ptr, inner, inner < C, column, C, C)
            spread = dot(_load_weight(weight_ptr, x_ptr, output, inner, E, C), covariance, spread)
        dweight = scale[:, None] * (product - (dscale * rstd)[:, None] * spread)
        store_tile(dweight_ptr, output, valid, column, dweight, C, C)
    tl.store(dnorm_weight_ptr + output, dscale.to(dnorm_weight_ptr.dtype.element_ty), mask=valid)
    tl.store(dnorm_bias_ptr + output, total.to(dnorm_bias_ptr.dtype.element_ty), mask=valid)
    tl.store(correction_ptr + output, scale * rstd * dscale / rows, mask=valid)
    tl.store(correction_ptr + E + output, scale * total / rows, mask=valid)


@triton.jit
def _correction_bwd_kernel(
    x_ptr, weight_ptr, correction_ptr, matrix_ptr, shift_ptr, C: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr
):
    """K = W^T diag(k) W and shift = s W for what each channel weighs, k and s."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    left = tl.program_id(0) // blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    right = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    matrix = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    shift = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, E, BLOCK_E):
        output = first + tl.arange(0, BLOCK_E)
        weight = _load_weight(weight_ptr, x_ptr, output, right, E, C)
        scaled = _load_weight(weight_ptr, x_ptr, output, left, E, C) * load_vector(correction_ptr, output, E)[:, None]
        matrix = dot(tl.trans(scaled), weight, matrix)
        shift += tl.sum(weight * load_vector(correction_ptr + E, output, E)[:, None], 0)
    store_tile(matrix_ptr, left, left < C, right, matrix, C, C)
    if tl.program_id(0) < blocks:
        tl.store(shift_ptr + right, shift, mask=right < C)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _correct_bwd_kernel(
    dx_ptr, x_ptr, residual_ptr, mean_ptr, matrix_ptr, shift_ptr, rows,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx -= (x - mean) K + shift; then a residual's gradient on top."""
    columns: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    start = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M
    column, lane = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    valid = start + lane < rows
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, C, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        x = _load_distances(x_ptr + start * C, load_vector(mean_ptr, inner, C), lane, valid, inner, C).to(x_ptr.dtype.element_ty)
        sums = dot(x, load_tile(matrix_ptr, inner, inner < C, column, C, C).to(x.dtype), sums)
    dx = load_tile(dx_ptr + start * C, lane, valid, column, C, C).to(tl.float32) - sums - load_vector(shift_ptr, column, C)[None, :]
    if residual_ptr is not None:
        dx += load_tile(residual_ptr + start * C, lane, valid, column, C, C).to(tl.float32)
    store_tile(dx_ptr + start * C, lane, valid, column, dx, C, C)


# Launchers


def _dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in tensors)


def _vectors(x: Tensor, channels: int, count: int) -> list[Tensor]:
    return [torch.empty(channels, dtype=torch.float32, device=x.device) for _ in range(count)]


def _affine(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm, for an op that is not Triton's."""
    scale = weight.float() * (var + eps).rsqrt()
    return scale, bias.float() - mean * scale


def _expansion_moments(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and covariance of x, mean and variance of its expansion."""
    rows, inputs, wide = x.shape[:-1].numel(), x.shape[-1], weight.shape[0]
    config = configuration("moments", x, inputs, inputs)
    blocks = triton.cdiv(inputs, config["BLOCK_N"]) ** 2
    part, rows_per_part = _parts(x, rows, config, blocks, inputs * (inputs + 1))
    pivot, mean = _vectors(x, inputs, 2)
    covariance = torch.empty((inputs, inputs), dtype=torch.float32, device=x.device)
    expanded_mean, expanded_var = _vectors(x, wide, 2)
    _moments_fwd_kernel[(blocks * len(part),)](x, pivot, part, rows, rows_per_part, C=inputs, **config)
    _expanded_moments_kernel[(triton.cdiv(wide, 16),)](
        x, _add_parts(part), pivot, weight, mean, covariance, expanded_mean, expanded_var, rows, C=inputs, E=wide, BLOCK_E=16, BLOCK_C=32,
        num_warps=4,
    )  # fmt: skip
    return mean, covariance, expanded_mean, expanded_var


def _project(z: Tensor, weight: Tensor, norm: tuple[Tensor, ...], eps: float, act: int) -> tuple[Tensor, Tensor, int, int]:
    """p and its partial moments."""
    outputs, wide, rows = weight.shape[0], z.shape[-1], z.shape[:-1].numel()
    p = z.new_empty(*z.shape[:-1], outputs)
    config = configuration("project", z, outputs, wide)
    blocks = triton.cdiv(outputs, config["BLOCK_N"])
    parts, rows_per_part = split_rows(rows, max(2 * multiprocessors(z) // blocks, 1), config["BLOCK_M"])
    part = torch.empty((2, parts, outputs), dtype=torch.float32, device=z.device)
    _project_fwd_kernel[(blocks * parts,)](
        z, weight, *norm, p, part, rows, parts, rows_per_part, eps, ACT=act, E=wide, OUT=outputs, **config
    )
    return p, part, parts, rows_per_part


def inverted_residual_training(
    x: Tensor, expand: Tensor, expand_weight: Tensor, expand_bias: Tensor, expand_eps: float,
    depthwise: Tensor, depthwise_weight: Tensor, depthwise_bias: Tensor, depthwise_eps: float,
    project: Tensor, project_weight: Tensor, project_bias: Tensor, project_eps: float,
    stride: int, dilation: int, act: int, store: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Launches the forward pass: y, mean and variance of the three convolutions, and what backward needs: a or nothing, z, p, mean and
    covariance of x."""
    x, expand, expand_weight, expand_bias, depthwise = _dense(x, expand, expand_weight, expand_bias, depthwise)
    depthwise_weight, depthwise_bias, project = _dense(depthwise_weight, depthwise_bias, project)
    with on_device(x):
        mean, covariance, *first = _expansion_moments(x, expand)
        if store:
            a = pointwise_conv_inference(x, None, expand, None, expand_weight, expand_bias, *first, expand_eps, act, None)
            z, *middle = filter(a, depthwise, stride, dilation)
        else:
            a = x.new_empty(0)
            affine = _affine(expand_weight, expand_bias, *first, expand_eps)
            z, *middle = torch.ops.mvit3.inverted_residual_filter(x, expand, *affine, depthwise, stride, dilation, act)
        p, *partials = _project(z, project, (depthwise_weight, depthwise_bias, *middle), depthwise_eps, act)
        residual = x if stride == 1 and x.shape[-1] == p.shape[-1] else None
        y, *last = normalize(p, project_weight, project_bias, project_eps, IDENTITY, residual, *partials)
    return y, *first, *middle, *last, a, z, p, mean, covariance


def _project_backward(
    dp: Tensor, z: Tensor, weight: Tensor, norm: tuple[Tensor, ...], eps: float, act: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the projection's weight and of the middle norm's weight and bias, and that norm's coefficients (4, E)."""
    outputs, wide, rows = weight.shape[0], z.shape[-1], z.shape[:-1].numel()
    config = configuration("project_bwd", z, wide, outputs)
    blocks = triton.cdiv(wide, config["BLOCK_N"]) * triton.cdiv(outputs, config["BLOCK_K"])
    part, rows_per_part = _parts(z, rows, config, blocks, (outputs + 2) * wide)
    _project_bwd_kernel[(blocks * len(part),)](dp, z, weight, *norm, part, rows, rows_per_part, eps, ACT=act, E=wide, OUT=outputs, **config)
    total = _add_parts(part)
    dweight, dbias = (torch.empty_like(t) for t in norm[:2])
    coefficients = torch.empty((4, wide), dtype=torch.float32, device=z.device)
    _middle_norm_bwd_kernel[(triton.cdiv(wide, SUMS_BLOCK),)](
        total[outputs * wide :], *norm, dweight, dbias, coefficients, rows, eps, E=wide, BLOCK=SUMS_BLOCK, num_warps=1
    )
    return total[: outputs * wide].view(weight.shape).to(weight.dtype), dweight, dbias, coefficients


def _filtered_backward(dp: Tensor, z: Tensor, weight: Tensor, coefficients: Tensor, act: int) -> Tensor:
    """The gradient of z."""
    outputs, wide, rows = weight.shape[0], z.shape[-1], z.shape[:-1].numel()
    dz = torch.empty_like(z)
    config = configuration("filtered_bwd", z, wide, outputs)
    grid = (triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(wide, config["BLOCK_N"]),)
    _filtered_bwd_kernel[grid](dp, z, weight, coefficients, dz, rows, ACT=act, E=wide, OUT=outputs, **config)
    return dz


def _expand_backward(
    da: Tensor, x: Tensor, weight: Tensor, norm: tuple[Tensor, ...], mean: Tensor, eps: float, act: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dx without the norm's correction, and grad^T (x - mean) and sum grad for the gradient of the first norm's output, which may replace
    da."""
    rows, inputs, wide = x.shape[:-1].numel(), x.shape[-1], weight.shape[0]
    if fits_a_program(x, wide):
        config = configuration("expand_bwd", x, wide, inputs)
        part, rows_per_part = _parts(x, rows, config, 1, wide * (inputs + 1))
        dx = torch.empty_like(x)
        _expand_bwd_kernel[(len(part),)](
            da, x, weight, *norm, mean, dx, part, rows, rows_per_part, eps, ACT=act, C=inputs, E=wide, **config
        )
        total = _add_parts(part)
        return dx, total[: wide * inputs], total[wide * inputs :]
    config = configuration("expanded_bwd", x, wide, inputs)
    grid = (triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(wide, config["BLOCK_N"]),)
    _expanded_bwd_kernel[grid](da, x, weight, *norm, rows, eps, ACT=act, C=inputs, E=wide, **config)
    config = configuration("products_bwd", x, wide, inputs)
    blocks = triton.cdiv(wide, config["BLOCK_N"]) * triton.cdiv(inputs, config["BLOCK_K"])
    part, rows_per_part = _parts(x, rows, config, blocks, wide * (inputs + 1))
    _products_bwd_kernel[(blocks * len(part),)](da, x, mean, part, rows, rows_per_part, C=inputs, E=wide, **config)
    total = _add_parts(part)
    scale, _ = _affine(*norm, eps)
    scaled = (weight.flatten(1).to(x.dtype) * scale[:, None]).to(x.dtype)
    return (da.view(rows, wide) @ scaled).view(x.shape), total[: wide * inputs], total[wide * inputs :]


def _correct(
    dx: Tensor, product: Tensor, sums: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, norm: tuple[Tensor, ...], eps: float,
    mean: Tensor, covariance: Tensor, centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of weight, norm weight and norm bias of the expansion; corrects dx in place."""
    rows, inputs, wide = x.shape[:-1].numel(), x.shape[-1], weight.shape[0]
    scale, bias, _, var = norm
    dweight, dscale, dbias = (torch.empty_like(t) for t in (weight, scale, bias))
    correction = torch.empty((2, wide), dtype=torch.float32, device=x.device)
    matrix, shift = torch.empty_like(covariance), torch.empty_like(mean)
    _expand_gradient_kernel[(triton.cdiv(wide, 16),)](
        x, product, sums, weight, scale, mean, covariance, var, dweight, dscale, dbias, correction, rows, eps, CENTRED=centred,
        C=inputs, E=wide, BLOCK_E=16, BLOCK_C=16, num_warps=4,  # larger tiles spill at some widths
    )  # fmt: skip
    _correction_bwd_kernel[(triton.cdiv(inputs, 32) ** 2,)](
        x, weight, correction, matrix, shift, C=inputs, E=wide, BLOCK_E=32, BLOCK_C=32, num_warps=4
    )
    config = configuration("correct_bwd", x, inputs, inputs)
    grid = (triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(inputs, config["BLOCK_N"]),)
    _correct_bwd_kernel[grid](dx, x, residual, mean, matrix, shift, rows, C=inputs, **config)
    return dweight, dscale, dbias


def inverted_residual_backward(
    dy: Tensor, x: Tensor,
    expand: Tensor, expand_weight: Tensor, expand_bias: Tensor, expand_mean: Tensor, expand_var: Tensor, expand_eps: float,
    depthwise: Tensor, depthwise_weight: Tensor, depthwise_bias: Tensor, depthwise_mean: Tensor, depthwise_var: Tensor,
    depthwise_eps: float,
    project: Tensor, project_weight: Tensor, project_bias: Tensor, project_mean: Tensor, project_var: Tensor, project_eps: float,
    a: Tensor, z: Tensor, p: Tensor, mean: Tensor, covariance: Tensor, stride: int, dilation: int, act: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Launches the backward pass: the gradients of x, then of weight, norm weight and norm bias of the three convolutions."""
    dy, x, expand, depthwise, project = _dense(dy, x, expand, depthwise, project)
    first = _dense(expand_weight, expand_bias, expand_mean, expand_var)
    middle = _dense(depthwise_weight, depthwise_bias, depthwise_mean, depthwise_var)
    last = (project_weight, project_bias, project_mean, project_var)
    residual = dy if stride == 1 and x.shape[-1] == p.shape[-1] else None
    with on_device(x):
        dp, *dlast = batch_norm_act_backward(dy, p, *last, True, project_eps, IDENTITY)
        dproject, *dmiddle, coefficients = _project_backward(dp, z, project, middle, depthwise_eps, act)
        stored = a.numel() > 0
        if stored:
            # The gradient of z lives no longer than it is read.
            da, ddepthwise = filter_backward(_filtered_backward(dp, z, project, coefficients, act), a, depthwise, stride, dilation)
            dx, product, sums = _expand_backward(da, x, expand, first, mean, expand_eps, act)
        else:
            scale, shift, offset, slope = coefficients
            affine, geometry = _affine(*first, expand_eps), (stride, dilation, act)
            dx, product, sums, ddepthwise = torch.ops.mvit3.inverted_residual_filter_backward(
                dp, project, z, scale, shift, scale, offset, slope, x, expand, *affine, depthwise, *geometry
            )
        dfirst = _correct(dx, product, sums, x, residual, expand, first, expand_eps, mean, covariance, stored)
    return dx, *dfirst, ddepthwise.view(depthwise.shape).to(depthwise.dtype), *dmiddle, dproject, *dlast
