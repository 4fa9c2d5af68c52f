"""Triton kernels of batch_norm_act.

A map is a matrix (rows, C) in memory, rows = B * H * W. The grid is (blocks of columns, ranges of rows): programs
beside each other share lines of memory, and each walks down its rows. Launches:

- forward in training 2: moments of parts of the rows; then the normalised map, by programs that first join the parts;
- forward in evaluation 1;
- backward 2: sums over parts of the rows; then dx, by programs that first add up the parts. In evaluation dx does not
  depend on the sums, so the first launch writes it and the second only adds up.

A third launch that joined the parts once would cost 2 to 3 us on the GPU and 10 to 20 us of Python for every layer.
Each program joining them again costs at most 4 us (C = 32, the worst case: 264 parts from cache), and nothing where a
map has few rows.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import tuning
from ..registry import Call, batch_norm
from ..sizes import cdiv, next_power_of_2
from ..triton_common import contiguous, most_parts, multiprocessors, on_device, rows_at_one_distance, split_rows
from ..types import BatchNorm
from . import kernels

# The fixed configuration. 32 channels are a full 64 or 128 bytes of a row, and keep a program's share of the parts
# small; 8 warps that each have four 16-byte loads per thread under way, twice per multiprocessor, cover the latency of
# HBM (32 KB per multiprocessor).
BLOCK_C = 32
TILE_BYTES = 16384
LAUNCH_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
PROGRAMS_PER_SM = 2
FEW_VALUES = 1024  # of a tile of a map that has no more of them than all multiprocessors together take programs
# Kernels that keep sums, whose registers leave room for as many programs: all that wait for memory at once.
MOMENTS_PER_SM, SUMS_PER_SM = 4, 5
# Kernels that join no parts pay nothing for more programs, and short ones end together.
FREE_PROGRAMS_PER_SM = 8


def configurations(channels: int, itemsize: int, tensors: int, sums: bool = False) -> list[dict[str, int | bool]]:
    """Tiles of a kernel that loads `tensors` maps of `channels` channels, half as large where it keeps sums of them."""
    columns = min(next_power_of_2(channels), BLOCK_C)
    # Rows that do not start on 16 bytes load element by element: a quarter of the tile keeps such a kernel from
    # spilling.
    tile_bytes = TILE_BYTES if channels * itemsize % 16 == 0 else TILE_BYTES // 4
    rows = tile_bytes // (tensors * columns * itemsize)
    first = {"BLOCK_M": rows, "BLOCK_C": columns, **LAUNCH_OPTIONS}
    if sums:
        rows //= 2
        first |= {"BLOCK_M": rows, "num_warps": 8 if tensors == 1 else 4}
    others = (
        {"num_warps": 4},
        {"BLOCK_M": rows // 2},
        {"BLOCK_M": rows // 2, "num_warps": 4},
        {"BLOCK_M": rows // 4, "num_warps": 4},
    )
    return [first, *(first | other for other in others)]


def few_configuration(channels: int) -> dict[str, int | bool]:
    """Of a map that leaves most of a GPU idle: four values a thread, so that each program ends soon."""
    columns = min(next_power_of_2(channels), BLOCK_C)
    return {"BLOCK_M": FEW_VALUES // columns, "BLOCK_C": columns, **LAUNCH_OPTIONS}


def configuration(kernel: str, x: Tensor, tensors: int) -> dict[str, int | bool]:
    channels, sums = x.shape[-1], kernel in ("moments", "sums")
    few = few_configuration(channels)
    tiles = cdiv(x.numel() // channels, few["BLOCK_M"]) * cdiv(channels, few["BLOCK_C"])
    if tiles <= PROGRAMS_PER_SM * multiprocessors(x):
        return few
    offer = partial(configurations, channels, x.element_size(), tensors, sums)
    return tuning.choose(f"batch_norm_act_{kernel}{tensors}", x, (channels,), offer)


def bytes_moved(x: Tensor, training: bool, residual: bool) -> tuple[int, int]:
    """Bytes of full-size tensors that the forward and the backward pass read and write (parts and parameters are a few
    KB)."""
    size = x.numel() * x.element_size()
    return size * (2 + training + residual), size * (5 if training else 3)


def _workspace(x: Tensor, parts: int) -> Tensor:
    """Two float32 values of each channel for each part of the rows."""
    return torch.empty((2, parts, x.shape[-1]), dtype=torch.float32, device=x.device)


def batch_norm_act_forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the forward pass: y and, in training, the batch's mean and variance (empty in evaluation)."""
    x, residual = call.x.contiguous(), call.residual
    norm, channels = batch_norm(call), x.shape[-1]
    if x.numel() > 0 and norm.training:
        return normalize(x, norm, call.act, residual, _moments(x))
    # Two tensors, not two halves of one: the outputs of an op may not share memory.
    make = torch.zeros if x.numel() == 0 else torch.empty
    moments = [make(channels if norm.training else 0, dtype=torch.float32, device=x.device) for _ in range(2)]
    y = torch.empty_like(x)
    if x.numel() > 0:
        statistics = contiguous(norm.running_mean, norm.running_var)
        _launch_normalize(x, norm, call.act, residual, y, statistics, (None, 0, 0))
    return y, *moments


def _moments(x: Tensor) -> tuple[Tensor, int, int]:
    """Means and sums of squared deviations of parts of x: (workspace, parts, rows of each)."""
    channels, rows = x.shape[-1], x.numel() // x.shape[-1]
    config = configuration("moments", x, 1)
    columns = cdiv(channels, config["BLOCK_C"])
    parts, rows_per_part = split_rows(rows, MOMENTS_PER_SM * multiprocessors(x) // columns, config["BLOCK_M"])
    part = _workspace(x, parts)
    with on_device(x):
        kernels.moments_fwd_kernel[(columns, parts)](x, part, rows, parts, rows_per_part, C=channels, **config)
    return part, parts, rows_per_part


def normalize(
    x: Tensor,
    norm: BatchNorm,
    act: int,
    residual: Tensor | None,
    partials: tuple[Tensor, int, int],
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the batch's mean and variance, from the moments of parts of x, which is not empty: the second half of the
    forward pass in training. counts: how many rows each part has, where they are not of one size."""
    y = torch.empty_like(x)
    moments = tuple(torch.empty(x.shape[-1], dtype=torch.float32, device=x.device) for _ in range(2))
    _launch_normalize(x, norm, act, residual, y, moments, partials, counts)
    return y, *moments


def _launch_normalize(
    x: Tensor,
    norm: BatchNorm,
    act: int,
    residual: Tensor | None,
    y: Tensor,
    statistics: tuple[Tensor, Tensor],
    partials: tuple[Tensor | None, int, int],
    counts: Tensor | None = None,
) -> None:
    """Fills y, and `statistics` where there are partial moments; without them the statistics are read."""
    channels, rows, training = x.shape[-1], x.numel() // x.shape[-1], partials[0] is not None
    config = configuration("normalize", x, 1 if residual is None else 2)
    columns = cdiv(channels, config["BLOCK_C"])
    per_sm = PROGRAMS_PER_SM if training else FREE_PROGRAMS_PER_SM
    programs, rows_per_program = split_rows(rows, per_sm * multiprocessors(x) // columns, config["BLOCK_M"])
    residual, weight, bias = contiguous(residual, norm.weight, norm.bias)
    part, parts, rows_per_part = partials
    with on_device(x):
        kernels.normalize_fwd_kernel[(columns, programs)](
            x, residual, weight, bias, part, counts, y, *statistics,
            rows, rows_per_program, parts, rows_per_part, norm.eps,
            ACT=act, TRAINING=training, C=channels, MOST=most_parts(parts), **config,
        )  # fmt: skip


def batch_norm_act_backward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the backward pass: the gradients of x, weight and bias."""
    norm = BatchNorm(call.weight, call.bias, call.mean, call.var, call.training, call.eps)
    return normalize_backward(call.dy, call.x, norm, call.act)


def gradient_sums(dy: Tensor, dy_stride: int, x: Tensor, norm: BatchNorm, act: int, dx: Tensor) -> tuple[Tensor, int]:
    """Sums for the gradients of weight and bias in parts of the rows: (workspace, parts). The rows of `dy` are
    `dy_stride` values apart; all else is contiguous. Fills `dx` where the norm is not in training."""
    channels, config = x.shape[-1], configuration("sums", x, 2)
    columns = cdiv(channels, config["BLOCK_C"])
    rows = x.numel() // channels
    parts, rows_per_part = split_rows(rows, SUMS_PER_SM * multiprocessors(x) // columns, config["BLOCK_M"])
    part = _workspace(x, parts)
    with on_device(x):
        kernels.sums_bwd_kernel[(columns, parts)](
            dy, x, *norm[:4], dx, part, rows, parts, rows_per_part, norm.eps,
            ACT=act, TRAINING=norm.training, C=channels, DY_STRIDE=dy_stride, **config,
        )  # fmt: skip
    return part, parts


def normalize_backward(dy: Tensor, x: Tensor, norm: BatchNorm, act: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias. The statistics of `norm` are those that normalised x: the batch's in
    training."""
    channels = x.shape[-1]
    dy, dy_stride = rows_at_one_distance(dy)
    x, *parameters = contiguous(x, *norm[:4])
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight, dbias = torch.empty_like(parameters[0]), torch.empty_like(parameters[1])
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()

    part, parts = gradient_sums(dy, dy_stride, x, BatchNorm(*parameters, norm.training, norm.eps), act, dx)
    rows, config = x.numel() // channels, configuration("bwd", x, 2)
    columns = cdiv(channels, config["BLOCK_C"])
    programs, rows_per_program = split_rows(rows, PROGRAMS_PER_SM * multiprocessors(x) // columns, config["BLOCK_M"])
    most = most_parts(parts)
    if not norm.training:
        programs, most = 1, None  # the second launch only adds up
    with on_device(x):
        kernels.input_bwd_kernel[(columns, programs)](
            dy, x, *parameters, part, dx, dweight, dbias, rows, parts, rows_per_program, norm.eps,
            ACT=act, TRAINING=norm.training, C=channels, DY_STRIDE=dy_stride, MOST=most, **config,
        )  # fmt: skip
    return dx, dweight, dbias
