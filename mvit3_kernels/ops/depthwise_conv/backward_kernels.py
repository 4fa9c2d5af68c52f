"""Triton kernels of depthwise_conv, backward; they walk over a map as kernels.py says, whose names are used here. A "d"
in front of a name is its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import activate_backward, inverse_std, load_sums, load_vector, store_vector
from ..triton_launch import jit_kernel
from .kernels import (
    NOT_SPECIALIZED,
    STAGES,
    channels_of_program,
    load_taps,
    place_of_block,
    scaled_taps,
    start_walk,
    tile_at,
    tile_mask,
    walk,
)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def norm_bwd_kernel(
    dy_ptr, x_ptr,  # (B, out_height, out_width, C), (B, height, width, C)
    weight_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr,  # (C, 1, 3, 3), then (C,)
    means_ptr,  # (2, C), float32, or None: dbias / rows and dweight / rows of the norm, in training
    dz_ptr, part_ptr,  # written where not None: like dy; (2, parts, C), float32
    columns, height, width, out_height, out_width, depth, units, units_per_part, parts, eps,
    ACT: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    C: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """With n = (z - mean) * rstd, rstd = 1 / sqrt(var + eps) and g = act'(n * norm_weight + norm_bias) * dy:

        part_ptr: the sums of g and of g * n over the units of a program, parts of the gradients of bias and weight;
        dz_ptr: dz = norm_weight * rstd * (g - mean(g) - n * mean(g * n)), the means from means_ptr, 0 without it.

    z is made again from x. Reads dy once and x as depthwise_fwd_kernel does; writes dz once."""
    channel, valid = channels_of_program(C=C, BLOCK_C=BLOCK_C)
    rstd = inverse_std(load_vector(var_ptr, channel, WIDTH=C, OTHER=1.0), eps)
    taps = scaled_taps(load_taps(weight_ptr, channel, valid), rstd)
    mean = (load_vector(mean_ptr, channel, WIDTH=C) * rstd)[None, :]
    norm_weight = load_vector(norm_weight_ptr, channel, WIDTH=C)[None, :]
    norm_bias = load_vector(norm_bias_ptr, channel, WIDTH=C)[None, :]
    if means_ptr is not None:
        mean_grad = load_vector(means_ptr, channel, WIDTH=C)[None, :]
        mean_product = load_vector(means_ptr + C, channel, WIDTH=C)[None, :]
    if part_ptr is not None:
        dbias = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
        dweight = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
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
        dy_at = tile_at(dy_ptr, sample * (out_height * out_width) + column, channel, C=C)
        if dz_ptr is not None:
            dz_at = tile_at(dz_ptr, sample * (out_height * out_width) + column, channel, C=C)
        for k in tl.range(first, last, num_stages=STAGES):
            y = residue + k * DILATION
            inside = mask & (y < out_height)
            dy = tl.load(dy_at + y * out_width * C, mask=inside, other=0.0).to(tl.float32)
            z, state = walk(at, masks, state, taps, y, height, width, STRIDE=STRIDE, DILATION=DILATION, C=C)
            normal = z - mean
            grad = activate_backward(dy, normal * norm_weight + norm_bias, ACT=ACT, DTYPE=x_ptr.dtype.element_ty)
            if part_ptr is not None:
                grad = tl.where(inside, grad, 0.0)
                dbias += grad
                dweight += grad * normal
            if dz_ptr is not None:
                if means_ptr is not None:
                    grad = grad - mean_grad - normal * mean_product
                dz = grad * (norm_weight * rstd[None, :])
                tl.store(dz_at + y * out_width * C, dz.to(dz_ptr.dtype.element_ty), mask=inside)
    if part_ptr is not None:
        part_ptr += tl.program_id(1) * C
        store_vector(part_ptr, channel, tl.sum(dbias, 0), WIDTH=C)
        store_vector(part_ptr + parts * C, channel, tl.sum(dweight, 0), WIDTH=C)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def norm_sums_bwd_kernel(
    part_ptr,  # (2, parts, C), float32
    dweight_ptr, dbias_ptr, means_ptr,  # written: (C,), like the norm's; (2, C), float32, or None
    rows, parts,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradients of the norm's weight and bias, added up from their parts, and both over the number of rows. A
    program has BLOCK_C channels."""
    channel, valid = channels_of_program(C=C, BLOCK_C=BLOCK_C)
    dbias = load_sums(part_ptr, parts, channel, valid, C=C, BLOCK_C=BLOCK_C)
    dweight = load_sums(part_ptr + parts * C, parts, channel, valid, C=C, BLOCK_C=BLOCK_C)
    store_vector(dbias_ptr, channel, dbias, WIDTH=C)
    store_vector(dweight_ptr, channel, dweight, WIDTH=C)
    if means_ptr is not None:
        store_vector(means_ptr, channel, dbias / rows, WIDTH=C)
        store_vector(means_ptr + C, channel, dweight / rows, WIDTH=C)


@triton.jit
def _gather_row(
    places, masks, row, rows, width, taps, dx,
    ROW: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """dx plus what row ROW of the taps gives to it, from row `row` / STRIDE of dz; the three tiles of dz that it met;
    and whether there is such a row."""
    exists = (row >= 0) & (row % STRIDE == 0) & (row // STRIDE < rows)
    found = ()
    for j in tl.static_range(3):
        if STRIDE == 1:  # one address for all three
            at = places[0] + row * width * C + (1 - j) * DILATION * C
        else:
            at = places[j] + row // STRIDE * width * C
        dz = tl.load(at, mask=masks[j] & exists, other=0.0).to(tl.float32)
        dx += dz * taps[3 * ROW + j]
        found += (dz,)
    return dx, found, exists


@triton.jit
def _add_products(sums, row, x, ROW: tl.constexpr):
    """The nine sums of the gradients of the taps, those of row ROW plus the products of three tiles of dz, `row`, with
    the values of x that they meet."""
    added = ()
    for tap in tl.static_range(9):
        if tap // 3 == ROW:
            added += (sums[tap] + row[tap % 3] * x[tap % 3],)
        else:
            added += (sums[tap],)
    return added


@triton.jit
def _store_sums(part_ptr, sums, parts, channel, C: tl.constexpr):
    """A part of the gradient of the taps, in a (9, parts, C) float32 workspace."""
    part_ptr += tl.program_id(1) * C
    for tap in tl.static_range(9):
        store_vector(part_ptr + tap * parts * C, channel, tl.sum(sums[tap], 0), WIDTH=C)


@triton.jit
def _zero_sums(BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile of zeros for each tap."""
    sums = ()
    for _ in tl.static_range(9):
        sums += (tl.zeros((BLOCK_X, BLOCK_C), tl.float32),)
    return sums


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def depthwise_bwd_kernel(
    dz_ptr, x_ptr,  # (B, out_height, out_width, C), (B, height, width, C)
    weight_ptr,  # (C, 1, 3, 3)
    dx_ptr, part_ptr,  # written: like x; (9, parts, C), float32
    columns, height, width, out_height, out_width, depth, units, units_per_part, parts,
    STRIDE: tl.constexpr, DILATION: tl.constexpr, C: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = the sum over the taps t of t * dz at the pixel of z that met x through t, and the gradient of t, the sum
    over pixels of x * dz there, in parts.

    A lane has a pixel of x, which met at most nine pixels of z; with stride 2 most of these do not exist. Reads x once,
    dz about nine times, of which eight come from cache; writes dx once."""
    channel, valid = channels_of_program(C=C, BLOCK_C=BLOCK_C)
    taps = load_taps(weight_ptr, channel, valid)
    sums = _zero_sums(BLOCK_X=BLOCK_X, BLOCK_C=BLOCK_C)
    begin = tl.program_id(1) * units_per_part
    end = tl.minimum(begin + units_per_part, units)
    for block in range(begin // depth, tl.cdiv(end, depth)):
        first, last = tl.maximum(begin - block * depth, 0), tl.minimum(end - block * depth, depth)
        sample, column, there = place_of_block(block, width, columns, BLOCK_X=BLOCK_X)
        mask = tile_mask(there, valid, C=C, BLOCK_C=BLOCK_C)
        x_at = tile_at(x_ptr, sample * (height * width) + column, channel, C=C)
        dx_at = tile_at(dx_ptr, sample * (height * width) + column, channel, C=C)
        places, masks = (), ()
        for j in tl.static_range(3):
            source = column - (j - 1) * DILATION
            meets = there & (source >= 0) & (source % STRIDE == 0) & (source // STRIDE < out_width)
            from_column = column if STRIDE == 1 else source // STRIDE
            places += (tile_at(dz_ptr, sample * (out_height * out_width) + from_column, channel, C=C),)
            masks += (tile_mask(meets, valid, C=C, BLOCK_C=BLOCK_C),)
        for row in range(first, last):
            x = tl.load(x_at + row * width * C, mask=mask, other=0.0).to(tl.float32)
            dx = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
            dx, above, has_above = _gather_row(
                places, masks, row + DILATION, out_height, out_width, taps, dx,
                ROW=0, STRIDE=STRIDE, DILATION=DILATION, C=C,
            )  # fmt: skip
            dx, here, has_here = _gather_row(
                places, masks, row, out_height, out_width, taps, dx,
                ROW=1, STRIDE=STRIDE, DILATION=DILATION, C=C,
            )  # fmt: skip
            dx, below, has_below = _gather_row(
                places, masks, row - DILATION, out_height, out_width, taps, dx,
                ROW=2, STRIDE=STRIDE, DILATION=DILATION, C=C,
            )  # fmt: skip
            tl.store(dx_at + row * width * C, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            # A value that meets no gradient adds nothing, not even NaN.
            middle = x if STRIDE == 1 else tl.where(masks[1], x, 0.0)
            met = (tl.where(masks[0], x, 0.0), middle, tl.where(masks[2], x, 0.0))
            if has_above:
                sums = _add_products(sums, above, met, ROW=0)
            if has_here:
                sums = _add_products(sums, here, met, ROW=1)
            if has_below:
                sums = _add_products(sums, below, met, ROW=2)
    _store_sums(part_ptr, sums, parts, channel, C=C)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def depthwise_stride_2_bwd_kernel(
    dz_ptr, x_ptr,  # (B, out_height, out_width, C), (B, height, width, C)
    weight_ptr,  # (C, 1, 3, 3)
    dx_ptr, part_ptr,  # written: like x; (9, parts, C), float32
    columns, height, width, out_height, out_width, depth, units, units_per_part, parts,
    C: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The same for stride 2 without dilation.

    A lane has four pixels of x, one of each parity of row and column: an even row or column met the middle tap, an odd
    one the two taps beside it, so that nothing is multiplied by zero. In names "e" and "o" are even and odd, first the
    row, then the column. Reads x once, dz four times, of which three come from cache; writes dx once."""
    channel, valid = channels_of_program(C=C, BLOCK_C=BLOCK_C)
    taps = load_taps(weight_ptr, channel, valid)
    sums = _zero_sums(BLOCK_X=BLOCK_X, BLOCK_C=BLOCK_C)
    begin = tl.program_id(1) * units_per_part
    end = tl.minimum(begin + units_per_part, units)
    for block in range(begin // depth, tl.cdiv(end, depth)):
        first, last = tl.maximum(begin - block * depth, 0), tl.minimum(end - block * depth, depth)
        sample, column, there = place_of_block(block, out_width, columns, BLOCK_X=BLOCK_X)
        mask = tile_mask(there, valid, C=C, BLOCK_C=BLOCK_C)
        odd = tile_mask(
            there & (2 * column + 1 < width), valid, C=C, BLOCK_C=BLOCK_C
        )  # the pixel of the odd column exists
        next_ = tile_mask(
            there & (column + 1 < out_width), valid, C=C, BLOCK_C=BLOCK_C
        )  # and so does the output after it
        pixel = sample * (height * width) + 2 * column
        x_at, dx_at = tile_at(x_ptr, pixel, channel, C=C), tile_at(dx_ptr, pixel, channel, C=C)
        dz_at = tile_at(dz_ptr, sample * (out_height * out_width) + column, channel, C=C)
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

            # A value that meets no gradient adds nothing, and neither does a gradient that meets no value, not even
            # NaN.
            dz_odd = tl.where(odd, dz, 0.0)
            x_eo_right, x_oo_right = tl.where(next_, x_eo, 0.0), tl.where(next_, x_oo, 0.0)
            sums = _add_products(sums, (dz_right, dz, dz_odd), (x_eo_right, x_ee, x_eo), ROW=1)
            if has_odd:
                sums = _add_products(sums, (dz_right, dz, dz_odd), (x_oo_right, x_oe, x_oo), ROW=2)
            if has_below:
                below_odd = tl.where(odd, dz_below, 0.0)
                sums = _add_products(sums, (dz_across, dz_below, below_odd), (x_oo_right, x_oe, x_oo), ROW=0)
    _store_sums(part_ptr, sums, parts, channel, C=C)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def taps_bwd_kernel(
    part_ptr,  # (9, parts, C), float32
    dweight_ptr,  # written: (C, 1, 3, 3), like the weight
    parts,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of the taps, added up from its parts. The grid is (blocks of BLOCK_C channels, taps)."""
    channel, valid = channels_of_program(C=C, BLOCK_C=BLOCK_C)
    tap = tl.program_id(1)
    total = load_sums(part_ptr + tap * parts * C, parts, channel, valid, C=C, BLOCK_C=BLOCK_C)
    tl.store(dweight_ptr + channel * 9 + tap, total.to(dweight_ptr.dtype.element_ty), mask=valid)
