"""The Triton kernels of the gradients of a layer's parameters: sums over parts of the rows, and what finishes them."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import dot, folded_rows, load_tile, load_vector, store_vector
from ..triton_launch import jit_kernel
from ..triton_row_gradients import store_norm_sums
from ..triton_row_kernels import load_row_statistics, row_columns

# The four linear maps of a layer, in this order: qkv and fc1, which have a norm in front, out and fc2. The gradient of
# a weight is a^T x for the gradient a of the map's outputs and its inputs x, normalised for the first two.


@triton.jit
def _place(block, C: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr):
    """Which map a block of BLOCK of its outputs belongs to, and which it is there; the numbers of outputs and inputs of
    that map. What fc2 reads is as many as C channels at a time; its blocks follow each other once for each."""
    QKV: tl.constexpr = (3 * C + BLOCK - 1) // BLOCK
    FC1: tl.constexpr = QKV + (F + BLOCK - 1) // BLOCK
    OUT: tl.constexpr = FC1 + (C + BLOCK - 1) // BLOCK
    which = tl.where(block < QKV, 0, tl.where(block < FC1, 1, tl.where(block < OUT, 2, 3)))
    begin = tl.where(block < QKV, 0, tl.where(block < FC1, QKV, tl.where(block < OUT, FC1, OUT)))
    outputs = tl.where(block < QKV, 3 * C, tl.where(block < FC1, F, C))
    return which, block - begin, outputs, tl.where(block < OUT, C, F)


@triton.jit
def _load_inputs(ptr, lane, valid, column, width, limit):
    """Columns `column`, below `limit`, of rows of a matrix (.., width)."""
    mask = valid[:, None] & (column < limit)[None, :]
    return tl.load(ptr + lane[:, None] * width + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store_product(ptr, output, column, width, limit, outputs, tile):
    mask = (output < outputs)[:, None] & (column < limit)[None, :]
    tl.store(ptr + output[:, None] * width + column[None, :], tile, mask=mask)


@jit_kernel(do_not_specialize=["rows", "rows_per_sample", "rows_per_part"])
def layer_products_kernel(
    qkv, fc1,  # a, x, mean, rstd, weight, and written product, sums and norm, as of normalised_products_kernel
    out, fc2,  # a, x, and written product and sums
    rows, rows_per_sample, rows_per_part,
    PER_SAMPLE: tl.constexpr, F: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """product = a^T x for a part of the rows, (parts, outputs, inputs), and sums = the sums of the columns of a,
    (parts, outputs), of the four maps in one launch. Rows that are not normalised have mean 0 and rstd 1, which
    changes no bit of them. `norm`: as of normalised_products_kernel.

    The grid is (blocks of BLOCK_N outputs of all maps, parts). Reads each a once (of fc2 once for each C inputs),
    x once for each block; writes all of the workspaces."""
    part = tl.program_id(1)
    which, block, outputs, width = _place(tl.program_id(0), C=C, F=F, BLOCK=BLOCK_N)
    OUT: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    normed, chunk = which < 2, tl.where(which == 3, block // OUT, 0)
    block -= chunk * OUT
    limit = tl.minimum(width - chunk * C, C)
    a_ptr, x_ptr, product_ptr, sums_ptr = qkv[0], qkv[1], qkv[5], qkv[6]
    mean_ptr, rstd_ptr, weight_ptr, norm_ptr = qkv[2], qkv[3], qkv[4], qkv[7]
    if which == 1:
        a_ptr, x_ptr, product_ptr, sums_ptr = fc1[0], fc1[1], fc1[5], fc1[6]
        mean_ptr, rstd_ptr, weight_ptr, norm_ptr = fc1[2], fc1[3], fc1[4], fc1[7]
    elif which == 2:
        a_ptr, x_ptr, product_ptr, sums_ptr = out[0], out[1], out[2], out[3]
    elif which == 3:
        a_ptr, x_ptr, product_ptr, sums_ptr = fc2[0], fc2[1], fc2[2], fc2[3]
    x_ptr += chunk * C

    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    lane, output = tl.arange(0, BLOCK_M), block * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.zeros((BLOCK_N, HEAD), tl.float32)
    tail = tl.zeros((BLOCK_N, TAIL), tl.float32)
    total = folded_rows(tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, rows)
    for first in range(0, end - begin, BLOCK_M):
        start, row = begin.to(tl.int64) + first, begin + first + lane
        valid = row < end
        a = _load_inputs(a_ptr + start * outputs, lane, valid, output, outputs, outputs)
        head_x = _load_inputs(x_ptr + start * width, lane, valid, head_column, width, limit)
        tail_x = _load_inputs(x_ptr + start * width, lane, valid, tail_column, width, limit)
        total += folded_rows(a.to(tl.float32))
        mean, rstd = load_row_statistics(
            mean_ptr, rstd_ptr, row, valid & normed, rows_per_sample, PER_SAMPLE=PER_SAMPLE
        )
        rstd = tl.where(normed, rstd, 1.0)
        if a.dtype == tl.float32:
            head_x, tail_x = (head_x - mean) * rstd, (tail_x - mean) * rstd
        else:  # one instruction, as exact as what it is rounded to
            shift = mean * rstd
            head_x, tail_x = head_x.to(tl.float32) * rstd - shift, tail_x.to(tl.float32) * rstd - shift
        head = dot(tl.trans(a), head_x.to(a.dtype), head)
        tail = dot(tl.trans(a), tail_x.to(a.dtype), tail)
    product_ptr += part * (outputs * width) + chunk * C
    sums_ptr += part * outputs
    _store_product(product_ptr, output, head_column, width, limit, outputs, head)
    _store_product(product_ptr, output, tail_column, width, limit, outputs, tail)
    tl.store(sums_ptr + output, tl.sum(total, 0), mask=(output < outputs) & (chunk == 0))
    if normed:
        blocks = tl.cdiv(outputs, BLOCK_N)
        store_norm_sums(
            norm_ptr + (part * blocks + block) * (2 * C), weight_ptr, product_ptr, sums_ptr, block * BLOCK_N, outputs,
            C=C, BLOCK_C=2 * HEAD, BLOCK_N=BLOCK_N,
        )  # fmt: skip


@jit_kernel(do_not_specialize=["parts", "qkv_norm_parts", "fc1_norm_parts"])
def layer_gradient_kernel(
    qkv, fc1,  # product, sums, norm, the norm's weight and bias, and written: their gradients, dweight, dbias or None
    out, fc2,  # product, sums, and written: dweight, dbias or None
    parts, qkv_norm_parts, fc1_norm_parts,
    C: tl.constexpr, F: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """The gradients of both norms and of the four linear maps of a layer, from what layer_products_kernel wrote:

        dweight = P * norm_weight + s norm_bias^T,  dbias = s

    for the sums P of the products and s of the sums, without a norm dweight = P. The grid is (blocks of outputs of all
    maps, blocks of the most inputs); the first block of outputs adds up the norm's parts too."""
    which, block, outputs, width = _place(tl.program_id(0), C=C, F=F, BLOCK=BLOCK_O)
    normed = which < 2
    product_ptr, sums_ptr, norm_ptr, norm_weight_ptr, norm_bias_ptr = qkv[0], qkv[1], qkv[2], qkv[3], qkv[4]
    dnorm_weight_ptr, dnorm_bias_ptr, dweight_ptr, norm_parts = qkv[5], qkv[6], qkv[7], qkv_norm_parts
    if which == 1:
        product_ptr, sums_ptr, norm_ptr, norm_weight_ptr, norm_bias_ptr = fc1[0], fc1[1], fc1[2], fc1[3], fc1[4]
        dnorm_weight_ptr, dnorm_bias_ptr, dweight_ptr, norm_parts = fc1[5], fc1[6], fc1[7], fc1_norm_parts
    elif which == 2:
        product_ptr, sums_ptr, dweight_ptr = out[0], out[1], out[2]
    elif which == 3:
        product_ptr, sums_ptr, dweight_ptr = fc2[0], fc2[1], fc2[2]
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    output = block * BLOCK_O + tl.arange(0, BLOCK_O)
    mask = (output < outputs)[:, None] & (column < width)[None, :]
    at = output[:, None] * width + column[None, :]
    product = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_O,), tl.float32)
    for part in tl.range(0, parts, loop_unroll_factor=4):
        product += tl.load(product_ptr + part * (outputs * width) + at, mask=mask, other=0.0)
        total += tl.load(sums_ptr + part * outputs + output, mask=output < outputs, other=0.0)
    if normed:
        scale, bias = load_vector(norm_weight_ptr, column, WIDTH=C), load_vector(norm_bias_ptr, column, WIDTH=C)
        product = product * scale[None, :] + total[:, None] * bias[None, :]
        if block == 0:
            store_vector(dnorm_weight_ptr, column, _add_parts(norm_ptr, norm_parts, column, C=C), WIDTH=C)
            store_vector(dnorm_bias_ptr, column, _add_parts(norm_ptr + C, norm_parts, column, C=C), WIDTH=C)
    tl.store(dweight_ptr + at, product.to(dweight_ptr.dtype.element_ty), mask=mask)
    if tl.program_id(1) == 0:
        if which == 0:
            _store_bias(qkv[8], output, outputs, total)
        elif which == 1:
            _store_bias(fc1[8], output, outputs, total)
        elif which == 2:
            _store_bias(out[3], output, outputs, total)
        else:
            _store_bias(fc2[3], output, outputs, total)


@triton.jit
def _add_parts(ptr, parts, column, C: tl.constexpr):
    """Sums of columns of (parts, 2, C), from the first or from the second half on."""
    total = tl.zeros((32, column.shape[0]), tl.float32)
    for first in range(0, parts, 32):
        total += load_tile(
            ptr, first + tl.arange(0, 32), first + tl.arange(0, 32) < parts, column, WIDTH=C, STRIDE=2 * C
        )
    return tl.sum(total, 0)


@triton.jit
def _store_bias(ptr, output, outputs, total):
    if ptr is not None:
        tl.store(ptr + output, total.to(ptr.dtype.element_ty), mask=output < outputs)
