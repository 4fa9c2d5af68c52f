"""Triton kernels of global_representation without gradients: all layers of a stage and its final norm in one launch.

A program owns tokens that nothing else of the map has an effect on, takes them through all layers, and walks over them a tile of rows at
a time. Between walks they lie in y, and the queries, keys and values of one layer in a small workspace: both are this program's alone,
written and read again within microseconds, so that they stay in cache, and a barrier of the program is all that orders them. The price is
that a program's tokens wait for each other: a map that keeps fewer multiprocessors busy than half of them is left to the ops.

- Multi-head attention never leaves a group, the tokens of a sample that share their position inside a patch, nor does anything else of a
  layer whose norms are of tokens. So the unit is a few groups that fill a tile: one or two of a 16x16 map in 2x2 patches, four or eight
  of an 8x8 map. Where norms are of samples it is a sample.
- Separable attention has norms of samples in all networks, so the unit is a sample of any size. A layer is three walks: the scores and
  the mean of tokens that they weight (identity D: no keys), the values, the feed-forward network. Who writes tokens adds up their moments
  for the norm that comes next.

Weights stream from the second-level cache, once for each tile of rows, which is why tiles are as high as registers allow. They are passed
as a tuple of pointers, of which a program selects its layer's: no copy of weights into one buffer, no table of addresses that a CUDA graph
would have to upload, and one binary for each number of layers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import (
    RELU,
    SILU,
    activate,
    at_least_zero,
    dot,
    inverse_std,
    multiplies_from_shared_memory,
    multiprocessors,
    on_device,
    pixel_of_token,
)
from ..triton_rows import load_tile, load_vector, load_weight, multiply_rows, row_statistics, store_tile, two_tiles
from . import TILE

_OLD_TRITON = triton.__version__.startswith(("3.6.", "3.7."))
TALL = 128  # rows of a tile where there are more than TILE for each multiprocessor
LOG2E = tl.constexpr(1 / math.log(2))
TENSORS = tl.constexpr(12)  # of a layer: weight and bias of norm1, qkv, out_proj, norm2, fc1 and fc2
NORM1, QKV, OUT_PROJ, NORM2, FC1, FC2 = (tl.constexpr(2 * i) for i in range(6))

_NOT_SPECIALIZED = ["groups", "groups_per_program", "tokens", "pixels", "width", "tiles", "eps", "scale"]


@triton.jit
def _of_layer(pointers, layer, PART: tl.constexpr, LAYERS: tl.constexpr):
    """One of a layer's tensors. All layers have it, in one dtype, or none has."""
    ptr = pointers[PART]
    if ptr is not None:
        for i in tl.static_range(1, LAYERS):
            ptr = tl.where(layer == i, pointers[TENSORS * i + PART], ptr)
    return ptr


@triton.jit
def _load_rows(ptr, pixel, valid, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Rows as two float32 tiles."""
    head = load_tile(ptr, pixel, valid, tl.arange(0, HEAD), C, C).to(tl.float32)
    return head, load_tile(ptr, pixel, valid, HEAD + tl.arange(0, TAIL), C, C).to(tl.float32)


@triton.jit
def _store_rows(ptr, pixel, valid, head, tail, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    tl.debug_barrier()  # where the rows come from here, a thread may still have to read what another one holds as well
    store_tile(ptr, pixel, valid, tl.arange(0, HEAD), head, C, C)
    store_tile(ptr, pixel, valid, HEAD + tl.arange(0, TAIL), tail, C, C)


@triton.jit
def _add_moments(count, mean, m2, head, tail, valid, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Number, mean and sum of squared deviations of all values so far and of those of a tile, by Chan's formula. The mean of the tile is
    corrected by the sum of the distances to it, so that a mean of many deviations costs no accuracy."""
    head_column, tail_column = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    head_mask, tail_mask = valid[:, None] & (head_column < C)[None, :], valid[:, None] & (tail_column < C)[None, :]
    added = tl.sum(valid.to(tl.float32), 0) * C
    safe = tl.maximum(added, 1.0)
    tile_mean = (tl.sum(tl.where(head_mask, head, 0.0)) + tl.sum(tl.where(tail_mask, tail, 0.0))) / safe
    head, tail = tl.where(head_mask, head - tile_mean, 0.0), tl.where(tail_mask, tail - tile_mean, 0.0)
    correction = (tl.sum(head) + tl.sum(tail)) / safe
    tile_m2 = at_least_zero(tl.sum(head * head) + tl.sum(tail * tail) - added * correction * correction)
    share = added / tl.maximum(count + added, 1.0)
    delta = tile_mean + correction - mean
    return count + added, mean + delta * share, m2 + tile_m2 + delta * delta * count * share


@triton.jit
def _load_scaled(ptr, pixel, valid, column, mean, rstd, weight_ptr, bias_ptr, C: tl.constexpr):
    """Some channels of rows after a norm; zeros where a row is not valid, which no product may spoil."""
    rows = (load_tile(ptr, pixel, valid, column, C, C).to(tl.float32) - mean) * rstd
    rows = rows * load_vector(weight_ptr, column, C)[None, :] + load_vector(bias_ptr, column, C)[None, :]
    return tl.where(valid[:, None], rows, 0.0).to(ptr.dtype.element_ty)


@triton.jit
def _load_normalised(
    ptr, pixel, valid, weight_ptr, bias_ptr, count, mean, m2, eps,
    PER_SAMPLE: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Rows after a norm of tokens, or of the sample with these moments, as two tiles."""
    if PER_SAMPLE:
        rstd = inverse_std(m2 / count, eps)
    else:
        head, tail = _load_rows(ptr, pixel, valid, C, HEAD, TAIL)
        row_mean, row_rstd = row_statistics(head, tail, tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL), eps, C)
        mean, rstd = row_mean[:, None], row_rstd[:, None]
        tl.debug_barrier()  # rows are read again, for in registers they would not leave room for anything else
    head = _load_scaled(ptr, pixel, valid, tl.arange(0, HEAD), mean, rstd, weight_ptr, bias_ptr, C)
    tail = _load_scaled(ptr, pixel, valid, HEAD + tl.arange(0, TAIL), mean, rstd, weight_ptr, bias_ptr, C)
    return head, tail


@triton.jit
def _project(head, tail, weight_ptr, bias_ptr, output, OUT: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Some outputs of a linear map of normalised rows, in float32; zeros for outputs from OUT on."""
    head_weight, tail_weight = load_weight(weight_ptr, output, head, C, OUT, HEAD, TAIL)
    return multiply_rows(head, tail, head_weight, tail_weight) + load_vector(bias_ptr, output, OUT)[None, :]


@triton.jit
def _add_product(head, tail, block, weight_ptr, column, WIDTH: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """rows + block @ weight^T, for the columns `column` of a weight (C, WIDTH)."""
    head_row, tail_row = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    head = dot(block, tl.trans(load_tile(weight_ptr, head_row, head_row < C, column, WIDTH, WIDTH).to(block.dtype)), head)
    tail = dot(block, tl.trans(load_tile(weight_ptr, tail_row, tail_row < C, column, WIDTH, WIDTH).to(block.dtype)), tail)
    return head, tail


@triton.jit
def _add_bias_and_rows(head, tail, bias_ptr, ptr, pixel, valid, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """What a branch makes, with the bias of its last linear map and its residual."""
    head_column, tail_column = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    tl.debug_barrier()  # or the compiler would keep the rows in registers from where the norm read them
    head += load_vector(bias_ptr, head_column, C)[None, :]
    head += load_tile(ptr, pixel, valid, head_column, C, C).to(tl.float32)
    tail += load_vector(bias_ptr, tail_column, C)[None, :]
    tail += load_tile(ptr, pixel, valid, tail_column, C, C).to(tl.float32)
    return head, tail


@triton.jit
def _feed_forward(
    y_ptr, pixel, valid, pointers, layer, count, mean, m2, eps,
    PER_SAMPLE: tl.constexpr, LAYERS: tl.constexpr, F: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One tile through the feed-forward network of a layer, with its norm and residual."""
    weight_ptr, bias_ptr = _of_layer(pointers, layer, NORM2, LAYERS), _of_layer(pointers, layer, NORM2 + 1, LAYERS)
    normed_head, normed_tail = _load_normalised(y_ptr, pixel, valid, weight_ptr, bias_ptr, count, mean, m2, eps, PER_SAMPLE, C, HEAD, TAIL)
    weight_ptr, bias_ptr = _of_layer(pointers, layer, FC1, LAYERS), _of_layer(pointers, layer, FC1 + 1, LAYERS)
    weight2_ptr = _of_layer(pointers, layer, FC2, LAYERS)
    head = tl.zeros(normed_head.shape, tl.float32)
    tail = tl.zeros(normed_tail.shape, tl.float32)
    for first in tl.range(0, F, BLOCK_F, disable_licm=True):
        column = first + tl.arange(0, BLOCK_F)
        hidden = activate(_project(normed_head, normed_tail, weight_ptr, bias_ptr, column, F, C, HEAD, TAIL), SILU)
        head, tail = _add_product(head, tail, hidden.to(normed_head.dtype), weight2_ptr, column, F, C, HEAD, TAIL)
    return _add_bias_and_rows(head, tail, _of_layer(pointers, layer, FC2 + 1, LAYERS), y_ptr, pixel, valid, C, HEAD, TAIL)


@triton.jit
def _load_head(qkv_ptr, row, channel, DIM: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr):
    """A head of some rows of queries, keys or values; zeros beyond the head."""
    lane = tl.arange(0, BLOCK_D)
    return tl.load(
        qkv_ptr + row[:, None] * (3 * C) + (channel + lane)[None, :], mask=(lane < DIM)[None, :] & (row >= 0)[:, None], other=0.0
    )


@triton.jit
def _attend(q, k, v, tokens, scale, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """Softmax attention of the queries of GROUPS groups, or of a part of one, to the keys of their group, of which `tokens` are there."""
    there = tl.arange(0, GROUP) < tokens
    if GROUPS == 1:
        scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], GROUP), tl.float32)) * scale
        scores = tl.where(there[None, :], scores, float("-inf"))
        probabilities = tl.exp2(scores - tl.max(scores, 1)[:, None])
        out = dot(probabilities.to(v.dtype), v, tl.zeros(q.shape, tl.float32)) / tl.sum(probabilities, 1)[:, None]
    else:
        q_groups = tl.reshape(q, (GROUPS, GROUP, q.shape[1]))
        k = tl.reshape(k, q_groups.shape)
        v = tl.reshape(v, q_groups.shape)
        scores = dot(q_groups, tl.trans(k, 0, 2, 1), tl.zeros((GROUPS, GROUP, GROUP), tl.float32)) * scale
        scores = tl.where(there[None, None, :], scores, float("-inf"))
        probabilities = tl.exp2(scores - tl.max(scores, 2)[:, :, None])
        out = dot(probabilities.to(v.dtype), v, tl.zeros(q_groups.shape, tl.float32)) / tl.sum(probabilities, 2)[:, :, None]
        out = tl.reshape(out, q.shape)
    return out.to(v.dtype)


@triton.jit
def _group_rows(
    tile, groups_in_program, tokens, pixels, width, start,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Row numbers of a tile, the pixels that they are, counted from the first one of the program's first sample, and which are there. Each
    group takes GROUP rows; `start` is the position of the first group."""
    POSITIONS: tl.constexpr = PATCH_H * PATCH_W
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    group, token = start + row // GROUP, row % GROUP
    pixel = group // POSITIONS * pixels + pixel_of_token(token, group % POSITIONS, width, PATCH_H, PATCH_W)
    return row, pixel, (token < tokens) & (row // GROUP < groups_in_program)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _transformer_fwd_kernel(
    x_ptr, y_ptr, qkv_ptr, pointers, norm_weight_ptr, norm_bias_ptr, groups, groups_per_program, tokens, pixels, width, tiles, eps, scale,
    PER_SAMPLE: tl.constexpr, LAYERS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    F: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    POSITIONS: tl.constexpr = PATCH_H * PATCH_W
    GROUPS: tl.constexpr = BLOCK_Q // GROUP if BLOCK_Q > GROUP else 1  # of a tile of queries
    first_group = tl.program_id(0) * groups_per_program
    here = tl.minimum(groups - first_group, groups_per_program)
    sample, start = first_group // POSITIONS, first_group % POSITIONS
    x_ptr += sample.to(tl.int64) * pixels * C
    y_ptr += sample.to(tl.int64) * pixels * C
    qkv_ptr += tl.program_id(0).to(tl.int64) * tiles * (BLOCK_M * 3 * C)
    count, mean, m2 = 0.0, 0.0, 0.0  # of the sample
    if PER_SAMPLE:
        for tile in range(tiles):
            row, pixel, valid = _group_rows(tile, here, tokens, pixels, width, start, PATCH_H, PATCH_W, BLOCK_M, GROUP)
            head, tail = _load_rows(x_ptr, pixel, valid, C, HEAD, TAIL)
            count, mean, m2 = _add_moments(count, mean, m2, head, tail, valid, C, HEAD, TAIL)

    t_ptr = x_ptr  # handed on from layer to layer: Triton 3.6 cannot choose between two pointers that were moved, on AMD
    for layer in tl.range(0, LAYERS, disable_licm=True, num_stages=1):
        if BLOCK_M > BLOCK_Q:  # a tall tile, of NVIDIA alone, leaves no register for it
            t_ptr = tl.where(layer == 0, x_ptr, y_ptr)

        # Queries, keys and values.
        weight_ptr, bias_ptr = _of_layer(pointers, layer, QKV, LAYERS), _of_layer(pointers, layer, QKV + 1, LAYERS)
        for tile in tl.range(0, tiles, disable_licm=True, num_stages=1):
            row, pixel, valid = _group_rows(tile, here, tokens, pixels, width, start, PATCH_H, PATCH_W, BLOCK_M, GROUP)
            normed_head, normed_tail = _load_normalised(
                t_ptr, pixel, valid, _of_layer(pointers, layer, NORM1, LAYERS), _of_layer(pointers, layer, NORM1 + 1, LAYERS),
                count, mean, m2, eps, PER_SAMPLE, C, HEAD, TAIL,
            )  # fmt: skip
            for first in tl.range(0, 3 * C, BLOCK_N, disable_licm=True):
                output = first + tl.arange(0, BLOCK_N)
                block = _project(normed_head, normed_tail, weight_ptr, bias_ptr, output, 3 * C, C, HEAD, TAIL)
                store_tile(qkv_ptr, row, row >= 0, output, block, 3 * C, 3 * C)
        tl.debug_barrier()

        # Attention: each head is multiplied into the sums of the out-projection.
        weight_ptr = _of_layer(pointers, layer, OUT_PROJ, LAYERS)
        new_count, new_mean, new_m2 = 0.0, 0.0, 0.0
        for tile in tl.range(0, tiles * (BLOCK_M // BLOCK_Q), disable_licm=True, num_stages=1):
            row, pixel, valid = _group_rows(tile, here, tokens, pixels, width, start, PATCH_H, PATCH_W, BLOCK_Q, GROUP)
            key = tile * BLOCK_Q // GROUP * GROUP + tl.arange(0, GROUPS * GROUP)
            head = tl.zeros((BLOCK_Q, HEAD), tl.float32)
            tail = tl.zeros((BLOCK_Q, TAIL), tl.float32)
            for i in tl.range(0, HEADS, disable_licm=True):
                q = _load_head(qkv_ptr, row, i * DIM, DIM, C, BLOCK_D)
                k = _load_head(qkv_ptr, key, C + i * DIM, DIM, C, BLOCK_D)
                v = _load_head(qkv_ptr, key, 2 * C + i * DIM, DIM, C, BLOCK_D)
                out = _attend(q, k, v, tokens, scale, GROUPS, GROUP)
                head, tail = _add_product(head, tail, out, weight_ptr, i * DIM + tl.arange(0, BLOCK_D), C, C, HEAD, TAIL)
            bias_ptr = _of_layer(pointers, layer, OUT_PROJ + 1, LAYERS)
            head, tail = _add_bias_and_rows(head, tail, bias_ptr, t_ptr, pixel, valid, C, HEAD, TAIL)
            _store_rows(y_ptr, pixel, valid, head, tail, C, HEAD, TAIL)
            if PER_SAMPLE:
                new_count, new_mean, new_m2 = _add_moments(new_count, new_mean, new_m2, head, tail, valid, C, HEAD, TAIL)
        count, mean, m2 = new_count, new_mean, new_m2
        tl.debug_barrier()

        new_count, new_mean, new_m2 = 0.0, 0.0, 0.0
        for tile in tl.range(0, tiles, disable_licm=True, num_stages=1):
            row, pixel, valid = _group_rows(tile, here, tokens, pixels, width, start, PATCH_H, PATCH_W, BLOCK_M, GROUP)
            head, tail = _feed_forward(
                y_ptr, pixel, valid, pointers, layer, count, mean, m2, eps, PER_SAMPLE, LAYERS, F, C, HEAD, TAIL, BLOCK_F
            )
            _store_rows(y_ptr, pixel, valid, head, tail, C, HEAD, TAIL)
            if PER_SAMPLE:
                new_count, new_mean, new_m2 = _add_moments(new_count, new_mean, new_m2, head, tail, valid, C, HEAD, TAIL)
        count, mean, m2 = new_count, new_mean, new_m2
        t_ptr = y_ptr
        tl.debug_barrier()

    if norm_weight_ptr is not None:
        for tile in range(tiles):
            row, pixel, valid = _group_rows(tile, here, tokens, pixels, width, start, PATCH_H, PATCH_W, BLOCK_M, GROUP)
            head, tail = _load_normalised(
                y_ptr, pixel, valid, norm_weight_ptr, norm_bias_ptr, count, mean, m2, eps, PER_SAMPLE, C, HEAD, TAIL
            )
            _store_rows(y_ptr, pixel, valid, head, tail, C, HEAD, TAIL)


@triton.jit
def _mean_tokens(
    t_ptr, pointers, layer, count, mean, m2, pixels, width, tiles, eps,
    PER_SAMPLE: tl.constexpr, LAYERS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, POSITIONS: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """For each position inside a patch the mean of the normalised tokens there, weighted by the softmax of their scores: two tiles."""
    norm_weight_ptr, norm_bias_ptr = _of_layer(pointers, layer, NORM1, LAYERS), _of_layer(pointers, layer, NORM1 + 1, LAYERS)
    weight_ptr, bias_ptr = _of_layer(pointers, layer, QKV, LAYERS), _of_layer(pointers, layer, QKV + 1, LAYERS)
    lane = tl.arange(0, POSITIONS)
    maximum = tl.full((POSITIONS,), float("-inf"), tl.float32)
    total = tl.zeros((POSITIONS,), tl.float32)
    head_mean = tl.zeros((POSITIONS, HEAD), tl.float32)
    tail_mean = tl.zeros((POSITIONS, TAIL), tl.float32)
    for tile in tl.range(0, tiles, disable_licm=True, num_stages=1):
        pixel, position, valid = _sample_rows(tile, pixels, width, PATCH_H, PATCH_W, BLOCK_M)
        head, tail = _load_normalised(t_ptr, pixel, valid, norm_weight_ptr, norm_bias_ptr, count, mean, m2, eps, PER_SAMPLE, C, HEAD, TAIL)
        score = tl.sum(head.to(tl.float32) * load_vector(weight_ptr, tl.arange(0, HEAD), C)[None, :], 1)
        score += tl.sum(tail.to(tl.float32) * load_vector(weight_ptr, HEAD + tl.arange(0, TAIL), C)[None, :], 1)
        if bias_ptr is not None:
            score += tl.load(bias_ptr).to(tl.float32)
        mine = (lane[:, None] == position[None, :]) & valid[None, :]
        scores = tl.where(mine, (score * LOG2E)[None, :], float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # of a position that no token had so far
        shrink = tl.exp2(maximum - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        maximum = new_maximum
        if not PER_SAMPLE:
            # A token that is not a number spoils its own position, through its score, and no other.
            head = tl.where(head == head, head, 0.0).to(head.dtype)
            tail = tl.where(tail == tail, tail, 0.0).to(tail.dtype)
        head_mean = dot(weights.to(head.dtype), head, head_mean * shrink[:, None])
        tail_mean = dot(weights.to(tail.dtype), tail, tail_mean * shrink[:, None])
    total = tl.where(lane < PATCH_H * PATCH_W, total, 1.0)
    return head_mean / total[:, None], tail_mean / total[:, None]


@triton.jit
def _sample_rows(tile, pixels, width, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, BLOCK_M: tl.constexpr):
    """Pixels of a tile, their positions inside a patch, and which are there."""
    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return pixel, pixel // width % PATCH_H * PATCH_W + pixel % width % PATCH_W, pixel < pixels


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _separable_fwd_kernel(
    x_ptr, y_ptr, context_ptr, pointers, norm_weight_ptr, norm_bias_ptr, pixels, width, tiles, eps,
    PER_SAMPLE: tl.constexpr, LAYERS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, POSITIONS: tl.constexpr,
    F: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    x_ptr += sample * pixels * C
    y_ptr += sample * pixels * C
    context_ptr += sample * (PATCH_H * PATCH_W * C)
    count, mean, m2 = 0.0, 0.0, 0.0
    if PER_SAMPLE:
        for tile in range(tiles):
            pixel, position, valid = _sample_rows(tile, pixels, width, PATCH_H, PATCH_W, BLOCK_M)
            head, tail = _load_rows(x_ptr, pixel, valid, C, HEAD, TAIL)
            count, mean, m2 = _add_moments(count, mean, m2, head, tail, valid, C, HEAD, TAIL)

    t_ptr = x_ptr  # handed on from layer to layer: Triton 3.6 cannot choose between two pointers that were moved, on AMD
    for layer in tl.range(0, LAYERS, disable_licm=True, num_stages=1):
        weight_ptr, bias_ptr = _of_layer(pointers, layer, QKV, LAYERS), _of_layer(pointers, layer, QKV + 1, LAYERS)

        # The context of each position: what the keys' projection makes of the mean token.
        head_mean, tail_mean = _mean_tokens(
            t_ptr, pointers, layer, count, mean, m2, pixels, width, tiles, eps, PER_SAMPLE, LAYERS, PATCH_H, PATCH_W, POSITIONS,
            C, HEAD, TAIL, BLOCK_M,
        )  # fmt: skip
        head_mean, tail_mean = head_mean.to(dtype), tail_mean.to(dtype)
        lane = tl.arange(0, POSITIONS)
        for first in tl.range(0, C, BLOCK_N, disable_licm=True):
            channel = first + tl.arange(0, BLOCK_N)
            block = _project(head_mean, tail_mean, weight_ptr, bias_ptr, 1 + channel, 1 + C, C, HEAD, TAIL)
            store_tile(context_ptr, lane, lane < PATCH_H * PATCH_W, channel, block, C, C)
        tl.debug_barrier()

        # Values, times the context of their position, multiplied into the sums of the out-projection.
        norm_weight, norm_bias = _of_layer(pointers, layer, NORM1, LAYERS), _of_layer(pointers, layer, NORM1 + 1, LAYERS)
        out_ptr = _of_layer(pointers, layer, OUT_PROJ, LAYERS)
        new_count, new_mean, new_m2 = 0.0, 0.0, 0.0
        for tile in tl.range(0, tiles, disable_licm=True, num_stages=1):
            pixel, position, valid = _sample_rows(tile, pixels, width, PATCH_H, PATCH_W, BLOCK_M)
            normed_head, normed_tail = _load_normalised(
                t_ptr, pixel, valid, norm_weight, norm_bias, count, mean, m2, eps, PER_SAMPLE, C, HEAD, TAIL
            )
            head = tl.zeros((BLOCK_M, HEAD), tl.float32)
            tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
            for first in tl.range(0, C, BLOCK_N, disable_licm=True):
                channel = first + tl.arange(0, BLOCK_N)
                value = activate(_project(normed_head, normed_tail, weight_ptr, bias_ptr, 1 + C + channel, 1 + 2 * C, C, HEAD, TAIL), RELU)
                value *= load_tile(context_ptr, position, valid, channel, C, C)
                head, tail = _add_product(head, tail, value.to(dtype), out_ptr, channel, C, C, HEAD, TAIL)
            bias2_ptr = _of_layer(pointers, layer, OUT_PROJ + 1, LAYERS)
            head, tail = _add_bias_and_rows(head, tail, bias2_ptr, t_ptr, pixel, valid, C, HEAD, TAIL)
            _store_rows(y_ptr, pixel, valid, head, tail, C, HEAD, TAIL)
            if PER_SAMPLE:
                new_count, new_mean, new_m2 = _add_moments(new_count, new_mean, new_m2, head, tail, valid, C, HEAD, TAIL)
        count, mean, m2 = new_count, new_mean, new_m2
        tl.debug_barrier()

        new_count, new_mean, new_m2 = 0.0, 0.0, 0.0
        for tile in tl.range(0, tiles, disable_licm=True, num_stages=1):
            pixel, position, valid = _sample_rows(tile, pixels, width, PATCH_H, PATCH_W, BLOCK_M)
            head, tail = _feed_forward(
                y_ptr, pixel, valid, pointers, layer, count, mean, m2, eps, PER_SAMPLE, LAYERS, F, C, HEAD, TAIL, BLOCK_F
            )
            _store_rows(y_ptr, pixel, valid, head, tail, C, HEAD, TAIL)
            if PER_SAMPLE:
                new_count, new_mean, new_m2 = _add_moments(new_count, new_mean, new_m2, head, tail, valid, C, HEAD, TAIL)
        count, mean, m2 = new_count, new_mean, new_m2
        t_ptr = y_ptr
        tl.debug_barrier()

    if norm_weight_ptr is not None:
        for tile in range(tiles):
            pixel, position, valid = _sample_rows(tile, pixels, width, PATCH_H, PATCH_W, BLOCK_M)
            head, tail = _load_normalised(
                y_ptr, pixel, valid, norm_weight_ptr, norm_bias_ptr, count, mean, m2, eps, PER_SAMPLE, C, HEAD, TAIL
            )
            _store_rows(y_ptr, pixel, valid, head, tail, C, HEAD, TAIL)


def configuration(x: Tensor, weight: Tensor, num_heads: int | None, rows: int = 0) -> dict[str, int]:
    """BLOCK_M rows of a tile, BLOCK_Q of them in attention, and the blocks of BLOCK_N outputs and BLOCK_F hidden channels that a program
    walks over, none of which spills. `rows`: how many rows may be split freely. Where they are more than one tile for each multiprocessor,
    a tall tile halves the traffic of weights, which is what bounds these kernels."""
    if x.dtype is torch.float32:  # no matrix units of this precision: products are made in registers
        warps, stages = (8, 1) if num_heads is None else (16, 2)
        return {"BLOCK_M": 16, "BLOCK_Q": 16, "BLOCK_N": 16, "BLOCK_F": 16, "num_warps": warps, "num_stages": stages}
    if multiplies_from_shared_memory(x):
        config = {"BLOCK_M": TILE, "BLOCK_Q": TILE, "BLOCK_N": 32, "BLOCK_F": 32, "num_warps": 8, "num_stages": 2}
        if num_heads is None and x.shape[-1] > 192:
            config["BLOCK_F"] = 16
        tall = num_heads is not None and x.shape[-1] > 128 and rows > TILE * multiprocessors(x)
        if _OLD_TRITON:
            tall = tall and x.shape[-1] <= 192 and weight.dtype is torch.float32  # the others spill
        if tall and x.dtype is torch.bfloat16:  # float16 spills in all that were tried
            config["BLOCK_M"] = TALL
            if x.shape[-1] > 192:
                config |= {"BLOCK_N": 64, "BLOCK_F": 16}
            elif weight.dtype is not torch.float32:
                config["BLOCK_F"] = 16
        return config
    hip = triton.runtime.driver.active.get_current_target().backend == "hip"  # 64 KiB of shared memory
    stages = 1 if hip or (num_heads is None and weight.dtype is not torch.float32) else 2  # 2 would spill there
    return {"BLOCK_M": 32, "BLOCK_Q": 32, "BLOCK_N": 16, "BLOCK_F": 16, "num_warps": 4, "num_stages": stages}


def bytes_moved(x: Tensor, layers: int) -> int:
    """Bytes of full-size tensors that a call reads and writes: x and y, however many layers there are. (What a program hands from one walk
    to the next stays in cache.)"""
    return 2 * x.numel() * x.element_size()


def global_representation_inference(
    x: Tensor, layers: list[Tensor | None], norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, per_sample: bool,
    num_heads: int | None, patch_height: int, patch_width: int,
) -> Tensor:  # fmt: skip
    """Launches all layers and the final norm."""
    batch, height, width, channels = x.shape
    x = x.contiguous()
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    pointers = tuple(None if t is None else t.contiguous() for t in layers)
    norm = (None, None) if norm_weight is None else (norm_weight.contiguous(), norm_bias.contiguous())
    positions, pixels = patch_height * patch_width, height * width
    head, tail = two_tiles(channels, even=False)
    flags = {
        "PER_SAMPLE": per_sample, "LAYERS": len(layers) // TENSORS.value, "PATCH_H": patch_height, "PATCH_W": patch_width,
        "F": layers[FC1.value].shape[0], "C": channels, "HEAD": head, "TAIL": tail,
    }  # fmt: skip
    with on_device(x):
        if num_heads is None:
            config = configuration(x, layers[QKV.value], None)
            config.pop("BLOCK_Q")
            context = x.new_empty(batch, positions, channels, dtype=torch.float32)
            tiles = triton.cdiv(pixels, config["BLOCK_M"])
            lanes = max(triton.next_power_of_2(positions), 16)  # which a product needs
            _separable_fwd_kernel[(batch,)](x, y, context, pointers, *norm, pixels, width, tiles, eps, POSITIONS=lanes, **flags, **config)
        else:
            groups, tokens, dim = batch * positions, pixels // positions, channels // num_heads
            group = max(triton.next_power_of_2(tokens), 16)  # rows that a group takes
            config = configuration(x, layers[QKV.value], num_heads, 0 if per_sample else groups * group)
            block = config["BLOCK_M"]
            per_program = positions if per_sample else max(max(TILE, block) // group, 1)
            programs, tiles = triton.cdiv(groups, per_program), triton.cdiv(per_program * group, block)
            qkv = x.new_empty(programs * tiles * block, 3 * channels)
            _transformer_fwd_kernel[(programs,)](
                x, y, qkv, pointers, *norm, groups, per_program, tokens, pixels, width, tiles, eps, LOG2E.value / math.sqrt(dim),
                HEADS=num_heads, DIM=dim, GROUP=group, BLOCK_D=max(triton.next_power_of_2(dim), 16), **flags, **config,
            )  # fmt: skip
    return y
