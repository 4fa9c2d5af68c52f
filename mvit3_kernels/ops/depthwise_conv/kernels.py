"""Triton kernels of depthwise_conv, forward, and how all of them walk over a map; triton.py launches them.

x is (B, height, width, C) and z, its depth-wise convolution, (B, out_height, out_width, C). The nine weights of a
channel are its taps, row by row.

A program owns BLOCK_C channels and a number of units. The columns of all samples, counted through, are cut into blocks
of BLOCK_X; the rows of such a block fall into DILATION classes, each of every DILATION-th row, `depth` rows at most;
and a unit is one row of one class of one block. A program walks down the rows of its units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import activate, load_folded_norm, load_moments, merge_moments, store_vector
from ..triton_launch import jit_kernel

STAGES = tl.constexpr(3)  # rows on their way to shared memory while one is added up

# one binary for every batch and map size
NOT_SPECIALIZED = [
    "columns", "height", "width", "out_height", "out_width", "depth", "units", "units_per_part", "parts", "rows", "eps",
]  # fmt: skip


@triton.jit
def channels_of_program(C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The channels of this program, and which of them there are."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    return channel, channel < C


@triton.jit
def load_taps(weight_ptr, channel, valid):
    """The taps of a weight (C, 1, 3, 3), each as a float32 tile of one row."""
    weight_ptr += channel * 9
    taps = ()
    for tap in tl.static_range(9):
        taps += (tl.load(weight_ptr + tap, mask=valid, other=0.0).to(tl.float32)[None, :],)
    return taps


@triton.jit
def scaled_taps(taps, scale):
    """The taps of a convolution whose result is multiplied by a scale of each channel."""
    scaled = ()
    for tap in tl.static_range(9):
        scaled += (taps[tap] * scale[None, :],)
    return scaled


@triton.jit
def place_of_block(block, width, columns, BLOCK_X: tl.constexpr):
    """Sample (int64) and column of each lane of a block of columns, and whether there is such a column."""
    index = block * BLOCK_X + tl.arange(0, BLOCK_X)
    return (index // width).to(tl.int64), index % width, index < columns


@triton.jit
def tile_at(ptr, pixel, channel, C: tl.constexpr):
    """Pointers to channels of pixels."""
    return ptr + pixel[:, None] * C + channel[None, :]


@triton.jit
def tile_mask(there, valid, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of the lanes that are `there`, the channels that are valid; only the former where all channels are."""
    mask = there[:, None]
    if C % BLOCK_C != 0:
        mask = mask & valid[None, :]
    return mask


@triton.jit
def _load_row(at, masks, row, height, width, DILATION: tl.constexpr, C: tl.constexpr):
    """A row of x as it is stored, at the columns that the taps of a row meet: left, middle and right; zeros outside of
    the map."""
    inside = (row >= 0) & (row < height)
    at += row * width * C
    left = tl.load(at - DILATION * C, mask=masks[0] & inside, other=0.0)
    middle = tl.load(at, mask=masks[1] & inside, other=0.0)
    right = tl.load(at + DILATION * C, mask=masks[2] & inside, other=0.0)
    return left, middle, right


@triton.jit
def _weigh(sums, row, taps, ROW: tl.constexpr):
    """sums + a row times row ROW of the taps."""
    sums += row[0].to(tl.float32) * taps[3 * ROW]
    sums += row[1].to(tl.float32) * taps[3 * ROW + 1]
    sums += row[2].to(tl.float32) * taps[3 * ROW + 2]
    return sums


@triton.jit
def start_walk(
    x_ptr, taps, sample, column, there, channel, valid, y, height, width,
    STRIDE: tl.constexpr, DILATION: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What a walk that starts at row y of z reads from, and the unfinished sums that it carries. With stride 1 these
    are rows y and y + DILATION of z, as far as row y of x contributes; with stride 2 row y of z, as far as the row of x
    above its middle one does."""
    column *= STRIDE
    at = tile_at(x_ptr, sample * (height * width) + column, channel, C=C)
    left, right = there & (column >= DILATION), there & (column < width - DILATION)
    masks = (
        tile_mask(left, valid, C=C, BLOCK_C=BLOCK_C),
        tile_mask(there, valid, C=C, BLOCK_C=BLOCK_C),
        tile_mask(right, valid, C=C, BLOCK_C=BLOCK_C),
    )
    zeros = tl.zeros(at.shape, tl.float32)
    above = _load_row(at, masks, y * STRIDE - DILATION, height, width, DILATION=DILATION, C=C)
    if STRIDE == 1:
        middle = _load_row(at, masks, y, height, width, DILATION=DILATION, C=C)
        state = (_weigh(_weigh(zeros, above, taps, ROW=0), middle, taps, ROW=1), _weigh(zeros, middle, taps, ROW=0))
    else:
        state = (_weigh(zeros, above, taps, ROW=0),)
    return at, masks, state


@triton.jit
def walk(at, masks, state, taps, y, height, width, STRIDE: tl.constexpr, DILATION: tl.constexpr, C: tl.constexpr):
    """Row y of z, and what the walk carries to row y + DILATION. With stride 1 it reads one row of x, with 2 two."""
    zeros = tl.zeros(at.shape, tl.float32)
    if STRIDE == 1:
        below = _load_row(at, masks, y + DILATION, height, width, DILATION=DILATION, C=C)
        z = _weigh(state[0], below, taps, ROW=2)
        state = (_weigh(state[1], below, taps, ROW=1), _weigh(zeros, below, taps, ROW=0))
    else:
        middle = _load_row(at, masks, 2 * y, height, width, DILATION=DILATION, C=C)
        below = _load_row(at, masks, 2 * y + DILATION, height, width, DILATION=DILATION, C=C)
        z = _weigh(_weigh(state[0], middle, taps, ROW=1), below, taps, ROW=2)
        state = (_weigh(zeros, below, taps, ROW=0),)
    return z, state


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def depthwise_fwd_kernel(
    x_ptr,  # (B, height, width, C)
    weight_ptr,  # (C, 1, 3, 3)
    norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr,  # (C,), or None without a norm
    y_ptr,  # written where not None: (B, out_height, out_width, C), like x
    part_ptr, count_ptr,  # written where not None: (2, parts, C) and (parts,), float32
    columns, height, width, out_height, out_width, depth, units, units_per_part, parts, eps,
    ACT: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    C: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act(norm(z)), or z without a norm, for the convolution z of x; and where `part_ptr` is given the means and
    sums of squared deviations of z, as it is stored if it is, and the number of values, in the units of each program.

    The norm's scale is folded into the taps. Reads x about three times, at three columns, of which two come from cache;
    writes y once."""
    channel, valid = channels_of_program(C=C, BLOCK_C=BLOCK_C)
    taps = load_taps(weight_ptr, channel, valid)
    if norm_weight_ptr is not None:
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        scale, shift = load_folded_norm(
            norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, channel, eps, C=C, DTYPE=dtype
        )
        taps = scaled_taps(taps, scale)
    if part_ptr is not None:
        # Welford's update, with a running mean for each lane and channel. Lanes beyond the last column only appear at
        # the end, so that all of the others have seen as many rows.
        seen = 0
        count = tl.zeros((BLOCK_X,), tl.float32)
        mean = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
        m2 = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
    begin = tl.program_id(1) * units_per_part
    end = tl.minimum(begin + units_per_part, units)
    classes = tl.minimum(out_height, DILATION)
    for block in range(begin // depth, tl.cdiv(end, depth)):
        first, last = tl.maximum(begin - block * depth, 0), tl.minimum(end - block * depth, depth)
        sample, column, there = place_of_block(block // classes, out_width, columns, BLOCK_X=BLOCK_X)
        mask = tile_mask(there, valid, C=C, BLOCK_C=BLOCK_C)
        residue = block % classes
        at, masks, state = start_walk(
            x_ptr, taps, sample, column, there, channel, valid, residue + first * DILATION, height, width,
            STRIDE=STRIDE, DILATION=DILATION, C=C, BLOCK_C=BLOCK_C,
        )  # fmt: skip
        if y_ptr is not None:
            out = tile_at(y_ptr, sample * (out_height * out_width) + column, channel, C=C)
        for k in tl.range(first, last, num_stages=STAGES):
            y = residue + k * DILATION
            z, state = walk(at, masks, state, taps, y, height, width, STRIDE=STRIDE, DILATION=DILATION, C=C)
            inside = y < out_height  # the last row of a class may be missing
            if y_ptr is not None:
                result = z
                if norm_weight_ptr is not None:
                    result = activate(z + shift[None, :], ACT=ACT, DTYPE=y_ptr.dtype.element_ty)
                result = result.to(y_ptr.dtype.element_ty)
                tl.store(out + y * out_width * C, result, mask=mask & inside)
                if part_ptr is not None:
                    z = result.to(tl.float32)
            if part_ptr is not None:
                seen += inside.to(tl.int32)
                delta = tl.where(there[:, None] & inside, z - mean, 0.0)
                mean += delta * (1.0 / tl.maximum(seen, 1).to(tl.float32))
                m2 += delta * (z - mean)
        if part_ptr is not None:
            count = tl.where(there, seen.to(tl.float32), count)
    if part_ptr is not None:
        total, mean, m2 = merge_moments(count, mean, m2)
        part_ptr += tl.program_id(1) * C
        store_vector(part_ptr, channel, mean, WIDTH=C)
        store_vector(part_ptr + parts * C, channel, m2, WIDTH=C)
        if tl.program_id(0) == 0:
            tl.store(count_ptr + tl.program_id(1), total)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def moments_fwd_kernel(
    part_ptr, count_ptr,  # (2, parts, C) and (parts,), float32
    mean_ptr, var_ptr,  # written: (C,), float32
    parts,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of each channel from the moments of parts. A program has BLOCK_C channels."""
    channel, valid = channels_of_program(C=C, BLOCK_C=BLOCK_C)
    mean, var = load_moments(part_ptr, parts, 0, 0, channel, valid, C=C, BLOCK_C=BLOCK_C, count_ptr=count_ptr)
    store_vector(mean_ptr, channel, mean, WIDTH=C)
    store_vector(var_ptr, channel, var, WIDTH=C)
