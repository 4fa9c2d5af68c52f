"""Triton kernels of separable_attention, backward; names and formulas are those of kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import (
    RELU,
    activate,
    activate_backward,
    dot,
    dropout_kept,
    dropout_key,
    load_tile,
    load_vector,
    pixel_of_token,
    store_tile,
    store_vector,
    token_of_pixel,
)
from ..triton_row_gradients import add_up_outputs, store_norm_gradient
from ..triton_row_kernels import (
    drop_rows,
    load_row_statistics,
    load_row_vector,
    load_rows,
    load_weight,
    multiply_by_columns,
    multiply_rows,
    normalise_rows,
    row_columns,
)
from .kernels import NOT_SPECIALIZED


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def values_bwd_kernel(
    dy_ptr, x_ptr,  # (rows, C)
    norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, qkv_bias_ptr,  # (C,), (C,), (1 + 2 C, C), (1 + 2 C,) or None
    out_weight_ptr,  # (C, C)
    mean_ptr, rstd_ptr, context_ptr,  # (rows,) or, PER_SAMPLE, (samples,); (groups, LANES); float32
    seed_ptr,  # one int64, or None without dropout
    attended_ptr, dvalues_ptr,  # written: (rows, C), like x
    dcontext_ptr,  # written: (splits, groups, C), float32
    groups, tokens, width, rows_per_sample, splits, groups_per_block, output_keep, output_scale,
    PER_SAMPLE: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, LANES: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """With values = W_v norm(x) + b_v and dattended = dropout(dy) out_weight:

        attended = ReLU(values) * context, what out_proj saw;  dvalues = ReLU'(values) * dattended * context
        dcontext = the sum of dattended * ReLU(values) over tokens, in splits of a group

    A program has BLOCK_M tokens of a group or, where groups are smaller, `groups_per_block` whole groups, so that what
    it adds up is its own. Reads dy and x once, W_v and out_weight once for each program; writes everything once."""
    POSITIONS: tl.constexpr = PATCH_H * PATCH_W
    lane = tl.arange(0, BLOCK_M)
    split = tl.program_id(0) % splits
    mine = lane // tokens  # of the groups of this block
    first_group = tl.program_id(0) // splits * groups_per_block
    group, token = first_group + mine, split * BLOCK_M + lane % tokens
    valid = (mine < groups_per_block) & (group < groups) & (token < tokens)
    pixel = pixel_of_token(token, group % POSITIONS, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    row = tl.where(valid, group // POSITIONS * rows_per_sample + pixel, 0)
    at = row.to(tl.int64)
    head, tail = normalise_rows(
        x_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, at, row, valid, rows_per_sample,
        PER_SAMPLE=PER_SAMPLE, C=C, HEAD=HEAD, TAIL=TAIL,
    )  # fmt: skip
    head_dy, tail_dy = load_rows(dy_ptr, at, valid, C=C, HEAD=HEAD, TAIL=TAIL)
    if seed_ptr is not None:
        head_grad, tail_grad = drop_rows(
            head_dy.to(tl.float32), tail_dy.to(tl.float32), seed_ptr, row, rows_per_sample, output_keep, output_scale,
            SITE=1, C=C, HEAD=HEAD, TAIL=TAIL,
        )  # fmt: skip
        head_dy, tail_dy = head_grad.to(head_dy.dtype), tail_grad.to(tail_dy.dtype)
    qkv_weight_ptr += (1 + C) * C
    if qkv_bias_ptr is not None:
        qkv_bias_ptr += 1 + C
    context_row = group.to(tl.int64)
    for first in range(0, C, BLOCK_F):
        column = first + tl.arange(0, BLOCK_F)
        head_weight, tail_weight = load_weight(qkv_weight_ptr, column, head, C=C, OUT=C, HEAD=HEAD, TAIL=TAIL)
        values = multiply_rows(head, tail, head_weight, tail_weight)
        values += load_vector(qkv_bias_ptr, column, WIDTH=C)[None, :]
        dattended = multiply_by_columns(head_dy, tail_dy, out_weight_ptr, column, WIDTH=C, C=C, HEAD=HEAD, TAIL=TAIL)
        context = load_tile(context_ptr, context_row, valid, column, WIDTH=C, STRIDE=LANES)
        active = activate(values, ACT=RELU, DTYPE=tl.float32)
        store_tile(attended_ptr, at, valid, column, active * context, WIDTH=C)
        dvalues = activate_backward(dattended * context, values, ACT=RELU, DTYPE=tl.float32)
        store_tile(dvalues_ptr, at, valid, column, dvalues, WIDTH=C)
        dattended *= active
        for i in range(groups_per_block):
            total = tl.sum(tl.where((valid & (mine == i))[:, None], dattended, 0.0), 0)
            out = dcontext_ptr + (split * groups + first_group + i).to(tl.int64) * C
            tl.store(out + column, total, mask=(column < C) & (first_group + i < groups))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def context_bwd_kernel(
    part_ptr, context_ptr, scores_ptr,  # (splits, groups, C), (groups, LANES), (groups, tokens); float32
    qkv_weight_ptr, qkv_bias_ptr,  # (1 + 2 C, C), (1 + 2 C,) or None
    seed_ptr,  # one int64, or None without dropout
    dcontext_ptr, dpooled_ptr, slope_ptr, dtotal_ptr,  # written: (groups, C) twice, (groups,) twice; float32
    dbias_ptr,  # written: (blocks of groups, C), float32
    groups, tokens, splits, score_keep, score_scale,
    POSITIONS: tl.constexpr, LANES: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For each group, with dcontext added up from its splits:

        dpooled = dcontext W_k, the gradient of t * norm_weight + sum(w) * norm_bias
        slope = sum(dcontext * context), what the backward pass of the softmax subtracts
        dtotal = sum(dcontext * b_k), the gradient of sum(w)
        dbias = dcontext * sum(w), the gradient of b_k, summed over the groups of a block

    The slope costs no pass over the tokens: the context is linear in the weights w, so the sum over tokens of weight
    times gradient is that product. A program has BLOCK_N values of dpooled of BLOCK_M groups; the first of each block
    of groups also reads the scores, for the dropout, and writes all but dpooled."""
    group = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid, row = group < groups, group.to(tl.int64)
    kept = tl.where(valid, 1.0, 0.0)
    if seed_ptr is not None and tl.program_id(1) == 0:
        key = dropout_key(seed_ptr, group // POSITIONS, SITE=0)
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
            grad += load_tile(part_ptr, row + split * groups.to(tl.int64), valid, output, WIDTH=C)
        weight = load_tile(qkv_weight_ptr + C, output, output < C, column, WIDTH=C).to(tl.float32)
        dpooled = dot(grad, weight, dpooled)
        if tl.program_id(1) == 0:
            store_tile(dcontext_ptr, row, valid, output, grad, WIDTH=C)
            dbias = tl.sum(grad * kept[:, None], 0)
            store_vector(dbias_ptr + tl.program_id(0).to(tl.int64) * C, output, dbias, WIDTH=C)
            slope += tl.sum(grad * load_tile(context_ptr, row, valid, output, WIDTH=C, STRIDE=LANES), 1)
            if qkv_bias_ptr is not None:
                dtotal += tl.sum(grad * load_vector(qkv_bias_ptr + 1, output, WIDTH=C)[None, :], 1)
    store_tile(dpooled_ptr, row, valid, column, dpooled, WIDTH=C)
    if tl.program_id(1) == 0:
        tl.store(slope_ptr + group, slope, mask=valid)
        tl.store(dtotal_ptr + group, dtotal, mask=valid)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def input_bwd_kernel(
    dvalues_ptr, x_ptr, residual_ptr,  # (rows, C)
    norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr,  # (C,), (C,), (1 + 2 C, C)
    mean_ptr, rstd_ptr, scores_ptr,  # (rows,) or, PER_SAMPLE, (samples,); (groups, tokens); float32
    dpooled_ptr, slope_ptr, dtotal_ptr,  # (groups, C), (groups,), (groups,), float32
    seed_ptr,  # one int64, or None without dropout
    dx_ptr, sums_ptr, dscores_ptr,  # written: (rows, C), like x; (2, rows), float32, or None; (rows,), float32
    rows, rows_per_sample, width, tokens, score_keep, score_scale,
    PER_SAMPLE: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The gradient of a token through its values, its score and its share of the pooled token, and the score's own:

        dw = norm(x) . dpooled + dtotal;  dscore = p * (dropout(dw) - slope)
        dnorm = dvalues W_v + w * dpooled + dscore * W_s;  dx by store_norm_gradient from norm_weight * dnorm

    A program has BLOCK_M rows. Reads dvalues, x, the residual and p once, W_v once for each program; writes everything
    once."""
    lane = tl.arange(0, BLOCK_M)
    row = tl.program_id(0) * BLOCK_M + lane
    start, valid = tl.program_id(0).to(tl.int64) * BLOCK_M, row < rows
    head = tl.zeros((BLOCK_M, HEAD), tl.float32)
    tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    for first in range(0, C, BLOCK_F):
        column = first + tl.arange(0, BLOCK_F)
        dvalues = load_tile(dvalues_ptr + start * C, lane, valid, column, WIDTH=C)
        head_weight, tail_weight = load_weight(
            qkv_weight_ptr + (1 + C) * C, column, dvalues, C=C, OUT=C, HEAD=HEAD, TAIL=TAIL
        )
        head = dot(dvalues, head_weight, head)
        tail = dot(dvalues, tail_weight, tail)

    mean, rstd = load_row_statistics(mean_ptr, rstd_ptr, row, valid, rows_per_sample, PER_SAMPLE=PER_SAMPLE)
    # Head and tail one after the other: a program has no registers for more loads on their way.
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    head_normal = (load_tile(x_ptr + start * C, lane, valid, head_column, WIDTH=C).to(tl.float32) - mean) * rstd
    tail_normal = (load_tile(x_ptr + start * C, lane, valid, tail_column, WIDTH=C).to(tl.float32) - mean) * rstd
    head_scale, tail_scale = load_row_vector(norm_weight_ptr, C=C, HEAD=HEAD, TAIL=TAIL)
    sample = row // rows_per_sample
    position, token = token_of_pixel(row % rows_per_sample, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    group = sample.to(tl.int64) * (PATCH_H * PATCH_W) + position
    score = tl.load(scores_ptr + group * tokens + token, mask=valid, other=0.0)
    kept = tl.where(valid, 1.0, 0.0)
    if seed_ptr is not None:
        key = dropout_key(seed_ptr, sample, SITE=0)
        kept = tl.where(dropout_kept(key, position * tokens + token, score_keep), score_scale, 0.0)
    head_pooled, tail_pooled = load_rows(dpooled_ptr, group, valid, C=C, HEAD=HEAD, TAIL=TAIL)
    normed = head_normal * head_scale + load_vector(norm_bias_ptr, head_column, WIDTH=C)[None, :]
    dscore = tl.sum(normed * head_pooled, 1)
    normed = tail_normal * tail_scale + load_vector(norm_bias_ptr, tail_column, WIDTH=C)[None, :]
    dscore += tl.sum(normed * tail_pooled, 1)
    dscore += tl.load(dtotal_ptr + group, mask=valid, other=0.0)
    dscore = score * (dscore * kept - tl.load(slope_ptr + group, mask=valid, other=0.0))
    tl.store(dscores_ptr + row, dscore, mask=valid)
    kept *= score
    head_weight = load_vector(qkv_weight_ptr, head_column, WIDTH=C)[None, :]
    head += kept[:, None] * head_pooled + dscore[:, None] * head_weight
    tail_weight = load_vector(qkv_weight_ptr, tail_column, WIDTH=C)[None, :]
    tail += kept[:, None] * tail_pooled + dscore[:, None] * tail_weight
    head *= head_scale
    tail *= tail_scale
    store_norm_gradient(
        residual_ptr + start * C, dx_ptr + start * C, sums_ptr, lane, row, valid,
        head, tail, head_normal, tail_normal, rstd, rows, PER_SAMPLE=PER_SAMPLE, C=C, HEAD=HEAD, TAIL=TAIL,
    )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def parameters_bwd_kernel(
    value_ptr, value_sums_ptr,  # (parts, C + 1, C) and (parts, C + 1), float32: of the values, then of the score
    key_ptr, key_sums_ptr,  # (key_parts, C, LANES) and (context_parts, C), float32
    norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr,  # (C,), (C,), (1 + 2 C, C)
    dnorm_weight_ptr, dnorm_bias_ptr, dqkv_weight_ptr, dqkv_bias_ptr,  # written: like these; (1 + 2 C,) or None
    parts, key_parts, context_parts,
    LANES: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """The gradients of the parameters of norm and qkv: for score, keys and values those of add_up_outputs, which adds
    up the parts. A program has BLOCK_C columns; everything is read and written once."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    norm_weight, norm_bias = load_vector(norm_weight_ptr, column, WIDTH=C), load_vector(norm_bias_ptr, column, WIDTH=C)
    nothing = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    dnorm_weight, dnorm_bias = add_up_outputs(
        value_ptr + C * C, value_sums_ptr + C, qkv_weight_ptr, dqkv_weight_ptr, dqkv_bias_ptr, nothing, nothing,
        column, norm_weight, norm_bias, parts, parts,
        PRODUCT_SIZE=(1 + C) * C, PRODUCT_STRIDE=C, SUMS_SIZE=1 + C, OUT=1, C=C, BLOCK_C=BLOCK_C, BLOCK_O=BLOCK_O,
    )  # fmt: skip
    qkv_weight_ptr += C
    dqkv_weight_ptr += C
    if dqkv_bias_ptr is not None:
        dqkv_bias_ptr += 1
    dnorm_weight, dnorm_bias = add_up_outputs(
        key_ptr, key_sums_ptr, qkv_weight_ptr, dqkv_weight_ptr, dqkv_bias_ptr, dnorm_weight, dnorm_bias,
        column, norm_weight, norm_bias, key_parts, context_parts,
        PRODUCT_SIZE=C * LANES, PRODUCT_STRIDE=LANES, SUMS_SIZE=C, OUT=C, C=C, BLOCK_C=BLOCK_C, BLOCK_O=BLOCK_O,
    )  # fmt: skip
    qkv_weight_ptr += C * C
    dqkv_weight_ptr += C * C
    if dqkv_bias_ptr is not None:
        dqkv_bias_ptr += C
    dnorm_weight, dnorm_bias = add_up_outputs(
        value_ptr, value_sums_ptr, qkv_weight_ptr, dqkv_weight_ptr, dqkv_bias_ptr, dnorm_weight, dnorm_bias,
        column, norm_weight, norm_bias, parts, parts,
        PRODUCT_SIZE=(1 + C) * C, PRODUCT_STRIDE=C, SUMS_SIZE=1 + C, OUT=C, C=C, BLOCK_C=BLOCK_C, BLOCK_O=BLOCK_O,
    )  # fmt: skip
    store_vector(dnorm_weight_ptr, column, tl.sum(dnorm_weight, 0), WIDTH=C)
    store_vector(dnorm_bias_ptr, column, tl.sum(dnorm_bias, 0), WIDTH=C)
