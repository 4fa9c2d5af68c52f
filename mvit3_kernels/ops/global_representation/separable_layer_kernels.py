"""The Triton kernels in front of and behind a layer in training: one that rounds its weights, and those that finish the
gradients of its parameters."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import load_sums, load_tile, load_vector, store_tile, store_vector
from ..triton_launch import jit_kernel
from ..triton_row_gradients import norm_linear_gradient_kernel, second_gradient_kernel, store_outputs_gradient


@triton.jit
def _pack_weight(
    weight_ptr, norm_weight_ptr, norm_bias_ptr,  # (OUT, C), (C,), (C,)
    packed_ptr, folded_ptr,  # written: (OUT, C); (2, OUT), float32, or None
    OUT: tl.constexpr, C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    valid = output < OUT
    scale = tl.zeros((BLOCK_O,), tl.float32)
    shift = tl.zeros((BLOCK_O,), tl.float32)
    for first in range(0, C, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        weight = load_tile(weight_ptr, output, valid, column, WIDTH=C).to(packed_ptr.dtype.element_ty)
        store_tile(packed_ptr, output, valid, column, weight, WIDTH=C)
        if folded_ptr is not None:
            weight = weight.to(tl.float32)
            scale += tl.sum(weight * load_vector(norm_weight_ptr, column, WIDTH=C)[None, :], 1)
            shift += tl.sum(weight * load_vector(norm_bias_ptr, column, WIDTH=C)[None, :], 1)
    if folded_ptr is not None:
        store_vector(folded_ptr, output, scale, WIDTH=OUT)
        store_vector(folded_ptr + OUT, output, shift, WIDTH=OUT)


@jit_kernel
def pack_kernel(
    qkv_ptr, out_ptr, weight1_ptr, weight2_ptr,  # (1 + 2 C, C), (C, C), (F, C), (C, F)
    norm1, norm2,  # weight and bias of each norm, (C,)
    packed_ptr, folded_ptr,  # written: the weights, each from its place on; (2, 1 + 2 C + F), float32, or None
    OUT_AT: tl.constexpr, WEIGHT1_AT: tl.constexpr, WEIGHT2_AT: tl.constexpr,
    C: tl.constexpr, F: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The weights of a layer of separable attention as they are multiplied, and (2, outputs), qkv's and then weight1's:
    each weight, so rounded, times weight and bias of the norm in front of it. The grid is (blocks of outputs, 4), as
    long as the longest needs; everything is read and written once."""
    which = tl.program_id(1)
    if which == 0:
        _pack_weight(
            qkv_ptr, norm1[0], norm1[1], packed_ptr, folded_ptr, OUT=1 + 2 * C, C=C, BLOCK_O=BLOCK_O, BLOCK_C=BLOCK_C
        )
    elif which == 1:
        _pack_weight(out_ptr, None, None, packed_ptr + OUT_AT, None, OUT=C, C=C, BLOCK_O=BLOCK_O, BLOCK_C=BLOCK_C)
    elif which == 2:
        if folded_ptr is not None:
            folded_ptr += 2 * (1 + 2 * C)
        _pack_weight(
            weight1_ptr, norm2[0], norm2[1], packed_ptr + WEIGHT1_AT, folded_ptr,
            OUT=F, C=C, BLOCK_O=BLOCK_O, BLOCK_C=BLOCK_C,
        )  # fmt: skip
    else:
        _pack_weight(
            weight2_ptr, None, None, packed_ptr + WEIGHT2_AT, None, OUT=C, C=F, BLOCK_O=BLOCK_O, BLOCK_C=BLOCK_C
        )


_PARTS = ["value_parts", "value_norm_parts", "key_parts", "context_parts", "fc1_parts", "fc1_norm_parts", "out_parts"]


@jit_kernel(do_not_specialize=[*_PARTS, "fc2_parts"])
def separable_gradient_kernel(
    value, key,  # (parts, C + 1, C), (parts, C + 1), (parts, 2, C); (parts, C, LANES), (parts, C), (parts, 2, C)
    norm, qkv,  # weight, bias and their gradients, written; weight and the gradients of weight and bias (None)
    fc1, out, fc2,  # the tensors of norm_linear_gradient_kernel; those of second_gradient_kernel
    value_parts, value_norm_parts, key_parts, context_parts, fc1_parts, fc1_norm_parts, out_parts, fc2_parts,
    LANES: tl.constexpr, C: tl.constexpr, F: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The gradients of all parameters of a layer of separable attention, from the sums of parts of the rows. The third
    axis of the grid is which, the others are as in the kernels of the linear maps, as long as the longest needs."""
    which, block = tl.program_id(2), tl.program_id(1)
    if which == 0:
        if block * BLOCK_O < C:
            store_outputs_gradient(
                value[0], value[1], norm[0], norm[1], qkv[1] + (1 + C) * C, None if qkv[2] is None else qkv[2] + 1 + C,
                value_parts, None, PRODUCT_SIZE=(1 + C) * C, PRODUCT_STRIDE=C, SUMS_SIZE=1 + C,
                OUT=C, C=C, BLOCK_C=BLOCK_C, BLOCK_O=BLOCK_O,
            )  # fmt: skip
    elif which == 1:
        if block * BLOCK_O < C:
            store_outputs_gradient(
                key[0], key[1], norm[0], norm[1], qkv[1] + C, None if qkv[2] is None else qkv[2] + 1,
                key_parts, context_parts, PRODUCT_SIZE=C * LANES, PRODUCT_STRIDE=LANES, SUMS_SIZE=C,
                OUT=C, C=C, BLOCK_C=BLOCK_C, BLOCK_O=BLOCK_O,
            )  # fmt: skip
    elif which == 2:
        if block * BLOCK_O < F:
            norm_linear_gradient_kernel(
                fc1[0], fc1[1], fc1[2], fc1[3], fc1[4], fc1[5], fc1[6], fc1[7], fc1[8], fc1_parts, fc1_norm_parts,
                OUT=F, C=C, BLOCK_C=BLOCK_C, BLOCK_O=BLOCK_O,
            )  # fmt: skip
    elif which == 3:
        if block * BLOCK_F < C:
            second_gradient_kernel(
                out[0], out[1], out[2], out[3], out_parts, F=C, C=C, BLOCK_C=BLOCK_C, BLOCK_F=BLOCK_F
            )
    elif which == 4:
        if block * BLOCK_F < F:
            second_gradient_kernel(
                fc2[0], fc2[1], fc2[2], fc2[3], fc2_parts, F=F, C=C, BLOCK_C=BLOCK_C, BLOCK_F=BLOCK_F
            )
    elif block == 0:
        _score_and_norm_gradient(
            value, key[2], norm, qkv, value_parts, value_norm_parts, context_parts, C=C, BLOCK_C=BLOCK_C
        )


@triton.jit
def _score_and_norm_gradient(
    value, key_norm_ptr, norm, qkv, value_parts, value_norm_parts, context_parts, C: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Of the score, whose products are the last row of the values', and of the norm, from the shares of all three."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid, one = column < C, tl.arange(0, 16)
    product = load_sums(value[0] + C * C, value_parts, column, valid, C=(1 + C) * C, BLOCK_C=BLOCK_C)
    total = tl.sum(load_sums(value[1] + C, value_parts, one, one < 1, C=1 + C, BLOCK_C=16), 0)
    norm_weight, norm_bias = load_vector(norm[0], column, WIDTH=C), load_vector(norm[1], column, WIDTH=C)
    store_vector(qkv[1], column, product * norm_weight + total * norm_bias, WIDTH=C)
    if qkv[2] is not None and tl.program_id(0) == 0:
        tl.store(qkv[2], total.to(qkv[2].dtype.element_ty))
    weight = load_vector(qkv[0], column, WIDTH=C)
    dweight = weight * product + load_sums(value[2], value_norm_parts, column, valid, C=2 * C, BLOCK_C=BLOCK_C)
    dweight += load_sums(key_norm_ptr, context_parts, column, valid, C=2 * C, BLOCK_C=BLOCK_C)
    store_vector(norm[2], column, dweight, WIDTH=C)
    dbias = weight * total + load_sums(value[2] + C, value_norm_parts, column, valid, C=2 * C, BLOCK_C=BLOCK_C)
    dbias += load_sums(key_norm_ptr + C, context_parts, column, valid, C=2 * C, BLOCK_C=BLOCK_C)
    store_vector(norm[3], column, dbias, WIDTH=C)
