"""What both kernels of global_representation do with the tokens of a program, a tile of BLOCK_M rows at a time.

A walk reads tokens from a map t (.., C), normalises them and writes what becomes of them. `place` says which tokens the
program has, see `rows_of_tile`. In a norm of samples, PER_SAMPLE, a program has one sample, and `count`, `mean` and
`m2` are number, mean and sum of squared deviations of all its values; a walk that writes tokens returns those of what
it wrote.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import (
    SILU,
    activate,
    at_least_zero,
    inverse_std,
    load_tile,
    load_vector,
    pixel_of_token,
)
from ..triton_row_kernels import (
    add_columns_product,
    load_rows_in_float32,
    load_weight,
    multiply_rows,
    row_columns,
    row_statistics,
    store_rows,
)

TENSORS = tl.constexpr(12)  # of a layer: weight and bias of norm1, qkv, out_proj, norm2, fc1 and fc2
NORM1, QKV, OUT_PROJ, NORM2, FC1, FC2 = (tl.constexpr(2 * i) for i in range(6))


@triton.jit
def of_layer(pointers, layer, PART: tl.constexpr, LAYERS: tl.constexpr):
    """One of a layer's tensors. All layers have it, in one dtype, or none has."""
    ptr = pointers[PART]
    if ptr is not None:
        for i in tl.static_range(1, LAYERS):
            ptr = tl.where(layer == i, pointers[TENSORS * i + PART], ptr)
    return ptr


@triton.jit
def rows_of_tile(tile, place, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """Numbers of the rows of a tile; the pixels that they are, counted from the first one of the program's first
    sample; and which of them there are.

    GROUP is the number of rows that each group of tokens takes; `place` is then (groups of the program, tokens of a
    group, pixels of a sample, width, position inside a patch of the first group). With GROUP None the program has a
    sample, whose pixels are the rows; `place` is then (pixels, width)."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if GROUP is None:
        pixel = row
        valid = row < place[0]
    else:
        POSITIONS: tl.constexpr = PATCH_H * PATCH_W
        group, token = place[4] + row // GROUP, row % GROUP
        pixel = group // POSITIONS * place[2]
        pixel += pixel_of_token(token, group % POSITIONS, place[3], PATCH_H=PATCH_H, PATCH_W=PATCH_W)
        valid = (token < place[1]) & (row // GROUP < place[0])
    return row, pixel, valid


@triton.jit
def store_tokens(ptr, pixel, valid, head, tail, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Writes tokens over those that were there."""
    tl.debug_barrier()  # where the rows come from here, a thread may still have to read what another one holds as well
    store_rows(ptr, pixel, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)


# Norms


@triton.jit
def add_sample_moments(count, mean, m2, head, tail, valid, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Number, mean and sum of squared deviations of all values so far and of those of a tile, by Chan's formula. The
    mean of the tile is corrected by the sum of the distances to it, so that a mean of many standard deviations costs no
    accuracy."""
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
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
def measure_sample(
    x_ptr, place, tiles,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Number, mean and sum of squared deviations of the values of the program's tokens, which it reads once."""
    count, mean, m2 = 0.0, 0.0, 0.0
    for tile in range(tiles):
        _, pixel, valid = rows_of_tile(tile, place, PATCH_H=PATCH_H, PATCH_W=PATCH_W, BLOCK_M=BLOCK_M, GROUP=GROUP)
        head, tail = load_rows_in_float32(x_ptr, pixel, valid, C=C, HEAD=HEAD, TAIL=TAIL)
        count, mean, m2 = add_sample_moments(count, mean, m2, head, tail, valid, C=C, HEAD=HEAD, TAIL=TAIL)
    return count, mean, m2


@triton.jit
def _load_scaled(ptr, pixel, valid, column, mean, rstd, weight_ptr, bias_ptr, C: tl.constexpr):
    """Some channels of rows after a norm; zeros where a row is not valid, which no product may spoil."""
    rows = (load_tile(ptr, pixel, valid, column, WIDTH=C).to(tl.float32) - mean) * rstd
    rows = rows * load_vector(weight_ptr, column, WIDTH=C)[None, :] + load_vector(bias_ptr, column, WIDTH=C)[None, :]
    return tl.where(valid[:, None], rows, 0.0).to(ptr.dtype.element_ty)


@triton.jit
def load_normalised(
    ptr, pixel, valid, weight_ptr, bias_ptr, count, mean, m2, eps,
    PER_SAMPLE: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Rows after a norm of tokens, or of the sample with these moments, as two tiles."""
    if PER_SAMPLE:
        rstd = inverse_std(m2 / count, eps)
    else:
        head, tail = load_rows_in_float32(ptr, pixel, valid, C=C, HEAD=HEAD, TAIL=TAIL)
        row_mean, row_rstd = row_statistics(head, tail, eps, C=C, HEAD=HEAD, TAIL=TAIL)
        mean, rstd = row_mean[:, None], row_rstd[:, None]
        tl.debug_barrier()  # rows are read again, for in registers they would not leave room for anything else
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    head = _load_scaled(ptr, pixel, valid, head_column, mean, rstd, weight_ptr, bias_ptr, C=C)
    return head, _load_scaled(ptr, pixel, valid, tail_column, mean, rstd, weight_ptr, bias_ptr, C=C)


@triton.jit
def normalise_in_place(
    y_ptr, norm_weight_ptr, norm_bias_ptr, count, mean, m2, place, tiles, eps,
    PER_SAMPLE: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Replaces the program's tokens by what a norm makes of them."""
    for tile in range(tiles):
        _, pixel, valid = rows_of_tile(tile, place, PATCH_H=PATCH_H, PATCH_W=PATCH_W, BLOCK_M=BLOCK_M, GROUP=GROUP)
        head, tail = load_normalised(
            y_ptr, pixel, valid, norm_weight_ptr, norm_bias_ptr, count, mean, m2, eps,
            PER_SAMPLE=PER_SAMPLE, C=C, HEAD=HEAD, TAIL=TAIL,
        )  # fmt: skip
        store_tokens(y_ptr, pixel, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)


# Linear maps


@triton.jit
def project(
    head, tail, weight_ptr, bias_ptr, output, OUT: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr
):
    """Outputs `output` of a linear map (OUT, C) of normalised rows, in float32; zeros for outputs from OUT on."""
    head_weight, tail_weight = load_weight(weight_ptr, output, head, C=C, OUT=OUT, HEAD=HEAD, TAIL=TAIL)
    sums = multiply_rows(head, tail, head_weight, tail_weight)
    return sums + load_vector(bias_ptr, output, WIDTH=OUT)[None, :]


@triton.jit
def add_bias_and_tokens(
    head, tail, bias_ptr, ptr, pixel, valid, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr
):
    """What a branch makes, with the bias of its last linear map and its residual."""
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    tl.debug_barrier()  # or the compiler would keep the rows in registers from where the norm read them
    head += load_vector(bias_ptr, head_column, WIDTH=C)[None, :]
    head += load_tile(ptr, pixel, valid, head_column, WIDTH=C).to(tl.float32)
    tail += load_vector(bias_ptr, tail_column, WIDTH=C)[None, :]
    tail += load_tile(ptr, pixel, valid, tail_column, WIDTH=C).to(tl.float32)
    return head, tail


@triton.jit
def _feed_forward_tile(
    y_ptr, pixel, valid, pointers, layer, count, mean, m2, eps,
    PER_SAMPLE: tl.constexpr, LAYERS: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """t + fc2(SiLU(fc1(norm2(t)))) for the rows of a tile."""
    weight_ptr = of_layer(pointers, layer, PART=NORM2, LAYERS=LAYERS)
    bias_ptr = of_layer(pointers, layer, PART=NORM2 + 1, LAYERS=LAYERS)
    normed_head, normed_tail = load_normalised(
        y_ptr, pixel, valid, weight_ptr, bias_ptr, count, mean, m2, eps,
        PER_SAMPLE=PER_SAMPLE, C=C, HEAD=HEAD, TAIL=TAIL,
    )  # fmt: skip
    weight_ptr = of_layer(pointers, layer, PART=FC1, LAYERS=LAYERS)
    bias_ptr = of_layer(pointers, layer, PART=FC1 + 1, LAYERS=LAYERS)
    weight2_ptr = of_layer(pointers, layer, PART=FC2, LAYERS=LAYERS)
    head = tl.zeros(normed_head.shape, tl.float32)
    tail = tl.zeros(normed_tail.shape, tl.float32)
    for first in tl.range(0, F, BLOCK_F, disable_licm=True):
        column = first + tl.arange(0, BLOCK_F)
        hidden = project(normed_head, normed_tail, weight_ptr, bias_ptr, column, OUT=F, C=C, HEAD=HEAD, TAIL=TAIL)
        hidden = activate(hidden, ACT=SILU, DTYPE=normed_head.dtype).to(normed_head.dtype)
        head, tail = add_columns_product(head, tail, hidden, weight2_ptr, column, WIDTH=F, C=C, HEAD=HEAD, TAIL=TAIL)
    bias_ptr = of_layer(pointers, layer, PART=FC2 + 1, LAYERS=LAYERS)
    return add_bias_and_tokens(head, tail, bias_ptr, y_ptr, pixel, valid, C=C, HEAD=HEAD, TAIL=TAIL)


@triton.jit
def feed_forward(
    y_ptr, pointers, layer, count, mean, m2, place, tiles, eps,
    PER_SAMPLE: tl.constexpr, LAYERS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    F: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """t = t + fc2(SiLU(fc1(norm2(t)))) for the program's tokens, which lie in y. Reads them twice, writes them once."""
    new_count, new_mean, new_m2 = 0.0, 0.0, 0.0
    for tile in tl.range(0, tiles, disable_licm=True, num_stages=1):
        _, pixel, valid = rows_of_tile(tile, place, PATCH_H=PATCH_H, PATCH_W=PATCH_W, BLOCK_M=BLOCK_M, GROUP=GROUP)
        head, tail = _feed_forward_tile(
            y_ptr, pixel, valid, pointers, layer, count, mean, m2, eps,
            PER_SAMPLE=PER_SAMPLE, LAYERS=LAYERS, F=F, BLOCK_F=BLOCK_F, C=C, HEAD=HEAD, TAIL=TAIL,
        )  # fmt: skip
        store_tokens(y_ptr, pixel, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)
        if PER_SAMPLE:
            new_count, new_mean, new_m2 = add_sample_moments(
                new_count, new_mean, new_m2, head, tail, valid, C=C, HEAD=HEAD, TAIL=TAIL
            )
    return new_count, new_mean, new_m2
