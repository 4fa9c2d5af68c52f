"""Triton kernels of global_representation for layers of separable attention on maps of few tokens: as in
spread_kernels.py a layer is two launches, each spread over the whole GPU, with its norms of samples.

The first is attention; a program has some tokens of a group and a share of the values. What its group's tokens
are weighted to it computes for itself, from tokens in cache. The second is the feed-forward network; a program has some
tokens and a share of the hidden channels. Either has a part of a sum, and of the programs with the same tokens the one
that comes last adds up the parts, in their order whichever it is, so that results are the same in every run. It alone
sees whole tokens, and measures them for the norm of the sample that the next launch begins with. Which one is last is
counted in integers; no program waits for another.

Between the launches tokens lie group by group: (rows, C), where a row is group * tokens + token. A block is BLOCK_M
tokens of a group, of which there are `blocks`; its mean and sum of squared deviations are its entry in a (2, blocks of
all groups) workspace of moments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..separable_attention.kernels import LOWEST
from ..triton_common import RELU, SILU, activate, at_least_zero, inverse_std, merge_moments
from ..triton_launch import jit_kernel
from ..triton_row_kernels import (
    add_columns_product,
    load_row_vector,
    load_rows_in_float32,
    normalise,
    row_columns,
    store_rows,
)
from .spread_kernels import pixel_of_row, project, round_weights

_NOT_SPECIALIZED = ["rows", "tokens", "pixels", "width", "blocks", "programs", "eps"]


@triton.jit
def _block_of_tokens(tokens, blocks, BLOCK_M: tl.constexpr):
    """Group and rows of a program, and which of them there are."""
    group = tl.program_id(0) // blocks
    token = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    return group, group * tokens + token, token < tokens


@triton.jit
def _store_moments(
    moments_ptr,
    head,
    tail,
    valid,
    programs,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Mean and sum of squared deviations of all values of the program's block, as they are stored. The second sum
    corrects the mean, so that one of many standard deviations costs no accuracy."""
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    head_mask, tail_mask = valid[:, None] & (head_column < C)[None, :], valid[:, None] & (tail_column < C)[None, :]
    head = tl.where(head_mask, head.to(DTYPE).to(tl.float32), 0.0)
    tail = tl.where(tail_mask, tail.to(DTYPE).to(tl.float32), 0.0)
    count = tl.sum(valid.to(tl.float32), 0) * C
    mean = (tl.sum(tl.sum(head, 1), 0) + tl.sum(tl.sum(tail, 1), 0)) / count
    head, tail = tl.where(head_mask, head - mean, 0.0), tl.where(tail_mask, tail - mean, 0.0)
    offset = (tl.sum(tl.sum(head, 1), 0) + tl.sum(tl.sum(tail, 1), 0)) / count
    m2 = tl.sum(tl.sum(head * head, 1), 0) + tl.sum(tl.sum(tail * tail, 1), 0)
    tl.store(moments_ptr + tl.program_id(0), mean + offset)
    tl.store(moments_ptr + programs + tl.program_id(0), at_least_zero(m2 - count * offset * offset))


@triton.jit
def _load_statistics(
    moments_ptr, sample, tokens, blocks, eps, C: tl.constexpr, BLOCK_M: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of a sample, from the moments of its blocks, of which there are at most
    BLOCKS."""
    block = tl.arange(0, BLOCKS)
    valid = block < POSITIONS * blocks
    rows = tl.where(valid, tl.minimum(tokens - block % blocks * BLOCK_M, BLOCK_M), 0)
    at = moments_ptr + sample * (POSITIONS * blocks) + block
    mean = tl.load(at, mask=valid, other=0.0)
    m2 = tl.load(at + tl.num_programs(0), mask=valid, other=0.0)
    total, mean, m2 = merge_moments(rows.to(tl.float32) * C, mean[:, None], m2[:, None])
    return tl.sum(mean, 0), inverse_std(tl.sum(m2, 0) / total, eps)


@triton.jit
def _add_up(
    head, tail, part_ptr, counter_ptr, bias_ptr, t_ptr, y_ptr, moments_ptr, row, valid, rows,
    SHARES: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Makes y = t + bias + all parts of the program's tokens and the moments of the block. Where there are several
    parts each program writes its own, and the last of those with these tokens goes on, and leaves their counter as it
    was."""
    last = True
    if SHARES > 1:
        store_rows(part_ptr + tl.program_id(1) * rows * C, row, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)
        tl.debug_barrier()  # all threads' parts are written before the one that counts says so
        last = tl.atomic_add(counter_ptr + tl.program_id(0), 1, sem="acq_rel", scope="gpu") == SHARES - 1
    if last:
        if SHARES > 1:
            tl.debug_barrier()
            head = tl.zeros(head.shape, tl.float32)
            tail = tl.zeros(tail.shape, tl.float32)
            for share in tl.static_range(SHARES):
                head_part, tail_part = load_rows_in_float32(
                    part_ptr + share * rows * C, row, valid, C=C, HEAD=HEAD, TAIL=TAIL
                )
                head += head_part
                tail += tail_part
            tl.store(counter_ptr + tl.program_id(0), 0)
        head_bias, tail_bias = load_row_vector(bias_ptr, C=C, HEAD=HEAD, TAIL=TAIL)
        head_t, tail_t = load_rows_in_float32(t_ptr, row, valid, C=C, HEAD=HEAD, TAIL=TAIL)
        head += head_t + head_bias
        tail += tail_t + tail_bias
        store_rows(y_ptr, row, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)
        _store_moments(
            moments_ptr, head, tail, valid, tl.num_programs(0), C=C, HEAD=HEAD, TAIL=TAIL, DTYPE=y_ptr.dtype.element_ty
        )


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def enter_fwd_kernel(
    x_ptr,  # (B, H, W, C)
    t_ptr, moments_ptr, counter_ptr,  # written: (rows, C); (2, programs); (programs,), int32, zeros
    weights, packed_ptr,  # of later launches; written: these, rounded
    tokens, pixels, width, blocks, programs,
    SIZES: tl.constexpr, BLOCK: tl.constexpr,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Tokens group by group, and the moments of each block. A program has a block; those behind the `programs` blocks
    round BLOCK values of a weight."""
    if tl.program_id(0) >= programs:
        round_weights(weights, packed_ptr, tl.program_id(0) - programs, SIZES=SIZES, BLOCK=BLOCK)
    else:
        _, row, valid = _block_of_tokens(tokens, blocks, BLOCK_M=BLOCK_M)
        pixel = pixel_of_row(row, tokens, pixels, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
        head, tail = load_rows_in_float32(x_ptr, pixel, valid, C=C, HEAD=HEAD, TAIL=TAIL)
        store_rows(t_ptr, row, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)
        _store_moments(
            moments_ptr, head, tail, valid, programs, C=C, HEAD=HEAD, TAIL=TAIL, DTYPE=t_ptr.dtype.element_ty
        )
        tl.store(counter_ptr + tl.program_id(0), 0)


@triton.jit
def _pooled(
    t_ptr, group, tokens, mean, rstd, norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, qkv_bias_ptr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The mean of norm1(t) over a group, weighted by the softmax of the scores, the first output of qkv: two rows. What
    the norm adds to all scores alike is left out."""
    head_norm, tail_norm = load_row_vector(norm_weight_ptr, C=C, HEAD=HEAD, TAIL=TAIL)
    head_weight, tail_weight = load_row_vector(qkv_weight_ptr, C=C, HEAD=HEAD, TAIL=TAIL)
    head_weight *= head_norm * rstd
    tail_weight *= tail_norm * rstd
    bias = 0.0
    if qkv_bias_ptr is not None:
        bias = tl.load(qkv_bias_ptr).to(tl.float32)
    # Each lane has a softmax of its own: nothing crosses lanes before the end.
    largest = tl.full((BLOCK_K,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float32)
    head_sum = tl.zeros((BLOCK_K, HEAD), tl.float32)
    tail_sum = tl.zeros((BLOCK_K, TAIL), tl.float32)
    for first in tl.range(0, tokens, BLOCK_K):
        token = first + tl.arange(0, BLOCK_K)
        valid = token < tokens
        head, tail = load_rows_in_float32(t_ptr, group * tokens + token, valid, C=C, HEAD=HEAD, TAIL=TAIL)
        head -= mean
        tail -= mean
        score = tl.sum(head * head_weight, 1) + tl.sum(tail * tail_weight, 1) + bias
        new_largest = tl.maximum(largest, tl.where(valid, score, LOWEST))
        shrink = tl.exp(largest - new_largest)
        weight = tl.where(valid, tl.exp(score - new_largest), 0.0)
        largest = new_largest
        total = total * shrink + weight
        head_sum = head_sum * shrink[:, None] + weight[:, None] * head
        tail_sum = tail_sum * shrink[:, None] + weight[:, None] * tail
    shrink = tl.exp(largest - tl.max(largest, 0))
    scale = rstd / tl.sum(total * shrink, 0)
    head_sum = tl.sum(head_sum * shrink[:, None], 0)
    tail_sum = tl.sum(tail_sum * shrink[:, None], 0)
    head_bias, tail_bias = load_row_vector(norm_bias_ptr, C=C, HEAD=HEAD, TAIL=TAIL)
    return head_sum[None, :] * scale * head_norm + head_bias, tail_sum[None, :] * scale * tail_norm + tail_bias


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def attend_fwd_kernel(
    t_ptr, moments_ptr,  # (rows, C); of its blocks
    norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, qkv_bias_ptr,  # (C,), (C,), (1 + 2 C, C), (1 + 2 C,) or None
    out_weight_ptr, out_bias_ptr,  # (C, C), (C,) or None
    part_ptr, counter_ptr,  # workspaces: (SHARES, rows, C), float32; (blocks of all groups,), int32, zeros
    y_ptr, new_moments_ptr,  # written: (rows, C), like t; of its blocks
    rows, tokens, blocks, eps,
    SHARES: tl.constexpr, SHARE: tl.constexpr, POSITIONS: tl.constexpr, BLOCKS: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = t + out_proj(ReLU(values) * context), where with score, keys and values = qkv(norm1(t)) the context is what
    the keys' part of qkv makes of the group's tokens, weighted by softmax(score). A program has a block and SHARE
    values, BLOCK_N at a time."""
    dtype: tl.constexpr = t_ptr.dtype.element_ty
    group, row, valid = _block_of_tokens(tokens, blocks, BLOCK_M=BLOCK_M)
    mean, rstd = _load_statistics(
        moments_ptr, group // POSITIONS, tokens, blocks, eps, C=C, BLOCK_M=BLOCK_M, POSITIONS=POSITIONS, BLOCKS=BLOCKS
    )
    head_mean, tail_mean = _pooled(
        t_ptr, group, tokens, mean, rstd, norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, qkv_bias_ptr,
        C=C, HEAD=HEAD, TAIL=TAIL, BLOCK_K=BLOCK_K,
    )  # fmt: skip
    # The same in each row, of which a product needs 16.
    head_mean = tl.broadcast_to(head_mean, (16, HEAD)).to(dtype)
    tail_mean = tl.broadcast_to(tail_mean, (16, TAIL)).to(dtype)
    head, tail = load_rows_in_float32(t_ptr, row, valid, C=C, HEAD=HEAD, TAIL=TAIL)
    normed_head, normed_tail = normalise(
        head, tail, mean, rstd, norm_weight_ptr, norm_bias_ptr, DTYPE=dtype, C=C, HEAD=HEAD, TAIL=TAIL
    )
    head = tl.zeros((BLOCK_M, HEAD), tl.float32)
    tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    for first in range(0, SHARE, BLOCK_N):
        column = tl.program_id(1) * SHARE + first + tl.arange(0, BLOCK_N)
        context = project(
            head_mean, tail_mean, qkv_weight_ptr, qkv_bias_ptr, 1 + column, OUT=1 + C, C=C, HEAD=HEAD, TAIL=TAIL
        )
        if BLOCK_M > 16:
            context = tl.sum(context, 0)[None, :] * 0.0625
        values = project(
            normed_head, normed_tail, qkv_weight_ptr, qkv_bias_ptr, 1 + C + column, OUT=1 + 2 * C,
            C=C, HEAD=HEAD, TAIL=TAIL,
        )  # fmt: skip
        attended = (activate(values, ACT=RELU, DTYPE=dtype) * context).to(dtype)
        head, tail = add_columns_product(
            head, tail, attended, out_weight_ptr, column, WIDTH=C, C=C, HEAD=HEAD, TAIL=TAIL
        )
    _add_up(
        head, tail, part_ptr, counter_ptr, out_bias_ptr, t_ptr, y_ptr, new_moments_ptr, row, valid, rows,
        SHARES=SHARES, C=C, HEAD=HEAD, TAIL=TAIL,
    )  # fmt: skip


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def feed_fwd_kernel(
    t_ptr, moments_ptr,  # (rows, C); of its blocks
    norm_weight_ptr, norm_bias_ptr, weight1_ptr, bias1_ptr,  # (C,), (C,), (F, C), (F,) or None
    weight2_ptr, bias2_ptr,  # (C, F), (C,) or None
    part_ptr, counter_ptr,  # workspaces: (SHARES, rows, C), float32; (blocks of all groups,), int32, zeros
    y_ptr, new_moments_ptr,  # written: (rows, C), like t; of its blocks
    rows, tokens, blocks, eps,
    SHARES: tl.constexpr, F: tl.constexpr, SHARE: tl.constexpr, POSITIONS: tl.constexpr, BLOCKS: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """y = t + fc2(SiLU(fc1(norm2(t)))). A program has a block and SHARE hidden channels, BLOCK_F at a time."""
    dtype: tl.constexpr = t_ptr.dtype.element_ty
    group, row, valid = _block_of_tokens(tokens, blocks, BLOCK_M=BLOCK_M)
    mean, rstd = _load_statistics(
        moments_ptr, group // POSITIONS, tokens, blocks, eps, C=C, BLOCK_M=BLOCK_M, POSITIONS=POSITIONS, BLOCKS=BLOCKS
    )
    head, tail = load_rows_in_float32(t_ptr, row, valid, C=C, HEAD=HEAD, TAIL=TAIL)
    normed_head, normed_tail = normalise(
        head, tail, mean, rstd, norm_weight_ptr, norm_bias_ptr, DTYPE=dtype, C=C, HEAD=HEAD, TAIL=TAIL
    )
    head = tl.zeros((BLOCK_M, HEAD), tl.float32)
    tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    for first in range(0, SHARE, BLOCK_F):
        column = tl.program_id(1) * SHARE + first + tl.arange(0, BLOCK_F)
        hidden = project(normed_head, normed_tail, weight1_ptr, bias1_ptr, column, OUT=F, C=C, HEAD=HEAD, TAIL=TAIL)
        hidden = activate(hidden, ACT=SILU, DTYPE=dtype).to(dtype)
        head, tail = add_columns_product(head, tail, hidden, weight2_ptr, column, WIDTH=F, C=C, HEAD=HEAD, TAIL=TAIL)
    _add_up(
        head, tail, part_ptr, counter_ptr, bias2_ptr, t_ptr, y_ptr, new_moments_ptr, row, valid, rows,
        SHARES=SHARES, C=C, HEAD=HEAD, TAIL=TAIL,
    )  # fmt: skip


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def leave_fwd_kernel(
    t_ptr, moments_ptr,  # (rows, C); of its blocks
    norm_weight_ptr, norm_bias_ptr,  # of the final norm, (C,), or None
    y_ptr,  # written: (B, H, W, C)
    tokens, pixels, width, blocks, eps,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, BLOCKS: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The final norm, back at the tokens' pixels. A program has a block."""
    group, row, valid = _block_of_tokens(tokens, blocks, BLOCK_M=BLOCK_M)
    head, tail = load_rows_in_float32(t_ptr, row, valid, C=C, HEAD=HEAD, TAIL=TAIL)
    if norm_weight_ptr is not None:
        POSITIONS: tl.constexpr = PATCH_H * PATCH_W
        mean, rstd = _load_statistics(
            moments_ptr, group // POSITIONS, tokens, blocks, eps,
            C=C, BLOCK_M=BLOCK_M, POSITIONS=POSITIONS, BLOCKS=BLOCKS,
        )  # fmt: skip
        head, tail = normalise(
            head, tail, mean, rstd, norm_weight_ptr, norm_bias_ptr, DTYPE=tl.float32, C=C, HEAD=HEAD, TAIL=TAIL
        )
    pixel = pixel_of_row(row, tokens, pixels, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    store_rows(y_ptr, pixel, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)
