"""Triton kernels of the gradients of a layer norm in front of a linear map, on whole rows as in triton_row_kernels.py.

Gradients of parameters are sums over rows. Each program adds up a range of rows, a part, into a float32 workspace, and
one small launch adds up the parts in a fixed order. There are no atomics: the result is the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import dot, folded_rows, load_sums, load_tile, load_vector, store_tile, store_vector
from .triton_launch import jit_kernel
from .triton_math import opaque
from .triton_row_kernels import (
    NOT_SPECIALIZED,
    drop_rows,
    load_row_statistics,
    load_row_vector,
    load_rows,
    load_rows_in_float32,
    load_weight,
    row_columns,
    store_rows,
)

# The gradient of x


@triton.jit
def store_norm_gradient(
    residual_ptr,  # (.., C) or None
    dx_ptr, sums_ptr,  # written: (.., C); (2, rows), float32, or None
    at, row, valid, head, tail, head_normal, tail_normal, rstd, rows,
    PER_SAMPLE: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """From the gradient g of the normalised rows n, tiles `head` and `tail`, the gradient of x:

        dx = rstd * (g - mean(g) - n * mean(g * n)) + the gradient of a residual

    The means are over a row or, PER_SAMPLE, over a sample. A sample's are known only when all of its rows are: then dx
    receives g, `sums_ptr` the sums of g and of g * n over each row, and sample_gradient_kernel does the rest."""
    total = tl.sum(head, 1) + tl.sum(tail, 1)
    product = tl.sum(head * head_normal, 1) + tl.sum(tail * tail_normal, 1)
    if PER_SAMPLE:
        tl.store(sums_ptr + row, total, mask=valid)
        tl.store(sums_ptr + rows + row, product, mask=valid)
    else:
        head = rstd * (head - (total / C)[:, None] - head_normal * (product / C)[:, None])
        tail = rstd * (tail - (total / C)[:, None] - tail_normal * (product / C)[:, None])
        if residual_ptr is not None:
            head_residual, tail_residual = load_rows_in_float32(residual_ptr, at, valid, C=C, HEAD=HEAD, TAIL=TAIL)
            head += head_residual
            tail += tail_residual
    store_rows(dx_ptr, at, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)


@triton.jit
def load_folded(ptr, output, OUT: tl.constexpr, STRIDE: tl.constexpr):
    """Values `output` of weight @ norm_weight and of weight @ norm_bias, (2, STRIDE), float32, as rows."""
    scale, shift = load_vector(ptr, output, WIDTH=OUT), load_vector(ptr + STRIDE, output, WIDTH=OUT)
    return scale[None, :], shift[None, :]


@triton.jit
def load_sample_means(parts_ptr, sample, samples, parts, count):
    """The means over a sample of g and of g * n, of `count` values, from the sums of parts, (2, samples, parts),
    float32."""
    lane = tl.arange(0, 256)
    total = tl.zeros((256,), tl.float32)
    product = tl.zeros((256,), tl.float32)
    at = parts_ptr + sample.to(tl.int64) * parts
    for first in range(0, parts, 256):
        valid = first + lane < parts
        total += tl.load(at + first + lane, mask=valid, other=0.0)
        product += tl.load(at + samples.to(tl.int64) * parts + first + lane, mask=valid, other=0.0)
    return tl.sum(total, 0) / count, tl.sum(product, 0) / count


@triton.jit
def store_sample_gradient(
    residual_ptr, dx_ptr, at, valid, column, grad, normal, rstd, mean_grad, mean_product, C: tl.constexpr
):  # fmt: skip
    """What store_norm_gradient writes to one of both tiles, where the means over the sample are known."""
    residual = load_tile(residual_ptr, at, valid, column, WIDTH=C).to(tl.float32)
    store_tile(dx_ptr, at, valid, column, rstd * (grad - mean_grad - normal * mean_product) + residual, WIDTH=C)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def input_bwd_kernel(
    dy_ptr, x_ptr, residual_ptr,  # (rows, OUT); (rows, C); (rows, C) or None
    norm_weight_ptr, weight_ptr, mean_ptr, rstd_ptr,  # (C,); (OUT, C); (rows,) or, PER_SAMPLE, (samples,), float32
    known_ptr,  # (2, samples, parts), float32: sums of g and of g * n of each sample, where they are known, or None
    dx_ptr, sums_ptr,  # written: (rows, C); (2, rows), float32, or None
    made,  # None, or, where x = z weight^T: that weight, (C, C), and, written, the gradient of z, (rows, C)
    rows, rows_per_sample, samples, parts,
    PER_SAMPLE: tl.constexpr, OUT: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of x where y = norm(x) weight^T: g = norm_weight * (dy weight), then as in store_norm_gradient; and
    from it, as it is rounded, that of what x is `made` of.

    A program has BLOCK_M rows, with `known_ptr` of one sample, whose gradient it finishes. It leaves dy weight in dx,
    rounded as a library's product would hand it to the norm, and reads it again from cache, ROWS rows at a time: the
    product as it is made, x and a residual would be more than the registers of half a multiprocessor. Reads dy, x and
    the residual once, the weight once for each program."""
    ROWS: tl.constexpr = 64 if BLOCK_M >= 256 and HEAD + TAIL <= 160 else min(BLOCK_M, 32)
    lane = tl.arange(0, BLOCK_M)
    begin_row, end = tl.program_id(0) * BLOCK_M, rows
    if known_ptr is not None:
        blocks = tl.cdiv(rows_per_sample, BLOCK_M)
        sample = tl.program_id(0) // blocks
        begin_row = sample * rows_per_sample + tl.program_id(0) % blocks * BLOCK_M
        end = (sample + 1) * rows_per_sample
        mean_grad, mean_product = load_sample_means(
            known_ptr, sample, samples, parts, rows_per_sample.to(tl.float32) * C
        )
    start, valid = begin_row.to(tl.int64), begin_row + lane < end
    x_ptr += start * C
    dx_ptr += start * C
    _store_rows_product(
        dy_ptr + start * OUT, weight_ptr, dx_ptr, lane, valid,
        OUT=OUT, C=C, HEAD=HEAD, TAIL=TAIL, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    if residual_ptr is not None:
        residual_ptr += start * C
    tl.debug_barrier()
    head_scale, tail_scale = load_row_vector(norm_weight_ptr, C=C, HEAD=HEAD, TAIL=TAIL)
    for begin in range(0, BLOCK_M, ROWS):
        at = begin + tl.arange(0, ROWS)
        token = begin_row + at
        here = token < end
        mean, rstd = load_row_statistics(mean_ptr, rstd_ptr, token, here, rows_per_sample, PER_SAMPLE=PER_SAMPLE)
        head_grad, tail_grad = load_rows_in_float32(dx_ptr, at, here, C=C, HEAD=HEAD, TAIL=TAIL)
        head_x, tail_x = load_rows_in_float32(x_ptr, at, here, C=C, HEAD=HEAD, TAIL=TAIL)
        head_grad, tail_grad = head_grad * head_scale, tail_grad * tail_scale
        head_normal, tail_normal = (head_x - mean) * rstd, (tail_x - mean) * rstd
        if known_ptr is not None:
            head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
            store_sample_gradient(
                residual_ptr, dx_ptr, at, here, head_column, head_grad, head_normal, rstd,
                mean_grad, mean_product, C=C,
            )  # fmt: skip
            store_sample_gradient(
                residual_ptr, dx_ptr, at, here, tail_column, tail_grad, tail_normal, rstd,
                mean_grad, mean_product, C=C,
            )  # fmt: skip
        else:
            store_norm_gradient(
                residual_ptr, dx_ptr, sums_ptr, at, token, here, head_grad, tail_grad, head_normal, tail_normal,
                rstd, rows, PER_SAMPLE=PER_SAMPLE, C=C, HEAD=HEAD, TAIL=TAIL,
            )  # fmt: skip
    if made is not None:
        tl.debug_barrier()
        lane = opaque(lane)  # anew: the product has no registers for what was kept since the last one
        valid = begin_row + lane < end
        _store_rows_product(
            dx_ptr, made[0], made[1] + start * C, lane, valid, OUT=C, C=C, HEAD=HEAD, TAIL=TAIL, BLOCK_N=BLOCK_N
        )


@triton.jit
def _store_rows_product(
    dy_ptr, weight_ptr,  # (.., OUT); (OUT, C)
    dx_ptr,  # written: (.., C)
    lane, valid, OUT: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx = dy weight of rows `lane`."""
    head = tl.zeros((lane.shape[0], HEAD), tl.float32)
    tail = tl.zeros((lane.shape[0], TAIL), tl.float32)
    for first in range(0, OUT, BLOCK_N):
        output = first + tl.arange(0, BLOCK_N)
        dy = load_tile(dy_ptr, lane, valid, output, WIDTH=OUT)
        head_weight, tail_weight = load_weight(weight_ptr, output, dy, C=C, OUT=OUT, HEAD=HEAD, TAIL=TAIL)
        head = dot(dy, head_weight, head)
        tail = dot(dy, tail_weight, tail)
    store_rows(dx_ptr, lane, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def sample_gradient_kernel(
    x_ptr, residual_ptr,  # (rows, C); (rows, C) or None
    mean_ptr, rstd_ptr, sums_ptr,  # (samples,), (samples,), (2, rows), float32
    dx_ptr,  # read and written: (rows, C)
    rows, rows_per_sample,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Replaces g, the gradient of the normalised rows n, by that of x where the norm is of samples:

        dx = rstd * (g - mean(g) - n * mean(g * n)) + the gradient of a residual

    A program has a block of rows of a sample. Reads x, dx and the residual once, and the sums of a sample once for each
    of its programs; writes dx once."""
    blocks = tl.cdiv(rows_per_sample, BLOCK_M)
    sample, lane = (tl.program_id(0) // blocks).to(tl.int64), tl.arange(0, BLOCK_M)
    many = tl.arange(0, 1024)
    sums_ptr += sample * rows_per_sample
    total = tl.zeros((1024,), tl.float32)
    product = tl.zeros((1024,), tl.float32)
    for first in range(0, rows_per_sample, 1024):
        valid = first + many < rows_per_sample
        total += tl.load(sums_ptr + first + many, mask=valid, other=0.0)
        product += tl.load(sums_ptr + rows + first + many, mask=valid, other=0.0)
    count = rows_per_sample.to(tl.float32) * C
    mean_grad, mean_product = tl.sum(total) / count, tl.sum(product) / count
    mean, rstd = tl.load(mean_ptr + sample), tl.load(rstd_ptr + sample)

    first = tl.program_id(0) % blocks * BLOCK_M
    valid = first + lane < rows_per_sample
    at = (sample * rows_per_sample + first) * C
    for half in tl.static_range(2):
        column = tl.arange(0, HEAD) if half == 0 else HEAD + tl.arange(0, TAIL)
        normal = (load_tile(x_ptr + at, lane, valid, column, WIDTH=C).to(tl.float32) - mean) * rstd
        grad = load_tile(dx_ptr + at, lane, valid, column, WIDTH=C).to(tl.float32)
        grad = rstd * (grad - mean_grad - normal * mean_product)
        if residual_ptr is not None:
            grad += load_tile(residual_ptr + at, lane, valid, column, WIDTH=C).to(tl.float32)
        store_tile(dx_ptr + at, lane, valid, column, grad, WIDTH=C)


# The gradients of the parameters


@triton.jit
def store_norm_sums(
    norm_ptr, weight_ptr, product_ptr, sums_ptr, begin, outputs, C: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What BLOCK_N of `outputs` outputs from `begin` on, whose product and sums this program has written, contribute
    to the gradients of the norm's parameters. They are read again, some at a time: a program has no registers for the
    weight beside its product."""
    column = tl.arange(0, BLOCK_C)
    BLOCK: tl.constexpr = min(BLOCK_N, 16)
    dweight = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    tl.debug_barrier()
    for first in range(begin, begin + BLOCK_N, BLOCK):
        output = first + tl.arange(0, BLOCK)
        weight = load_tile(weight_ptr, output, output < outputs, column, WIDTH=C).to(tl.float32)
        dweight += weight * load_tile(product_ptr, output, output < outputs, column, WIDTH=C)
        dbias += weight * tl.load(sums_ptr + output, mask=output < outputs, other=0.0)[:, None]
    store_vector(norm_ptr, column, tl.sum(dweight, 0), WIDTH=C)
    store_vector(norm_ptr + C, column, tl.sum(dbias, 0), WIDTH=C)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def normalised_products_kernel(
    a_ptr, extra_ptr,  # (rows, OUT); (rows,), float32, or None
    x_ptr, mean_ptr, rstd_ptr,  # (rows, C); (rows,) or, PER_SAMPLE, (samples,), float32
    weight_ptr,  # (OUT, C) or None
    product_ptr, sums_ptr,  # written: (parts, OUT or OUT + 1, C) and (parts, OUT or OUT + 1), float32
    norm_ptr,  # written with a weight: (parts, blocks, 2, C), float32
    rows, rows_per_sample, rows_per_part,
    PER_SAMPLE: tl.constexpr, OUT: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """product = a^T n for the normalised rows n = (x - mean) * rstd of a part, and sums = the sums of the columns of a.
    `extra_ptr` is one more column of a: the last row of the product, the last of the sums. With the weight of
    y = norm(x) weight^T, of which a is the gradient, `norm_ptr` receives what a block contributes to the gradients of
    the norm's parameters, the sums of the columns of weight * product and weight^T sums.

    The grid is (blocks of BLOCK_N columns of a, parts). Reads a and `extra_ptr` once, x once for each block; writes all
    of the workspaces."""
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    lane, output = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    head = tl.zeros((BLOCK_N, HEAD), tl.float32)
    tail = tl.zeros((BLOCK_N, TAIL), tl.float32)
    total = folded_rows(tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    extra_total = tl.zeros((BLOCK_M,), tl.float32)
    head_extra = folded_rows(tl.zeros((BLOCK_M, HEAD), tl.float32))
    tail_extra = folded_rows(tl.zeros((BLOCK_M, TAIL), tl.float32))
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, rows)
    for first in range(0, end - begin, BLOCK_M):
        start, row = begin.to(tl.int64) + first, begin + first + lane
        a = load_tile(a_ptr + start * OUT, lane, row < end, output, WIDTH=OUT)
        head_x, tail_x = load_rows(x_ptr + start * C, lane, row < end, C=C, HEAD=HEAD, TAIL=TAIL)
        total += folded_rows(a.to(tl.float32))
        mean, rstd = load_row_statistics(mean_ptr, rstd_ptr, row, row < end, rows_per_sample, PER_SAMPLE=PER_SAMPLE)
        if x_ptr.dtype.element_ty == tl.float32:
            head_normal, tail_normal = (head_x - mean) * rstd, (tail_x - mean) * rstd
        else:  # one instruction, as exact as what it is rounded to
            shift = mean * rstd
            head_normal, tail_normal = head_x.to(tl.float32) * rstd - shift, tail_x.to(tl.float32) * rstd - shift
        if extra_ptr is not None and tl.program_id(0) == 0:
            extra = tl.load(extra_ptr + row, mask=row < end, other=0.0)
            extra_total += extra
            head_extra += folded_rows(extra[:, None] * head_normal)
            tail_extra += folded_rows(extra[:, None] * tail_normal)
        head = dot(tl.trans(a), head_normal.to(a.dtype), head)
        tail = dot(tl.trans(a), tail_normal.to(a.dtype), tail)
    OUTPUTS: tl.constexpr = OUT if extra_ptr is None else OUT + 1
    product_ptr += part * (OUTPUTS * C)
    sums_ptr += part * OUTPUTS
    store_rows(product_ptr, output, output < OUT, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)
    store_vector(sums_ptr, output, tl.sum(total, 0), WIDTH=OUT)
    if weight_ptr is not None:
        store_norm_sums(
            norm_ptr + (part * tl.num_programs(0) + tl.program_id(0)) * (2 * C), weight_ptr, product_ptr, sums_ptr,
            tl.program_id(0) * BLOCK_N, OUT, C=C, BLOCK_C=2 * HEAD, BLOCK_N=BLOCK_N,
        )  # fmt: skip
    if extra_ptr is not None and tl.program_id(0) == 0:
        store_vector(product_ptr + OUT * C, head_column, tl.sum(head_extra, 0), WIDTH=C)
        store_vector(product_ptr + OUT * C, tail_column, tl.sum(tail_extra, 0), WIDTH=C)
        tl.store(sums_ptr + OUT, tl.sum(extra_total, 0))


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def dropped_products_kernel(
    a_ptr, x_ptr, seed_ptr,  # (rows, OUT); (rows, C); one int64, or None without dropout
    product_ptr, sums_ptr,  # written: (parts, OUT, C) and (parts, C), float32
    rows, rows_per_sample, rows_per_part, keep, keep_scale,
    OUT: tl.constexpr, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """product = a^T d for the rows of a part, where d is x after the dropout of site 1, and sums = the sums of the
    columns of d.

    The grid is (blocks of BLOCK_N columns of a, parts). Reads a once, x once for each block; writes all of the
    workspaces."""
    head_column, tail_column = row_columns(HEAD=HEAD, TAIL=TAIL)
    lane, output = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    head = tl.zeros((BLOCK_N, HEAD), tl.float32)
    tail = tl.zeros((BLOCK_N, TAIL), tl.float32)
    head_total = folded_rows(tl.zeros((BLOCK_M, HEAD), tl.float32))
    tail_total = folded_rows(tl.zeros((BLOCK_M, TAIL), tl.float32))
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, rows)
    for first in range(0, end - begin, BLOCK_M):
        start, row = begin.to(tl.int64) + first, begin + first + lane
        a = load_tile(a_ptr + start * OUT, lane, row < end, output, WIDTH=OUT)
        head_x, tail_x = load_rows(x_ptr + start * C, lane, row < end, C=C, HEAD=HEAD, TAIL=TAIL)
        if seed_ptr is not None:
            head_dropped, tail_dropped = drop_rows(
                head_x.to(tl.float32), tail_x.to(tl.float32), seed_ptr, row, rows_per_sample, keep, keep_scale,
                SITE=1, C=C, HEAD=HEAD, TAIL=TAIL,
            )  # fmt: skip
            head_x, tail_x = head_dropped.to(a.dtype), tail_dropped.to(a.dtype)
        if tl.program_id(0) == 0:
            head_total += folded_rows(head_x.to(tl.float32))
            tail_total += folded_rows(tail_x.to(tl.float32))
        head = dot(tl.trans(a), head_x, head)
        tail = dot(tl.trans(a), tail_x, tail)
    store_rows(product_ptr + part * (OUT * C), output, output < OUT, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)
    if tl.program_id(0) == 0:
        store_vector(sums_ptr + part * C, head_column, tl.sum(head_total, 0), WIDTH=C)
        store_vector(sums_ptr + part * C, tail_column, tl.sum(tail_total, 0), WIDTH=C)


# Below, loops over parts are unrolled: a load that waits for the one before it takes half a microsecond.


@triton.jit
def add_up_outputs(
    product_ptr, sums_ptr,  # parts of dy^T n (OUT, C) and of the sums of dy (OUT,), float32
    weight_ptr,  # (OUT, C)
    dweight_ptr, dbias_ptr,  # written: (OUT, C); (OUT,) or None
    dnorm_weight, dnorm_bias,  # tiles (BLOCK_O, BLOCK_C), float32
    column, norm_weight, norm_bias,  # (BLOCK_C,)
    product_parts, sums_parts,
    PRODUCT_SIZE: tl.constexpr, PRODUCT_STRIDE: tl.constexpr, SUMS_SIZE: tl.constexpr,
    OUT: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """The columns `column` of the gradients of y = norm(x) weight^T + bias, where norm(x) = n * norm_weight +
    norm_bias. With P = dy^T n and s = sum dy, which it adds up from their parts:

        dweight = P * norm_weight + s norm_bias^T,  dbias = s,
        dnorm_weight = the sums of the columns of weight * P,  dnorm_bias = weight^T s

    The shares of the last two are added to the tiles, which it returns; the caller sums these over their rows at its
    end, because a vector that lives through a loop is spilled. Parts are PRODUCT_SIZE and SUMS_SIZE values apart, rows
    of the product PRODUCT_STRIDE."""
    for first in range(0, OUT, BLOCK_O):
        output = first + tl.arange(0, BLOCK_O)
        valid = output < OUT
        product = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
        total = tl.zeros((BLOCK_O,), tl.float32)
        for part in tl.range(0, product_parts, loop_unroll_factor=2):
            at = product_ptr + part * PRODUCT_SIZE
            product += load_tile(at, output, valid, column, WIDTH=C, STRIDE=PRODUCT_STRIDE)
        for part in tl.range(0, sums_parts, loop_unroll_factor=2):
            total += load_vector(sums_ptr + part * SUMS_SIZE, output, WIDTH=OUT)
        weight = load_tile(weight_ptr, output, valid, column, WIDTH=C).to(tl.float32)
        dnorm_weight += weight * product
        dnorm_bias += weight * total[:, None]
        dweight = product * norm_weight[None, :] + total[:, None] * norm_bias[None, :]
        store_tile(dweight_ptr, output, valid, column, dweight, WIDTH=C)
        if dbias_ptr is not None and tl.program_id(0) == 0:
            store_vector(dbias_ptr, output, total, WIDTH=OUT)
    return dnorm_weight, dnorm_bias


@triton.jit
def store_outputs_gradient(
    product_ptr, sums_ptr,  # parts of dy^T n (OUT, C) and of the sums of dy (OUT,), float32
    norm_weight_ptr, norm_bias_ptr,  # (C,)
    dweight_ptr, dbias_ptr,  # written: (OUT, C); (OUT,) or None
    product_parts, sums_parts,
    PRODUCT_SIZE: tl.constexpr, PRODUCT_STRIDE: tl.constexpr, SUMS_SIZE: tl.constexpr,
    OUT: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """dweight and dbias as in add_up_outputs, of the outputs and columns of a program of the grid (blocks of columns,
    blocks of outputs). `sums_parts` None: as many as of the product."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    output = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    norm_weight, norm_bias = load_vector(norm_weight_ptr, column, WIDTH=C), load_vector(norm_bias_ptr, column, WIDTH=C)
    product = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_O,), tl.float32)
    for part in tl.range(0, product_parts, loop_unroll_factor=8):
        at = product_ptr + part * PRODUCT_SIZE
        product += load_tile(at, output, output < OUT, column, WIDTH=C, STRIDE=PRODUCT_STRIDE)
        if sums_parts is None:
            total += load_vector(sums_ptr + part * SUMS_SIZE, output, WIDTH=OUT)
    if sums_parts is not None:
        for part in tl.range(0, sums_parts, loop_unroll_factor=8):
            total += load_vector(sums_ptr + part * SUMS_SIZE, output, WIDTH=OUT)
    dweight = product * norm_weight[None, :] + total[:, None] * norm_bias[None, :]
    store_tile(dweight_ptr, output, output < OUT, column, dweight, WIDTH=C)
    if dbias_ptr is not None and tl.program_id(0) == 0:
        store_vector(dbias_ptr, output, total, WIDTH=OUT)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def norm_linear_gradient_kernel(
    product_ptr, sums_ptr, norm_ptr,  # (parts, OUT, C), (parts, OUT) and (norm_parts, 2, C), float32
    norm_weight_ptr, norm_bias_ptr,  # (C,)
    dnorm_weight_ptr, dnorm_bias_ptr, dweight_ptr, dbias_ptr,  # written: like the parameters; (OUT,) or None
    parts, norm_parts,
    OUT: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """The gradients of the parameters of y = norm(x) weight^T + bias, as in add_up_outputs, from what
    normalised_products_kernel wrote. The grid is (blocks of columns, blocks of outputs); the first program of a block
    of columns adds up those of the norm too."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    store_outputs_gradient(
        product_ptr, sums_ptr, norm_weight_ptr, norm_bias_ptr, dweight_ptr, dbias_ptr, parts, None,
        PRODUCT_SIZE=OUT * C, PRODUCT_STRIDE=C, SUMS_SIZE=OUT, OUT=OUT, C=C, BLOCK_C=BLOCK_C, BLOCK_O=BLOCK_O,
    )  # fmt: skip
    if tl.program_id(1) == 0:
        valid = column < C
        dnorm_weight = load_sums(norm_ptr, norm_parts, column, valid, C=2 * C, BLOCK_C=BLOCK_C)
        store_vector(dnorm_weight_ptr, column, dnorm_weight, WIDTH=C)
        dnorm_bias = load_sums(norm_ptr + C, norm_parts, column, valid, C=2 * C, BLOCK_C=BLOCK_C)
        store_vector(dnorm_bias_ptr, column, dnorm_bias, WIDTH=C)


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def second_gradient_kernel(
    product_ptr, sums_ptr,  # (parts, F, C) and (parts, C), float32
    dweight_ptr, dbias_ptr,  # written: (C, F); (C,) or None
    parts,
    F: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dweight = (sum of the parts of hidden^T dy)^T and dbias = the sum of the parts of the sums of dy, where
    y = hidden weight^T + bias. The grid is (blocks of columns, blocks of hidden channels)."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    hidden = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    product = tl.zeros((BLOCK_F, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for part in tl.range(0, parts, loop_unroll_factor=8):
        product += load_tile(product_ptr + part * (F * C), hidden, hidden < F, column, WIDTH=C)
        total += load_vector(sums_ptr + part * C, column, WIDTH=C)
    store_tile(dweight_ptr, column, column < C, hidden, tl.trans(product), WIDTH=F)
    if dbias_ptr is not None and tl.program_id(1) == 0:
        store_vector(dbias_ptr, column, total, WIDTH=C)
