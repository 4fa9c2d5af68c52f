"""Triton kernels of global_representation for maps of few tokens, on which a program that takes tokens through all
layers would leave most of a GPU idle: a layer is two launches, each spread over the whole GPU.

The first makes queries, keys and values; a program has some tokens and a share of the outputs. The second does the
rest; a program has some tokens and a share of the hidden channels, and computes what its tokens attend to for itself.
It writes a part of the feed-forward network's sum; who needs the tokens next adds up the parts in their order when it
starts, so that results are the same in every run and adding up costs no launch. What several programs compute alike
runs on multiprocessors that would be idle. Behind the last layer nothing starts: of the programs with the same tokens
the one that comes last adds up, and makes the final norm. Which one is last is counted in integers; no program waits
for another.

Between the launches tokens lie group by group: (rows, C), where a row is group * tokens + token.

The first launch of a stage has programs beside its own that round the weights of all later ones: it waits for its rows
and not for bytes, so these cost next to nothing there, and a launch by themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import SILU, activate, dot, load_tile, load_vector, pixel_of_token, store_tile
from ..triton_launch import jit_kernel
from ..triton_row_kernels import (
    add_columns_product,
    load_row_vector,
    load_rows_in_float32,
    load_weight,
    multiply_rows,
    normalise,
    row_columns,
    row_statistics,
    store_rows,
)

# Few tokens: positions in these tensors are counted in 32 bits.
_NOT_SPECIALIZED = ["rows", "tokens", "pixels", "width", "blocks", "programs", "tiles", "eps", "scale"]


@triton.jit
def project(
    head, tail, weight_ptr, bias_ptr, output, OUT: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr
):
    """Outputs `output` of a linear map (OUT, C) of normalised rows, in float32; zeros for outputs from OUT on."""
    head_weight, tail_weight = load_weight(weight_ptr, output, head, C=C, OUT=OUT, HEAD=HEAD, TAIL=TAIL)
    sums = multiply_rows(head, tail, head_weight, tail_weight)
    return sums + load_vector(bias_ptr, output, WIDTH=OUT)[None, :]


@triton.jit
def pixel_of_row(row, tokens, pixels, width, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr):
    """The pixel of the map that a row is."""
    group, token = row // tokens, row % tokens
    POSITIONS: tl.constexpr = PATCH_H * PATCH_W
    pixel = pixel_of_token(token, group % POSITIONS, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    return group // POSITIONS * pixels + pixel


@triton.jit
def _load_tokens(
    t_ptr, part_ptr, bias_ptr, row, valid, rows, PARTS: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Tokens in float32, with what the parts of the branch before them add up to, and its bias."""
    head, tail = load_rows_in_float32(t_ptr, row, valid, C=C, HEAD=HEAD, TAIL=TAIL)
    if part_ptr is not None:
        head_bias, tail_bias = load_row_vector(bias_ptr, C=C, HEAD=HEAD, TAIL=TAIL)
        head += head_bias
        tail += tail_bias
        for part in tl.static_range(PARTS):
            head_part, tail_part = load_rows_in_float32(
                part_ptr + part * rows * C, row, valid, C=C, HEAD=HEAD, TAIL=TAIL
            )
            head += head_part
            tail += tail_part
    return head, tail


@triton.jit
def _norm(
    head, tail, weight_ptr, bias_ptr, eps, DTYPE: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr
):
    """The norm of each row, rounded to DTYPE."""
    mean, rstd = row_statistics(head, tail, eps, C=C, HEAD=HEAD, TAIL=TAIL)
    return normalise(
        head, tail, mean[:, None], rstd[:, None], weight_ptr, bias_ptr, DTYPE=DTYPE, C=C, HEAD=HEAD, TAIL=TAIL
    )


@triton.jit
def round_weights(weights, packed_ptr, block, SIZES: tl.constexpr, BLOCK: tl.constexpr):
    """Writes values `block` * BLOCK.. of the weights to their places in a packed tensor, rounded to its dtype: they lie
    there one behind the other, each in blocks of its own, SIZES values each."""
    if len(SIZES) > 0:
        weight_ptr, first, place, size = weights[0], 0, 0, SIZES[0]  # of the weight that the block is of
        next_first, next_place = 0, 0
        for i in tl.static_range(len(SIZES)):
            here = block >= next_first
            weight_ptr = tl.where(here, weights[i], weight_ptr)
            first = tl.where(here, next_first, first)
            place, size = tl.where(here, next_place, place), tl.where(here, SIZES[i], size)
            next_first += (SIZES[i] + BLOCK - 1) // BLOCK
            next_place += (SIZES[i] + 63) // 64 * 64
        at = (block - first) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(weight_ptr + at, mask=at < size)
        tl.store(packed_ptr + place + at, value.to(packed_ptr.dtype.element_ty), mask=at < size)


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def qkv_fwd_kernel(
    t_ptr,  # (B, H, W, C) in the first layer, else (rows, C)
    part_ptr, part_bias_ptr,  # of the layer before: (PARTS, rows, C), float32, and (C,) or None; None in the first one
    norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr,  # (C,), (C,), (3 C, C), (3 C,) or None
    sum_ptr, qkv_ptr,  # written: (rows, C), the tokens in front of this layer, and (rows, 3 C), both like t
    counter_ptr,  # written in the first layer: (programs,), int32, zeros
    weights, packed_ptr,  # in the first layer: weights of later launches; written: these, rounded
    rows, tokens, pixels, width, programs, tiles, eps,
    SIZES: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, SHARE: tl.constexpr, PROGRAMS: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """qkv(norm1(t)). A program has BLOCK_M tokens and SHARE outputs, BLOCK_N at a time. Programs behind those of the
    `tiles` blocks of tokens round BLOCK values of a weight."""
    if tl.program_id(0) >= tiles:
        block = (tl.program_id(0) - tiles) * tl.num_programs(1) + tl.program_id(1)
        round_weights(weights, packed_ptr, block, SIZES=SIZES, BLOCK=BLOCK)
    else:
        dtype: tl.constexpr = t_ptr.dtype.element_ty
        row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        valid, at = row < rows, row
        if part_ptr is None:
            at = pixel_of_row(row, tokens, pixels, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
            if tl.program_id(0) == 0 and tl.program_id(1) == 0:
                program = tl.arange(0, PROGRAMS)
                tl.store(counter_ptr + program, 0, mask=program < programs)
        head, tail = _load_tokens(
            t_ptr, part_ptr, part_bias_ptr, at, valid, rows, PARTS=PARTS, C=C, HEAD=HEAD, TAIL=TAIL
        )
        if tl.program_id(1) == 0:
            store_rows(sum_ptr, row, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)
        head, tail = _norm(head, tail, norm_weight_ptr, norm_bias_ptr, eps, DTYPE=dtype, C=C, HEAD=HEAD, TAIL=TAIL)
        for first in range(0, SHARE, BLOCK_N):
            output = tl.program_id(1) * SHARE + first + tl.arange(0, BLOCK_N)
            block = project(head, tail, weight_ptr, bias_ptr, output, OUT=3 * C, C=C, HEAD=HEAD, TAIL=TAIL)
            store_tile(qkv_ptr, row, valid, output, block, WIDTH=3 * C)


@triton.jit
def _attend(
    qkv_ptr, group, token, tokens, first, scale,
    DIM: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What tokens `token` of a group attend to in the head whose channels begin with `first`: (rows, BLOCK_D), zeros
    beyond the head."""
    lane, key = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    qkv_ptr += group * tokens * (3 * C) + first
    q = load_tile(qkv_ptr, token, token < tokens, lane, WIDTH=DIM, STRIDE=3 * C)
    k = load_tile(qkv_ptr + C, key, key < tokens, lane, WIDTH=DIM, STRIDE=3 * C)
    v = load_tile(qkv_ptr + 2 * C, key, key < tokens, lane, WIDTH=DIM, STRIDE=3 * C)
    scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_K), tl.float32)) * scale
    scores = tl.where((key < tokens)[None, :], scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    out = dot(weights.to(v.dtype), v, tl.zeros(q.shape, tl.float32))
    return (out / tl.sum(weights, 1)[:, None]).to(q.dtype)


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def layer_fwd_kernel(
    t_ptr, qkv_ptr,  # (rows, C), (rows, 3 C)
    out_ptr, out_bias_ptr,  # (C, C), (C,) or None
    norm_weight_ptr, norm_bias_ptr, weight1_ptr, bias1_ptr, weight2_ptr,  # (C,), (C,), (F, C), (F,) or None, (C, F)
    sum_ptr,  # written: (rows, C), like t: the tokens behind attention
    part_ptr,  # written: (PARTS, rows, C), float32: what each share of the hidden channels adds to them
    bias2_ptr, final_weight_ptr, final_bias_ptr,  # of the last layer: fc2's, the final norm's, (C,) or None
    counter_ptr, y_ptr,  # of the last layer: a counter for each block, zeros; written, (B, H, W, C)
    rows, tokens, pixels, width, blocks, eps, scale,
    PARTS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, F: tl.constexpr, SHARE: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """t = t + out_proj(attention(qkv)), and fc2(SiLU(fc1(norm2(t)))) without its bias, in a part for each share of the
    hidden channels; with a y the final norm of their sum, back at the tokens' pixels. A program has BLOCK_M tokens of a
    group, of which there are `blocks` blocks, and SHARE hidden channels, BLOCK_F at a time."""
    dtype: tl.constexpr = t_ptr.dtype.element_ty
    group = tl.program_id(0) // blocks
    token = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    row, valid = group * tokens + token, token < tokens
    head, tail = load_rows_in_float32(t_ptr, row, valid, C=C, HEAD=HEAD, TAIL=TAIL)
    head_bias, tail_bias = load_row_vector(out_bias_ptr, C=C, HEAD=HEAD, TAIL=TAIL)
    head += head_bias
    tail += tail_bias
    head_row, tail_row = row_columns(HEAD=HEAD, TAIL=TAIL)
    lane = tl.arange(0, BLOCK_D)
    for i in range(HEADS):
        out = _attend(qkv_ptr, group, token, tokens, i * DIM, scale, DIM=DIM, C=C, BLOCK_D=BLOCK_D, BLOCK_K=BLOCK_K)
        weight = load_tile(out_ptr + i * DIM, head_row, head_row < C, lane, WIDTH=DIM, STRIDE=C).to(out.dtype)
        head = dot(out, tl.trans(weight), head)
        weight = load_tile(out_ptr + i * DIM, tail_row, tail_row < C, lane, WIDTH=DIM, STRIDE=C).to(out.dtype)
        tail = dot(out, tl.trans(weight), tail)
    if tl.program_id(1) == 0:
        store_rows(sum_ptr, row, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)
    normed_head, normed_tail = _norm(
        head, tail, norm_weight_ptr, norm_bias_ptr, eps, DTYPE=dtype, C=C, HEAD=HEAD, TAIL=TAIL
    )
    head = tl.zeros((BLOCK_M, HEAD), tl.float32)
    tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    for first in range(0, SHARE, BLOCK_F):
        column = tl.program_id(1) * SHARE + first + tl.arange(0, BLOCK_F)
        hidden = project(normed_head, normed_tail, weight1_ptr, bias1_ptr, column, OUT=F, C=C, HEAD=HEAD, TAIL=TAIL)
        hidden = activate(hidden, ACT=SILU, DTYPE=dtype).to(dtype)
        head, tail = add_columns_product(head, tail, hidden, weight2_ptr, column, WIDTH=F, C=C, HEAD=HEAD, TAIL=TAIL)
    store_rows(part_ptr + tl.program_id(1) * rows * C, row, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)
    if y_ptr is not None:
        tl.debug_barrier()  # all threads' parts are written before the one that counts says so
        if tl.atomic_add(counter_ptr + tl.program_id(0), 1, sem="acq_rel", scope="gpu") == PARTS - 1:
            tl.debug_barrier()
            head, tail = _load_tokens(
                sum_ptr, part_ptr, bias2_ptr, row, valid, rows, PARTS=PARTS, C=C, HEAD=HEAD, TAIL=TAIL
            )
            if final_weight_ptr is not None:
                head, tail = _norm(
                    head, tail, final_weight_ptr, final_bias_ptr, eps, DTYPE=tl.float32, C=C, HEAD=HEAD, TAIL=TAIL
                )
            pixel = pixel_of_row(row, tokens, pixels, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
            store_rows(y_ptr, pixel, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)
