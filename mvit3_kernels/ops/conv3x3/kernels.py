"""The Triton kernel of conv3x3; triton.py launches it."""

from __future__ import annotations

import triton.language as tl

from ..triton_common import activate, dot, load_folded_norm, load_tile, store_tile
from ..triton_launch import jit_kernel


@jit_kernel(do_not_specialize=["height", "width", "out_height", "out_width", "eps"])
def image_fwd_kernel(
    x_ptr, weight_ptr,  # (B, H, W, C), (OUT, C, 3, 3) or, with LAST, (OUT, 3, 3, C)
    norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr,  # (OUT,), or None without a norm
    y_ptr,  # written: (B, OUT_H, OUT_W, OUT)
    height, width, out_height, out_width, eps,
    STRIDE: tl.constexpr, ACT: tl.constexpr, C: tl.constexpr, OUT: tl.constexpr, LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = act(norm(conv(x))), x and the weight rounded to the dtype of y. A program has BLOCK_M pixels of an image row
    of y and all outputs. What a pixel's taps read of all channels is one row of a product of 9 * C columns."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    blocks = (out_width + BLOCK_M - 1) // BLOCK_M
    image_row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    sample, top = (image_row // out_height).to(tl.int64), image_row % out_height * STRIDE - 1
    pixel = block * BLOCK_M + tl.arange(0, BLOCK_M)
    output, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    if LAST:
        tap, channel = k // C, k % C
    else:
        tap, channel = k % 9, k // 9
    down, right = tap // 3, tap % 3
    column = (pixel * STRIDE - 1)[:, None] + right[None, :]
    there = (k < 9 * C) & (top + down >= 0) & (top + down < height)
    there = there[None, :] & (column >= 0) & (column < width)
    x_ptr += (sample * height + top) * width * C
    x = tl.load(x_ptr + column * C + (down * width * C + channel)[None, :], mask=there, other=0.0).to(dtype)
    weight = load_tile(weight_ptr, output, output < OUT, k, WIDTH=9 * C).to(dtype)
    y = dot(x, tl.trans(weight), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    if norm_weight_ptr is not None:
        scale, shift = load_folded_norm(
            norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, output, eps, C=OUT, DTYPE=dtype
        )
        y = y * scale[None, :] + shift[None, :]
    y = activate(y, ACT=ACT, DTYPE=dtype)
    store_tile(y_ptr + image_row.to(tl.int64) * out_width * OUT, pixel, pixel < out_width, output, y, WIDTH=OUT)
