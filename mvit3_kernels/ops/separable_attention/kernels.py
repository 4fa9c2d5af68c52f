"""Triton kernels of separable_attention, forward; triton.py launches them and says how they work together.

A group is the tokens of a sample that share their position inside a patch: `groups` in all, of `tokens` each. n are the
normalised tokens (x - mean) * rstd, and norm(x) = n * norm_weight + norm_bias. The weight of the first linear map, qkv,
has 1 + 2 C outputs: a score, the keys (W_k, b_k) and the values (W_v, b_v). Each group has weights

    w = dropout(p),  p = softmax over the group's tokens of the scores

and, as the keys are linear in the tokens, with the pooled token t = sum(w * n) its context is

    context = W_k (t * norm_weight + sum(w) * norm_bias) + sum(w) * b_k
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import triton_row_kernels
from ..triton_common import (
    RELU,
    activate,
    dot,
    dropout_kept,
    dropout_key,
    load_tile,
    load_vector,
    pixel_of_token,
    store_tile,
    store_vector,
)
from ..triton_launch import jit_kernel
from ..triton_row_kernels import (
    add_columns_product,
    drop_rows,
    load_row_vector,
    load_rows_in_float32,
    load_sample_statistics,
    load_weight,
    multiply_rows,
    normalise_rows,
    row_columns,
    row_statistics,
    store_moments_of_rows,
    store_rows,
)

NOT_SPECIALIZED = [
    *triton_row_kernels.NOT_SPECIALIZED, "width", "tokens", "groups", "groups_per_block", "splits", "tokens_per_split",
    "key_parts", "context_parts", "sums_parts", "first_sum", "score_keep", "score_scale", "output_keep", "output_scale",
]  # fmt: skip

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # finite, so that the distance of two of them is a number


@triton.jit
def _load_score_weights(
    norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, qkv_bias_ptr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Two rows and a number with which the score of a token is their product with n plus the number: the norm's
    parameters folded into the first output of qkv."""
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    head, tail = load_vector(qkv_weight_ptr, head_column, WIDTH=C), load_vector(qkv_weight_ptr, tail_column, WIDTH=C)
    bias = tl.sum(head * load_vector(norm_bias_ptr, head_column, WIDTH=C))
    bias += tl.sum(tail * load_vector(norm_bias_ptr, tail_column, WIDTH=C))
    if qkv_bias_ptr is not None:
        bias += tl.load(qkv_bias_ptr).to(tl.float32)
    head *= load_vector(norm_weight_ptr, head_column, WIDTH=C)
    tail *= load_vector(norm_weight_ptr, tail_column, WIDTH=C)
    return head[None, :], tail[None, :], bias


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def pool_fwd_kernel(
    x_ptr,  # (B, H, W, C)
    norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, qkv_bias_ptr,  # (C,), (C,), (1 + 2 C, C), (1 + 2 C,) or None
    moments_ptr, seed_ptr,  # PER_SAMPLE: (3, B, most_parts), float32; one int64, or None without dropout
    mean_ptr, rstd_ptr,  # written: (B * H * W,) or, PER_SAMPLE, (B,), float32
    scores_ptr,  # written: (groups, tokens), float32, or None
    softmax_ptr, pooled_ptr,  # written: (3 or 5, splits, groups) and (1 or 2, splits, groups, C), float32
    groups, tokens, width, rows_per_sample, parts, most_parts, splits, tokens_per_split, eps, score_keep, score_scale,
    SLOPES: tl.constexpr, PER_SAMPLE: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The statistics of the norm, and for a split of a group, which is `tokens_per_split` of its tokens:

        scores = W_s norm(x) + b_s;  with top = max(scores) and e = exp(scores - top)
        softmax = (top, sum(e), sum(dropout(e)));  pooled = sum(dropout(e) * n)

    SLOPES: also sum(e * score) and sum(dropout(e) * score), and sum(dropout(e) * score * n), from which backward finds
    the sum of products of the scores with their gradients. A program has a split. Reads x once, in training writes each
    score once."""
    POSITIONS: tl.constexpr = PATCH_H * PATCH_W
    lane = tl.arange(0, BLOCK_M)
    # Last samples first: the statistics kernel read them last, they are in cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    group, split = program // splits, program % splits
    sample, position = group // POSITIONS, group % POSITIONS
    start = sample.to(tl.int64) * rows_per_sample
    x_ptr += start * C
    if PER_SAMPLE:
        mean, rstd = load_sample_statistics(moments_ptr, sample, groups // POSITIONS, parts, most_parts, eps)
        tl.store(mean_ptr + sample, mean, mask=(position == 0) & (split == 0))
        tl.store(rstd_ptr + sample, rstd, mask=(position == 0) & (split == 0))
    if seed_ptr is not None:
        mask_key = dropout_key(seed_ptr, sample, SITE=0)
    head_weight, tail_weight, bias = _load_score_weights(
        norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, qkv_bias_ptr, C=C, HEAD=HEAD, TAIL=TAIL
    )

    # Each lane has a softmax of its own: nothing crosses lanes before the end.
    largest = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total, kept = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    head, tail = tl.zeros((BLOCK_M, HEAD), tl.float32), tl.zeros((BLOCK_M, TAIL), tl.float32)
    if SLOPES:
        total_slope, kept_slope, head_slope, tail_slope = total, kept, head, tail
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, tokens)
    for first in range(begin, end, BLOCK_M):
        token, valid = first + lane, first + lane < end
        pixel = pixel_of_token(token, position, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
        head_normal, tail_normal = load_rows_in_float32(x_ptr, pixel, valid, C=C, HEAD=HEAD, TAIL=TAIL)
        if not PER_SAMPLE:
            mean, rstd = _measure_tokens(
                head_normal, tail_normal, pixel, valid, mean_ptr + start, rstd_ptr + start, eps,
                C=C, HEAD=HEAD, TAIL=TAIL,
            )  # fmt: skip
        head_normal, tail_normal = (head_normal - mean) * rstd, (tail_normal - mean) * rstd
        score = tl.sum(head_normal * head_weight, 1) + tl.sum(tail_normal * tail_weight, 1)
        score = tl.where(valid, score + bias, LOWEST)
        if scores_ptr is not None:
            tl.store(scores_ptr + start + position * tokens + token, score, mask=valid)
        new_largest = tl.maximum(largest, score)
        shrink = tl.exp(largest - new_largest)
        weight = tl.where(valid, tl.exp(score - new_largest), 0.0)
        largest = new_largest
        total = total * shrink + weight
        if SLOPES:
            total_slope = total_slope * shrink + weight * score
        if seed_ptr is not None:
            weight *= tl.where(dropout_kept(mask_key, position * tokens + token, score_keep), score_scale, 0.0)
            kept = kept * shrink + weight
        head = head * shrink[:, None] + weight[:, None] * head_normal
        tail = tail * shrink[:, None] + weight[:, None] * tail_normal
        if SLOPES:
            weight *= score
            kept_slope = kept_slope * shrink + weight
            head_slope = head_slope * shrink[:, None] + weight[:, None] * head_normal
            tail_slope = tail_slope * shrink[:, None] + weight[:, None] * tail_normal

    top = tl.max(largest, 0)
    shrink = tl.exp(largest - top)
    at, stride = split * groups.to(tl.int64) + group, splits * groups.to(tl.int64)
    tl.store(softmax_ptr + at, top)
    softmax_ptr += stride + at
    _store_split(softmax_ptr, pooled_ptr + at * C, stride, shrink, total, kept, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)
    if SLOPES:
        _store_split(
            softmax_ptr + 2 * stride, pooled_ptr + (stride + at) * C, stride, shrink, total_slope, kept_slope,
            head_slope, tail_slope, C=C, HEAD=HEAD, TAIL=TAIL,
        )  # fmt: skip


@triton.jit
def _store_split(
    softmax_ptr, pooled_ptr, stride, shrink, total, kept, head, tail,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    tl.store(softmax_ptr, tl.sum(total * shrink, 0))
    tl.store(softmax_ptr + stride, tl.sum(kept * shrink, 0))
    store_vector(pooled_ptr, head_column, tl.sum(head * shrink[:, None], 0), WIDTH=C)
    store_vector(pooled_ptr, tail_column, tl.sum(tail * shrink[:, None], 0), WIDTH=C)


@triton.jit
def _measure_tokens(
    head, tail, pixel, valid, mean_ptr, rstd_ptr, eps, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of each token, (rows, 1), which it writes; the latter 0 where none is."""
    mean, rstd = row_statistics(head, tail, eps, C=C, HEAD=HEAD, TAIL=TAIL)
    rstd = tl.where(valid, rstd, 0.0)
    tl.store(mean_ptr + pixel, mean, mask=valid)
    tl.store(rstd_ptr + pixel, rstd, mask=valid)
    return mean[:, None], rstd[:, None]


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def context_fwd_kernel(
    softmax_ptr, part_ptr,  # (3 or 5, splits, groups) and (1 or 2, splits, groups, C), float32, of pool_fwd_kernel
    norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, qkv_bias_ptr,  # (C,), (C,), (1 + 2 C, C), (1 + 2 C,) or None
    seed_ptr,  # one int64, or None without dropout
    scores_ptr,  # in training, (groups, tokens), float32: the scores, replaced by p, their softmax
    pooled_ptr, context_ptr,  # written: (1 or 2, groups, LANES) or None, (groups, LANES), float32
    sums_ptr,  # written: (3, groups), float32, or None
    groups, tokens, splits,
    LANES: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Joins the splits of groups: the pooled token t and the context of each, and in training p. With `sums_ptr` also
    the sums of w, w * score and p * score, and, as a second pooled token, that of w * score * n.

    A program has BLOCK_N values of the context of BLOCK_M groups. Reads the splits once for each block of values, W_k
    once for each block of groups, and the scores once; writes everything once."""
    group = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid, row = group < groups, group.to(tl.int64)
    largest = tl.full((BLOCK_M,), LOWEST, tl.float32)
    for split in range(splits):
        largest = tl.maximum(largest, tl.load(softmax_ptr + split * groups + group, mask=valid, other=LOWEST))
    total = tl.zeros((BLOCK_M,), tl.float32)
    kept = tl.zeros((BLOCK_M,), tl.float32)
    all_slope = tl.zeros((BLOCK_M,), tl.float32)
    kept_slope = tl.zeros((BLOCK_M,), tl.float32)
    for split in range(splits):
        at, stride = softmax_ptr + split * groups + group, splits * groups.to(tl.int64)
        grow = tl.exp(tl.load(at, mask=valid, other=LOWEST) - largest)
        total += grow * tl.load(at + stride, mask=valid, other=1.0)
        kept += grow * tl.load(at + 2 * stride, mask=valid, other=0.0)
        if sums_ptr is not None:
            all_slope += grow * tl.load(at + 3 * stride, mask=valid, other=0.0)
            kept_slope += grow * tl.load(at + 4 * stride, mask=valid, other=0.0)
    scale = 1 / total
    # The sum of the weights is 1 but for dropout.
    kept = kept * scale if seed_ptr is not None else tl.full((BLOCK_M,), 1.0, tl.float32)

    if sums_ptr is not None and tl.program_id(1) == 0:
        tl.store(sums_ptr + group, kept, mask=valid)
        tl.store(sums_ptr + groups + group, kept_slope * scale, mask=valid)
        tl.store(sums_ptr + 2 * groups + group, all_slope * scale, mask=valid)

    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    context = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, C, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        pooled = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for split in range(splits):
            grow = tl.exp(tl.load(softmax_ptr + split * groups + group, mask=valid, other=LOWEST) - largest)
            pooled += grow[:, None] * load_tile(part_ptr, row + split * groups.to(tl.int64), valid, column, WIDTH=C)
        pooled *= scale[:, None]
        if pooled_ptr is not None and tl.program_id(1) == 0:
            store_tile(pooled_ptr, row, valid, column, pooled, WIDTH=LANES)
            if sums_ptr is not None:
                second = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
                for split in range(splits):
                    grow = tl.exp(tl.load(softmax_ptr + split * groups + group, mask=valid, other=LOWEST) - largest)
                    at = part_ptr + splits * groups.to(tl.int64) * C
                    second += grow[:, None] * load_tile(at, row + split * groups.to(tl.int64), valid, column, WIDTH=C)
                at = pooled_ptr + groups.to(tl.int64) * LANES
                store_tile(at, row, valid, column, second * scale[:, None], WIDTH=LANES)
        pooled = (
            pooled * load_vector(norm_weight_ptr, column, WIDTH=C)[None, :]
            + kept[:, None] * load_vector(norm_bias_ptr, column, WIDTH=C)[None, :]
        )
        weight = load_tile(qkv_weight_ptr + C, output, output < C, column, WIDTH=C).to(tl.float32)
        context = dot(pooled, tl.trans(weight), context)
    if qkv_bias_ptr is not None:
        context += kept[:, None] * load_vector(qkv_bias_ptr + 1, output, WIDTH=C)[None, :]
    store_tile(context_ptr, row, valid, output, context, WIDTH=LANES)
    if pooled_ptr is not None:
        for first in range(tl.program_id(1) * 64, tokens, tl.num_programs(1) * 64):
            token = first + tl.arange(0, 64)
            mask = valid[:, None] & (token < tokens)[None, :]
            at = scores_ptr + row[:, None] * tokens + token[None, :]
            scores = tl.load(at, mask=mask, other=0.0)
            tl.store(at, tl.exp(scores - largest[:, None]) * scale[:, None], mask=mask)


@triton.jit
def tokens_of_block(
    block, begin, tokens, width, splits, groups_per_block,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, ONE: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(positions, tokens, which are there, pixels) of the ROWS lanes from `begin` on of a block of a sample, which has
    SPAN tokens of a group or, where groups are smaller, `groups_per_block` whole groups; ONE: of one, and position is a
    number."""
    lane = begin + tl.arange(0, ROWS)
    if ONE:
        position, token = block // splits, block % splits * SPAN + lane
        valid = token < tokens
    else:
        position, token = block * groups_per_block + lane // tokens, lane % tokens
        valid = (lane // tokens < groups_per_block) & (position < PATCH_H * PATCH_W)
    pixel = pixel_of_token(token, position, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    return position, token, valid, tl.where(valid, pixel, 0)


@triton.jit
def load_of_groups(ptr, position, valid, column, WIDTH: tl.constexpr, STRIDE: tl.constexpr, ONE: tl.constexpr):
    """Values `column` of the groups of tokens, which are rows of a float32 matrix (.., STRIDE) from a sample's first
    one on: a row for each token or, where all are of ONE group, one row."""
    if ONE:
        tile = load_vector(ptr + position * STRIDE, column, WIDTH=WIDTH)[None, :]
    else:
        tile = load_tile(ptr, position, valid, column, WIDTH=WIDTH, STRIDE=STRIDE)
    return tile


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def attend_fwd_kernel(
    x_ptr,  # (rows, C)
    norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, qkv_bias_ptr,  # (C,), (C,), (1 + 2 C, C), (1 + 2 C,) or None
    out_weight_ptr, out_bias_ptr,  # (C, C), (C,) or None
    mean_ptr, rstd_ptr, context_ptr,  # (rows,) or, PER_SAMPLE, (samples,); (groups, LANES); float32
    seed_ptr,  # one int64, or None without dropout
    y_ptr, moments_ptr,  # written: (rows, C), like x; (3, samples, most_parts), float32, or None
    rows_per_sample, tokens, width, splits, groups_per_block, samples, most_parts, output_keep, output_scale,
    PER_SAMPLE: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, LANES: tl.constexpr, ONE: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """y = x + dropout((ReLU(W_v norm(x) + b_v) * context) out_weight^T + out_bias), and the moments of blocks of y.

    A program has a block of tokens of a sample (tokens_of_block). Reads x once and again at its end, from cache, and
    W_v and out_weight once for each program; writes y once."""
    POSITIONS: tl.constexpr = PATCH_H * PATCH_W
    blocks = tl.cdiv(POSITIONS, groups_per_block) * splits
    sample = tl.program_id(0) // blocks
    position, _, valid, row = tokens_of_block(
        tl.program_id(0) % blocks, 0, tokens, width, splits, groups_per_block,
        PATCH_H=PATCH_H, PATCH_W=PATCH_W, ONE=ONE, SPAN=BLOCK_M, ROWS=BLOCK_M,
    )  # fmt: skip
    start = sample.to(tl.int64) * rows_per_sample
    x_ptr += start * C
    y_ptr += start * C
    first_statistic = sample if PER_SAMPLE else start
    head_normed, tail_normed = normalise_rows(
        x_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr + first_statistic, rstd_ptr + first_statistic,
        row, row, valid, rows_per_sample, PER_SAMPLE=PER_SAMPLE, C=C, HEAD=HEAD, TAIL=TAIL,
    )  # fmt: skip
    context_ptr += sample.to(tl.int64) * (POSITIONS * LANES)
    qkv_weight_ptr += (1 + C) * C
    if qkv_bias_ptr is not None:
        qkv_bias_ptr += 1 + C
    head = tl.zeros((BLOCK_M, HEAD), tl.float32)
    tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    for first in range(0, C, BLOCK_F):
        column = first + tl.arange(0, BLOCK_F)
        head_weight, tail_weight = load_weight(qkv_weight_ptr, column, head_normed, C=C, OUT=C, HEAD=HEAD, TAIL=TAIL)
        values = multiply_rows(head_normed, tail_normed, head_weight, tail_weight)
        values += load_vector(qkv_bias_ptr, column, WIDTH=C)[None, :]
        attended = activate(values, ACT=RELU, DTYPE=tl.float32) * load_of_groups(
            context_ptr, position, valid, column, WIDTH=C, STRIDE=LANES, ONE=ONE
        )
        attended = attended.to(head_normed.dtype)
        head, tail = add_columns_product(
            head, tail, attended, out_weight_ptr, column, WIDTH=C, C=C, HEAD=HEAD, TAIL=TAIL
        )
    head_bias, tail_bias = load_row_vector(out_bias_ptr, C=C, HEAD=HEAD, TAIL=TAIL)
    head += head_bias
    tail += tail_bias
    if seed_ptr is not None:
        head, tail = drop_rows(
            head, tail, seed_ptr, sample * rows_per_sample + row, rows_per_sample, output_keep, output_scale,
            SITE=1, C=C, HEAD=HEAD, TAIL=TAIL,
        )  # fmt: skip
    head_x, tail_x = load_rows_in_float32(x_ptr, row, valid, C=C, HEAD=HEAD, TAIL=TAIL, AGAIN=True)
    head += head_x
    tail += tail_x
    store_rows(y_ptr, row, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)
    if moments_ptr is not None:
        store_moments_of_rows(
            moments_ptr, sample, samples, tl.program_id(0) % blocks, most_parts, head, tail, valid,
            tl.load(mean_ptr + first_statistic), EXACT=y_ptr.dtype.element_ty == tl.float32, C=C, HEAD=HEAD, TAIL=TAIL,
        )  # fmt: skip
