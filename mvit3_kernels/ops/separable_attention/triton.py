"""Triton kernels of separable_attention without keys (identity D).

The context is linear in the normalised tokens, so their mean under the softmax of the scores goes through W_k once for each group, the
tokens of a sample that share their position inside a patch, and two products remain for each token, W_v and W_o. Forward reads x for the
scores and that mean, and once more for the values; of samples, a first time for their statistics. A group's tokens may be cut over several
programs, which a batch of one needs: each leaves its largest score, its sums relative to that and its sum of tokens, and the kernel of the
contexts joins them in a fixed order.

Backward has the same shape. It writes what the out-projection saw and the gradient of the values, for the products that follow, as
feed_forward's does; and the gradient of each context, in parts of a group. From there on a token's score and its share of the mean are
terms of the gradient of x, which its kernel adds to its product. What softmax's backward subtracts is the product of a context and its
gradient, since the context is linear in the weights too: it costs no pass. Launches: 3 forward and 8 backward, for a norm of samples 4
and 9.

The normalised tokens are rounded as the reference rounds them, scale and shift applied, before the product of the values: where a value
changes its sign in front of ReLU it does so in both. (The norm folded into the weight, identity C, would round other numbers.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..triton_common import (
    RELU,
    activate,
    activate_backward,
    dot,
    dropout_kept,
    dropout_key,
    dropout_threshold,
    dropped,
    multiprocessors,
    on_device,
    pixel_of_token,
    split_rows,
    token_of_pixel,
)
from ..triton_rows import (
    NOT_SPECIALIZED,
    Rows,
    add_up_outputs,
    load_row_statistics,
    load_sample_statistics,
    load_tile,
    load_vector,
    load_weight,
    multiply_rows,
    normalise_rows,
    row_statistics,
    store_norm_gradient,
    store_tile,
)

_NOT_SPECIALIZED = [
    *NOT_SPECIALIZED, "width", "tokens", "groups", "groups_per_block", "splits", "tokens_per_split", "key_parts", "context_parts",
    "score_keep", "score_scale", "output_keep", "output_scale",
]  # fmt: skip

GROUPS = 16  # that a program of the contexts takes: the rows of a product
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # finite, so that the distance of two of them is a number


def configurations(rows: Rows) -> list[dict[str, int]]:
    """Of the kernels with products: BLOCK_M rows of a program, the blocks of BLOCK_F values that it walks over. The first is shipped."""
    if rows.x.dtype is torch.float32:
        return [{"BLOCK_M": 16, "BLOCK_F": 16, "num_warps": 8, "num_stages": 2}]
    shipped = {"BLOCK_M": rows.block(), "BLOCK_F": 32 if rows.block() == 64 else 16, "num_warps": 8, "num_stages": 1}
    others = ({"num_stages": 2}, {"num_warps": 4}, {"BLOCK_M": 32, "BLOCK_F": 32, "num_warps": 4}, {"BLOCK_M": 16, "num_warps": 4})
    return [shipped, *(shipped | other for other in others)]


def configuration(kernel: str, rows: Rows) -> dict[str, int]:
    return tuning.choose(f"separable_attention_{kernel}", rows.x, (rows.channels,), lambda: configurations(rows))


def input_configuration(rows: Rows) -> dict[str, int]:
    """Of the kernel of the gradient of x, which holds a row three times: rows, the blocks of values that it walks over."""
    config = configurations(rows)[0]
    return config | {"BLOCK_M": min(config["BLOCK_M"], 32 if rows.width() <= 256 else 16)} if rows.width() > 192 else config


def pool_configuration(rows: Rows) -> dict[str, int]:
    """Of the kernel of the scores: BLOCK_M tokens at a time, whose sums stay apart, in registers, until the end."""
    block = min(max(4096 // triton.next_power_of_2(rows.width()), 8), 32)
    return {"BLOCK_M": block, "num_warps": 4 if block > 8 else 8, "num_stages": 2}


def bytes_moved(x: Tensor, training: bool, per_sample: bool = True) -> tuple[int, int]:
    """Bytes of full-size tensors that the forward and the backward pass read and write: x twice and y, and in training the scores, written,
    read and written; backward x, dy and what both products saw (two written, three read), x twice more, dx, and dy twice more. Of samples,
    x once more forward, and backward x once more and dx twice."""
    size = x.numel() * x.element_size()
    scores = 4 * x.numel() // max(x.shape[-1], 1)
    return size * (4 if per_sample else 3) + (3 * scores if training else 0), size * (15 if per_sample else 12) + 3 * scores


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _pool_fwd_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, qkv_bias_ptr, part_mean_ptr, part_spread_ptr, mean_ptr, rstd_ptr, scores_ptr,
    softmax_ptr, pooled_ptr, seed_ptr, groups, tokens, width, rows_per_sample, rows_per_part, parts, splits, tokens_per_split, eps,
    score_keep, score_scale,
    PER_SAMPLE: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Scores of some tokens of a group, (largest, sum of exponentials, those that dropout keeps) as (3, splits, groups), and the sums of
    the normalised tokens under them, (splits, groups, C)."""
    POSITIONS: tl.constexpr = PATCH_H * PATCH_W
    head_column, tail_column, lane = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL), tl.arange(0, BLOCK_M)
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # the statistics ended with the last samples: those are in cache
    group, split = program // splits, program % splits
    sample, position = group // POSITIONS, group % POSITIONS
    start = sample.to(tl.int64) * rows_per_sample
    x_ptr += start * C
    if PER_SAMPLE:
        mean, rstd = load_sample_statistics(part_mean_ptr, part_spread_ptr, sample, rows_per_sample, rows_per_part, parts, eps, C)
        if position == 0 and split == 0:
            tl.store(mean_ptr + sample, mean)
            tl.store(rstd_ptr + sample, rstd)
    if seed_ptr is not None:
        mask_key = dropout_key(seed_ptr, sample, 0)
    head_weight, tail_weight = load_vector(qkv_weight_ptr, head_column, C), load_vector(qkv_weight_ptr, tail_column, C)
    shift = tl.sum(head_weight * load_vector(norm_bias_ptr, head_column, C))
    shift += tl.sum(tail_weight * load_vector(norm_bias_ptr, tail_column, C))
    if qkv_bias_ptr is not None:
        shift += tl.load(qkv_bias_ptr).to(tl.float32)
    head_weight *= load_vector(norm_weight_ptr, head_column, C)
    tail_weight *= load_vector(norm_weight_ptr, tail_column, C)

    # Each lane has a softmax of its own: nothing crosses lanes before the end.
    largest = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    kept = tl.zeros((BLOCK_M,), tl.float32)
    head = tl.zeros((BLOCK_M, HEAD), tl.float32)
    tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, tokens)
    for first in range(begin, end, BLOCK_M):
        token = first + lane
        valid = token < end
        pixel = pixel_of_token(token, position, width, PATCH_H, PATCH_W)
        head_normal = load_tile(x_ptr, pixel, valid, head_column, C, C).to(tl.float32)
        tail_normal = load_tile(x_ptr, pixel, valid, tail_column, C, C).to(tl.float32)
        if PER_SAMPLE:
            head_normal = (head_normal - mean) * rstd
            tail_normal = (tail_normal - mean) * rstd
        else:
            row_mean, row_rstd = row_statistics(head_normal, tail_normal, head_column, tail_column, eps, C)
            row_rstd = tl.where(valid, row_rstd, 0.0)
            tl.store(mean_ptr + start + pixel, row_mean, mask=valid)
            tl.store(rstd_ptr + start + pixel, row_rstd, mask=valid)
            head_normal = (head_normal - row_mean[:, None]) * row_rstd[:, None]
            tail_normal = (tail_normal - row_mean[:, None]) * row_rstd[:, None]
        score = tl.sum(head_normal * head_weight[None, :], 1) + tl.sum(tail_normal * tail_weight[None, :], 1) + shift
        score = tl.where(valid, score, LOWEST)
        if scores_ptr is not None:
            tl.store(scores_ptr + start + position * tokens + token, score, mask=valid)
        new_largest = tl.maximum(largest, score)
        shrink = tl.exp(largest - new_largest)
        weight = tl.where(valid, tl.exp(score - new_largest), 0.0)
        largest = new_largest
        total = total * shrink + weight
        if seed_ptr is not None:
            weight *= tl.where(dropout_kept(mask_key, position * tokens + token, score_keep), score_scale, 0.0)
            kept = kept * shrink + weight
        head = head * shrink[:, None] + weight[:, None] * head_normal
        tail = tail * shrink[:, None] + weight[:, None] * tail_normal

    top = tl.max(largest, 0)
    shrink = tl.exp(largest - top)
    at, stride = split * groups.to(tl.int64) + group, splits * groups.to(tl.int64)
    tl.store(softmax_ptr + at, top)
    tl.store(softmax_ptr + stride + at, tl.sum(total * shrink, 0))
    tl.store(softmax_ptr + 2 * stride + at, tl.sum(kept * shrink, 0))
    pooled_ptr += at * C
    tl.store(pooled_ptr + head_column, tl.sum(head * shrink[:, None], 0), mask=head_column < C)
    tl.store(pooled_ptr + tail_column, tl.sum(tail * shrink[:, None], 0), mask=tail_column < C)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _context_fwd_kernel(
    softmax_ptr, part_ptr, norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, qkv_bias_ptr, scores_ptr, pooled_ptr, context_ptr, seed_ptr,
    groups, tokens, splits,
    LANES: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Joins the parts of some groups: BLOCK_N values of the context, and the scores' softmax and the weighted mean where they are kept."""
    group = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid, row = group < groups, group.to(tl.int64)
    largest = tl.full((BLOCK_M,), LOWEST, tl.float32)
    for split in range(splits):
        largest = tl.maximum(largest, tl.load(softmax_ptr + split * groups + group, mask=valid, other=LOWEST))
    total = tl.zeros((BLOCK_M,), tl.float32)
    kept = tl.zeros((BLOCK_M,), tl.float32)
    for split in range(splits):
        at, stride = softmax_ptr + split * groups + group, splits * groups.to(tl.int64)
        grow = tl.exp(tl.load(at, mask=valid, other=LOWEST) - largest)
        total += grow * tl.load(at + stride, mask=valid, other=1.0)
        kept += grow * tl.load(at + 2 * stride, mask=valid, other=0.0)
    scale = 1 / total
    # The sum of the weights is 1 but for dropout.
    kept = kept * scale if seed_ptr is not None else tl.full((BLOCK_M,), 1.0, tl.float32)

    # W_k (weighted mean of scale * normalised + shift) + (sum of the weights) b_k
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    context = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, C, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        pooled = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for split in range(splits):
            grow = tl.exp(tl.load(softmax_ptr + split * groups + group, mask=valid, other=LOWEST) - largest)
            pooled += grow[:, None] * load_tile(part_ptr, row + split * groups.to(tl.int64), valid, column, C, C)
        pooled *= scale[:, None]
        if pooled_ptr is not None and tl.program_id(1) == 0:
            store_tile(pooled_ptr, row, valid, column, pooled, LANES, LANES)
        pooled = pooled * load_vector(norm_weight_ptr, column, C)[None, :] + kept[:, None] * load_vector(norm_bias_ptr, column, C)[None, :]
        weight = load_tile(qkv_weight_ptr + C, output, output < C, column, C, C).to(tl.float32)
        context = dot(pooled, tl.trans(weight), context)
    if qkv_bias_ptr is not None:
        context += kept[:, None] * load_vector(qkv_bias_ptr + 1, output, C)[None, :]
    store_tile(context_ptr, row, valid, output, context, LANES, LANES)
    if pooled_ptr is not None:
        for first in range(tl.program_id(1) * 64, tokens, tl.num_programs(1) * 64):
            token = first + tl.arange(0, 64)
            mask = valid[:, None] & (token < tokens)[None, :]
            scores = scores_ptr + row[:, None] * tokens + token[None, :]
            tl.store(scores, tl.exp(tl.load(scores, mask=mask, other=0.0) - largest[:, None]) * scale[:, None], mask=mask)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _attend_fwd_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, qkv_bias_ptr, out_weight_ptr, out_bias_ptr, mean_ptr, rstd_ptr, context_ptr,
    y_ptr, seed_ptr, rows, rows_per_sample, width, output_keep, output_scale,
    PER_SAMPLE: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, LANES: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """x + W_o (ReLU(values) * context) + b_o for some rows."""
    head_column, tail_column, lane = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL), tl.arange(0, BLOCK_M)
    row = tl.program_id(0) * BLOCK_M + lane
    start, valid = tl.program_id(0).to(tl.int64) * BLOCK_M, row < rows
    x_ptr += start * C
    head_normed, tail_normed = normalise_rows(
        x_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, lane, row, valid, rows_per_sample, 0.0, False, PER_SAMPLE, C, HEAD, TAIL
    )
    position, _ = token_of_pixel(row % rows_per_sample, width, PATCH_H, PATCH_W)
    group = (row // rows_per_sample).to(tl.int64) * (PATCH_H * PATCH_W) + position
    qkv_weight_ptr += (1 + C) * C
    if qkv_bias_ptr is not None:
        qkv_bias_ptr += 1 + C
    head = tl.zeros((BLOCK_M, HEAD), tl.float32)
    tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    for first in range(0, C, BLOCK_F):
        column = first + tl.arange(0, BLOCK_F)
        head_weight, tail_weight = load_weight(qkv_weight_ptr, column, head_normed, C, C, HEAD, TAIL)
        values = multiply_rows(head_normed, tail_normed, head_weight, tail_weight) + load_vector(qkv_bias_ptr, column, C)[None, :]
        attended = activate(values, RELU) * load_tile(context_ptr, group, valid, column, LANES, C)
        attended = attended.to(head_normed.dtype)
        weight = load_tile(out_weight_ptr, head_column, head_column < C, column, C, C).to(attended.dtype)
        head = dot(attended, tl.trans(weight), head)
        weight = load_tile(out_weight_ptr, tail_column, tail_column < C, column, C, C).to(attended.dtype)
        tail = dot(attended, tl.trans(weight), tail)
    head += load_vector(out_bias_ptr, head_column, C)[None, :]
    tail += load_vector(out_bias_ptr, tail_column, C)[None, :]
    if seed_ptr is not None:
        head = dropped(head, seed_ptr, row, head_column, rows_per_sample, output_keep, output_scale, 1, C)
        tail = dropped(tail, seed_ptr, row, tail_column, rows_per_sample, output_keep, output_scale, 1, C)
    head += load_tile(x_ptr, lane, valid, head_column, C, C).to(tl.float32)
    tail += load_tile(x_ptr, lane, valid, tail_column, C, C).to(tl.float32)
    store_tile(y_ptr + start * C, lane, valid, head_column, head, C, C)
    store_tile(y_ptr + start * C, lane, valid, tail_column, tail, C, C)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _values_bwd_kernel(
    dy_ptr, x_ptr, norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, qkv_bias_ptr, out_weight_ptr, mean_ptr, rstd_ptr, context_ptr,
    attended_ptr, dvalues_ptr, dcontext_ptr, seed_ptr, groups, tokens, width, rows_per_sample, splits, groups_per_block,
    output_keep, output_scale,
    PER_SAMPLE: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, LANES: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """What the out-projection saw, the gradient of the values, and that of the contexts, (splits, groups, C). A program owns a part of a
    group or, where they are small, `groups_per_block` whole groups: so what it adds up is its own."""
    POSITIONS: tl.constexpr = PATCH_H * PATCH_W
    head_column, tail_column, lane = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL), tl.arange(0, BLOCK_M)
    split = tl.program_id(0) % splits
    mine = lane // tokens  # of the groups of this block
    first_group = tl.program_id(0) // splits * groups_per_block
    group, token = first_group + mine, split * BLOCK_M + lane % tokens
    valid = (mine < groups_per_block) & (group < groups) & (token < tokens)
    row = group // POSITIONS * rows_per_sample + pixel_of_token(token, group % POSITIONS, width, PATCH_H, PATCH_W)
    row = tl.where(valid, row, 0)
    at = row.to(tl.int64)
    head, tail = normalise_rows(
        x_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, at, row, valid, rows_per_sample, 0.0, False, PER_SAMPLE, C, HEAD, TAIL
    )
    head_dy = load_tile(dy_ptr, at, valid, head_column, C, C)
    tail_dy = load_tile(dy_ptr, at, valid, tail_column, C, C)
    if seed_ptr is not None:
        grad = dropped(head_dy.to(tl.float32), seed_ptr, row, head_column, rows_per_sample, output_keep, output_scale, 1, C)
        head_dy = grad.to(head_dy.dtype)
        grad = dropped(tail_dy.to(tl.float32), seed_ptr, row, tail_column, rows_per_sample, output_keep, output_scale, 1, C)
        tail_dy = grad.to(tail_dy.dtype)
    qkv_weight_ptr += (1 + C) * C
    if qkv_bias_ptr is not None:
        qkv_bias_ptr += 1 + C
    context_row = group.to(tl.int64)
    for first in range(0, C, BLOCK_F):
        column = first + tl.arange(0, BLOCK_F)
        head_weight, tail_weight = load_weight(qkv_weight_ptr, column, head, C, C, HEAD, TAIL)
        values = multiply_rows(head, tail, head_weight, tail_weight) + load_vector(qkv_bias_ptr, column, C)[None, :]
        dattended = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
        dattended = dot(head_dy, load_tile(out_weight_ptr, head_column, head_column < C, column, C, C).to(head_dy.dtype), dattended)
        dattended = dot(tail_dy, load_tile(out_weight_ptr, tail_column, tail_column < C, column, C, C).to(head_dy.dtype), dattended)
        context = load_tile(context_ptr, context_row, valid, column, LANES, C)
        active = activate(values, RELU)
        store_tile(attended_ptr, at, valid, column, active * context, C, C)
        store_tile(dvalues_ptr, at, valid, column, activate_backward(dattended * context, values, RELU), C, C)
        dattended *= active
        for i in range(groups_per_block):
            total = tl.sum(tl.where((valid & (mine == i))[:, None], dattended, 0.0), 0)
            out = dcontext_ptr + (split * groups + first_group + i).to(tl.int64) * C
            tl.store(out + column, total, mask=(column < C) & (first_group + i < groups))


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _context_bwd_kernel(
    part_ptr, context_ptr, scores_ptr, qkv_weight_ptr, qkv_bias_ptr, seed_ptr, dcontext_ptr, dpooled_ptr, slope_ptr, dtotal_ptr, dbias_ptr,
    groups, tokens, splits, score_keep, score_scale,
    POSITIONS: tl.constexpr, LANES: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From the gradient of some contexts, of which it joins the parts: BLOCK_N values of that of the weighted mean (scale and shift
    applied), what softmax's backward subtracts, the gradient of the sum of the weights, and a part of that of the bias of the keys."""
    group = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid, row = group < groups, group.to(tl.int64)
    kept = tl.where(valid, 1.0, 0.0)
    if seed_ptr is not None and tl.program_id(1) == 0:
        key = dropout_key(seed_ptr, group // POSITIONS, 0)
        sums = tl.zeros((BLOCK_M, 64), tl.float32)
        for first in range(0, tokens, 64):
            token = first + tl.arange(0, 64)
            mask = valid[:, None] & (token < tokens)[None, :]
            element = (group % POSITIONS)[:, None] * tokens + token[None, :]
            scores = tl.load(scores_ptr + row[:, None] * tokens + token[None, :], mask=mask, other=0.0)
            sums += scores * tl.where(dropout_kept(key[:, None], element, score_keep), score_scale, 0.0)
        kept = tl.sum(sums, 1)

    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dpooled = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    slope = tl.zeros((BLOCK_M,), tl.float32)
    dtotal = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, C, BLOCK_K):
        output = first + tl.arange(0, BLOCK_K)
        grad = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for split in range(splits):
            grad += load_tile(part_ptr, row + split * groups.to(tl.int64), valid, output, C, C)
        dpooled = dot(grad, load_tile(qkv_weight_ptr + C, output, output < C, column, C, C).to(tl.float32), dpooled)
        if tl.program_id(1) == 0:
            store_tile(dcontext_ptr, row, valid, output, grad, C, C)
            tl.store(dbias_ptr + tl.program_id(0).to(tl.int64) * C + output, tl.sum(grad * kept[:, None], 0), mask=output < C)
            slope += tl.sum(grad * load_tile(context_ptr, row, valid, output, LANES, C), 1)
            if qkv_bias_ptr is not None:
                dtotal += tl.sum(grad * load_vector(qkv_bias_ptr + 1, output, C)[None, :], 1)
    store_tile(dpooled_ptr, row, valid, column, dpooled, C, C)
    if tl.program_id(1) == 0:
        tl.store(slope_ptr + group, slope, mask=valid)
        tl.store(dtotal_ptr + group, dtotal, mask=valid)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _input_bwd_kernel(
    dvalues_ptr, x_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, mean_ptr, rstd_ptr, scores_ptr, dpooled_ptr,
    slope_ptr, dtotal_ptr, seed_ptr, dx_ptr, sums_ptr, dscores_ptr, rows, rows_per_sample, width, tokens, score_keep, score_scale,
    PER_SAMPLE: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The gradient of x: through the values, the scores and the weighted mean, and the norm; and the gradient of the scores."""
    head_column, tail_column, lane = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL), tl.arange(0, BLOCK_M)
    row = tl.program_id(0) * BLOCK_M + lane
    start, valid = tl.program_id(0).to(tl.int64) * BLOCK_M, row < rows
    head = tl.zeros((BLOCK_M, HEAD), tl.float32)
    tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    for first in range(0, C, BLOCK_F):
        column = first + tl.arange(0, BLOCK_F)
        dvalues = load_tile(dvalues_ptr + start * C, lane, valid, column, C, C)
        head_weight, tail_weight = load_weight(qkv_weight_ptr + (1 + C) * C, column, dvalues, C, C, HEAD, TAIL)
        head = dot(dvalues, head_weight, head)
        tail = dot(dvalues, tail_weight, tail)

    mean, rstd = load_row_statistics(mean_ptr, rstd_ptr, row, valid, rows_per_sample, PER_SAMPLE)
    head_normal = (load_tile(x_ptr + start * C, lane, valid, head_column, C, C).to(tl.float32) - mean) * rstd
    tail_normal = (load_tile(x_ptr + start * C, lane, valid, tail_column, C, C).to(tl.float32) - mean) * rstd
    head_scale, tail_scale = load_vector(norm_weight_ptr, head_column, C), load_vector(norm_weight_ptr, tail_column, C)
    sample = row // rows_per_sample
    position, token = token_of_pixel(row % rows_per_sample, width, PATCH_H, PATCH_W)
    group = sample.to(tl.int64) * (PATCH_H * PATCH_W) + position
    score = tl.load(scores_ptr + group * tokens + token, mask=valid, other=0.0)
    kept = tl.where(valid, 1.0, 0.0)
    if seed_ptr is not None:
        key = dropout_key(seed_ptr, sample, 0)
        kept = tl.where(dropout_kept(key, position * tokens + token, score_keep), score_scale, 0.0)
    head_pooled = load_tile(dpooled_ptr, group, valid, head_column, C, C)
    tail_pooled = load_tile(dpooled_ptr, group, valid, tail_column, C, C)
    normed = head_normal * head_scale[None, :] + load_vector(norm_bias_ptr, head_column, C)[None, :]
    dscore = tl.sum(normed * head_pooled, 1)
    normed = tail_normal * tail_scale[None, :] + load_vector(norm_bias_ptr, tail_column, C)[None, :]
    dscore += tl.sum(normed * tail_pooled, 1) + tl.load(dtotal_ptr + group, mask=valid, other=0.0)
    dscore = score * (dscore * kept - tl.load(slope_ptr + group, mask=valid, other=0.0))
    tl.store(dscores_ptr + row, dscore, mask=valid)
    kept *= score
    head += kept[:, None] * head_pooled + dscore[:, None] * load_vector(qkv_weight_ptr, head_column, C)[None, :]
    tail += kept[:, None] * tail_pooled + dscore[:, None] * load_vector(qkv_weight_ptr, tail_column, C)[None, :]
    head *= head_scale[None, :]
    tail *= tail_scale[None, :]
    store_norm_gradient(
        dx_ptr + start * C, sums_ptr, residual_ptr + start * C, lane, row, valid, head_column, tail_column, head, tail, head_normal,
        tail_normal, rstd, rows, PER_SAMPLE, C,
    )  # fmt: skip


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _parameters_bwd_kernel(
    value_ptr, value_sums_ptr, key_ptr, key_sums_ptr, norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, dnorm_weight_ptr, dnorm_bias_ptr,
    dqkv_weight_ptr, dqkv_bias_ptr, parts, key_parts, context_parts,
    LANES: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of the gradients of score (the last output beside those of the values), keys and values."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale, shift = load_vector(norm_weight_ptr, column, C), load_vector(norm_bias_ptr, column, C)
    nothing = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    dscale, dshift = add_up_outputs(
        nothing, nothing, value_ptr + C * C, parts, value_sums_ptr + C, parts, qkv_weight_ptr, dqkv_weight_ptr, dqkv_bias_ptr, column,
        scale, shift, 0, 1, 1 + C, C, 1 + C, C, BLOCK_C, BLOCK_O,
    )  # fmt: skip
    dscale, dshift = add_up_outputs(
        dscale, dshift, key_ptr, key_parts, key_sums_ptr, context_parts, qkv_weight_ptr, dqkv_weight_ptr, dqkv_bias_ptr, column,
        scale, shift, 1, C, C, LANES, C, C, BLOCK_C, BLOCK_O,
    )  # fmt: skip
    dscale, dshift = add_up_outputs(
        dscale, dshift, value_ptr, parts, value_sums_ptr, parts, qkv_weight_ptr, dqkv_weight_ptr, dqkv_bias_ptr, column,
        scale, shift, 1 + C, C, 1 + C, C, 1 + C, C, BLOCK_C, BLOCK_O,
    )  # fmt: skip
    valid = column < C
    tl.store(dnorm_weight_ptr + column, tl.sum(dscale, 0).to(dnorm_weight_ptr.dtype.element_ty), mask=valid)
    tl.store(dnorm_bias_ptr + column, tl.sum(dshift, 0).to(dnorm_bias_ptr.dtype.element_ty), mask=valid)


class _Groups(NamedTuple):
    """The groups of a map, for the launchers."""

    rows: Rows
    count: int
    tokens: int  # of a group
    width: int
    positions: int
    lanes: int  # of a kept context
    patch: dict[str, int]

    @staticmethod
    def of(x: Tensor, patch_height: int, patch_width: int) -> _Groups:
        batch, height, width, channels = x.shape
        positions = patch_height * patch_width
        patch = {"PATCH_H": patch_height, "PATCH_W": patch_width}
        return _Groups(Rows.of(x), batch * positions, height * width // positions, width, positions, -(-channels // 16) * 16, patch)

    def blocks(self) -> int:
        """Programs along the groups of the kernels of the contexts."""
        return triton.cdiv(self.count, GROUPS)

    def context_flags(self, columns: int) -> tuple[tuple[int, int], dict[str, int]]:
        """Grid and flags of a kernel of the contexts, where `columns` are cut into blocks."""
        flags = {
            "LANES": self.lanes,
            "C": self.rows.channels,
            "BLOCK_M": GROUPS,
            "BLOCK_N": 32,
            "BLOCK_K": 32,
            "num_warps": 4,
            "num_stages": 2,
        }
        return (self.blocks(), triton.cdiv(columns, flags["BLOCK_N"])), flags


def _contiguous(*parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in parameters)


def _dropouts(score: float, output: float, seed: Tensor | None) -> tuple[tuple[Tensor | None, tuple], tuple[Tensor | None, tuple]]:
    """Of the dropout of the scores and of the output: the seed, None where it is off, and (threshold, scale)."""
    return tuple((seed if p > 0 else None, (dropout_threshold(p), 1 / (1 - p))) for p in (score, output))


def _forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, per_sample: bool, qkv_weight: Tensor, qkv_bias: Tensor | None,
    out_weight: Tensor, out_bias: Tensor | None, patch_height: int, patch_width: int, score_dropout: float, output_dropout: float,
    seed: Tensor | None, training: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    groups = _Groups.of(x, patch_height, patch_width)
    rows = groups.rows
    y = torch.empty_like(rows.x)

    def float32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    mean, rstd = (float32(x.shape[0] if per_sample else rows.rows) for _ in range(2))
    scores, pooled = (float32(x.shape[0], groups.positions, n) if training else None for n in (groups.tokens, groups.lanes))
    context = float32(x.shape[0], groups.positions, groups.lanes)
    if not y.numel():
        return y, mean, rstd, scores, pooled, context
    norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias = _contiguous(
        norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias
    )
    (score_seed, score_keep), (output_seed, output_keep) = _dropouts(score_dropout, output_dropout, seed)
    pool, config = pool_configuration(rows), configuration("fwd", rows)
    splits, per_split = split_rows(groups.tokens, 4 * multiprocessors(x) // groups.count, pool["BLOCK_M"])
    part_mean, part_spread, rows_per_part, parts = rows.partial_statistics() if per_sample else (None, None, 0, 0)
    softmax, sums = float32(3, splits, groups.count), float32(splits, groups.count, rows.channels)
    with on_device(x):
        _pool_fwd_kernel[(groups.count * splits,)](
            rows.x, norm_weight, norm_bias, qkv_weight, qkv_bias, part_mean, part_spread, mean, rstd, scores, softmax, sums, score_seed,
            groups.count, groups.tokens, groups.width, rows.rows_per_sample, rows_per_part, parts, splits, per_split, eps, *score_keep,
            PER_SAMPLE=per_sample, **groups.patch, **rows.tiles, **pool,
        )  # fmt: skip
        grid, flags = groups.context_flags(groups.lanes)
        _context_fwd_kernel[grid](
            softmax, sums, norm_weight, norm_bias, qkv_weight, qkv_bias, scores, pooled, context, score_seed, groups.count, groups.tokens,
            splits, **flags,
        )  # fmt: skip
        _attend_fwd_kernel[(triton.cdiv(rows.rows, config["BLOCK_M"]),)](
            rows.x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias, mean, rstd, context, y, output_seed, rows.rows,
            rows.rows_per_sample, groups.width, *output_keep,
            PER_SAMPLE=per_sample, LANES=groups.lanes, **groups.patch, **rows.tiles, **config,
        )  # fmt: skip
    return y, mean, rstd, scores, pooled, context


def separable_attention_inference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, per_sample: bool, qkv_weight: Tensor, qkv_bias: Tensor | None,
    out_weight: Tensor, out_bias: Tensor | None, patch_height: int, patch_width: int,
) -> Tensor:  # fmt: skip
    """Launches the forward pass where no backward pass follows."""
    parameters = (norm_weight, norm_bias, eps, per_sample, qkv_weight, qkv_bias, out_weight, out_bias)
    return _forward(x, *parameters, patch_height, patch_width, 0.0, 0.0, None, training=False)[0]


def separable_attention_training(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, per_sample: bool, qkv_weight: Tensor, qkv_bias: Tensor | None,
    out_weight: Tensor, out_bias: Tensor | None, patch_height: int, patch_width: int, score_dropout: float, output_dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Launches the forward pass: y; mean and 1 / deviation of each token or sample; the softmax of the scores, (B, positions, tokens); and
    of each group the weighted mean of the normalised tokens, without scale and shift, and the context, (B, positions, lanes)."""
    parameters = (norm_weight, norm_bias, eps, per_sample, qkv_weight, qkv_bias, out_weight, out_bias)
    return _forward(x, *parameters, patch_height, patch_width, score_dropout, output_dropout, seed, training=True)


def separable_attention_backward(
    dy: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, per_sample: bool, qkv_weight: Tensor, qkv_bias: Tensor | None,
    out_weight: Tensor, out_bias: Tensor | None, mean: Tensor, rstd: Tensor, scores: Tensor, pooled: Tensor, context: Tensor,
    patch_height: int, patch_width: int, score_dropout: float, output_dropout: float, seed: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Launches the backward pass: the gradients of x, norm weight and bias, qkv weight and bias, out_proj weight and bias (empty without a
    bias)."""
    groups = _Groups.of(x, patch_height, patch_width)
    rows, channels = groups.rows, groups.rows.channels
    dy, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias, mean, rstd, scores, pooled, context = _contiguous(
        dy, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias, mean, rstd, scores, pooled, context
    )
    dx = torch.empty_like(rows.x)
    gradients = [None if t is None else torch.empty_like(t) for t in (norm_weight, norm_bias, qkv_weight, qkv_bias)]
    if not dx.numel():
        gradients += [None if t is None else torch.empty_like(t) for t in (out_weight, out_bias)]
        return dx, *(x.new_empty(0) if t is None else t.zero_() for t in gradients)
    (score_seed, score_keep), (output_seed, output_keep) = _dropouts(score_dropout, output_dropout, seed)
    config = configuration("bwd", rows)
    block, seen = config["BLOCK_M"], {"PER_SAMPLE": per_sample, **groups.patch, **rows.tiles}
    splits, per_block = triton.cdiv(groups.tokens, block), max(block // groups.tokens, 1)

    def float32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    attended, dvalues = (x.new_empty(rows.rows, channels) for _ in range(2))
    parts, dbias = float32(splits, groups.count, channels), float32(groups.blocks(), channels)
    dcontext, dpooled = (float32(groups.count, channels) for _ in range(2))
    slope, dtotal = (float32(groups.count) for _ in range(2))
    dscores, sums = float32(rows.rows), float32(2, rows.rows) if per_sample else None
    with on_device(x):
        _values_bwd_kernel[(triton.cdiv(groups.count, per_block) * splits,)](
            dy, rows.x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, mean, rstd, context, attended, dvalues, parts,
            output_seed, groups.count, groups.tokens, groups.width, rows.rows_per_sample, splits, per_block, *output_keep,
            LANES=groups.lanes, **seen, **config,
        )  # fmt: skip
        grid, flags = groups.context_flags(channels)
        _context_bwd_kernel[grid](
            parts, context, scores, qkv_weight, qkv_bias, score_seed, dcontext, dpooled, slope, dtotal, dbias, groups.count,
            groups.tokens, splits, *score_keep, POSITIONS=groups.positions, **flags,
        )  # fmt: skip
        config = input_configuration(rows)
        _input_bwd_kernel[(triton.cdiv(rows.rows, config["BLOCK_M"]),)](
            dvalues, rows.x, dy, norm_weight, norm_bias, qkv_weight, mean, rstd, scores, dpooled, slope, dtotal, score_seed, dx, sums,
            dscores, rows.rows, rows.rows_per_sample, groups.width, groups.tokens, *score_keep, **seen, **config,
        )  # fmt: skip
        if per_sample:
            rows.finish_input_gradient(dx, dy, mean, rstd, sums)
        value, value_sums = rows.products(dvalues, channels, mean, rstd, per_sample, extra=dscores)
        key, _ = Rows.of(pooled[:, :, None]).products(dcontext, channels, None, None, per_sample)
        dnorm_weight, dnorm_bias, dqkv_weight, dqkv_bias = gradients
        _parameters_bwd_kernel[(triton.cdiv(channels, 16),)](
            value, value_sums, key, dbias, norm_weight, norm_bias, qkv_weight, dnorm_weight, dnorm_bias, dqkv_weight, dqkv_bias,
            len(value), len(key), len(dbias), LANES=groups.lanes, C=channels, BLOCK_C=16, BLOCK_O=64, num_warps=4,
        )  # fmt: skip
    dout = rows.second_weight_backward(dy, attended, out_weight, out_bias, per_sample, output_dropout, seed)
    return dx, *(x.new_empty(0) if t is None else t for t in gradients), *dout
