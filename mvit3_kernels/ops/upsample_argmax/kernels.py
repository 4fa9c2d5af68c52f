"""The Triton kernel of upsample_argmax; triton.py launches it, triton_upsampling.py says how a program walks."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_launch import jit_kernel
from ..triton_upsampling import (
    LARGEST,
    NOT_SPECIALIZED,
    classes_of_block,
    columns_of_block,
    largest_of_row,
    load_bands,
    logits_of_row,
    place_of_program,
    share_of_upper,
)


@triton.jit
def _not_finite(tiles, BLOCKS: tl.constexpr):
    """Which of a program's mixed values are infinite or NaN, of any block."""
    found = (tl.abs(tiles[0]) <= LARGEST) == 0
    for k in tl.static_range(1, BLOCKS):
        found = found | ((tl.abs(tiles[k]) <= LARGEST) == 0)
    return found


@jit_kernel(do_not_specialize=[*NOT_SPECIALIZED, "groups"])
def argmax_kernel(
    logits_ptr, target_ptr, best_ptr, labels_ptr, confusion_ptr,
    inputs_y, outputs_y, step_y, offset_y, whole_y, inputs_x, outputs_x, step_x, offset_x, whole_x, splits, blocks,
    groups,
    C: tl.constexpr, BLOCKS: tl.constexpr, MANY: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The labels (B, H, W) int64 and, given a target, what is added to the confusion matrix (C, C) int64: sums of whole
    numbers, equal in any order. MANY classes are walked over group by group, which hand each other the best logits, (B,
    H, W) float32, and labels in memory."""
    rows = (inputs_y, outputs_y, step_y, offset_y, whole_y)
    columns = (inputs_x, outputs_x, step_x, offset_x, whole_x)
    image, band, block, begin, end = place_of_program(tl.program_id(0), rows, splits, blocks)
    x, valid, low, high, across = columns_of_block(block, columns, COLUMNS)
    # The latest pair of label and prediction down a column and how often it came: neighbours are mostly alike, and
    # additions to one address wait for each other.
    latest = tl.full((COLUMNS,), -1, tl.int32)
    times = tl.zeros((COLUMNS,), tl.int32)
    for group in range(groups if MANY else 1):
        first = group * (BLOCKS * DEPTH * LANES)
        upper, lower = load_bands(
            logits_ptr, image, band, first, low, high, across, rows, columns, C, BLOCKS, DEPTH, LANES
        )
        bad = _not_finite(upper, BLOCKS) | _not_finite(lower, BLOCKS)
        hostile = tl.max(tl.max(tl.max(bad.to(tl.int32), 0), 0), 0) > 0
        for row in range(begin, end):
            down = share_of_upper(row, band, rows)
            pixel = (image * outputs_y + row) * outputs_x + x
            z = logits_of_row(upper, lower, down, first, C, BLOCKS, DEPTH, LANES, MANY)
            if hostile:  # NaN is the largest, as in torch.argmax
                ordered = ()
                for k in tl.static_range(BLOCKS):
                    ordered += (tl.where(z[k] != z[k], float("inf"), tl.minimum(z[k], LARGEST)),)
                z = ordered
            best = largest_of_row(z, BLOCKS)
            where = tl.full((COLUMNS, LANES), C, tl.int32)
            for k in tl.static_range(BLOCKS):
                c = classes_of_block(first + k * DEPTH * LANES, DEPTH, LANES)
                where = tl.minimum(where, tl.min(tl.where(z[k] == best[None, :, None], c, C), 0))
            label = tl.min(where, 1)
            if MANY:
                before = tl.load(best_ptr + pixel, mask=valid & (group > 0), other=float("-inf"))
                other = tl.load(labels_ptr + pixel, mask=valid & (group > 0), other=0).to(tl.int32)
                label = tl.where((best > before) | (group == 0), label, other)
                tl.store(best_ptr + pixel, tl.maximum(best, before), mask=valid)
            tl.store(labels_ptr + pixel, label.to(tl.int64), mask=valid)
            if target_ptr is not None:
                target = tl.load(target_ptr + pixel, mask=valid & (group == groups - 1), other=-1)
                counted = (target >= 0) & (target < C)
                pair = tl.where(counted, target.to(tl.int32) * C + label, -1)
                over = (pair != latest) & (latest >= 0)
                tl.atomic_add(confusion_ptr + latest, times.to(tl.int64), mask=over, sem="relaxed")
                times = tl.where(pair != latest, 1, times + 1)
                latest = pair
        if MANY:
            tl.debug_barrier()  # other threads read what these wrote
    if target_ptr is not None:
        tl.atomic_add(confusion_ptr + latest, times.to(tl.int64), mask=latest >= 0, sem="relaxed")
