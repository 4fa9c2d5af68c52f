"""The Triton kernel of inverted_residual in evaluation, for maps of few pixels: all that follows the expansion."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import activate, dot, load_folded_norm, load_tile, store_tile
from ..triton_launch import jit_kernel

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
    weight2_ptr, bias2_ptr, mean2_ptr, var2_ptr,  # (OUT,), of the norm behind the projection
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
    scale, shift = load_folded_norm(
        weight2_ptr, bias2_ptr, mean2_ptr, var2_ptr, output, project_eps, C=OUT, DTYPE=dtype
    )
    y = sums * scale[None, :] + shift[None, :]
    if residual_ptr is not None:
        y += load_tile(residual_ptr, pixel, valid, output, WIDTH=OUT).to(tl.float32)
    store_tile(y_ptr, pixel, valid, output, y, WIDTH=OUT)
