"""Triton kernels of batch_norm_act; triton.py launches them and says how they work together.

The grid is (blocks of BLOCK_C columns, ranges of rows).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import (
    activate,
    activate_backward,
    inverse_std,
    load_moments,
    load_sums,
    load_vector,
    merge_moments,
    row_range,
    store_vector,
)
from ..triton_launch import jit_kernel

# one binary for every batch and map size
_NOT_SPECIALIZED = ["rows", "rows_per_program", "parts", "rows_per_part"]


@triton.jit
def _columns(C: tl.constexpr, BLOCK_C: tl.constexpr):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    return column, column < C


@triton.jit
def _mask(lane, left, valid, C: tl.constexpr, BLOCK_C: tl.constexpr):
    mask = (lane < left)[:, None]
    if C % BLOCK_C != 0:
        mask = mask & valid[None, :]
    return mask


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def moments_fwd_kernel(
    x_ptr,  # (rows, C)
    part_ptr,  # written: (2, parts, C), float32
    rows, parts, rows_per_part,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over the rows of a part. Reads x once.

    Welford's update, with a running mean for each lane and channel."""
    column, valid = _columns(C=C, BLOCK_C=BLOCK_C)
    start, length = row_range(rows, rows_per_part, tl.program_id(1))
    lane = tl.arange(0, BLOCK_M)
    offset = lane[:, None] * C + column[None, :]

    count = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in range(tl.cdiv(length, BLOCK_M)):
        first = i * BLOCK_M
        left = length - first
        mask = _mask(lane, left, valid, C=C, BLOCK_C=BLOCK_C)
        base = (start + first) * C
        x = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        count += tl.where(lane < left, 1.0, 0.0)
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / tl.maximum(count, 1.0))[:, None]
        m2 += delta * (x - mean)

    _, mean, m2 = merge_moments(count, mean, m2)
    part_ptr += tl.program_id(1) * C
    store_vector(part_ptr, column, mean, WIDTH=C)
    store_vector(part_ptr + parts * C, column, m2, WIDTH=C)


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def normalize_fwd_kernel(
    x_ptr, residual_ptr,  # (rows, C); residual or None
    weight_ptr, bias_ptr,  # (C,)
    part_ptr, count_ptr,  # (2, parts, C), float32; TRAINING only; count as load_moments takes it
    y_ptr,  # written: (rows, C), like x
    mean_ptr, var_ptr,  # (C,), float32: written where TRAINING, else the running statistics, read
    rows, rows_per_program, parts, rows_per_part, eps,
    ACT: tl.constexpr, TRAINING: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """y = act((x - mean) * weight / sqrt(var + eps) + bias) + residual; mean and var from the parts where TRAINING.

    Reads x and the residual once, the parts once for each program; writes y once."""
    column, valid = _columns(C=C, BLOCK_C=BLOCK_C)
    if TRAINING:
        mean, var = load_moments(
            part_ptr,
            parts,
            rows,
            rows_per_part,
            column,
            valid,
            C=C,
            BLOCK_C=BLOCK_C,
            count_ptr=count_ptr,
            MOST=MOST,
        )
        if tl.program_id(1) == 0:
            store_vector(mean_ptr, column, mean, WIDTH=C)
            store_vector(var_ptr, column, var, WIDTH=C)
    else:
        mean, var = load_vector(mean_ptr, column, WIDTH=C), load_vector(var_ptr, column, WIDTH=C, OTHER=1.0)
    # Not folded into one shift: x - mean keeps its digits where the mean is large.
    scale = load_vector(weight_ptr, column, WIDTH=C) * inverse_std(var, eps)
    bias = load_vector(bias_ptr, column, WIDTH=C)

    start, length = row_range(rows, rows_per_program, tl.program_id(1))
    lane = tl.arange(0, BLOCK_M)
    offset = lane[:, None] * C + column[None, :]
    tiles = tl.cdiv(length, BLOCK_M)
    for i in range(tiles):
        # Bottom up: the rows that the moments kernel read last are still in cache.
        first = (tiles - 1 - i) * BLOCK_M
        mask = _mask(lane, length - first, valid, C=C, BLOCK_C=BLOCK_C)
        base = (start + first) * C
        x = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        y = activate((x - mean[None, :]) * scale[None, :] + bias[None, :], ACT=ACT, DTYPE=tl.float32)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + base + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_norm(weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, column, C: tl.constexpr):
    """weight, bias, mean and 1 / sqrt(var + eps) of the columns, as rows."""
    weight, bias = load_vector(weight_ptr, column, WIDTH=C), load_vector(bias_ptr, column, WIDTH=C)
    mean = load_vector(mean_ptr, column, WIDTH=C)
    rstd = inverse_std(load_vector(var_ptr, column, WIDTH=C, OTHER=1.0), eps)
    return weight[None, :], bias[None, :], mean[None, :], rstd[None, :]


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def sums_bwd_kernel(
    dy_ptr, x_ptr,  # (rows, C), the rows of dy DY_STRIDE values apart
    weight_ptr, bias_ptr, mean_ptr, var_ptr,  # (C,)
    dx_ptr, part_ptr,  # written: (rows, C), not where TRAINING; (2, parts, C), float32
    rows, parts, rows_per_part, eps,
    ACT: tl.constexpr, TRAINING: tl.constexpr, C: tl.constexpr, DY_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """With rstd = 1 / sqrt(var + eps), n = (x - mean) * rstd and g = act'(n * weight + bias) * dy:

        the sums of g and of g * n over the rows of a part, which are parts of dbias and dweight;
        in evaluation dx = g * weight * rstd.

    Reads dy and x once; writes dx once."""
    column, valid = _columns(C=C, BLOCK_C=BLOCK_C)
    weight, bias, mean, rstd = _load_norm(weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, column, C=C)
    start, length = row_range(rows, rows_per_part, tl.program_id(1))
    lane = tl.arange(0, BLOCK_M)
    offset, dy_offset = lane[:, None] * C + column[None, :], lane[:, None] * DY_STRIDE + column[None, :]

    dbias = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    dweight = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in range(tl.cdiv(length, BLOCK_M)):
        first = i * BLOCK_M
        mask = _mask(lane, length - first, valid, C=C, BLOCK_C=BLOCK_C)
        base = (start + first) * C
        x = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + (start + first) * DY_STRIDE + dy_offset, mask=mask, other=0.0).to(tl.float32)
        deviation = x - mean
        grad = activate_backward(dy, deviation * (weight * rstd) + bias, ACT=ACT, DTYPE=dx_ptr.dtype.element_ty)
        grad = tl.where(mask, grad, 0.0)
        dbias += grad
        dweight += grad * deviation
        if not TRAINING:
            tl.store(dx_ptr + base + offset, (grad * (weight * rstd)).to(dx_ptr.dtype.element_ty), mask=mask)

    part_ptr += tl.program_id(1) * C
    store_vector(part_ptr, column, tl.sum(dbias, 0), WIDTH=C)
    store_vector(part_ptr + parts * C, column, tl.sum(dweight * rstd, 0), WIDTH=C)


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def input_bwd_kernel(
    dy_ptr, x_ptr,  # (rows, C), the rows of dy DY_STRIDE values apart
    weight_ptr, bias_ptr, mean_ptr, var_ptr,  # (C,)
    part_ptr,  # (2, parts, C), float32
    dx_ptr, dweight_ptr, dbias_ptr,  # written: (rows, C), where TRAINING; (C,); (C,)
    rows, parts, rows_per_program, eps,
    ACT: tl.constexpr, TRAINING: tl.constexpr, C: tl.constexpr, DY_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """dbias and dweight, the sums of g and of g * n added up from their parts, and in training

        dx = weight * rstd * (g - dbias / rows - n * dweight / rows)

    with g, n and rstd as in sums_bwd_kernel. Reads dy and x once, the parts once for each program; writes dx once."""
    column, valid = _columns(C=C, BLOCK_C=BLOCK_C)
    dbias = load_sums(part_ptr, parts, column, valid, C=C, BLOCK_C=BLOCK_C, MOST=MOST)
    dweight = load_sums(part_ptr + parts * C, parts, column, valid, C=C, BLOCK_C=BLOCK_C, MOST=MOST)
    if tl.program_id(1) == 0:
        store_vector(dbias_ptr, column, dbias, WIDTH=C)
        store_vector(dweight_ptr, column, dweight, WIDTH=C)

    if TRAINING:
        weight, bias, mean, rstd = _load_norm(weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, column, C=C)
        mean_grad = (dbias / rows)[None, :]
        mean_product = (dweight / rows)[None, :]
        start, length = row_range(rows, rows_per_program, tl.program_id(1))
        lane = tl.arange(0, BLOCK_M)
        offset, dy_offset = lane[:, None] * C + column[None, :], lane[:, None] * DY_STRIDE + column[None, :]
        tiles = tl.cdiv(length, BLOCK_M)
        for i in range(tiles):
            first = (tiles - 1 - i) * BLOCK_M  # bottom up, as in the forward pass
            mask = _mask(lane, length - first, valid, C=C, BLOCK_C=BLOCK_C)
            base = (start + first) * C
            x = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + (start + first) * DY_STRIDE + dy_offset, mask=mask, other=0.0).to(tl.float32)
            normal = (x - mean) * rstd
            grad = (
                activate_backward(dy, normal * weight + bias, ACT=ACT, DTYPE=dx_ptr.dtype.element_ty)
                - mean_grad
                - normal * mean_product
            )
            tl.store(dx_ptr + base + offset, (grad * (weight * rstd)).to(dx_ptr.dtype.element_ty), mask=mask)
