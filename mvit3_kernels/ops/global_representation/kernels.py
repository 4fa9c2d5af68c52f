"""Triton kernels of global_representation; triton.py launches them and says how they work together, walks.py has what
both are made of.

`pointers` is a tuple of the tensors of all layers, TENSORS for each, all of them (OUT, C) or (OUT,), biases or None.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ..triton_common import RELU, activate, dot, load_tile, load_vector, store_tile
from ..triton_row_kernels import add_columns_product
from .walks import (
    NORM1,
    OUT_PROJ,
    QKV,
    add_bias_and_tokens,
    add_sample_moments,
    feed_forward,
    load_normalised,
    measure_sample,
    normalise_in_place,
    of_layer,
    project,
    rows_of_tile,
    store_tokens,
)

LOG2E = tl.constexpr(1 / math.log(2))

_NOT_SPECIALIZED = ["groups", "groups_per_program", "tokens", "pixels", "width", "tiles", "eps", "scale"]


# Multi-head attention


@triton.jit
def _write_qkv(
    t_ptr, qkv_ptr, pointers, layer, count, mean, m2, place, tiles, eps,
    PER_SAMPLE: tl.constexpr, LAYERS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """qkv(norm1(t)) for the program's rows, (rows, 3 C), into its workspace."""
    weight_ptr = of_layer(pointers, layer, PART=QKV, LAYERS=LAYERS)
    bias_ptr = of_layer(pointers, layer, PART=QKV + 1, LAYERS=LAYERS)
    for tile in tl.range(0, tiles, disable_licm=True, num_stages=1):
        row, pixel, valid = rows_of_tile(tile, place, PATCH_H=PATCH_H, PATCH_W=PATCH_W, BLOCK_M=BLOCK_M, GROUP=GROUP)
        norm_weight_ptr = of_layer(pointers, layer, PART=NORM1, LAYERS=LAYERS)
        norm_bias_ptr = of_layer(pointers, layer, PART=NORM1 + 1, LAYERS=LAYERS)
        head, tail = load_normalised(
            t_ptr, pixel, valid, norm_weight_ptr, norm_bias_ptr, count, mean, m2, eps,
            PER_SAMPLE=PER_SAMPLE, C=C, HEAD=HEAD, TAIL=TAIL,
        )  # fmt: skip
        for first in tl.range(0, 3 * C, BLOCK_N, disable_licm=True):
            output = first + tl.arange(0, BLOCK_N)
            block = project(head, tail, weight_ptr, bias_ptr, output, OUT=3 * C, C=C, HEAD=HEAD, TAIL=TAIL)
            store_tile(qkv_ptr, row, row >= 0, output, block, WIDTH=3 * C)


@triton.jit
def _load_head(qkv_ptr, row, channel, DIM: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr):
    """An attention head of some rows of queries, keys or values; zeros beyond the head."""
    lane = tl.arange(0, BLOCK_D)
    at = qkv_ptr + row[:, None] * (3 * C) + (channel + lane)[None, :]
    return tl.load(at, mask=(lane < DIM)[None, :] & (row >= 0)[:, None], other=0.0)


@triton.jit
def _attend(q, k, v, tokens, scale, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """softmax(q k^T * scale) v for the queries of GROUPS groups, or of a part of one, and the keys of their group, of
    which there are `tokens`. The scale is for a softmax of powers of 2."""
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
        out = dot(probabilities.to(v.dtype), v, tl.zeros(q_groups.shape, tl.float32))
        out = tl.reshape(out / tl.sum(probabilities, 2)[:, :, None], q.shape)
    return out.to(v.dtype)


@triton.jit
def _attention(
    t_ptr, y_ptr, qkv_ptr, pointers, layer, place, tiles, scale,
    PER_SAMPLE: tl.constexpr, LAYERS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """t + out_proj(attention(qkv)) for the program's tokens, from its workspace to y, BLOCK_Q rows at a time. Each head
    is multiplied into the sums of out_proj as soon as it is known."""
    GROUPS: tl.constexpr = BLOCK_Q // GROUP if BLOCK_Q > GROUP else 1  # of a tile of queries
    weight_ptr = of_layer(pointers, layer, PART=OUT_PROJ, LAYERS=LAYERS)
    count, mean, m2 = 0.0, 0.0, 0.0
    for tile in tl.range(0, tiles, disable_licm=True, num_stages=1):
        row, pixel, valid = rows_of_tile(tile, place, PATCH_H=PATCH_H, PATCH_W=PATCH_W, BLOCK_M=BLOCK_Q, GROUP=GROUP)
        key = tile * BLOCK_Q // GROUP * GROUP + tl.arange(0, GROUPS * GROUP)
        head = tl.zeros((BLOCK_Q, HEAD), tl.float32)
        tail = tl.zeros((BLOCK_Q, TAIL), tl.float32)
        for i in tl.range(0, HEADS, disable_licm=True):
            q = _load_head(qkv_ptr, row, i * DIM, DIM=DIM, C=C, BLOCK_D=BLOCK_D)
            k = _load_head(qkv_ptr, key, C + i * DIM, DIM=DIM, C=C, BLOCK_D=BLOCK_D)
            v = _load_head(qkv_ptr, key, 2 * C + i * DIM, DIM=DIM, C=C, BLOCK_D=BLOCK_D)
            out = _attend(q, k, v, place[1], scale, GROUPS=GROUPS, GROUP=GROUP)
            column = i * DIM + tl.arange(0, BLOCK_D)
            head, tail = add_columns_product(head, tail, out, weight_ptr, column, WIDTH=C, C=C, HEAD=HEAD, TAIL=TAIL)
        bias_ptr = of_layer(pointers, layer, PART=OUT_PROJ + 1, LAYERS=LAYERS)
        head, tail = add_bias_and_tokens(head, tail, bias_ptr, t_ptr, pixel, valid, C=C, HEAD=HEAD, TAIL=TAIL)
        store_tokens(y_ptr, pixel, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)
        if PER_SAMPLE:
            count, mean, m2 = add_sample_moments(count, mean, m2, head, tail, valid, C=C, HEAD=HEAD, TAIL=TAIL)
    return count, mean, m2


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def transformer_fwd_kernel(
    x_ptr,  # (B, H, W, C)
    pointers, norm_weight_ptr, norm_bias_ptr,  # of the layers; of the final norm, (C,) or None
    y_ptr,  # written: like x
    qkv_ptr,  # workspace, (programs, tiles * BLOCK_M, 3 C), like x
    groups, groups_per_program, tokens, pixels, width, tiles, eps, scale,
    PER_SAMPLE: tl.constexpr, LAYERS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, F: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = final_norm(layers(x)), where a layer is

        t = t + out_proj(attention(qkv(norm1(t)))), then t = t + fc2(SiLU(fc1(norm2(t))))

    and attention is among the tokens of a group, for each of HEADS heads of DIM channels. A program has
    `groups_per_program` groups or, PER_SAMPLE, those of a sample. x is read and y written once; what lies between, in y
    and the workspace, and the weights, once for each tile, come from cache."""
    POSITIONS: tl.constexpr = PATCH_H * PATCH_W
    first_group = tl.program_id(0) * groups_per_program
    here = tl.minimum(groups - first_group, groups_per_program)
    sample = first_group // POSITIONS
    place = (here, tokens, pixels, width, first_group % POSITIONS)
    x_ptr += sample.to(tl.int64) * pixels * C
    y_ptr += sample.to(tl.int64) * pixels * C
    qkv_ptr += tl.program_id(0).to(tl.int64) * tiles * (BLOCK_M * 3 * C)
    count, mean, m2 = 0.0, 0.0, 0.0  # of the sample
    if PER_SAMPLE:
        count, mean, m2 = measure_sample(
            x_ptr, place, tiles, PATCH_H=PATCH_H, PATCH_W=PATCH_W, BLOCK_M=BLOCK_M, GROUP=GROUP,
            C=C, HEAD=HEAD, TAIL=TAIL,
        )  # fmt: skip

    # handed on from layer to layer: Triton 3.6 cannot choose between two pointers that were moved, on AMD
    t_ptr = x_ptr
    for layer in tl.range(0, LAYERS, disable_licm=True, num_stages=1):
        if BLOCK_M > BLOCK_Q:  # a tall tile, of NVIDIA alone, leaves no register for it
            t_ptr = tl.where(layer == 0, x_ptr, y_ptr)
        _write_qkv(
            t_ptr, qkv_ptr, pointers, layer, count, mean, m2, place, tiles, eps,
            PER_SAMPLE=PER_SAMPLE, LAYERS=LAYERS, PATCH_H=PATCH_H, PATCH_W=PATCH_W, C=C, HEAD=HEAD, TAIL=TAIL,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, GROUP=GROUP,
        )  # fmt: skip
        tl.debug_barrier()
        count, mean, m2 = _attention(
            t_ptr, y_ptr, qkv_ptr, pointers, layer, place, tiles * (BLOCK_M // BLOCK_Q), scale,
            PER_SAMPLE=PER_SAMPLE, LAYERS=LAYERS, HEADS=HEADS, DIM=DIM, PATCH_H=PATCH_H, PATCH_W=PATCH_W,
            C=C, HEAD=HEAD, TAIL=TAIL, BLOCK_Q=BLOCK_Q, BLOCK_D=BLOCK_D, GROUP=GROUP,
        )  # fmt: skip
        tl.debug_barrier()
        count, mean, m2 = feed_forward(
            y_ptr, pointers, layer, count, mean, m2, place, tiles, eps,
            PER_SAMPLE=PER_SAMPLE, LAYERS=LAYERS, PATCH_H=PATCH_H, PATCH_W=PATCH_W, F=F, C=C, HEAD=HEAD, TAIL=TAIL,
            BLOCK_M=BLOCK_M, BLOCK_F=BLOCK_F, GROUP=GROUP,
        )  # fmt: skip
        t_ptr = y_ptr
        tl.debug_barrier()

    if norm_weight_ptr is not None:
        normalise_in_place(
            y_ptr, norm_weight_ptr, norm_bias_ptr, count, mean, m2, place, tiles, eps,
            PER_SAMPLE=PER_SAMPLE, PATCH_H=PATCH_H, PATCH_W=PATCH_W, BLOCK_M=BLOCK_M, GROUP=GROUP,
            C=C, HEAD=HEAD, TAIL=TAIL,
        )  # fmt: skip


# Separable attention


@triton.jit
def _position_of_pixel(pixel, width, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr):
    """Position inside a patch of a pixel of a sample."""
    return pixel // width % PATCH_H * PATCH_W + pixel % width % PATCH_W


@triton.jit
def _mean_tokens(
    t_ptr, pointers, layer, count, mean, m2, place, tiles, eps,
    PER_SAMPLE: tl.constexpr, LAYERS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    POSITIONS: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """For each position inside a patch the mean of norm1(t) over the tokens there, weighted by the softmax of their
    scores, the first output of qkv: two tiles of POSITIONS rows. Reads the tokens twice, the second time from cache."""
    norm_weight_ptr = of_layer(pointers, layer, PART=NORM1, LAYERS=LAYERS)
    norm_bias_ptr = of_layer(pointers, layer, PART=NORM1 + 1, LAYERS=LAYERS)
    weight_ptr = of_layer(pointers, layer, PART=QKV, LAYERS=LAYERS)
    bias_ptr = of_layer(pointers, layer, PART=QKV + 1, LAYERS=LAYERS)
    lane = tl.arange(0, POSITIONS)
    maximum = tl.full((POSITIONS,), float("-inf"), tl.float32)
    total = tl.zeros((POSITIONS,), tl.float32)
    head_mean = tl.zeros((POSITIONS, HEAD), tl.float32)
    tail_mean = tl.zeros((POSITIONS, TAIL), tl.float32)
    for tile in tl.range(0, tiles, disable_licm=True, num_stages=1):
        _, pixel, valid = rows_of_tile(tile, place, PATCH_H=PATCH_H, PATCH_W=PATCH_W, BLOCK_M=BLOCK_M, GROUP=None)
        position = _position_of_pixel(pixel, place[1], PATCH_H=PATCH_H, PATCH_W=PATCH_W)
        head, tail = load_normalised(
            t_ptr, pixel, valid, norm_weight_ptr, norm_bias_ptr, count, mean, m2, eps,
            PER_SAMPLE=PER_SAMPLE, C=C, HEAD=HEAD, TAIL=TAIL,
        )  # fmt: skip
        score = tl.sum(head.to(tl.float32) * load_vector(weight_ptr, tl.arange(0, HEAD), WIDTH=C)[None, :], 1)
        score += tl.sum(tail.to(tl.float32) * load_vector(weight_ptr, HEAD + tl.arange(0, TAIL), WIDTH=C)[None, :], 1)
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
def _write_contexts(
    head_mean, tail_mean, context_ptr, pointers, layer,
    LAYERS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, POSITIONS: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The context of each position: what the keys' part of qkv makes of the mean token."""
    weight_ptr = of_layer(pointers, layer, PART=QKV, LAYERS=LAYERS)
    bias_ptr = of_layer(pointers, layer, PART=QKV + 1, LAYERS=LAYERS)
    lane = tl.arange(0, POSITIONS)
    for first in tl.range(0, C, BLOCK_N, disable_licm=True):
        channel = first + tl.arange(0, BLOCK_N)
        block = project(head_mean, tail_mean, weight_ptr, bias_ptr, 1 + channel, OUT=1 + C, C=C, HEAD=HEAD, TAIL=TAIL)
        store_tile(context_ptr, lane, lane < PATCH_H * PATCH_W, channel, block, WIDTH=C)


@triton.jit
def _attend_to_contexts(
    t_ptr, y_ptr, context_ptr, pointers, layer, count, mean, m2, place, tiles, eps,
    PER_SAMPLE: tl.constexpr, LAYERS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """t + out_proj(ReLU(values) * context) for the sample's tokens, from t to y; values are qkv's last C outputs of
    norm1(t). They are multiplied into the sums of out_proj, BLOCK_N at a time."""
    weight_ptr = of_layer(pointers, layer, PART=QKV, LAYERS=LAYERS)
    bias_ptr = of_layer(pointers, layer, PART=QKV + 1, LAYERS=LAYERS)
    norm_weight_ptr = of_layer(pointers, layer, PART=NORM1, LAYERS=LAYERS)
    norm_bias_ptr = of_layer(pointers, layer, PART=NORM1 + 1, LAYERS=LAYERS)
    out_ptr = of_layer(pointers, layer, PART=OUT_PROJ, LAYERS=LAYERS)
    new_count, new_mean, new_m2 = 0.0, 0.0, 0.0
    for tile in tl.range(0, tiles, disable_licm=True, num_stages=1):
        _, pixel, valid = rows_of_tile(tile, place, PATCH_H=PATCH_H, PATCH_W=PATCH_W, BLOCK_M=BLOCK_M, GROUP=None)
        position = _position_of_pixel(pixel, place[1], PATCH_H=PATCH_H, PATCH_W=PATCH_W)
        normed_head, normed_tail = load_normalised(
            t_ptr, pixel, valid, norm_weight_ptr, norm_bias_ptr, count, mean, m2, eps,
            PER_SAMPLE=PER_SAMPLE, C=C, HEAD=HEAD, TAIL=TAIL,
        )  # fmt: skip
        head = tl.zeros((BLOCK_M, HEAD), tl.float32)
        tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
        for first in tl.range(0, C, BLOCK_N, disable_licm=True):
            channel = first + tl.arange(0, BLOCK_N)
            value = project(
                normed_head, normed_tail, weight_ptr, bias_ptr, 1 + C + channel,
                OUT=1 + 2 * C, C=C, HEAD=HEAD, TAIL=TAIL,
            )  # fmt: skip
            value = activate(value, ACT=RELU, DTYPE=tl.float32) * load_tile(
                context_ptr, position, valid, channel, WIDTH=C
            )
            head, tail = add_columns_product(
                head, tail, value.to(normed_head.dtype), out_ptr, channel, WIDTH=C, C=C, HEAD=HEAD, TAIL=TAIL
            )
        out_bias_ptr = of_layer(pointers, layer, PART=OUT_PROJ + 1, LAYERS=LAYERS)
        head, tail = add_bias_and_tokens(head, tail, out_bias_ptr, t_ptr, pixel, valid, C=C, HEAD=HEAD, TAIL=TAIL)
        store_tokens(y_ptr, pixel, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)
        if PER_SAMPLE:
            new_count, new_mean, new_m2 = add_sample_moments(
                new_count, new_mean, new_m2, head, tail, valid, C=C, HEAD=HEAD, TAIL=TAIL
            )
    return new_count, new_mean, new_m2


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def separable_fwd_kernel(
    x_ptr,  # (B, H, W, C)
    pointers, norm_weight_ptr, norm_bias_ptr,  # of the layers; of the final norm, (C,) or None
    y_ptr,  # written: like x
    context_ptr,  # workspace, (B, PATCH_H * PATCH_W, C), float32
    pixels, width, tiles, eps,
    PER_SAMPLE: tl.constexpr, LAYERS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    POSITIONS: tl.constexpr, F: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """y = final_norm(layers(x)), where a layer is, with score, keys and values = qkv(norm1(t)),

        context = the mean over a group of keys weighted by softmax(score)
        t = t + out_proj(ReLU(values) * context), then t = t + fc2(SiLU(fc1(norm2(t))))

    A program has a sample. x is read and y written once; what lies between, in y and the workspace, and the weights,
    once for each tile, come from cache."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    place = (pixels, width)
    x_ptr += sample * pixels * C
    y_ptr += sample * pixels * C
    context_ptr += sample * (PATCH_H * PATCH_W * C)
    count, mean, m2 = 0.0, 0.0, 0.0
    if PER_SAMPLE:
        count, mean, m2 = measure_sample(
            x_ptr, place, tiles, PATCH_H=PATCH_H, PATCH_W=PATCH_W, BLOCK_M=BLOCK_M, GROUP=None,
            C=C, HEAD=HEAD, TAIL=TAIL,
        )  # fmt: skip

    # handed on from layer to layer: Triton 3.6 cannot choose between two pointers that were moved, on AMD
    t_ptr = x_ptr
    for layer in tl.range(0, LAYERS, disable_licm=True, num_stages=1):
        head_mean, tail_mean = _mean_tokens(
            t_ptr, pointers, layer, count, mean, m2, place, tiles, eps,
            PER_SAMPLE=PER_SAMPLE, LAYERS=LAYERS, PATCH_H=PATCH_H, PATCH_W=PATCH_W, POSITIONS=POSITIONS,
            C=C, HEAD=HEAD, TAIL=TAIL, BLOCK_M=BLOCK_M,
        )  # fmt: skip
        _write_contexts(
            head_mean.to(dtype), tail_mean.to(dtype), context_ptr, pointers, layer,
            LAYERS=LAYERS, PATCH_H=PATCH_H, PATCH_W=PATCH_W, POSITIONS=POSITIONS,
            C=C, HEAD=HEAD, TAIL=TAIL, BLOCK_N=BLOCK_N,
        )  # fmt: skip
        tl.debug_barrier()
        count, mean, m2 = _attend_to_contexts(
            t_ptr, y_ptr, context_ptr, pointers, layer, count, mean, m2, place, tiles, eps,
            PER_SAMPLE=PER_SAMPLE, LAYERS=LAYERS, PATCH_H=PATCH_H, PATCH_W=PATCH_W, C=C, HEAD=HEAD, TAIL=TAIL,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        )  # fmt: skip
        tl.debug_barrier()
        count, mean, m2 = feed_forward(
            y_ptr, pointers, layer, count, mean, m2, place, tiles, eps,
            PER_SAMPLE=PER_SAMPLE, LAYERS=LAYERS, PATCH_H=PATCH_H, PATCH_W=PATCH_W, F=F, C=C, HEAD=HEAD, TAIL=TAIL,
            BLOCK_M=BLOCK_M, BLOCK_F=BLOCK_F, GROUP=None,
        )  # fmt: skip
        t_ptr = y_ptr
        tl.debug_barrier()

    if norm_weight_ptr is not None:
        normalise_in_place(
            y_ptr, norm_weight_ptr, norm_bias_ptr, count, mean, m2, place, tiles, eps,
            PER_SAMPLE=PER_SAMPLE, PATCH_H=PATCH_H, PATCH_W=PATCH_W, BLOCK_M=BLOCK_M, GROUP=None,
            C=C, HEAD=HEAD, TAIL=TAIL,
        )  # fmt: skip
