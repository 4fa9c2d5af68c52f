"""Triton kernels of depthwise_conv, and of the depth-wise convolution by itself, forward and backward.

A program owns a block of channels and walks down BLOCK_X columns of pixels, which are counted over all samples: where a map is narrower
than the block, columns of the next samples fill it. A row of the input is read once, at three column shifts, and added to the unfinished
sums of the three rows of the output that it belongs to: three loads for each output, where gathering takes nine, and nothing is carried
from row to row but sums. With a dilation the walk keeps to rows of one residue class.

Programs share the (block of columns, row) units evenly, a few programs for each multiprocessor, so that the taps are loaded once for
many rows and partial statistics stay few.

The filtered map is computed again wherever it is needed. In training: its moments, then y (x read twice, y written); the sums of the norm's
gradient, then the gradient dz of the filtered map (x and dy read twice, dz written), then dx and the gradient of the taps (dz and x read,
dx written). Storing the filtered map would take 4 passes instead of 3 forward, as many backward, and twice the memory.
"""

from __future__ import annotations

from collections.abc import Callable

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
    split_rows,
)

# Three of a program's size fit a multiprocessor with their registers: two rounds.
PROGRAMS_PER_SM = 6
MIN_ROWS = 4  # of a program: fewer would read more rows around its own than rows of its own

STAGES = tl.constexpr(3)  # rows on their way to shared memory while one is added up

_SIZES = ["columns", "height", "width", "out_height", "out_width", "depth", "units", "units_per_part", "parts", "rows"]
_NOT_SPECIALIZED = [*_SIZES, "eps"]  # one binary for every batch and map size


@triton.jit
def _channels(C: tl.constexpr, BLOCK_C: tl.constexpr):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    return channel, channel < C


@triton.jit
def _load_weight(weight_ptr, channel, valid):
    """Nine tiles of one row, tap by tap."""
    weight_ptr += channel * 9
    taps = ()
    for tap in tl.static_range(9):
        taps += (tl.load(weight_ptr + tap, mask=valid, other=0.0).to(tl.float32)[None, :],)
    return taps


@triton.jit
def _scaled(taps, scale):
    scaled = ()
    for tap in tl.static_range(9):
        scaled += (taps[tap] * scale[None, :],)
    return scaled


@triton.jit
def _place(block, width, columns, BLOCK_X: tl.constexpr):
    """Of a block of columns of a map of this width: the sample (int64) and column of each lane, and whether it is one."""
    index = block * BLOCK_X + tl.arange(0, BLOCK_X)
    return (index // width).to(tl.int64), index % width, index < columns


@triton.jit
def _tile(ptr, pixel, channel, C: tl.constexpr):
    return ptr + pixel[:, None] * C + channel[None, :]


@triton.jit
def _mask(there, valid, C: tl.constexpr, BLOCK_C: tl.constexpr):
    mask = there[:, None]
    if C % BLOCK_C != 0:
        mask = mask & valid[None, :]
    return mask


@triton.jit
def _load_row(at, masks, row, height, width, DILATION: tl.constexpr, C: tl.constexpr):
    """A row of the input as it is stored, at the three column shifts; zeros outside of the map."""
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
def _start_walk(
    x_ptr, taps, sample, column, there, channel, valid, y, height, width,
    STRIDE: tl.constexpr, DILATION: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What a walk that starts at output row y reads from, and what it carries: stride 1 the sums of rows y and y + DILATION as far as row y
    of the input, stride 2 the sum of row y above its middle."""
    column *= STRIDE
    at = _tile(x_ptr, sample * (height * width) + column, channel, C)
    left, right = there & (column >= DILATION), there & (column < width - DILATION)
    masks = (_mask(left, valid, C, BLOCK_C), _mask(there, valid, C, BLOCK_C), _mask(right, valid, C, BLOCK_C))
    zeros = tl.zeros(at.shape, tl.float32)
    above = _load_row(at, masks, y * STRIDE - DILATION, height, width, DILATION, C)
    if STRIDE == 1:
        middle = _load_row(at, masks, y, height, width, DILATION, C)
        state = (_weigh(_weigh(zeros, above, taps, 0), middle, taps, 1), _weigh(zeros, middle, taps, 0))
    else:
        state = (_weigh(zeros, above, taps, 0),)
    return at, masks, state


@triton.jit
def _walk(at, masks, state, taps, y, height, width, STRIDE: tl.constexpr, DILATION: tl.constexpr, C: tl.constexpr):
    """The convolution at output row y, and what the walk carries to row y + DILATION."""
    zeros = tl.zeros(at.shape, tl.float32)
    if STRIDE == 1:
        below = _load_row(at, masks, y + DILATION, height, width, DILATION, C)
        z = _weigh(state[0], below, taps, 2)
        state = (_weigh(state[1], below, taps, 1), _weigh(zeros, below, taps, 0))
    else:
        middle = _load_row(at, masks, 2 * y, height, width, DILATION, C)
        below = _load_row(at, masks, 2 * y + DILATION, height, width, DILATION, C)
        z = _weigh(_weigh(state[0], middle, taps, 1), below, taps, 2)
        state = (_weigh(zeros, below, taps, 0),)
    return z, state


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _filter_fwd_kernel(
    x_ptr, weight_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, y_ptr, part_ptr, count_ptr,
    columns, height, width, out_height, out_width, depth, units, units_per_part, parts, eps,
    ACT: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, C: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y, the convolution, normalised and activated where there is a norm; and moments of the convolution, as it is stored if it is."""
    channel, valid = _channels(C, BLOCK_C)
    taps = _load_weight(weight_ptr, channel, valid)
    if norm_weight_ptr is not None:
        scale = tl.load(norm_weight_ptr + channel, mask=valid, other=0.0).to(tl.float32)
        scale *= inverse_std(tl.load(var_ptr + channel, mask=valid, other=1.0).to(tl.float32), eps)
        shift = tl.load(norm_bias_ptr + channel, mask=valid, other=0.0).to(tl.float32)
        shift -= tl.load(mean_ptr + channel, mask=valid, other=0.0).to(tl.float32) * scale
        taps = _scaled(taps, scale)
    if part_ptr is not None:
        # Welford, one running mean per lane and channel. Lanes beyond the last column only appear at the end, so that all of the others
        # have seen as many rows.
        seen = 0
        count = tl.zeros((BLOCK_X,), tl.float32)
        mean = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
        m2 = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
    begin = tl.program_id(1) * units_per_part
    end = tl.minimum(begin + units_per_part, units)
    classes = tl.minimum(out_height, DILATION)
    for block in range(begin // depth, tl.cdiv(end, depth)):
        first, last = tl.maximum(begin - block * depth, 0), tl.minimum(end - block * depth, depth)
        sample, column, there = _place(block // classes, out_width, columns, BLOCK_X)
        mask = _mask(there, valid, C, BLOCK_C)
        residue = block % classes
        at, masks, state = _start_walk(
            x_ptr, taps, sample, column, there, channel, valid, residue + first * DILATION, height, width, STRIDE, DILATION, C, BLOCK_C
        )
        if y_ptr is not None:
            out = _tile(y_ptr, sample * (out_height * out_width) + column, channel, C)
        for k in tl.range(first, last, num_stages=STAGES):
            y = residue + k * DILATION
            z, state = _walk(at, masks, state, taps, y, height, width, STRIDE, DILATION, C)
            inside = y < out_height  # the last row of a class may be missing
            if y_ptr is not None:
                result = z
                if norm_weight_ptr is not None:
                    result = activate(z + shift[None, :], ACT)
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
        part_ptr += tl.program_id(1) * C + channel
        tl.store(part_ptr, mean, mask=valid)
        tl.store(part_ptr + parts * C, m2, mask=valid)
        if tl.program_id(0) == 0:
            tl.store(count_ptr + tl.program_id(1), total)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _moments_fwd_kernel(part_ptr, count_ptr, mean_ptr, var_ptr, parts, C: tl.constexpr, BLOCK_C: tl.constexpr):
    channel, valid = _channels(C, BLOCK_C)
    mean, var = load_moments(part_ptr, parts, 0, 0, channel, valid, C, BLOCK_C, count_ptr)
    tl.store(mean_ptr + channel, mean, mask=valid)
    tl.store(var_ptr + channel, var, mask=valid)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _norm_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, means_ptr, dz_ptr, part_ptr,
    columns, height, width, out_height, out_width, depth, units, units_per_part, parts, eps,
    ACT: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, C: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of the convolution where `dz_ptr` is given, and parts of the sums that are those of the norm's bias and weight where
    `part_ptr` is. `means_ptr`: these sums over the number of positions, (2, C), which correct the gradient in training."""
    channel, valid = _channels(C, BLOCK_C)
    rstd = inverse_std(tl.load(var_ptr + channel, mask=valid, other=1.0).to(tl.float32), eps)
    taps = _scaled(_load_weight(weight_ptr, channel, valid), rstd)
    shift = (tl.load(mean_ptr + channel, mask=valid, other=0.0).to(tl.float32) * rstd)[None, :]
    scale = tl.load(norm_weight_ptr + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(norm_bias_ptr + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    if means_ptr is not None:
        mean_grad = tl.load(means_ptr + channel, mask=valid, other=0.0)[None, :]
        mean_product = tl.load(means_ptr + C + channel, mask=valid, other=0.0)[None, :]
    if part_ptr is not None:
        dbias = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
        dscale = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
    begin = tl.program_id(1) * units_per_part
    end = tl.minimum(begin + units_per_part, units)
    classes = tl.minimum(out_height, DILATION)
    for block in range(begin // depth, tl.cdiv(end, depth)):
        first, last = tl.maximum(begin - block * depth, 0), tl.minimum(end - block * depth, depth)
        sample, column, there = _place(block // classes, out_width, columns, BLOCK_X)
        mask = _mask(there, valid, C, BLOCK_C)
        residue = block % classes
        at, masks, state = _start_walk(
            x_ptr, taps, sample, column, there, channel, valid, residue + first * DILATION, height, width, STRIDE, DILATION, C, BLOCK_C
        )
        dy_at = _tile(dy_ptr, sample * (out_height * out_width) + column, channel, C)
        if dz_ptr is not None:
            dz_at = _tile(dz_ptr, sample * (out_height * out_width) + column, channel, C)
        for k in tl.range(first, last, num_stages=STAGES):
            y = residue + k * DILATION
            inside = mask & (y < out_height)
            dy = tl.load(dy_at + y * out_width * C, mask=inside, other=0.0).to(tl.float32)
            z, state = _walk(at, masks, state, taps, y, height, width, STRIDE, DILATION, C)
            normal = z - shift
            grad = activate_backward(dy, normal * scale + bias, ACT)
            if part_ptr is not None:
                grad = tl.where(inside, grad, 0.0)
                dbias += grad
                dscale += grad * normal
            if dz_ptr is not None:
                if means_ptr is not None:
                    grad = grad - mean_grad - normal * mean_product
                tl.store(dz_at + y * out_width * C, (grad * (scale * rstd[None, :])).to(dz_ptr.dtype.element_ty), mask=inside)
    if part_ptr is not None:
        part_ptr += tl.program_id(1) * C + channel
        tl.store(part_ptr, tl.sum(dbias, 0), mask=valid)
        tl.store(part_ptr + parts * C, tl.sum(dscale, 0), mask=valid)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _norm_sums_bwd_kernel(part_ptr, dscale_ptr, dbias_ptr, means_ptr, rows, parts, C: tl.constexpr, BLOCK_C: tl.constexpr):
    channel, valid = _channels(C, BLOCK_C)
    dbias = load_sums(part_ptr, parts, channel, valid, C, BLOCK_C)
    dscale = load_sums(part_ptr + parts * C, parts, channel, valid, C, BLOCK_C)
    tl.store(dbias_ptr + channel, dbias.to(dbias_ptr.dtype.element_ty), mask=valid)
    tl.store(dscale_ptr + channel, dscale.to(dscale_ptr.dtype.element_ty), mask=valid)
    if means_ptr is not None:
        tl.store(means_ptr + channel, dbias / rows, mask=valid)
        tl.store(means_ptr + C + channel, dscale / rows, mask=valid)


@triton.jit
def _gather_row(
    places, masks, row, rows, width, taps, dx, ROW: tl.constexpr, SPREAD: tl.constexpr, DILATION: tl.constexpr, C: tl.constexpr
):
    """dx plus its part from the outputs whose row of the input is `row`; their gradients; and whether there are any."""
    exists = (row >= 0) & (row % SPREAD == 0) & (row // SPREAD < rows)
    found = ()
    for j in tl.static_range(3):
        if SPREAD == 1:  # one address for all three
            at = places[0] + row * width * C + (1 - j) * DILATION * C
        else:
            at = places[j] + row // SPREAD * width * C
        dz = tl.load(at, mask=masks[j] & exists, other=0.0).to(tl.float32)
        dx += dz * taps[3 * ROW + j]
        found += (dz,)
    return dx, found, exists


@triton.jit
def _add_products(sums, row, x, ROW: tl.constexpr):
    """The sums of row ROW of the taps plus the products of three tiles of gradients with the values that they meet."""
    added = ()
    for tap in tl.static_range(9):
        if tap // 3 == ROW:
            added += (sums[tap] + row[tap % 3] * x[tap % 3],)
        else:
            added += (sums[tap],)
    return added


@triton.jit
def _store_sums(part_ptr, sums, parts, channel, valid, C: tl.constexpr):
    """A part of the gradient of the taps, in a (9, parts, C) float32 workspace."""
    part_ptr += tl.program_id(1) * C + channel
    for tap in tl.static_range(9):
        tl.store(part_ptr + tap * parts * C, tl.sum(sums[tap], 0), mask=valid)


@triton.jit
def _zero_sums(BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr):
    sums = ()
    for _ in tl.static_range(9):
        sums += (tl.zeros((BLOCK_X, BLOCK_C), tl.float32),)
    return sums


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _filter_bwd_kernel(
    dz_ptr, x_ptr, weight_ptr, dx_ptr, part_ptr, columns, height, width, out_height, out_width, depth, units, units_per_part, parts,
    SPREAD: tl.constexpr, DILATION: tl.constexpr, C: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx, and parts of the gradient of the taps, for a pixel of the input in each lane: nine gradients are gathered, weighted for dx, and
    multiplied by x for the taps. SPREAD is the stride: between its outputs there is no gradient."""
    channel, valid = _channels(C, BLOCK_C)
    taps = _load_weight(weight_ptr, channel, valid)
    sums = _zero_sums(BLOCK_X, BLOCK_C)
    begin = tl.program_id(1) * units_per_part
    end = tl.minimum(begin + units_per_part, units)
    for block in range(begin // depth, tl.cdiv(end, depth)):
        first, last = tl.maximum(begin - block * depth, 0), tl.minimum(end - block * depth, depth)
        sample, column, there = _place(block, width, columns, BLOCK_X)
        mask = _mask(there, valid, C, BLOCK_C)
        x_at = _tile(x_ptr, sample * (height * width) + column, channel, C)
        dx_at = _tile(dx_ptr, sample * (height * width) + column, channel, C)
        places, masks = (), ()
        for j in tl.static_range(3):
            source = column - (j - 1) * DILATION
            meets = there & (source >= 0) & (source % SPREAD == 0) & (source // SPREAD < out_width)
            from_column = column if SPREAD == 1 else source // SPREAD
            places += (_tile(dz_ptr, sample * (out_height * out_width) + from_column, channel, C),)
            masks += (_mask(meets, valid, C, BLOCK_C),)
        for row in range(first, last):
            x = tl.load(x_at + row * width * C, mask=mask, other=0.0).to(tl.float32)
            dx = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
            dx, above, has_above = _gather_row(places, masks, row + DILATION, out_height, out_width, taps, dx, 0, SPREAD, DILATION, C)
            dx, here, has_here = _gather_row(places, masks, row, out_height, out_width, taps, dx, 1, SPREAD, DILATION, C)
            dx, below, has_below = _gather_row(places, masks, row - DILATION, out_height, out_width, taps, dx, 2, SPREAD, DILATION, C)
            tl.store(dx_at + row * width * C, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            # A value that meets no gradient adds nothing, not even NaN.
            middle = x if SPREAD == 1 else tl.where(masks[1], x, 0.0)
            met = (tl.where(masks[0], x, 0.0), middle, tl.where(masks[2], x, 0.0))
            if has_above:
                sums = _add_products(sums, above, met, 0)
            if has_here:
                sums = _add_products(sums, here, met, 1)
            if has_below:
                sums = _add_products(sums, below, met, 2)
    _store_sums(part_ptr, sums, parts, channel, valid, C)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _filter_stride_2_bwd_kernel(
    dz_ptr, x_ptr, weight_ptr, dx_ptr, part_ptr, columns, height, width, out_height, out_width, depth, units, units_per_part, parts,
    C: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The same for stride 2 without dilation, and four pixels of the input in each lane, by parity of row and column: the even ones meet
    the middle tap of their row or column, the odd ones the two around it, so nothing is multiplied by zero."""
    channel, valid = _channels(C, BLOCK_C)
    taps = _load_weight(weight_ptr, channel, valid)
    sums = _zero_sums(BLOCK_X, BLOCK_C)
    begin = tl.program_id(1) * units_per_part
    end = tl.minimum(begin + units_per_part, units)
    for block in range(begin // depth, tl.cdiv(end, depth)):
        first, last = tl.maximum(begin - block * depth, 0), tl.minimum(end - block * depth, depth)
        sample, column, there = _place(block, out_width, columns, BLOCK_X)
        mask = _mask(there, valid, C, BLOCK_C)
        odd = _mask(there & (2 * column + 1 < width), valid, C, BLOCK_C)  # the pixel of the odd column exists
        next_ = _mask(there & (column + 1 < out_width), valid, C, BLOCK_C)  # and so does the output after it
        pixel = sample * (height * width) + 2 * column
        x_at, dx_at = _tile(x_ptr, pixel, channel, C), _tile(dx_ptr, pixel, channel, C)
        dz_at = _tile(dz_ptr, sample * (out_height * out_width) + column, channel, C)
        for y in range(first, last):
            even_row, odd_row = 2 * y * width * C, (2 * y + 1) * width * C
            has_odd, has_below = 2 * y + 1 < height, y + 1 < out_height
            here, below = dz_at + y * out_width * C, dz_at + (y + 1) * out_width * C
            dz = tl.load(here, mask=mask, other=0.0).to(tl.float32)
            dz_right = tl.load(here + C, mask=next_, other=0.0).to(tl.float32)
            dz_below = tl.load(below, mask=mask & has_below, other=0.0).to(tl.float32)
            dz_across = tl.load(below + C, mask=next_ & has_below, other=0.0).to(tl.float32)
            x_ee = tl.load(x_at + even_row, mask=mask, other=0.0).to(tl.float32)
            x_eo = tl.load(x_at + even_row + C, mask=odd, other=0.0).to(tl.float32)
            x_oe = tl.load(x_at + odd_row, mask=mask & has_odd, other=0.0).to(tl.float32)
            x_oo = tl.load(x_at + odd_row + C, mask=odd & has_odd, other=0.0).to(tl.float32)

            dtype: tl.constexpr = dx_ptr.dtype.element_ty
            tl.store(dx_at + even_row, (dz * taps[4]).to(dtype), mask=mask)
            tl.store(dx_at + even_row + C, (dz * taps[5] + dz_right * taps[3]).to(dtype), mask=odd)
            dx_oe = dz * taps[7] + dz_below * taps[1]
            tl.store(dx_at + odd_row, dx_oe.to(dtype), mask=mask & has_odd)
            dx_oo = dz * taps[8] + dz_right * taps[6] + dz_below * taps[2] + dz_across * taps[0]
            tl.store(dx_at + odd_row + C, dx_oo.to(dtype), mask=odd & has_odd)

            # A value that meets no gradient adds nothing, and neither does a gradient that meets no value, not even NaN.
            dz_odd = tl.where(odd, dz, 0.0)
            x_eo_right, x_oo_right = tl.where(next_, x_eo, 0.0), tl.where(next_, x_oo, 0.0)
            sums = _add_products(sums, (dz_right, dz, dz_odd), (x_eo_right, x_ee, x_eo), 1)
            if has_odd:
                sums = _add_products(sums, (dz_right, dz, dz_odd), (x_oo_right, x_oe, x_oo), 2)
            if has_below:
                below_odd = tl.where(odd, dz_below, 0.0)
                sums = _add_products(sums, (dz_across, dz_below, below_odd), (x_oo_right, x_oe, x_oo), 0)
    _store_sums(part_ptr, sums, parts, channel, valid, C)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _taps_bwd_kernel(part_ptr, dweight_ptr, parts, C: tl.constexpr, BLOCK_C: tl.constexpr):
    channel, valid = _channels(C, BLOCK_C)
    tap = tl.program_id(1)
    total = load_sums(part_ptr + tap * parts * C, parts, channel, valid, C, BLOCK_C)
    tl.store(dweight_ptr + channel * 9 + tap, total.to(dweight_ptr.dtype.element_ty), mask=valid)


def bytes_moved(x: Tensor, stride: int, training: bool) -> tuple[int, int]:
    """Bytes of full-size tensors that the forward and the backward pass read and write: x and y, x twice in training; x and dy, twice in
    training, dz, which is written and read, and x and dx."""
    wide, narrow = (
        x.shape[0] * pixels[0] * pixels[1] * x.shape[-1] * x.element_size() for pixels in (x.shape[1:3], _output_size(x, stride))
    )
    reads = 2 if training else 1
    return wide * reads + narrow, wide * (reads + 2) + narrow * (reads + 2)


def configurations(channels: int, itemsize: int, backward: bool) -> list[dict[str, int]]:
    """Tiles of pixels and channels, and their warps, the one that is used first. A thread has 16 bytes of a row forward and 4 channels
    backward, where it holds nine taps and the sums of their gradients."""
    values = 4 if backward else 16 // itemsize
    tiles = ((32, 16, 4), (64, 8, 4), (64, 16, 8)) if values == 4 else ((64, 16, 4), (32, 32, 4), (64, 8, 2))
    chosen = []
    for width, pixels, warps in tiles:
        block_c = min(triton.next_power_of_2(channels), width)
        block_x = min(pixels * (width // block_c), 64)
        config = {"BLOCK_X": block_x, "BLOCK_C": block_c, "num_warps": max(min(warps, block_x * block_c // (32 * values)), 1)}
        if config not in chosen:
            chosen.append(config)
    return chosen


def configuration(kernel: str, x: Tensor) -> dict[str, int]:
    channels, backward = x.shape[-1], kernel.endswith("bwd")
    return tuning.choose(f"depthwise_conv_{kernel}", x, (channels,), lambda: configurations(channels, x.element_size(), backward))


class _Work:
    """How a launch divides a map: `columns` of all samples in blocks, and of each block `rows` rows in walks of every dilation-th."""

    def __init__(self, x: Tensor, width: int, rows: int, dilation: int, config: dict[str, int]):
        channels = x.shape[-1]
        self.columns, self.depth = x.shape[0] * width, triton.cdiv(rows, dilation)
        self.units = triton.cdiv(self.columns, config["BLOCK_X"]) * min(dilation, rows) * self.depth
        blocks = triton.cdiv(channels, config["BLOCK_C"])
        self.parts, self.units_per_part = split_rows(self.units, PROGRAMS_PER_SM * multiprocessors(x) // blocks, MIN_ROWS)
        self.grid = (blocks, self.parts)

    def sizes(self, x: Tensor, out: tuple[int, int]) -> tuple[int, ...]:
        return self.columns, *x.shape[1:3], *out, self.depth, self.units, self.units_per_part, self.parts


def _output_size(x: Tensor, stride: int) -> tuple[int, int]:
    return -(-x.shape[1] // stride), -(-x.shape[2] // stride)


def _at_most_the_map(dilation: int, x: Tensor) -> int:
    """Taps that reach beyond the map everywhere reach no further with a larger dilation."""
    return min(dilation, max(*x.shape[1:3], 1))


def _launch_filter(x, weight, norm, eps, act, y, measured: bool, stride: int, dilation: int) -> tuple[Tensor, Tensor] | None:
    """Fills y, where given, from contiguous x, weight and, where given, norm: (weight, bias, mean, var). Returns the moments of the
    convolution where `measured`."""
    channels, out, dilation = x.shape[-1], _output_size(x, stride), _at_most_the_map(dilation, x)
    config = configuration("fwd", x)
    work = _Work(x, out[1], out[0], dilation, config)
    part = count = None
    if measured:
        part = torch.empty((2, work.parts, channels), dtype=torch.float32, device=x.device)
        count = torch.empty(work.parts, dtype=torch.float32, device=x.device)
    with on_device(x):
        _filter_fwd_kernel[work.grid](
            x, weight, *norm, y, part, count, *work.sizes(x, out), eps, ACT=act, STRIDE=stride, DILATION=dilation, C=channels, **config
        )
        if not measured:
            return None
        mean, var = (torch.empty(channels, dtype=torch.float32, device=x.device) for _ in range(2))
        _moments_fwd_kernel[(triton.cdiv(channels, 16),)](part, count, mean, var, work.parts, C=channels, BLOCK_C=16, num_warps=4)
    return mean, var


_NO_NORM = (None, None, None, None)


def filter(x: Tensor, weight: Tensor, stride: int, dilation: int) -> tuple[Tensor, Tensor, Tensor]:
    """The depth-wise convolution z of x (B, H, W, C) by weight (C, 1, 3, 3) with a padding of `dilation`: (B, ceil(H / stride),
    ceil(W / stride), C), contiguous, in the dtype of x; and mean and biased variance of each channel of z as it is stored, (C,), float32,
    zeros where z is empty. Sums in float32; the same result in every run."""
    x, weight = x.contiguous(), weight.contiguous()
    z = x.new_empty(x.shape[0], *_output_size(x, stride), x.shape[-1])
    if z.numel() == 0:
        return z, *(torch.zeros(x.shape[-1], dtype=torch.float32, device=x.device) for _ in range(2))
    return z, *_launch_filter(x, weight, _NO_NORM, 0.0, 0, z, True, stride, dilation)


def filter_backward(dz: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int) -> tuple[Tensor, Tensor]:
    """The gradients of x, in its dtype, and of weight, in its dtype, for the gradient `dz` of z, (B, ceil(H / stride), ceil(W / stride), C)
    in the dtype of x. One pass over dz and x, sums in float32; the same result in every run."""
    dz, x, weight = dz.contiguous(), x.contiguous(), weight.contiguous()
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    if x.numel() == 0:
        return dx, dweight.zero_()
    channels, out, dilation = x.shape[-1], _output_size(x, stride), _at_most_the_map(dilation, x)
    by_parity = stride == 2 and dilation == 1
    config = configuration("stride_2_bwd" if by_parity else "bwd", x)
    work = _Work(x, out[1] if by_parity else x.shape[2], out[0] if by_parity else x.shape[1], 1, config)
    part = torch.empty((9, work.parts, channels), dtype=torch.float32, device=x.device)
    arguments = (dz, x, weight, dx, part, *work.sizes(x, out))
    with on_device(x):
        if by_parity:
            _filter_stride_2_bwd_kernel[work.grid](*arguments, C=channels, **config)
        else:
            _filter_bwd_kernel[work.grid](*arguments, SPREAD=stride, DILATION=dilation, C=channels, **config)
        _taps_bwd_kernel[(triton.cdiv(channels, 16), 9)](part, dweight, work.parts, C=channels, BLOCK_C=16, num_warps=4)
    return dx, dweight


def depthwise_conv_forward(
    x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, eps: float, act: int, stride: int, dilation: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the forward pass: y and, in training, the batch's mean and variance (empty in evaluation)."""
    x, weight, norm_weight, norm_bias = x.contiguous(), weight.contiguous(), norm_weight.contiguous(), norm_bias.contiguous()
    y = x.new_empty(x.shape[0], *_output_size(x, stride), x.shape[-1])
    # Two tensors, not two halves of one: the outputs of an op may not share memory.
    moments = [torch.zeros(x.shape[-1] if training else 0, dtype=torch.float32, device=x.device) for _ in range(2)]
    if y.numel() == 0:
        return y, *moments
    statistics = (running_mean, running_var)
    if training:
        statistics = moments = _launch_filter(x, weight, _NO_NORM, 0.0, 0, None, True, stride, dilation)
    norm = (norm_weight, norm_bias, *(t.contiguous() for t in statistics))
    _launch_filter(x, weight, norm, eps, act, y, False, stride, dilation)
    return y, *moments


def depthwise_conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, mean: Tensor, var: Tensor, training: bool, eps: float,
    act: int, stride: int, dilation: int, filter_backward: Callable[..., tuple[Tensor, Tensor]] = filter_backward,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the backward pass: the gradients of x, weight, norm weight and norm bias. `mean` and `var` are those that normalised."""
    dy, x, weight, *norm = (t.contiguous() for t in (dy, x, weight, norm_weight, norm_bias, mean, var))
    dscale, dbias = torch.empty_like(norm[0]), torch.empty_like(norm[1])
    if dy.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(weight), dscale.zero_(), dbias.zero_()
    channels, out, reach = x.shape[-1], _output_size(x, stride), _at_most_the_map(dilation, x)
    config = configuration("norm_bwd", x)
    work = _Work(x, out[1], out[0], reach, config)
    part = torch.empty((2, work.parts, channels), dtype=torch.float32, device=x.device)
    means = torch.empty((2, channels), dtype=torch.float32, device=x.device) if training else None
    dz = torch.empty_like(dy)
    # In training dz waits for the sums.
    passes = ((None, None, part), (means, dz, None)) if training else ((None, dz, part),)
    with on_device(x):
        for targets in passes:
            _norm_bwd_kernel[work.grid](
                dy, x, weight, *norm, *targets, *work.sizes(x, out), eps, ACT=act, STRIDE=stride, DILATION=reach, C=channels, **config
            )
            if targets[2] is not None:
                _norm_sums_bwd_kernel[(triton.cdiv(channels, 16),)](
                    part, dscale, dbias, means, dy.numel() // channels, work.parts, C=channels, BLOCK_C=16, num_warps=4
                )
    return *filter_backward(dz, x, weight, stride, dilation), dscale, dbias


depthwise_conv_forward_cuda = depthwise_conv_forward


def depthwise_conv_backward_cuda(*arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with the last pass, from the gradient of z to those of x and weight, in CUDA C++."""
    return depthwise_conv_backward(*arguments, filter_backward=torch.ops.mvit3.depthwise_conv_filter_backward)
