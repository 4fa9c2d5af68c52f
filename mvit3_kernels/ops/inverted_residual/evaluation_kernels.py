"""Triton kernels of inverted_residual in evaluation, for maps of few pixels: all that follows the expansion; and all of
it, where a program has the expanded map of its tile in memory of its own, which stays in cache."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import SILU, activate, dot, load_folded_norm, load_tile, store_tile
from ..triton_launch import jit_kernel
from ..triton_math import silu_of_half

_NOT_SPECIALIZED = ["pixels", "height", "width", "out_height", "out_width", "depthwise_eps", "project_eps"]


@triton.jit
def _filter(
    e_ptr, taps_ptr, pixel, valid, column, height, width, out_height, out_width,
    STRIDE: tl.constexpr, DILATION: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Channels `column` of the filtered map at pixels `pixel`, in float32."""
    x, y = pixel % out_width * STRIDE, pixel // out_width % out_height * STRIDE
    e_ptr += ((pixel // (out_width * out_height) * height + y) * width + x)[:, None] * E + column[None, :]
    WHOLE: tl.constexpr = E % BLOCK_K == 0  # no channel is masked then
    z = tl.zeros((pixel.shape[0], column.shape[0]), tl.float32)
    for tap in tl.static_range(9):
        down, right = (tap // 3 - 1) * DILATION, (tap % 3 - 1) * DILATION
        there = (y + down >= 0) & (y + down < height) & (x + right >= 0) & (x + right < width)
        mask = (valid & there)[:, None]
        if WHOLE:
            weight = tl.load(taps_ptr + column * 9 + tap)
        else:
            mask &= (column < E)[None, :]
            weight = tl.load(taps_ptr + column * 9 + tap, mask=column < E, other=0.0)
        value = tl.load(e_ptr + (down * width + right) * E, mask=mask, other=0.0)
        z += value.to(tl.float32) * weight.to(tl.float32)[None, :]
    return z


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def filter_project_kernel(
    e_ptr, taps_ptr, project_ptr,  # (B, H, W, E), the activated expansion; (E, 9), (OUT, E)
    weight1_ptr, bias1_ptr, mean1_ptr, var1_ptr,  # (E,), of the norm behind the depth-wise convolution
    weight2_ptr, bias2_ptr, mean2_ptr, var2_ptr,  # (OUT,), of the norm behind the projection, or None
    residual_ptr,  # like y, or None
    y_ptr,  # written: (B, OUT_H, OUT_W, OUT), like e
    pixels, height, width, out_height, out_width, depthwise_eps, project_eps,
    STRIDE: tl.constexpr, DILATION: tl.constexpr, ACT: tl.constexpr, E: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = norm2(act(norm1(filter(e))) project^T) + residual. A program has BLOCK_M pixels and BLOCK_N outputs, and
    filters BLOCK_K channels at a time, for itself: the filtered map is nowhere."""
    dtype: tl.constexpr = e_ptr.dtype.element_ty
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    output, valid = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), pixel < pixels
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, E, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        z = _filter(
            e_ptr, taps_ptr, pixel, valid, column, height, width, out_height, out_width,
            STRIDE=STRIDE, DILATION=DILATION, E=E, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        scale, shift = load_folded_norm(
            weight1_ptr, bias1_ptr, mean1_ptr, var1_ptr, column, depthwise_eps, C=E, DTYPE=dtype
        )
        z = activate(z * scale[None, :] + shift[None, :], ACT=ACT, DTYPE=dtype).to(dtype)
        weight = load_tile(project_ptr, output, output < OUT, column, WIDTH=E).to(dtype)
        sums = dot(z, tl.trans(weight), sums)
    y = sums
    if weight2_ptr is not None:
        scale, shift = load_folded_norm(
            weight2_ptr, bias2_ptr, mean2_ptr, var2_ptr, output, project_eps, C=OUT, DTYPE=dtype
        )
        y = y * scale[None, :] + shift[None, :]
    if residual_ptr is not None:
        y += load_tile(residual_ptr, pixel, valid, output, WIDTH=OUT).to(tl.float32)
    store_tile(y_ptr, pixel, valid, output, y, WIDTH=OUT)


@triton.jit
def _expand(x, weight, scale, shift, ACT: tl.constexpr, DTYPE: tl.constexpr):
    """act(scale * (x weight^T) + shift) in float32."""
    e = dot(x, tl.trans(weight), tl.zeros((x.shape[0], weight.shape[0]), tl.float32))
    if ACT == SILU:
        e = silu_of_half(e * (0.5 * scale)[None, :] + (0.5 * shift)[None, :], DTYPE=DTYPE)
    else:
        e = activate(e * scale[None, :] + shift[None, :], ACT=ACT, DTYPE=DTYPE)
    return e


@triton.jit
def _filter_tile(e_ptr, taps_ptr, place, column, WIDTH: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr):
    """Channels `column` of the filtered tile, in float32. `place`: of each pixel's first tap, in a tile of WIDTH
    columns that is zero outside of the map."""
    e_ptr += place[:, None] * E + column[None, :]
    WHOLE: tl.constexpr = E % BLOCK_K == 0  # no channel is masked then
    z = tl.zeros((place.shape[0], column.shape[0]), tl.float32)
    for tap in tl.static_range(9):
        at = e_ptr + (tap // 3 * WIDTH + tap % 3) * E
        if WHOLE:
            weight, value = tl.load(taps_ptr + column * 9 + tap), tl.load(at)
        else:
            weight = tl.load(taps_ptr + column * 9 + tap, mask=column < E, other=0.0)
            value = tl.load(at, mask=(column < E)[None, :], other=0.0)
        z += value.to(tl.float32) * weight.to(tl.float32)[None, :]
    return z


@jit_kernel(do_not_specialize=[*_NOT_SPECIALIZED[1:], "expand_eps"])
def expand_filter_project_kernel(
    x_ptr, expand_ptr, taps_ptr, project_ptr,  # (B, H, W, C); (E, C), (E, 9), (OUT, E)
    weight0_ptr, bias0_ptr, mean0_ptr, var0_ptr,  # (E,), of the norm behind the expansion
    weight1_ptr, bias1_ptr, mean1_ptr, var1_ptr,  # (E,), of the norm behind the depth-wise convolution
    weight2_ptr, bias2_ptr, mean2_ptr, var2_ptr,  # (OUT,), of the norm behind the projection
    residual_ptr,  # like y, or None
    e_ptr,  # a workspace like x: (programs, PLACES, E)
    y_ptr,  # written: (B, OUT_H, OUT_W, OUT), like x
    height, width, out_height, out_width, expand_eps, depthwise_eps, project_eps,
    STRIDE: tl.constexpr, ACT: tl.constexpr, C: tl.constexpr, E: tl.constexpr, OUT: tl.constexpr,
    PLACES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = norm2(act(norm1(filter(act(norm0(x expand^T))))) project^T) + residual. A program has ROWS x COLUMNS pixels
    of y and all outputs. It expands the PLACES pixels of x that these see, BLOCK_P at a time, into its own part of the
    workspace, where its taps find them as soon as all its threads have written; no other program reads there."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    WIDTH: tl.constexpr = (COLUMNS - 1) * STRIDE + 3  # columns that a tile sees
    across, down = (out_width + COLUMNS - 1) // COLUMNS, (out_height + ROWS - 1) // ROWS
    tile = tl.program_id(0)
    sample, top, left = tile // (across * down), tile // across % down * ROWS, tile % across * COLUMNS
    e_ptr += tile.to(tl.int64) * (PLACES * E)
    channel = tl.arange(0, BLOCK_C)
    for begin in tl.static_range(0, PLACES, BLOCK_P):
        place = begin + tl.arange(0, BLOCK_P)
        row, column = top * STRIDE - 1 + place // WIDTH, left * STRIDE - 1 + place % WIDTH
        there = (place < PLACES) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        x = load_tile(x_ptr, (sample * height + row) * width + column, there, channel, WIDTH=C)
        for first in range(0, E, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            weight = load_tile(expand_ptr, k, k < E, channel, WIDTH=C).to(dtype)
            scale, shift = load_folded_norm(
                weight0_ptr, bias0_ptr, mean0_ptr, var0_ptr, k, expand_eps, C=E, DTYPE=dtype
            )
            e = tl.where(there[:, None], _expand(x, weight, scale, shift, ACT=ACT, DTYPE=dtype), 0.0)
            store_tile(e_ptr, place, place < PLACES, k, e, WIDTH=E)
    tl.debug_barrier()  # all threads have written what the taps read
    lane, output = tl.arange(0, ROWS * COLUMNS), tl.arange(0, BLOCK_N)
    row, column = lane // COLUMNS, lane % COLUMNS
    first_tap = (row * WIDTH + column) * STRIDE
    sums = tl.zeros((ROWS * COLUMNS, BLOCK_N), tl.float32)
    for first in range(0, E, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        z = _filter_tile(e_ptr, taps_ptr, first_tap, k, WIDTH=WIDTH, E=E, BLOCK_K=BLOCK_K)
        scale, shift = load_folded_norm(weight1_ptr, bias1_ptr, mean1_ptr, var1_ptr, k, depthwise_eps, C=E, DTYPE=dtype)
        z = activate(z * scale[None, :] + shift[None, :], ACT=ACT, DTYPE=dtype).to(dtype)
        weight = load_tile(project_ptr, output, output < OUT, k, WIDTH=E).to(dtype)
        sums = dot(z, tl.trans(weight), sums)
    scale, shift = load_folded_norm(
        weight2_ptr, bias2_ptr, mean2_ptr, var2_ptr, output, project_eps, C=OUT, DTYPE=dtype
    )
    y = sums * scale[None, :] + shift[None, :]
    row, column = top + row, left + column
    pixel, valid = (sample * out_height + row) * out_width + column, (row < out_height) & (column < out_width)
    if residual_ptr is not None:
        y += load_tile(residual_ptr, pixel, valid, output, WIDTH=OUT).to(tl.float32)
    store_tile(y_ptr, pixel, valid, output, y, WIDTH=OUT)
