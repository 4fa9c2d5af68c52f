"""Triton kernels of batch_norm_act.

A map is (rows, C) in memory, rows = B * H * W. The grid is (column blocks, ranges of rows): programs beside each other share lines of
memory, and each walks down its rows. Launches: 2 for the forward pass in training (partial moments, then normalise: the prologue of
the second combines what the first left), 1 in evaluation, 2 for the backward pass (partial sums, then dx; in evaluation dx does not
wait for the sums, so the first writes it and the second only adds up). A third launch that combined the partials once would cost 2 to
3 us on the GPU and 10 to 20 us of Python for every layer; each program combining them again costs at most 4 us (C = 32, the worst
case: 264 partials from cache), nothing where a map has few rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..triton_common import (
    activate,
    activate_backward,
    inverse_std,
    load_moments,
    load_sums,
    merge_moments,
    multiprocessors,
    on_device,
    row_range,
    rows_at_one_distance,
    split_rows,
)

# The fixed configuration. 32 channels are a full 64 or 128 bytes of a row, and keep a program's share of the partials small; 8 warps that
# each have four 16-byte loads per thread under way, twice per multiprocessor, cover the latency of HBM (32 KB per multiprocessor).
BLOCK_C = 32
TILE_BYTES = 16384
LAUNCH_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
PROGRAMS_PER_SM = 2
# Kernels that read no partials pay nothing for more programs, and short ones end together.
FREE_PROGRAMS_PER_SM = 8

_NOT_SPECIALIZED = ["rows", "rows_per_program", "parts", "rows_per_part"]  # one binary for every batch and map size


def configurations(channels: int, itemsize: int, tensors: int) -> list[dict[str, int | bool]]:
    """Tiles of a kernel that loads `tensors` maps of `channels` channels."""
    columns = min(triton.next_power_of_2(channels), BLOCK_C)
    # Rows that do not start on 16 bytes load element by element: a quarter of the tile keeps such a kernel from spilling.
    tile_bytes = TILE_BYTES if channels * itemsize % 16 == 0 else TILE_BYTES // 4
    rows = tile_bytes // (tensors * columns * itemsize)
    first = {"BLOCK_M": rows, "BLOCK_C": columns, **LAUNCH_OPTIONS}
    others = ({"num_warps": 4}, {"BLOCK_M": rows // 2}, {"BLOCK_M": rows // 2, "num_warps": 4}, {"BLOCK_M": rows // 4, "num_warps": 4})
    return [first, *(first | other for other in others)]


def configuration(kernel: str, x: Tensor, tensors: int) -> dict[str, int | bool]:
    channels = x.shape[-1]
    return tuning.choose(f"batch_norm_act_{kernel}{tensors}", x, (channels,), lambda: configurations(channels, x.element_size(), tensors))


def bytes_moved(x: Tensor, training: bool, residual: bool) -> tuple[int, int]:
    """Bytes of full-size tensors that the forward and the backward pass read and write (partials and parameters are a few KB)."""
    size = x.numel() * x.element_size()
    return size * (2 + training + residual), size * (5 if training else 3)


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


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _moments_fwd_kernel(
    x_ptr, part_ptr, rows, parts, rows_per_part, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    column, valid = _columns(C, BLOCK_C)
    start, length = row_range(rows, rows_per_part, tl.program_id(1))
    lane = tl.arange(0, BLOCK_M)
    offset = lane[:, None] * C + column[None, :]

    # Welford, one running mean per lane and channel.
    count = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in range(tl.cdiv(length, BLOCK_M)):
        first = i * BLOCK_M
        left = length - first
        mask = _mask(lane, left, valid, C, BLOCK_C)
        base = (start + first) * C
        x = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        count += tl.where(lane < left, 1.0, 0.0)
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / tl.maximum(count, 1.0))[:, None]
        m2 += delta * (x - mean)

    _, mean, m2 = merge_moments(count, mean, m2)
    part_ptr += tl.program_id(1) * C + column
    tl.store(part_ptr, mean, mask=valid)
    tl.store(part_ptr + parts * C, m2, mask=valid)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _normalize_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr,
    mean_ptr, var_ptr,  # outputs in training, the running statistics in evaluation
    part_ptr, parts, rows_per_part,  # training only
    rows, rows_per_program, eps,
    ACT: tl.constexpr, TRAINING: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    column, valid = _columns(C, BLOCK_C)
    if TRAINING:
        mean, var = load_moments(part_ptr, parts, rows, rows_per_part, column, valid, C, BLOCK_C)
        if tl.program_id(1) == 0:
            tl.store(mean_ptr + column, mean, mask=valid)
            tl.store(var_ptr + column, var, mask=valid)
    else:
        mean = tl.load(mean_ptr + column, mask=valid, other=0.0).to(tl.float32)
        var = tl.load(var_ptr + column, mask=valid, other=1.0).to(tl.float32)
    scale = tl.load(weight_ptr + column, mask=valid, other=0.0).to(tl.float32) * inverse_std(var, eps)
    bias = tl.load(bias_ptr + column, mask=valid, other=0.0).to(tl.float32)

    start, length = row_range(rows, rows_per_program, tl.program_id(1))
    lane = tl.arange(0, BLOCK_M)
    offset = lane[:, None] * C + column[None, :]
    tiles = tl.cdiv(length, BLOCK_M)
    for i in range(tiles):
        # Bottom up: the rows that the moments kernel read last are still in cache.
        first = (tiles - 1 - i) * BLOCK_M
        mask = _mask(lane, length - first, valid, C, BLOCK_C)
        base = (start + first) * C
        x = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        y = activate((x - mean[None, :]) * scale[None, :] + bias[None, :], ACT)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + base + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, column, valid):
    weight = tl.load(weight_ptr + column, mask=valid, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=valid, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + column, mask=valid, other=0.0).to(tl.float32)
    rstd = inverse_std(tl.load(var_ptr + column, mask=valid, other=1.0).to(tl.float32), eps)
    return weight[None, :], bias[None, :], mean[None, :], rstd[None, :]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _sums_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, dx_ptr, part_ptr, rows, parts, rows_per_part, eps,
    ACT: tl.constexpr, TRAINING: tl.constexpr, C: tl.constexpr, DY_STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    column, valid = _columns(C, BLOCK_C)
    weight, bias, mean, rstd = _load_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, column, valid)
    start, length = row_range(rows, rows_per_part, tl.program_id(1))
    lane = tl.arange(0, BLOCK_M)
    offset, dy_offset = lane[:, None] * C + column[None, :], lane[:, None] * DY_STRIDE + column[None, :]

    dbias = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    dweight = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in range(tl.cdiv(length, BLOCK_M)):
        first = i * BLOCK_M
        mask = _mask(lane, length - first, valid, C, BLOCK_C)
        base = (start + first) * C
        x = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + (start + first) * DY_STRIDE + dy_offset, mask=mask, other=0.0).to(tl.float32)
        normal = (x - mean) * rstd
        grad = tl.where(mask, activate_backward(dy, normal * weight + bias, ACT), 0.0)
        dbias += grad
        dweight += grad * normal
        if not TRAINING:
            tl.store(dx_ptr + base + offset, (grad * (weight * rstd)).to(dx_ptr.dtype.element_ty), mask=mask)

    part_ptr += tl.program_id(1) * C + column
    tl.store(part_ptr, tl.sum(dbias, 0), mask=valid)
    tl.store(part_ptr + parts * C, tl.sum(dweight, 0), mask=valid)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _input_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, part_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    parts, rows, rows_per_program, eps,
    ACT: tl.constexpr, TRAINING: tl.constexpr, C: tl.constexpr, DY_STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    column, valid = _columns(C, BLOCK_C)
    dbias = load_sums(part_ptr, parts, column, valid, C, BLOCK_C)
    dweight = load_sums(part_ptr + parts * C, parts, column, valid, C, BLOCK_C)
    if tl.program_id(1) == 0:
        tl.store(dbias_ptr + column, dbias.to(dbias_ptr.dtype.element_ty), mask=valid)
        tl.store(dweight_ptr + column, dweight.to(dweight_ptr.dtype.element_ty), mask=valid)

    if TRAINING:
        weight, bias, mean, rstd = _load_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, column, valid)
        mean_grad = (dbias / rows)[None, :]
        mean_product = (dweight / rows)[None, :]
        start, length = row_range(rows, rows_per_program, tl.program_id(1))
        lane = tl.arange(0, BLOCK_M)
        offset, dy_offset = lane[:, None] * C + column[None, :], lane[:, None] * DY_STRIDE + column[None, :]
        tiles = tl.cdiv(length, BLOCK_M)
        for i in range(tiles):
            first = (tiles - 1 - i) * BLOCK_M  # bottom up, as in the forward pass
            mask = _mask(lane, length - first, valid, C, BLOCK_C)
            base = (start + first) * C
            x = tl.load(x_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + (start + first) * DY_STRIDE + dy_offset, mask=mask, other=0.0).to(tl.float32)
            normal = (x - mean) * rstd
            grad = activate_backward(dy, normal * weight + bias, ACT) - mean_grad - normal * mean_product
            tl.store(dx_ptr + base + offset, (grad * (weight * rstd)).to(dx_ptr.dtype.element_ty), mask=mask)


def _workspace(x: Tensor, parts: int, channels: int) -> Tensor:
    return torch.empty((2, parts, channels), dtype=torch.float32, device=x.device)


def batch_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, eps: float, act: int, residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the forward pass: y and, in training, the batch's mean and variance (empty in evaluation)."""
    channels = x.shape[-1]
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    # Two tensors, not two halves of one: the outputs of an op may not share memory.
    moments = [torch.empty(channels if training else 0, dtype=torch.float32, device=x.device) for _ in range(2)]
    if x.numel() == 0:
        return y, *(m.zero_() for m in moments)

    if not training:
        statistics = (running_mean.contiguous(), running_var.contiguous())
        _launch_normalize(x, residual, weight, bias, y, statistics, None, 0, 0, eps, act)
        return y, *moments
    rows = x.numel() // channels
    reduction = configuration("moments", x, 1)
    columns = triton.cdiv(channels, reduction["BLOCK_C"])
    parts, rows_per_part = split_rows(rows, PROGRAMS_PER_SM * multiprocessors(x) // columns, reduction["BLOCK_M"])
    part = _workspace(x, parts, channels)
    with on_device(x):
        _moments_fwd_kernel[(columns, parts)](x, part, rows, parts, rows_per_part, C=channels, **reduction)
    _launch_normalize(x, residual, weight, bias, y, moments, part, parts, rows_per_part, eps, act)
    return y, *moments


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, act: int, residual: Tensor | None, part: Tensor, parts: int, rows_per_part: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the batch's mean and variance, from the moments of parts of x: the second half of the forward pass in training."""
    y = torch.empty_like(x)
    moments = [torch.empty(x.shape[-1], dtype=torch.float32, device=x.device) for _ in range(2)]
    residual = None if residual is None else residual.contiguous()
    _launch_normalize(x, residual, weight.contiguous(), bias.contiguous(), y, moments, part, parts, rows_per_part, eps, act)
    return y, *moments


def _launch_normalize(x, residual, weight, bias, y, statistics, part, parts, rows_per_part, eps, act) -> None:
    """With `part` the statistics are written, without it they are read."""
    channels, training = x.shape[-1], part is not None
    rows = x.numel() // channels
    config = configuration("normalize", x, 1 if residual is None else 2)
    columns = triton.cdiv(channels, config["BLOCK_C"])
    per_sm = PROGRAMS_PER_SM if training else FREE_PROGRAMS_PER_SM
    programs, rows_per_program = split_rows(rows, per_sm * multiprocessors(x) // columns, config["BLOCK_M"])
    with on_device(x):
        _normalize_fwd_kernel[(columns, programs)](
            x, residual, weight, bias, y, *statistics, part, parts, rows_per_part, rows, rows_per_program, eps,
            ACT=act, TRAINING=training, C=channels, **config,
        )  # fmt: skip


def batch_norm_act_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, training: bool, eps: float, act: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the backward pass: the gradients of x, weight and bias. `mean` and `var` are those that normalised x."""
    channels = x.shape[-1]
    dy, dy_stride = rows_at_one_distance(dy)
    x = x.contiguous()
    weight, bias, mean, var = weight.contiguous(), bias.contiguous(), mean.contiguous(), var.contiguous()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()

    rows = x.numel() // channels
    config = configuration("bwd", x, 2)
    columns, sms = triton.cdiv(channels, config["BLOCK_C"]), multiprocessors(x)
    parts, rows_per_part = split_rows(rows, PROGRAMS_PER_SM * sms // columns, config["BLOCK_M"])
    programs = parts if training else 1  # in evaluation the second launch only adds up
    part = _workspace(x, parts, channels)
    flags = {"ACT": act, "TRAINING": training, "C": channels, "DY_STRIDE": dy_stride, **config}
    with on_device(x):
        _sums_bwd_kernel[(columns, parts)](dy, x, weight, bias, mean, var, dx, part, rows, parts, rows_per_part, eps, **flags)
        _input_bwd_kernel[(columns, programs)](
            dy, x, weight, bias, mean, var, part, dx, dweight, dbias, parts, rows, rows_per_part, eps, **flags
        )
    return dx, dweight, dbias
