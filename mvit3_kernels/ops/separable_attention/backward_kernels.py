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
    store_tile,
    store_vector,
)
from ..triton_launch import jit_kernel
from ..triton_row_gradients import (
    add_up_outputs,
    load_folded,
    load_sample_means,
    store_norm_gradient,
    store_sample_gradient,
)
from ..triton_row_kernels import (
    drop_rows,
    load_row_statistics,
    load_row_vector,
    load_rows,
    load_rows_in_float32,
    load_weight,
    multiply_by_columns,
    multiply_rows,
    normalise_rows,
    row_columns,
    store_rows,
)
from .kernels import NOT_SPECIALIZED, load_of_groups, tokens_of_block


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def values_bwd_kernel(
    dy_ptr, x_ptr,  # (rows, C)
    norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, qkv_bias_ptr,  # (C,), (C,), (1 + 2 C, C), (1 + 2 C,) or None
    out_weight_ptr,  # (C, C)
    mean_ptr, rstd_ptr, context_ptr,  # (rows,) or, PER_SAMPLE, (samples,); (groups, LANES); float32
    folded_ptr,  # (2, 1 + 2 C), float32, of fold_kernel, or None
    seed_ptr,  # one int64, or None without dropout
    attended_ptr, dvalues_ptr,  # written: (rows, C), like x
    dcontext_ptr, known_ptr,  # written: (splits, groups, C); (2, samples, sums_parts) or None; float32
    groups, tokens, width, rows_per_sample, splits, groups_per_block, samples, sums_parts, output_keep, output_scale,
    PER_SAMPLE: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, LANES: tl.constexpr, ONE: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """With values = W_v norm(x) + b_v and dattended = dropout(dy) out_weight:

        attended = ReLU(values) * context, what out_proj saw;  dvalues = ReLU'(values) * dattended * context
        dcontext = the sum of dattended * ReLU(values) over tokens, in splits of a group

    With `folded_ptr` also the sums over each block of g and of g * n, for the normalised tokens n and the share of the
    values in their gradient, g = norm_weight * (dvalues W_v): those of dvalues * (W_v norm_weight) and of dvalues times
    W_v (n * norm_weight), which are the values without b_v and W_v norm_bias.

    A program has a block of tokens of a sample (tokens_of_block), whose groups or splits are its own, and so are the
    sums over them. Reads dy and x once, W_v and out_weight once for each program; writes everything once."""
    POSITIONS: tl.constexpr = PATCH_H * PATCH_W
    blocks = tl.cdiv(POSITIONS, groups_per_block) * splits
    sample, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    position, _, valid, row = tokens_of_block(
        block, 0, tokens, width, splits, groups_per_block,
        PATCH_H=PATCH_H, PATCH_W=PATCH_W, ONE=ONE, SPAN=BLOCK_M, ROWS=BLOCK_M,
    )  # fmt: skip
    start = sample.to(tl.int64) * rows_per_sample
    first_statistic = sample if PER_SAMPLE else start
    head, tail = normalise_rows(
        x_ptr + start * C, norm_weight_ptr, norm_bias_ptr, mean_ptr + first_statistic, rstd_ptr + first_statistic,
        row, row, valid, rows_per_sample, PER_SAMPLE=PER_SAMPLE, C=C, HEAD=HEAD, TAIL=TAIL,
    )  # fmt: skip
    head_dy, tail_dy = load_rows(dy_ptr + start * C, row, valid, C=C, HEAD=HEAD, TAIL=TAIL)
    if seed_ptr is not None:
        head_grad, tail_grad = drop_rows(
            head_dy.to(tl.float32), tail_dy.to(tl.float32), seed_ptr, sample * rows_per_sample + row, rows_per_sample,
            output_keep, output_scale, SITE=1, C=C, HEAD=HEAD, TAIL=TAIL,
        )  # fmt: skip
        head_dy, tail_dy = head_grad.to(head_dy.dtype), tail_grad.to(tail_dy.dtype)
    qkv_weight_ptr += (1 + C) * C
    if qkv_bias_ptr is not None:
        qkv_bias_ptr += 1 + C
    attended_ptr += start * C
    dvalues_ptr += start * C
    context_ptr += sample.to(tl.int64) * (POSITIONS * LANES)
    dcontext_ptr += (block % splits * groups.to(tl.int64) + sample * POSITIONS) * C
    total = tl.zeros((BLOCK_M,), tl.float32)
    product = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, C, BLOCK_F):
        column = first + tl.arange(0, BLOCK_F)
        head_weight, tail_weight = load_weight(qkv_weight_ptr, column, head, C=C, OUT=C, HEAD=HEAD, TAIL=TAIL)
        linear = multiply_rows(head, tail, head_weight, tail_weight)
        values = linear + load_vector(qkv_bias_ptr, column, WIDTH=C)[None, :]
        dattended = multiply_by_columns(head_dy, tail_dy, out_weight_ptr, column, WIDTH=C, C=C, HEAD=HEAD, TAIL=TAIL)
        context = load_of_groups(context_ptr, position, valid, column, WIDTH=C, STRIDE=LANES, ONE=ONE)
        active = activate(values, ACT=RELU, DTYPE=tl.float32)
        store_tile(attended_ptr, row, valid, column, active * context, WIDTH=C)
        dvalues = activate_backward(dattended * context, values, ACT=RELU, DTYPE=tl.float32)
        store_tile(dvalues_ptr, row, valid, column, dvalues, WIDTH=C)
        if folded_ptr is not None:
            scale, shift = load_folded(folded_ptr + 1 + C, column, OUT=C, STRIDE=1 + 2 * C)
            total += tl.sum(dvalues * scale, 1)
            product += tl.sum(dvalues * (linear - shift), 1)
        dattended *= active
        if ONE:
            store_vector(dcontext_ptr + position * C, column, tl.sum(dattended, 0), WIDTH=C)
        else:
            for mine in range(block * groups_per_block, tl.minimum((block + 1) * groups_per_block, POSITIONS)):
                of_group = tl.sum(tl.where((valid & (position == mine))[:, None], dattended, 0.0), 0)
                store_vector(dcontext_ptr + mine * C, column, of_group, WIDTH=C)
    if folded_ptr is not None:
        known_ptr += sample.to(tl.int64) * sums_parts + block
        tl.store(known_ptr, tl.sum(total, 0))
        tl.store(known_ptr + samples.to(tl.int64) * sums_parts, tl.sum(product, 0))


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def context_bwd_kernel(
    part_ptr, context_ptr, scores_ptr,  # (splits, groups, C), (groups, LANES), (groups, tokens); float32
    qkv_weight_ptr, qkv_bias_ptr,  # (1 + 2 C, C), (1 + 2 C,) or None
    seed_ptr,  # one int64, or None without dropout
    norm_weight_ptr, norm_bias_ptr,  # (C,) each, read with pooled_ptr
    pooled_ptr, sums_ptr,  # (2, groups, LANES) and (3, groups), float32, of context_fwd_kernel, or None
    dcontext_ptr, dpooled_ptr, slope_ptr, dtotal_ptr,  # written: (groups, C) twice, (groups,) twice; float32
    dbias_ptr,  # written: (blocks of groups, C), float32
    norm_ptr, known_ptr,  # written: (blocks of groups, 2, C); (2, samples, sums_parts), from `first_sum` on, or None
    groups, tokens, splits, samples, sums_parts, first_sum, score_keep, score_scale,
    POSITIONS: tl.constexpr, LANES: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For each group, with dcontext added up from its splits:

        dpooled = dcontext W_k, the gradient of t * norm_weight + sum(w) * norm_bias
        slope = sum(dcontext * context), what the backward pass of the softmax subtracts
        dtotal = sum(dcontext * b_k), the gradient of sum(w)
        dbias = dcontext * sum(w), the gradient of b_k, summed over the groups of a block

    With `pooled_ptr` also what the keys contribute to the gradients of the norm's weight and bias, dpooled * t and
    dpooled * sum(w), summed over the groups of a block; and with `known_ptr`, in parts for each group and block of
    values, the sums over its tokens of g and of g * n for the share g of pooled token and score in the gradient of the
    normalised tokens n. The scores' own gradients add up to nothing, and their products with the scores s, up to a
    constant the products of n with norm_weight * W_s, to sum(w s (norm(x) . dpooled + dtotal)) - slope sum(p s).

    The slope costs no pass over the tokens: the context is linear in the weights w, so the sum over tokens of weight
    times gradient is that product. A program has BLOCK_N values of dpooled of BLOCK_M groups; the first of each block
    of groups also reads the scores, for the dropout, and writes all but dpooled."""
    group = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid, row = group < groups, group.to(tl.int64)
    kept = tl.where(valid, 1.0, 0.0)
    if sums_ptr is not None:
        kept = tl.load(sums_ptr + group, mask=valid, other=0.0)
    elif seed_ptr is not None and tl.program_id(1) == 0:
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
    if pooled_ptr is not None:
        pooled = load_tile(pooled_ptr, row, valid, column, WIDTH=C, STRIDE=LANES)
        norm_ptr += tl.program_id(0).to(tl.int64) * (2 * C)
        store_vector(norm_ptr, column, tl.sum(dpooled * pooled, 0), WIDTH=C)
        store_vector(norm_ptr + C, column, tl.sum(dpooled * kept[:, None], 0), WIDTH=C)
        if known_ptr is not None:
            pooled += load_tile(pooled_ptr + groups.to(tl.int64) * LANES, row, valid, column, WIDTH=C, STRIDE=LANES)
            kept_slope = tl.load(sums_ptr + groups + group, mask=valid, other=0.0)
            scaled = dpooled * load_vector(norm_weight_ptr, column, WIDTH=C)[None, :]
            shifted = tl.sum(dpooled * load_vector(norm_bias_ptr, column, WIDTH=C)[None, :], 1)
            product = tl.sum(scaled * pooled, 1) + kept_slope * shifted
            if tl.program_id(1) == 0:
                product += kept_slope * dtotal
                product -= slope * tl.load(sums_ptr + 2 * groups + group, mask=valid, other=0.0)
            part = first_sum + group % POSITIONS * tl.num_programs(1) + tl.program_id(1)
            known_ptr += (group // POSITIONS).to(tl.int64) * sums_parts + part
            tl.store(known_ptr, kept * tl.sum(scaled, 1), mask=valid)
            tl.store(known_ptr + samples.to(tl.int64) * sums_parts, product, mask=valid)
    if tl.program_id(1) == 0:
        tl.store(slope_ptr + group, slope, mask=valid)
        tl.store(dtotal_ptr + group, dtotal, mask=valid)


@triton.jit
def _multiply_values(
    dvalues_ptr, weight_ptr, dx_ptr, row, valid,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Writes dvalues W_v, for other threads of the program too."""
    head = tl.zeros((BLOCK_M, HEAD), tl.float32)
    tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    for first in range(0, C, BLOCK_F):
        column = first + tl.arange(0, BLOCK_F)
        dvalues = load_tile(dvalues_ptr, row, valid, column, WIDTH=C)
        head_weight, tail_weight = load_weight(weight_ptr, column, dvalues, C=C, OUT=C, HEAD=HEAD, TAIL=TAIL)
        head = dot(dvalues, head_weight, head)
        tail = dot(dvalues, tail_weight, tail)
    store_rows(dx_ptr, row, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)
    tl.debug_barrier()


@triton.jit
def _kept(seed_ptr, sample, element, valid, keep, scale):
    """What dropout multiplies scores of a sample by."""
    kept = tl.where(valid, 1.0, 0.0)
    if seed_ptr is not None:
        kept = tl.where(dropout_kept(dropout_key(seed_ptr, sample, SITE=0), element, keep), scale, 0.0)
    return kept


@triton.jit
def _score_gradient(dw, weight, kept, dtotal_ptr, slope_ptr, valid, ONE: tl.constexpr):
    """p * (dropout(dw + dtotal) - slope); the pointers are to the numbers of each token's group, or of the ONE."""
    if ONE:
        dtotal, slope = tl.load(dtotal_ptr), tl.load(slope_ptr)
    else:
        dtotal, slope = tl.load(dtotal_ptr, mask=valid, other=0.0), tl.load(slope_ptr, mask=valid, other=0.0)
    return weight * ((dw + dtotal) * kept - slope)


@triton.jit
def _add_pooled(dx_ptr, score_weight_ptr, at, valid, column, weight, dscore, pooled, scale, C: tl.constexpr):
    """norm_weight * (dvalues W_v + w * dpooled + dscore * W_s) for some columns; dx holds the first."""
    grad = load_tile(dx_ptr, at, valid, column, WIDTH=C).to(tl.float32)
    score_weight = load_vector(score_weight_ptr, column, WIDTH=C)[None, :]
    return (grad + weight[:, None] * pooled + dscore[:, None] * score_weight) * scale


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def input_bwd_kernel(
    dvalues_ptr, x_ptr, residual_ptr,  # (rows, C)
    norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr,  # (C,), (C,), (1 + 2 C, C)
    mean_ptr, rstd_ptr, scores_ptr,  # (rows,) or, PER_SAMPLE, (samples,); (groups, tokens); float32
    dpooled_ptr, slope_ptr, dtotal_ptr,  # (groups, C), (groups,), (groups,), float32
    known_ptr,  # (2, samples, sums_parts), float32: sums of g and of g * n of each sample, or None
    seed_ptr,  # one int64, or None without dropout
    dx_ptr, sums_ptr, dscores_ptr,  # written: (rows, C), like x; (2, rows), float32, or None; (rows,), float32
    rows, rows_per_sample, width, tokens, splits, groups_per_block, samples, sums_parts, score_keep, score_scale,
    PER_SAMPLE: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, ONE: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The gradient of a token through its values, its score and its share of the pooled token, and the score's own:

        dw = norm(x) . dpooled + dtotal;  dscore = p * (dropout(dw) - slope)
        dnorm = dvalues W_v + w * dpooled + dscore * W_s;  dx as in store_norm_gradient from g = norm_weight * dnorm

    A program has a block of tokens of a sample (tokens_of_block). It leaves dvalues W_v in dx and reads it again, ROWS
    rows at a time, as input_bwd_kernel of triton_row_gradients.py does. Reads dvalues, x, the residual and p once, W_v
    once for each program; writes the rest once."""
    POSITIONS: tl.constexpr = PATCH_H * PATCH_W
    ROWS: tl.constexpr = min(BLOCK_M, 32 if HEAD + TAIL <= 160 else 16)
    blocks = tl.cdiv(POSITIONS, groups_per_block) * splits
    sample, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    _, _, valid, row = tokens_of_block(
        block, 0, tokens, width, splits, groups_per_block,
        PATCH_H=PATCH_H, PATCH_W=PATCH_W, ONE=ONE, SPAN=BLOCK_M, ROWS=BLOCK_M,
    )  # fmt: skip
    first_row = sample * rows_per_sample
    start = first_row.to(tl.int64) * C
    dx_ptr += start
    _multiply_values(
        dvalues_ptr + start, qkv_weight_ptr + (1 + C) * C, dx_ptr, row, valid,
        C=C, HEAD=HEAD, TAIL=TAIL, BLOCK_M=BLOCK_M, BLOCK_F=BLOCK_F,
    )  # fmt: skip
    first_group = sample.to(tl.int64) * POSITIONS
    if known_ptr is not None:
        count = rows_per_sample.to(tl.float32) * C
        mean_grad, mean_product = load_sample_means(known_ptr, sample, samples, sums_parts, count)
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    for begin in range(0, BLOCK_M, ROWS):
        position, token, here, at = tokens_of_block(
            block, begin, tokens, width, splits, groups_per_block,
            PATCH_H=PATCH_H, PATCH_W=PATCH_W, ONE=ONE, SPAN=BLOCK_M, ROWS=ROWS,
        )  # fmt: skip
        if PER_SAMPLE:
            mean, rstd = tl.load(mean_ptr + sample), tl.load(rstd_ptr + sample)
        else:
            mean, rstd = load_row_statistics(mean_ptr, rstd_ptr, first_row + at, here, 1, PER_SAMPLE=False)
        head_x, tail_x = load_rows_in_float32(x_ptr + start, at, here, C=C, HEAD=HEAD, TAIL=TAIL)
        head_normal, tail_normal = (head_x - mean) * rstd, (tail_x - mean) * rstd
        group = first_group + position
        of_groups = dpooled_ptr + first_group * C
        head_pooled = load_of_groups(of_groups, position, here, head_column, WIDTH=C, STRIDE=C, ONE=ONE)
        tail_pooled = load_of_groups(of_groups, position, here, tail_column, WIDTH=C, STRIDE=C, ONE=ONE)
        head_scale, tail_scale = load_row_vector(norm_weight_ptr, C=C, HEAD=HEAD, TAIL=TAIL)
        head_bias, tail_bias = load_row_vector(norm_bias_ptr, C=C, HEAD=HEAD, TAIL=TAIL)
        dscore = tl.sum((head_normal * head_scale + head_bias) * head_pooled, 1)
        dscore += tl.sum((tail_normal * tail_scale + tail_bias) * tail_pooled, 1)
        kept = _kept(seed_ptr, sample, position * tokens + token, here, score_keep, score_scale)
        weight = tl.load(scores_ptr + group * tokens + token, mask=here, other=0.0)
        dscore = _score_gradient(dscore, weight, kept, dtotal_ptr + group, slope_ptr + group, here, ONE=ONE)
        tl.store(dscores_ptr + first_row + at, dscore, mask=here)
        weight *= kept
        # Head and tail one after the other: a program has no registers for more loads on their way.
        head_grad = _add_pooled(
            dx_ptr, qkv_weight_ptr, at, here, head_column, weight, dscore, head_pooled, head_scale, C=C
        )
        if known_ptr is not None:
            store_sample_gradient(
                residual_ptr + start, dx_ptr, at, here, head_column, head_grad, head_normal, rstd,
                mean_grad, mean_product, C=C,
            )  # fmt: skip
        tail_grad = _add_pooled(
            dx_ptr, qkv_weight_ptr, at, here, tail_column, weight, dscore, tail_pooled, tail_scale, C=C
        )
        if known_ptr is not None:
            store_sample_gradient(
                residual_ptr + start, dx_ptr, at, here, tail_column, tail_grad, tail_normal, rstd,
                mean_grad, mean_product, C=C,
            )  # fmt: skip
        else:
            store_norm_gradient(
                residual_ptr + start, dx_ptr, sums_ptr, at, first_row + at, here,
                head_grad, tail_grad, head_normal, tail_normal, rstd, rows,
                PER_SAMPLE=PER_SAMPLE, C=C, HEAD=HEAD, TAIL=TAIL,
            )  # fmt: skip


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
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
