"""Triton kernels of patch_attention.

A group is one attention head of the pixels of a sample that share their position inside a patch. The heads of a block
run side by side because they share cache lines: the part of a pixel that belongs to a head is 32 to 128 bytes.

Up to 256 tokens, which the maps of an image of 256x256 have at most, a program takes a whole group. Backward keeps the
keys and the sums of their gradients and walks over the queries, whose gradients are complete after a step: the scores
are computed once, everything is read once, and nothing is added up across programs, so that the result is the same in
every run.

Of a longer group a program owns a block of tokens and walks over all of them. Backward takes the block first as keys,
then as queries, and computes the scores twice. What the backward pass of the softmax subtracts, the product of out and
its gradient, is then computed by a launch of its own: for each block of queries again it was a quarter of the
instructions. With dropout it still is: what the mask takes beside a second pointer would spill.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..registry import Call
from ..sizes import cdiv, next_power_of_2
from ..triton_common import (
    OLD_TRITON,
    contiguous,
    dot,
    dropout_kept,
    dropout_key,
    dropout_threshold,
    multiplies_from_shared_memory,
    next_tokens,
    on_device,
    pixel_of_token,
    token_step,
)
from ..triton_launch import jit_kernel
from ..triton_math import opaque

LOG2E = 1 / math.log(2)
LN2 = tl.constexpr(math.log(2))

_NOT_SPECIALIZED = ["pixels_per_sample", "width", "tokens", "blocks", "threshold", "scale", "keep_scale"]


def whole_group(qkv: Tensor, dim: int, tokens: int, dropout: bool) -> int | None:
    """How many tokens a program has room for that takes a group of `tokens` at once: 16, one tile of the matrix units,
    64 or 256, so that there are few binaries for all maps; None where a program takes a block of a group."""
    if tokens <= 16:
        return 16
    if qkv.dtype is torch.float32 or dim > 64 or tokens > 256:
        return None
    if tokens <= 64:
        return 64
    # elsewhere the operands of so high a tile would not fit the registers, nor here what the mask takes
    return 256 if multiplies_from_shared_memory(qkv) and not dropout else None


def configurations(dim: int, whole: int | None, dtype: torch.dtype, backward: bool) -> list[dict[str, int]]:
    """A program's BLOCK of tokens, and the STEP that it walks over the others in. Float32 has no matrix units of its
    own precision: its products are made in registers, so its tiles are small."""
    columns = max(next_power_of_2(dim), 16)
    float32 = dtype is torch.float32
    stages: tuple[int, ...] = (2,) if float32 else (2, 1)
    if whole == 16:
        tiles = [(16, 16, 4)] if float32 or columns > 64 or backward else [(16, 16, 4), (16, 16, 2)]
        stages = (2,) if float32 else (1,)
    elif whole == 64:
        tiles = [(64, 16, 4), (64, 32, 4)] if backward else [(64, 32, 4), (64, 64, 4)]
    elif whole == 256:
        tiles = [(256, 16 if columns > 32 else 32, 16)] if backward else [(256, 64, 16), (256, 32, 16)]
    elif float32:
        tiles = [(32, 16, 8) if columns <= 64 else (16, 16, 4)]
    elif columns > 64:
        tiles = [(32, 32, 4 if backward else 8)]
    elif backward:
        tiles = [(32, 32, 4), (64, 32, 8), (32, 64, 4)]
        if dim % 4:  # rows that are loaded element by element would spill with 4 warps
            tiles[:2] = tiles[1::-1]
    else:
        tiles = [(64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 8)]
    tiles = dict.fromkeys((*tile, n) for n in stages for tile in tiles)
    return [
        {"BLOCK": block, "STEP": step, "BLOCK_D": columns, "num_warps": warps, "num_stages": n}
        for block, step, warps, n in tiles
    ]


def configuration(qkv: Tensor, dim: int, whole: int | None, backward: bool) -> dict[str, int]:
    kernel = f"patch_attention{'' if whole is None else f'_{whole}'}_{'bwd' if backward else 'fwd'}"
    config = tuning.choose(kernel, qkv, (dim,), lambda: configurations(dim, whole, qkv.dtype, backward))
    return {"WHOLE": whole is not None, **config, **(_unhurried(qkv, config) if backward else {})}


def _unhurried(qkv: Tensor, config: dict[str, int]) -> dict[str, int]:
    """Options with which an old compiler does not spill a register of backward to fit one more block on a
    multiprocessor: as it does in float32 in tiles of 16 tokens, else in those of heads of 16."""
    float32, columns = qkv.dtype is torch.float32, config["BLOCK_D"]
    small = columns <= 64 and config["BLOCK"] == 16 if float32 else columns == 16 and config["num_warps"] == 4
    return {"maxnreg": 128} if OLD_TRITON and small and tuning.architecture(qkv).startswith("sm_") else {}


def bytes_moved(qkv: Tensor) -> tuple[int, int]:
    """Bytes of full-size tensors that the forward and the backward pass read and write; the log-sum-exp is a few per
    cent more."""
    size = qkv.numel() * qkv.element_size()
    return size * 4 // 3, size * 8 // 3


@triton.jit
def _group(blocks, HEADS: tl.constexpr, POSITIONS: tl.constexpr):
    """(sample, position inside a patch, block of tokens, head) of this program."""
    program = tl.program_id(0)
    head = program % HEADS
    program = program // HEADS
    block = program % blocks
    program = program // blocks
    return program // POSITIONS, program % POSITIONS, block, head


@triton.jit
def _first(position, width, STEP: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr):
    """Column, in patches, and pixel of the first STEP tokens of a group, from which next_tokens goes on."""
    token = tl.arange(0, STEP)
    return token % (width // PATCH_W), pixel_of_token(token, position, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)


@triton.jit
def _load(ptr, pixel, valid, channel, STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head of some tokens, (tokens, BLOCK_D); zeros beyond the head and where a token is not valid."""
    lane = tl.arange(0, BLOCK_D)
    mask = valid[:, None]
    if DIM != BLOCK_D:
        mask = mask & (lane < DIM)[None, :]
    return tl.load(ptr + pixel[:, None] * STRIDE + (channel + lane)[None, :], mask=mask, other=0.0)


@triton.jit
def _store(ptr, pixel, valid, channel, tile, STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    lane = tl.arange(0, BLOCK_D)
    mask = valid[:, None]
    if DIM != BLOCK_D:
        mask = mask & (lane < DIM)[None, :]
    tl.store(ptr + pixel[:, None] * STRIDE + (channel + lane)[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    maximum, total, sums, q, qkv_ptr, pixel, query, key, tokens, group, channel, mask_key, threshold, scale, keep_scale,
    CHANNELS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One step of attention_fwd_kernel: what the running maximum, the sum of probabilities and the sums of values are
    with the keys `key` at `pixel`. Only the LAST ones may be beyond the group."""
    there = key < tokens if LAST else key >= 0
    k = _load(qkv_ptr, pixel, there, CHANNELS + channel, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
    scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], key.shape[0]), tl.float32))
    if LAST:
        scores = tl.where(there[None, :], scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale)
    shrink = tl.exp2(maximum - new_maximum)
    probabilities = tl.exp2(scores * scale - new_maximum[:, None])
    total = total * shrink + tl.sum(probabilities, 1)
    if DROPOUT:
        kept = dropout_kept(mask_key, (group * tokens + query[:, None]) * tokens + key[None, :], threshold)
        probabilities *= tl.where(kept, keep_scale, 0.0)
    v = _load(qkv_ptr, pixel, there, 2 * CHANNELS + channel, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
    return new_maximum, total, dot(probabilities.to(v.dtype), v, sums * shrink[:, None])


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def _attention_fwd_kernel(
    qkv_ptr, seed_ptr,  # (B, H, W, 3 HEADS DIM); one int64, or None without dropout
    out_ptr, lse_ptr,  # written: (B, H, W, HEADS DIM), like qkv; (B, positions, HEADS, tokens), float32, or None
    pixels_per_sample, width, tokens, blocks, scale, threshold, keep_scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = dropout(softmax(q k^T / sqrt(DIM))) v for the tokens of each group, and lse = log2(sum(exp2(scores))) of
    each query, where scores = q k^T * scale and scale = log2(e) / sqrt(DIM).

    A program has BLOCK queries of a group, WHOLE says all, and walks over the keys, STEP at a time, with a running
    maximum. Reads q once, k and v once for each block of queries, from cache; writes out and lse once."""
    POSITIONS: tl.constexpr = PATCH_H * PATCH_W
    CHANNELS: tl.constexpr = HEADS * DIM
    MOST: tl.constexpr = BLOCK if WHOLE else None
    sample, position, block, head = _group(blocks, HEADS=HEADS, POSITIONS=POSITIONS)
    channel = head * DIM
    group = position * HEADS + head  # of this sample
    pixels = sample.to(tl.int64) * pixels_per_sample
    qkv_ptr += pixels * (3 * CHANNELS)
    out_ptr += pixels * CHANNELS
    query = block * BLOCK + tl.arange(0, BLOCK)
    query_pixel = pixel_of_token(query, position, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W, MOST_TOKENS=MOST)
    q = _load(qkv_ptr, query_pixel, query < tokens, channel, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
    mask_key = 0 if seed_ptr is None else dropout_key(seed_ptr, sample, SITE=0)

    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    step = token_step(width, STEP=STEP, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    column, pixel = _first(position, width, STEP=STEP, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    full = tokens // STEP * STEP
    # products of float32 are made in registers, which two loops have not enough of
    if qkv_ptr.dtype.element_ty == tl.float32 or BLOCK == 16:
        full = 0
    for first in range(0, full, STEP):
        key = first + tl.arange(0, STEP)
        if WHOLE or seed_ptr is not None:  # what the mask takes leaves no registers for a walk
            pixel = pixel_of_token(key, position, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W, MOST_TOKENS=MOST)
        maximum, total, sums = _attend(
            maximum, total, sums, q, qkv_ptr, pixel, query, key, tokens, group, channel, mask_key, threshold, scale,
            keep_scale, CHANNELS=CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D, DROPOUT=seed_ptr is not None, LAST=False,
        )  # fmt: skip
        if not WHOLE and seed_ptr is None:
            column, pixel = next_tokens(column, pixel, step, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    for first in tl.range(full, tokens, STEP, num_stages=1):  # once or never
        key = first + tl.arange(0, STEP)
        pixel = pixel_of_token(key, position, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W, MOST_TOKENS=MOST)
        maximum, total, sums = _attend(
            maximum, total, sums, q, qkv_ptr, pixel, query, key, tokens, group, channel, mask_key, threshold, scale,
            keep_scale, CHANNELS=CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D, DROPOUT=seed_ptr is not None, LAST=True,
        )  # fmt: skip

    sums *= (1 / total)[:, None]  # a division of each sum would be four instructions more
    _store(out_ptr, query_pixel, query < tokens, channel, sums, STRIDE=CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
    if lse_ptr is not None:
        lse_ptr += pixels * HEADS + group * tokens
        tl.store(lse_ptr + query, maximum + tl.log2(total), mask=query < tokens)


@triton.jit
def _product_of_out(dout, out):
    """What softmax's backward subtracts from the gradient of each query's probabilities."""
    return tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def _delta_bwd_kernel(
    dout_ptr, out_ptr,  # (B, H, W, HEADS DIM)
    delta_ptr,  # written: (B, positions, HEADS, tokens), float32
    pixels_per_sample, width, tokens, blocks,
    HEADS: tl.constexpr, DIM: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta = sum(dout * out) of each query, which softmax's backward subtracts from the gradient of its
    probabilities. A program has BLOCK tokens of a group; everything is read and written once."""
    sample, position, block, head = _group(blocks, HEADS=HEADS, POSITIONS=PATCH_H * PATCH_W)
    pixels = sample.to(tl.int64) * pixels_per_sample
    token = block * BLOCK + tl.arange(0, BLOCK)
    pixel = pixel_of_token(token, position, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    at = pixels * (HEADS * DIM)
    dout = _load(dout_ptr + at, pixel, token < tokens, head * DIM, STRIDE=HEADS * DIM, DIM=DIM, BLOCK_D=BLOCK_D)
    out = _load(out_ptr + at, pixel, token < tokens, head * DIM, STRIDE=HEADS * DIM, DIM=DIM, BLOCK_D=BLOCK_D)
    delta = _product_of_out(dout, out)
    tl.store(delta_ptr + pixels * HEADS + (position * HEADS + head) * tokens + token, delta, mask=token < tokens)


@triton.jit
def _gradients(
    mine, my_other, theirs, their_other, lse, delta, mask_key, element, threshold, scale, keep_scale,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """(p * m, dscores) of attention_bwd_kernel for a tile of the scores mine theirs^T: `mine` are keys and `theirs`
    queries, or the other way round, and my_other their_other^T, of values and dout, is the gradient of p * m. lse and
    delta are of the queries, `element` counts the pairs of a sample.

    What the exponent may not exceed keeps tokens beyond the last, which are zeros, from infinite products: queries add
    zeros to dk and dv, and keys to dq."""
    zeros = tl.zeros((mine.shape[0], theirs.shape[0]), tl.float32)
    exponents = dot(mine, tl.trans(theirs), zeros) * scale - lse
    probabilities = tl.exp2(tl.minimum(exponents, 0.0, propagate_nan=tl.PropagateNan.ALL))
    grads = dot(my_other, tl.trans(their_other), zeros)
    weights = probabilities
    if DROPOUT:
        mask = tl.where(dropout_kept(mask_key, element, threshold), keep_scale, 0.0)
        weights, grads = probabilities * mask, grads * mask
    return weights.to(theirs.dtype), (probabilities * (grads - delta)).to(theirs.dtype)


@triton.jit
def _write_query_gradient(
    dout_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, seed_ptr, dqkv_ptr, mine, my_pixel, position, width, tokens, group,
    channel, mask_key, threshold, scale, keep_scale,
    CHANNELS: tl.constexpr, DIM: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes dq of the tokens `mine` of a group, for attention_bwd_kernel."""
    valid = mine < tokens
    my_q = _load(qkv_ptr, my_pixel, valid, channel, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
    my_dout = _load(dout_ptr, my_pixel, valid, channel, STRIDE=CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
    if delta_ptr is not None:
        my_delta = tl.load(delta_ptr + mine, mask=valid, other=0.0)
    else:
        my_out = _load(out_ptr, my_pixel, valid, channel, STRIDE=CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
        my_delta = _product_of_out(my_dout, my_out)
    my_lse = tl.load(lse_ptr + mine, mask=valid, other=float("inf"))
    dq = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    step = token_step(width, STEP=STEP, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    column, pixel = _first(position, width, STEP=STEP, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    for first in range(0, tokens, STEP):
        key = first + tl.arange(0, STEP)
        if seed_ptr is not None:  # what the mask takes leaves no registers for a walk
            pixel = pixel_of_token(key, position, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
        k = _load(qkv_ptr, pixel, key < tokens, CHANNELS + channel, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
        v = _load(qkv_ptr, pixel, key < tokens, 2 * CHANNELS + channel, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
        element = (group * tokens + mine[:, None]) * tokens + key[None, :]
        _, dscores = _gradients(
            my_q, my_dout, k, v, my_lse[:, None], my_delta[:, None], mask_key, element,
            threshold, scale, keep_scale, DROPOUT=seed_ptr is not None,
        )  # fmt: skip
        dq = dot(dscores, k, dq)
        if seed_ptr is None:
            column, pixel = next_tokens(column, pixel, step, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    dq *= scale * LN2
    _store(dqkv_ptr, my_pixel, valid, channel, dq, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def _attention_bwd_kernel(
    dout_ptr, qkv_ptr, out_ptr,  # like out and qkv
    lse_ptr, delta_ptr,  # (B, positions, HEADS, tokens), float32; WHOLE writes delta, others with dropout have none
    seed_ptr,  # one int64, or None without dropout
    dqkv_ptr,  # written: like qkv
    pixels_per_sample, width, tokens, blocks, scale, threshold, keep_scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """With p = exp2(scores - lse), the mask of the dropout m and delta = sum(dout * out) of each query:

        dv = (p * m)^T dout;  dscores = p * (dout v^T * m - delta)
        dq = dscores k / sqrt(DIM);  dk = dscores^T q / sqrt(DIM)

    A program has BLOCK tokens of a group as keys and walks over the queries STEP at a time. WHOLE says that these are
    all tokens: dq of a step is complete then, and everything is read and written once. Otherwise the program takes its
    block once more, as queries, and reads dout and qkv about twice for each block, from cache."""
    POSITIONS: tl.constexpr = PATCH_H * PATCH_W
    CHANNELS: tl.constexpr = HEADS * DIM
    sample, position, block, head = _group(blocks, HEADS=HEADS, POSITIONS=POSITIONS)
    channel = head * DIM
    group = position * HEADS + head
    pixels = sample.to(tl.int64) * pixels_per_sample
    qkv_ptr += pixels * (3 * CHANNELS)
    dqkv_ptr += pixels * (3 * CHANNELS)
    dout_ptr += pixels * CHANNELS
    out_ptr += pixels * CHANNELS
    lse_ptr += pixels * HEADS + group * tokens
    if delta_ptr is not None:
        delta_ptr += pixels * HEADS + group * tokens
    MOST: tl.constexpr = BLOCK if WHOLE else None
    mine = block * BLOCK + tl.arange(0, BLOCK)
    valid = mine < tokens
    my_pixel = pixel_of_token(mine, position, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W, MOST_TOKENS=MOST)
    mask_key = 0 if seed_ptr is None else dropout_key(seed_ptr, sample, SITE=0)
    score_scale = scale * LN2  # of the natural scores
    # The block as keys, transposed: (keys, queries).
    my_k = _load(qkv_ptr, my_pixel, valid, CHANNELS + channel, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
    my_v = _load(qkv_ptr, my_pixel, valid, 2 * CHANNELS + channel, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
    dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    if WHOLE:  # delta of all queries, for the steps, through memory
        tl.assume(tokens > 0)  # the loop runs, so there is no second way to its end
        my_dout = _load(dout_ptr, my_pixel, valid, channel, STRIDE=CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
        my_out = _load(out_ptr, my_pixel, valid, channel, STRIDE=CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
        tl.store(delta_ptr + mine, _product_of_out(my_dout, my_out), mask=valid)
        tl.debug_barrier()
    step = token_step(width, STEP=STEP, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    column, pixel = _first(position, width, STEP=STEP, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    for first in range(0, tokens, STEP):
        query = first + tl.arange(0, STEP)
        if WHOLE or seed_ptr is not None:  # what the mask takes leaves no registers for a walk
            pixel = pixel_of_token(query, position, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W, MOST_TOKENS=MOST)
            if WHOLE:  # or the offsets would be carried on from step to step, in registers
                pixel = opaque(pixel)
        q = _load(qkv_ptr, pixel, query < tokens, channel, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
        dout = _load(dout_ptr, pixel, query < tokens, channel, STRIDE=CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
        if delta_ptr is not None:
            delta = tl.load(delta_ptr + query, mask=query < tokens, other=0.0)
        else:
            out = _load(out_ptr, pixel, query < tokens, channel, STRIDE=CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
            delta = _product_of_out(dout, out)
        lse = tl.load(lse_ptr + query, mask=query < tokens, other=0.0)
        element = (group * tokens + query[None, :]) * tokens + mine[:, None]
        weights, dscores = _gradients(
            my_k, my_v, q, dout, lse[None, :], delta[None, :], mask_key, element,
            threshold, scale, keep_scale, DROPOUT=seed_ptr is not None,
        )  # fmt: skip
        dv = dot(weights, dout, dv)
        dk = dot(dscores, q, dk)
        if WHOLE:
            dq = dot(tl.trans(dscores), my_k, tl.zeros((STEP, BLOCK_D), tl.float32)) * score_scale
            _store(dqkv_ptr, pixel, query < tokens, channel, dq, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
        elif seed_ptr is None:
            column, pixel = next_tokens(column, pixel, step, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    if WHOLE:  # counted again, so that no register holds them through the loop
        mine = opaque(block) * BLOCK + tl.arange(0, BLOCK)
        my_pixel = pixel_of_token(mine, position, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W, MOST_TOKENS=MOST)
    valid = mine < tokens
    dk *= score_scale
    _store(dqkv_ptr, my_pixel, valid, CHANNELS + channel, dk, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
    _store(dqkv_ptr, my_pixel, valid, 2 * CHANNELS + channel, dv, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
    if not WHOLE:
        _write_query_gradient(
            dout_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, seed_ptr, dqkv_ptr, mine, my_pixel, position, width, tokens,
            group, channel, mask_key, threshold, scale, keep_scale,
            CHANNELS=CHANNELS, DIM=DIM, PATCH_H=PATCH_H, PATCH_W=PATCH_W, BLOCK=BLOCK, STEP=STEP, BLOCK_D=BLOCK_D,
        )  # fmt: skip


class _Launch:
    """Grid and arguments that both kernels share."""

    def __init__(self, call: Call, backward: bool):
        batch, height, width, channels = call.qkv.shape
        heads, patch_height, patch_width = call.num_heads, call.patch_height, call.patch_width
        dim = channels // (3 * heads)
        tokens = (height // patch_height) * (width // patch_width)
        whole = whole_group(call.qkv, dim, tokens, call.dropout > 0)
        config = configuration(call.qkv, dim, whole, backward)
        blocks = cdiv(tokens, config["BLOCK"])
        self.grid = (batch * patch_height * patch_width * heads * blocks,)
        self.seed = call.seed if call.dropout > 0 else None
        keep = (dropout_threshold(call.dropout), 1 / (1 - call.dropout))
        self.sizes = (height * width, width, tokens, blocks, LOG2E / math.sqrt(dim), *keep)
        self.flags = {"HEADS": heads, "DIM": dim, "PATCH_H": patch_height, "PATCH_W": patch_width, **config}
        self.lse_shape = (batch, patch_height * patch_width, heads, tokens)


def patch_attention_forward(call: Call) -> tuple[Tensor, Tensor]:
    """Launches the forward pass: out, and the binary logarithm of each query's sum, (B, positions, heads, tokens)."""
    lse = call.qkv.new_empty(_Launch(call, backward=False).lse_shape, dtype=torch.float32)
    return attend(call, lse), lse


def attend(call: Call, lse: Tensor | None) -> Tensor:
    """The same; `lse` is written where it is not None."""
    launch, qkv = _Launch(call, backward=False), call.qkv.contiguous()
    out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
    if out.numel() > 0:
        with on_device(qkv):
            _attention_fwd_kernel[launch.grid](qkv, launch.seed, out, lse, *launch.sizes, **launch.flags)
    return out


def patch_attention_backward(call: Call) -> Tensor:
    """Launches the backward pass: the gradient of qkv."""
    launch = _Launch(call, backward=True)
    dout, qkv, out, lse = contiguous(call.dout, call.qkv, call.out, call.lse)
    dqkv = torch.empty_like(qkv)
    delta = None if launch.seed is not None and not launch.flags["WHOLE"] else torch.empty_like(lse)
    if out.numel() > 0:
        with on_device(qkv):
            if delta is not None and not launch.flags["WHOLE"]:
                others = ("WHOLE", "STEP", "num_stages", "maxnreg")
                flags = {name: value for name, value in launch.flags.items() if name not in others}
                _delta_bwd_kernel[launch.grid](dout, out, delta, *launch.sizes[:4], **flags)
            _attention_bwd_kernel[launch.grid](
                dout, qkv, out, lse, delta, launch.seed, dqkv, *launch.sizes, **launch.flags
            )
    return dqkv
