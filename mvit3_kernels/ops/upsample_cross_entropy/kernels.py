"""Triton kernels of upsample_cross_entropy; triton.py launches them, triton_upsampling.py says how a program walks.

With smoothing e, class weights w and their sum W a pixel of label t and logits z has the loss
  a log sum exp(z - m) - b (z_t - m) - sum_c s_c (z_c - m),   b = (1 - e) w_t,  s_c = e w_c / C,  a = b + e W / C,
m the largest logit, and the gradient a softmax(z) - b onehot(t) - s.

A map's gradient is the sum over bands, splits and blocks of columns: each program writes one part for every pixel of
the map that its columns read, and for both of its rows, and gradient_kernel adds them up in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_launch import jit_kernel
from ..triton_upsampling import (
    NOT_SPECIALIZED,
    classes_of_block,
    columns_of_block,
    exponential,
    first_output,
    largest_of_row,
    load_bands,
    logits_of_row,
    lower_input,
    place_of_program,
    share_of_upper,
    upper_input,
)

_NOT_SPECIALIZED = [*NOT_SPECIALIZED, "ignore_index", "smoothing", "slots", "programs", "groups"]


@triton.jit
def _smoothed(
    weight_ptr, smoothing, group, C: tl.constexpr, BLOCKS: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr
):
    """s of each block of classes, 0 behind the classes."""
    found = ()
    for k in tl.static_range(BLOCKS):
        c = classes_of_block(group + k * DEPTH * LANES, DEPTH, LANES)
        if weight_ptr is None:
            w = tl.where(c < C, 1.0, 0.0)
        else:
            w = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        found += (w * (smoothing / C),)
    return found


@triton.jit
def _sum_of_smoothed(weight_ptr, smoothing, C: tl.constexpr):
    """e W / C."""
    if weight_ptr is None:
        total = smoothing
    else:
        total = 0.0
        lane = tl.arange(0, 128)
        for first in tl.static_range(0, C, 128):
            w = tl.load(weight_ptr + first + lane, mask=first + lane < C, other=0.0).to(tl.float32)
            total += tl.sum(w * (smoothing / C), 0)
    return total


@triton.jit
def _terms(label, valid, weight_ptr, ignore_index, smoothing, smooth, C: tl.constexpr):
    """Of labels (COLUMNS,): which count; which are wrong; the weights, b and a, 0 where they do not count."""
    known = (label >= 0) & (label < C)
    counted = valid & (label != ignore_index)
    wrong = counted & (known == 0)
    counted = counted & known
    if weight_ptr is None:
        weight = tl.where(counted, 1.0, 0.0)
    else:
        weight = tl.load(weight_ptr + label, mask=counted, other=0.0).to(tl.float32)
    b = weight * (1 - smoothing)
    return counted, wrong, weight, b, b + tl.where(counted, smooth, 0.0)


@triton.jit
def _store_sums(sums_ptr, program, programs, loss, weight, wrong):
    """Of a program, to (3, programs)."""
    tl.store(sums_ptr + program, loss)
    tl.store(sums_ptr + programs + program, weight)
    tl.store(sums_ptr + 2 * programs + program, wrong)


@triton.jit
def _exponentials(
    z, most, here, b, smoothed, group,
    C: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
    SMOOTH: tl.constexpr,
):  # fmt: skip
    """Of a row's logits, a tile of each block of classes: exp(z - m) and b at the label; and, still to be added up over
    lanes, (COLUMNS, LANES), sum exp(z - m) and b (z_t - m) + sum_c s_c (z_c - m)."""
    e = ()
    labelled = ()
    sums = tl.zeros((COLUMNS, LANES), tl.float32)
    at_label = tl.zeros((COLUMNS, LANES), tl.float32)
    of_smoothed = tl.zeros((COLUMNS, LANES), tl.float32)
    for k in tl.static_range(BLOCKS):
        c = classes_of_block(group + k * DEPTH * LANES, DEPTH, LANES)
        below = z[k] - most[None, :, None]
        e += (exponential(below),)
        labelled += (tl.where(c == here, b[None, :, None], 0.0),)
        sums += tl.sum(e[k], 0)
        at_label += tl.sum(tl.where(c == here, below, 0.0), 0)
        if SMOOTH:
            of_smoothed += tl.sum(tl.where(c < C, below, 0.0) * smoothed[k], 0)
    return e, labelled, sums, at_label * b[:, None] + of_smoothed


@triton.jit
def _without_smoothed(gradients, smoothed, counted, BLOCKS: tl.constexpr):
    """Gradients of columns less s times what their pixels count."""
    found = ()
    for k in tl.static_range(BLOCKS):
        found += (gradients[k] - smoothed[k] * counted[None, :, None],)
    return found


@triton.jit
def _store_parts(
    part_ptr, d_upper, d_lower, block, columns, group,
    C: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Adds up the gradients of columns for each pixel of a row of the map that they read, (slots, 2, C)."""
    _, valid, low, high, across = columns_of_block(block, columns, COLUMNS)
    end = upper_input(lower_input(tl.minimum((block + 1) * COLUMNS, columns[1]) - 1, columns), columns) + 1
    for token in range(lower_input(block * COLUMNS, columns), end):
        share = tl.where(low == token, 1 - across, 0.0) + tl.where(high == token, across, 0.0)
        share = share[None, :, None]
        # values of other columns, if not finite, do not reach it
        reads = (valid & ((low == token) | (high == token)))[None, :, None]
        for k in tl.static_range(BLOCKS):
            c = group + k * DEPTH * LANES + tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
            tl.store(part_ptr + c, tl.sum(tl.where(reads, d_upper[k] * share, 0.0), 1), mask=c < C)
            tl.store(part_ptr + C + c, tl.sum(tl.where(reads, d_lower[k] * share, 0.0), 1), mask=c < C)
        part_ptr += 2 * C


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def loss_fwd_kernel(
    logits_ptr, target_ptr, weight_ptr, most_ptr, total_ptr, sums_ptr, part_ptr,
    inputs_y, outputs_y, step_y, offset_y, whole_y, inputs_x, outputs_x, step_x, offset_x, whole_x, splits, blocks,
    ignore_index, smoothing, slots, programs,
    C: tl.constexpr, BLOCKS: tl.constexpr, MANY: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    LANES: tl.constexpr, SMOOTH: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Sums of loss and weight and the number of wrong labels, (3, programs), and where KEEP parts of the gradient,
    (programs, slots, 2, C). Where there are MANY classes, of a group of them: only the gradient, for the largest logit
    of each pixel and its sum of exponentials, (B, H, W), that statistics_fwd_kernel has found."""
    rows = (inputs_y, outputs_y, step_y, offset_y, whole_y)
    columns = (inputs_x, outputs_x, step_x, offset_x, whole_x)
    program = tl.program_id(0)
    group = tl.program_id(1) * (BLOCKS * DEPTH * LANES)
    image, band, block, begin, end = place_of_program(program, rows, splits, blocks)
    x, valid, low, high, across = columns_of_block(block, columns, COLUMNS)
    upper, lower = load_bands(logits_ptr, image, band, group, low, high, across, rows, columns, C, BLOCKS, DEPTH, LANES)
    smooth = 0.0
    smoothed = ()
    if SMOOTH:
        smoothed = _smoothed(weight_ptr, smoothing, group, C, BLOCKS, DEPTH, LANES)
        smooth = _sum_of_smoothed(weight_ptr, smoothing, C)
    d_upper = ()
    d_lower = ()
    for _ in tl.static_range(BLOCKS):
        d_upper += (tl.zeros((DEPTH, COLUMNS, LANES), tl.float32),)
        d_lower += (tl.zeros((DEPTH, COLUMNS, LANES), tl.float32),)
    counted_upper = tl.zeros((COLUMNS,), tl.float32)
    counted_lower = tl.zeros((COLUMNS,), tl.float32)
    loss = tl.zeros((COLUMNS,), tl.float32)
    of_logits = tl.zeros((COLUMNS, LANES), tl.float32)
    weights = tl.zeros((COLUMNS,), tl.float32)
    wrongs = tl.zeros((COLUMNS,), tl.float32)

    pixel = (image * outputs_y + begin) * outputs_x + x
    label = tl.load(target_ptr + pixel, mask=valid & (begin < end), other=0)
    for row in range(begin, end):
        down = share_of_upper(row, band, rows)
        counted, wrong, weight, b, a = _terms(label, valid, weight_ptr, ignore_index, smoothing, smooth, C)
        here = tl.where(counted, label, -1).to(tl.int32)[None, :, None]
        if MANY:
            most = tl.load(most_ptr + pixel)
            total = tl.load(total_ptr + pixel)
        pixel += outputs_x
        label = tl.load(target_ptr + pixel, mask=valid & (row + 1 < end), other=0)  # in time for the next row

        z = logits_of_row(upper, lower, down, group, C, BLOCKS, DEPTH, LANES, MANY)
        if not MANY:
            most = largest_of_row(z, BLOCKS)
        e, labelled, sums, of_row = _exponentials(
            z, most, here, b, smoothed, group, C, BLOCKS, COLUMNS, DEPTH, LANES, SMOOTH
        )
        if not MANY:
            total = tl.sum(sums, 1)
            loss += tl.where(counted, a * tl.log(total), 0.0)
            of_logits += tl.where(counted[:, None], of_row, 0.0)
            weights += weight
            wrongs += wrong.to(tl.float32)
        if KEEP:
            factor = tl.where(counted, tl.div_rn(a, total), 0.0)[None, :, None]
            new_upper = ()
            new_lower = ()
            for k in tl.static_range(BLOCKS):
                # in front of the sums over pixels: where a pixel is sure of its label the two nearly cancel
                g = e[k] * factor - labelled[k]
                new_upper += (d_upper[k] + g * (1 - down),)
                new_lower += (d_lower[k] + g * down,)
            d_upper = new_upper
            d_lower = new_lower
            if SMOOTH:
                one = tl.where(counted, 1.0, 0.0)
                counted_upper += one * (1 - down)
                counted_lower += one * down

    if not MANY:
        lost = tl.sum(loss, 0) - tl.sum(tl.sum(of_logits, 1), 0)
        _store_sums(sums_ptr, program, programs, lost, tl.sum(weights, 0), tl.sum(wrongs, 0))
    if KEEP:
        if SMOOTH:
            d_upper = _without_smoothed(d_upper, smoothed, counted_upper, BLOCKS)
            d_lower = _without_smoothed(d_lower, smoothed, counted_lower, BLOCKS)
        part_ptr += program.to(tl.int64) * slots * 2 * C
        _store_parts(part_ptr, d_upper, d_lower, block, columns, group, C, BLOCKS, COLUMNS, DEPTH, LANES)


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def statistics_fwd_kernel(
    logits_ptr, target_ptr, weight_ptr, most_ptr, total_ptr, at_label_ptr, sums_ptr,
    inputs_y, outputs_y, step_y, offset_y, whole_y, inputs_x, outputs_x, step_x, offset_x, whole_x, splits, blocks,
    ignore_index, smoothing, programs, groups,
    C: tl.constexpr, BLOCKS: tl.constexpr, MANY: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    LANES: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Of MANY classes, group by group: the largest logit of each pixel, the sum of exponentials, and b z_t + sum_c s_c
    z_c, (B, H, W) float32, which are handed from group to group in memory; and the sums of loss_fwd_kernel."""
    rows = (inputs_y, outputs_y, step_y, offset_y, whole_y)
    columns = (inputs_x, outputs_x, step_x, offset_x, whole_x)
    program = tl.program_id(0)
    image, band, block, begin, end = place_of_program(program, rows, splits, blocks)
    x, valid, low, high, across = columns_of_block(block, columns, COLUMNS)
    smooth = 0.0
    if SMOOTH:
        smooth = _sum_of_smoothed(weight_ptr, smoothing, C)
    loss = tl.zeros((COLUMNS,), tl.float32)
    weights = tl.zeros((COLUMNS,), tl.float32)
    wrongs = tl.zeros((COLUMNS,), tl.float32)
    for group in range(groups):
        first = group * (BLOCKS * DEPTH * LANES)
        upper, lower = load_bands(
            logits_ptr, image, band, first, low, high, across, rows, columns, C, BLOCKS, DEPTH, LANES
        )
        if SMOOTH:
            smoothed = _smoothed(weight_ptr, smoothing, first, C, BLOCKS, DEPTH, LANES)
        for row in range(begin, end):
            down = share_of_upper(row, band, rows)
            pixel = (image * outputs_y + row) * outputs_x + x
            label = tl.load(target_ptr + pixel)
            counted, wrong, weight, b, a = _terms(label, valid, weight_ptr, ignore_index, smoothing, smooth, C)
            here = tl.where(counted, label, -1).to(tl.int32)[None, :, None]
            known = group > 0
            old = tl.load(most_ptr + pixel, mask=known, other=float("-inf"))
            total = tl.load(total_ptr + pixel, mask=known, other=0.0)
            at_label = tl.load(at_label_ptr + pixel, mask=known, other=0.0)

            z = logits_of_row(upper, lower, down, first, C, BLOCKS, DEPTH, LANES, MANY)
            most = tl.maximum(old, largest_of_row(z, BLOCKS))
            shift = tl.where(most == float("-inf"), 0.0, most)  # a group may be all masked
            sums = tl.zeros((COLUMNS, LANES), tl.float32)
            found = tl.zeros((COLUMNS, LANES), tl.float32)
            for k in tl.static_range(BLOCKS):
                c = classes_of_block(first + k * DEPTH * LANES, DEPTH, LANES)
                sums += tl.sum(exponential(z[k] - shift[None, :, None]), 0)
                found += tl.sum(tl.where(c == here, z[k] * b[None, :, None], 0.0), 0)
                if SMOOTH:
                    found += tl.sum(tl.where(c < C, z[k], 0.0) * smoothed[k], 0)
            total = total * tl.exp(old - shift) + tl.sum(sums, 1)
            at_label += tl.sum(found, 1)
            tl.store(most_ptr + pixel, most, mask=valid)
            tl.store(total_ptr + pixel, total, mask=valid)
            tl.store(at_label_ptr + pixel, at_label, mask=valid)
            if group == groups - 1:
                loss += tl.where(counted, a * tl.log(total) + (a * most - at_label), 0.0)
                weights += weight
                wrongs += wrong.to(tl.float32)
        tl.debug_barrier()  # other threads read what these wrote
    _store_sums(sums_ptr, program, programs, tl.sum(loss, 0), tl.sum(weights, 0), tl.sum(wrongs, 0))


@triton.jit
def _add_parts(
    sums, part_ptr, c, image, band, lower_row, blocks_of, splits, blocks, slots, token, rows, columns,
    C: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds the parts of one of a band's two rows for a pixel of it."""
    for split in range(splits):
        for block in range(blocks_of[0], blocks_of[1]):
            program = ((image * rows[0] + band) * splits + split) * blocks + block
            slot = token - lower_input(block * COLUMNS, columns)
            sums += tl.load(part_ptr + ((program * slots + slot) * 2 + lower_row) * C + c, mask=c < C, other=0.0)
    return sums


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def gradient_fwd_kernel(
    part_ptr, gradient_ptr,
    inputs_y, outputs_y, step_y, offset_y, whole_y, inputs_x, outputs_x, step_x, offset_x, whole_x, splits, blocks,
    slots,
    C: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient (B, h, w, C) of a pixel of the map from parts (programs, slots, 2, C)."""
    rows = (inputs_y, outputs_y, step_y, offset_y, whole_y)
    columns = (inputs_x, outputs_x, step_x, offset_x, whole_x)
    pixel = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    token = (pixel % inputs_x).to(tl.int32)
    band = (pixel // inputs_x % inputs_y).to(tl.int32)
    image = pixel // inputs_x // inputs_y
    begin = first_output(tl.where(inputs_x == outputs_x, token, token - 1), columns)
    end = first_output(token + 1, columns)
    blocks_of = (begin // COLUMNS, tl.where(begin < end, (end - 1) // COLUMNS + 1, 0))
    sums = tl.zeros((BLOCK_C,), tl.float32)
    where = (blocks_of, splits, blocks, slots, token, rows, columns)
    sums = _add_parts(sums, part_ptr, c, image, band, 0, *where, C=C, COLUMNS=COLUMNS)
    if upper_input(band, rows) == band:
        sums = _add_parts(sums, part_ptr, c, image, band, 1, *where, C=C, COLUMNS=COLUMNS)
    if (band > 0) & (inputs_y != outputs_y):
        sums = _add_parts(sums, part_ptr, c, image, band - 1, 1, *where, C=C, COLUMNS=COLUMNS)
    tl.store(gradient_ptr + pixel * C + c, sums, mask=c < C)


@jit_kernel
def finish_fwd_kernel(sums_ptr, loss_ptr, total_ptr, right_ptr):
    """Loss, the weight that it is the mean of, and whether all labels were right, from sums (3,) in float64. Where no
    pixel counts the loss is NaN, as PyTorch's, and the gradient 0."""
    lost, weight, wrong = tl.load(sums_ptr), tl.load(sums_ptr + 1), tl.load(sums_ptr + 2)
    counts = weight != 0  # the weights of classes may be negative
    total = tl.where(counts, weight, 1.0)
    tl.store(loss_ptr, tl.where(counts, lost / total, float("nan")).to(tl.float32))
    tl.store(total_ptr, total.to(tl.float32))
    tl.store(right_ptr, wrong == 0)


@jit_kernel(do_not_specialize=["count"])
def scale_bwd_kernel(dloss_ptr, total_ptr, gradient_ptr, dlogits_ptr, count, BLOCK: tl.constexpr):
    """dlogits = gradient * dloss / total, element by element."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(dloss_ptr).to(tl.float32) / tl.load(total_ptr)
    gradient = tl.load(gradient_ptr + at, mask=at < count)
    tl.store(dlogits_ptr + at, (gradient * scale).to(dlogits_ptr.dtype.element_ty), mask=at < count)
