"""Triton kernels of pointwise_conv and, with a second input b, of pointwise_fusion: one computation.

Forward is one product; for a concatenation [a, b] two products are added up in the same registers. Where the statistics
of the norm are known, norm, activation and residual are applied before the product leaves the registers. In training a
program walks down its rows and writes p, the product with its bias, and the moments of its part of p; batch_norm_act's
second kernel does the rest, so that p is read once more, not twice. p is rounded with the bias: where the two cancel, a
product rounded alone is wrong by more than their sum is, and by its sign, which is what ReLU asks for. (The moments of
the inputs would give the statistics too, identity A of the design, without p. But backward needs p, or the product
again; and these layers have as many inputs as outputs or more, so that another read of the inputs and their product
with themselves cost more than p does.)

Dropout is that op's kernel, on what the product's returned forward and on dy backward.

Backward is batch_norm_act's on p, and two plain products for each input. There is nothing to fuse in these but the read
of one tensor, so they are torch.mm's, whose kernels are good at the shapes of this op.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..batch_norm_act.triton import normalize, normalize_backward
from ..dropout.triton import drop
from ..registry import Call
from ..triton_common import (
    IDENTITY,
    MOST_FEW_ROWS,
    activate,
    contiguous,
    dot,
    load_folded_norm,
    load_tile,
    load_vector,
    moments_from_pivot,
    multiplied,
    multiplies_from_shared_memory,
    multiprocessors,
    on_device,
    pairs,
    product_in,
    split_rows,
    store_tile,
    store_vector,
)
from ..types import BatchNorm

_NOT_SPECIALIZED = ["rows", "parts", "rows_per_part", "eps"]
PIVOT_ROWS = tl.constexpr(16)


def configurations(a: Tensor, b: Tensor | None) -> list[dict[str, int]]:
    """Of the product: BLOCK_M rows, BLOCK_N outputs, BLOCK_K inputs at a time."""
    if a.dtype is torch.float32:  # no matrix units of this precision: products are made in registers
        return [{"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}]  # two spill on sm_80
    even = _even(a, b)
    first = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64 if even else 32, "num_warps": 8, "num_stages": 2}
    if multiplies_from_shared_memory(a):
        first |= {"BLOCK_K": 32, "num_stages": 3, "maxnreg": 128}
    others = (
        {"num_warps": 4},
        {"BLOCK_K": 64} if even else {"num_stages": 2},
        {"BLOCK_M": 64, "num_warps": 4},
        {"BLOCK_N": 128},
        {"BLOCK_M": 64, "BLOCK_N": 128},
    )
    return [first, *(first | other for other in others)]


def _even(a: Tensor, b: Tensor | None) -> bool:
    return a.shape[-1] % 64 == 0 and (b is None or b.shape[-1] % 64 == 0)


def _few(rows: int, weight: Tensor) -> bool:
    """Whether so few rows ask for the weight that a smaller tile, and float32, cost less than they save."""
    return rows <= MOST_FEW_ROWS or (rows <= 4 * MOST_FEW_ROWS and weight.numel() <= 256 * 128)


def _few_configuration(a: Tensor, b: Tensor | None, outputs: int, rows: int) -> dict[str, int]:
    """Where tiles of any other would leave most of a GPU idle: the larger of two of which there are enough."""
    tile = (16, 32)
    if 4 * triton.cdiv(rows, 32) * triton.cdiv(outputs, 64) >= 3 * multiprocessors(a):
        tile = (32, 64)
    inputs = 64 if _even(a, b) else 32
    return {"BLOCK_M": tile[0], "BLOCK_N": tile[1], "BLOCK_K": inputs, "num_warps": 4, "num_stages": 3}


def configuration(a: Tensor, b: Tensor | None, outputs: int) -> dict[str, int]:
    channels = (a.shape[-1], 0 if b is None else b.shape[-1], outputs)
    return tuning.choose("pointwise_conv_fwd", a, channels, lambda: configurations(a, b))


def bytes_moved(
    a: Tensor, b: Tensor | None, outputs: int, training: bool, keeps_p: bool, residual: bool
) -> tuple[int, int]:
    """Bytes of full-size tensors that the forward and the backward pass of a call with gradients read and write: the
    inputs, a residual and y, and p where it is kept; the inputs and their gradients, dy and p (twice where a norm is in
    training), and the gradient of p, which each product reads."""
    size = a.numel() // a.shape[-1] * a.element_size()
    size_of_inputs, size_of_y = size * (a.shape[-1] + (0 if b is None else b.shape[-1])), size * outputs
    forward = size_of_inputs + size_of_y * (1 + residual + keeps_p * (2 if training else 1))
    products = 2 if b is None else 4
    return forward, 2 * size_of_inputs + size_of_y * (products + keeps_p * (5 if training else 3))


@triton.jit
def add_product(
    sums, x_ptr, weight_ptr, row, valid, output,
    C: tl.constexpr, STRIDE: tl.constexpr, OUT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums + x @ weight^T for rows `row` of x (.., C) and outputs `output` of OUT. `weight_ptr` points to the first of
    the C columns that x meets in a weight whose rows have STRIDE values."""
    for first in range(0, C, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, row, valid, column, WIDTH=C)
        weight = load_tile(weight_ptr, output, output < OUT, column, WIDTH=C, STRIDE=STRIDE).to(x.dtype)
        sums = dot(x, tl.trans(weight), sums)
    return sums


@triton.jit
def _pivot(
    a_ptr, b_ptr, weight_ptr, bias_ptr, begin, length, output,
    CA: tl.constexpr, CB: tl.constexpr, OUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A value near the mean of each output in a part: the mean over PIVOT_ROWS of its rows. Of an output that is
    constant it is the constant, as it is stored."""
    row = begin + tl.arange(0, PIVOT_ROWS).to(tl.int64) * length // PIVOT_ROWS
    valid = row >= 0
    sums = tl.zeros((PIVOT_ROWS, BLOCK_N), tl.float32)
    sums = add_product(sums, a_ptr, weight_ptr, row, valid, output, C=CA, STRIDE=CA + CB, OUT=OUT, BLOCK_K=BLOCK_K)
    if b_ptr is not None:
        sums = add_product(
            sums, b_ptr, weight_ptr + CA, row, valid, output, C=CB, STRIDE=CA + CB, OUT=OUT, BLOCK_K=BLOCK_K
        )
    mean = tl.sum(sums, 0) / PIVOT_ROWS + load_vector(bias_ptr, output, WIDTH=OUT)
    return mean.to(a_ptr.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _pointwise_fwd_kernel(
    a_ptr, b_ptr, residual_ptr,  # (rows, CA); (rows, CB) or None; (rows, OUT) or None
    weight_ptr, bias_ptr,  # (OUT, CA + CB); (OUT,) or None
    norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr,  # (OUT,), or None without a norm
    p_ptr, y_ptr,  # written where not None: (rows, OUT), like a
    part_ptr,  # written where not None: (2, parts, OUT), float32
    rows, parts, rows_per_part, eps,
    ACT: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """p = [a, b] weight^T + bias, and what is made of it:

        y = act(norm(p)) + residual, by the norm's known mean and variance;
        `part_ptr`: means and sums of squared deviations of p in each part of the rows, as p is stored.

    A program has BLOCK_N outputs of a part. Reads a and b once for each block of outputs, the weight once for each
    BLOCK_M rows; writes p and y once."""
    # Programs of one part side by side: they read the same rows. One axis, for a second one ends at 65,535.
    blocks: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    output, lane = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    part = tl.program_id(0) // blocks
    bias = load_vector(bias_ptr, output, WIDTH=OUT)
    if norm_weight_ptr is not None and y_ptr is not None:
        scale, shift = load_folded_norm(
            norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, output, eps, C=OUT, DTYPE=a_ptr.dtype.element_ty
        )
    begin = part * rows_per_part
    length = tl.minimum(rows - begin, rows_per_part)
    if part_ptr is not None:
        pivot = _pivot(
            a_ptr, b_ptr, weight_ptr, bias_ptr, begin, length, output,
            CA=CA, CB=CB, OUT=OUT, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        # It lies where the mean will: a program has no registers to keep it.
        part_ptr += part * OUT
        store_vector(part_ptr, output, pivot, WIDTH=OUT)
        tl.debug_barrier()
        total = pairs(tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        squares = pairs(tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    for first in range(0, length, BLOCK_M):
        start, valid = begin.to(tl.int64) + first, first + lane < length
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sums = add_product(
            sums, a_ptr + start * CA, weight_ptr, lane, valid, output, C=CA, STRIDE=CA + CB, OUT=OUT, BLOCK_K=BLOCK_K
        )
        if b_ptr is not None:
            b, weight_of_b = b_ptr + start * CB, weight_ptr + CA
            sums = add_product(
                sums, b, weight_of_b, lane, valid, output, C=CB, STRIDE=CA + CB, OUT=OUT, BLOCK_K=BLOCK_K
            )
        if bias_ptr is not None:
            sums += bias[None, :]
        if p_ptr is not None:
            store_tile(p_ptr + start * OUT, lane, valid, output, sums, WIDTH=OUT)
        if part_ptr is not None:
            deviation = sums.to(p_ptr.dtype.element_ty).to(tl.float32)
            deviation -= load_vector(part_ptr, output, WIDTH=OUT)[None, :]
            deviation = tl.where(valid[:, None], deviation, 0.0)
            total += pairs(deviation)
            squares += pairs(deviation * deviation)
        if y_ptr is not None:
            if norm_weight_ptr is not None:
                sums = sums * scale[None, :] + shift[None, :]
            y = activate(sums, ACT=ACT, DTYPE=y_ptr.dtype.element_ty)
            if residual_ptr is not None:
                y += load_tile(residual_ptr + start * OUT, lane, valid, output, WIDTH=OUT).to(tl.float32)
            store_tile(y_ptr + start * OUT, lane, valid, output, y, WIDTH=OUT)
    if part_ptr is not None:
        pivot = load_vector(part_ptr, output, WIDTH=OUT)
        mean, m2 = moments_from_pivot(total, squares, pivot, length.to(tl.float32))
        tl.debug_barrier()
        store_vector(part_ptr, output, mean, WIDTH=OUT)
        store_vector(part_ptr + parts * OUT, output, m2, WIDTH=OUT)


class Convolution(NamedTuple):
    """What is computed: act(norm([a, b] @ weight^T + bias)) + residual."""

    a: Tensor
    b: Tensor | None
    weight: Tensor
    bias: Tensor | None
    norm: BatchNorm | None
    act: int
    residual: Tensor | None

    @staticmethod
    def of(call: Call, training: bool = False) -> Convolution:
        norm = None
        if call.norm_weight is not None:
            statistics = (call.running_mean, call.running_var)
            norm = BatchNorm(call.norm_weight, call.norm_bias, *statistics, training, call.eps)
        return Convolution(call.a, call.b, call.weight, call.bias, norm, call.act, call.residual)


def _launch(conv: Convolution, p: Tensor | None, y: Tensor | None) -> tuple[Tensor | None, int, int]:
    """Fills p and y, where given, y by a norm's running statistics; without y, for a norm in training, returns p's
    partial moments: (workspace, parts, rows of each)."""
    a, b, residual, bias = contiguous(conv.a, conv.b, conv.residual, conv.bias)
    norm = (None,) * 4 if conv.norm is None else contiguous(*conv.norm[:4])
    outputs, rows = conv.weight.shape[0], a.shape[:-1].numel()
    config, measured = configuration(a, b, outputs), y is None
    tiles = triton.cdiv(outputs, config["BLOCK_N"]) * triton.cdiv(rows, config["BLOCK_M"])
    few = not measured and a.dtype is not torch.float32 and tiles <= multiprocessors(a) and _few(rows, conv.weight)
    if few:
        config = _few_configuration(a, b, outputs, rows)
    (weight,) = contiguous(conv.weight) if few else multiplied(a, conv.weight)
    blocks = triton.cdiv(outputs, config["BLOCK_N"])
    programs = 2 * multiprocessors(a) // blocks if measured else triton.cdiv(rows, config["BLOCK_M"])
    parts, rows_per_part = split_rows(rows, programs, config["BLOCK_M"])
    part = torch.empty((2, parts, outputs), dtype=torch.float32, device=a.device) if measured else None
    with on_device(a):
        _pointwise_fwd_kernel[(blocks * parts,)](
            a, b, residual, weight, bias, *norm, p, y, part,
            rows, parts, rows_per_part, 0.0 if conv.norm is None else conv.norm.eps,
            ACT=conv.act, CA=a.shape[-1], CB=0 if b is None else b.shape[-1], OUT=outputs, **config,
        )  # fmt: skip
    return part, parts, rows_per_part


def pointwise_conv_inference(call: Call) -> Tensor:
    """Launches the forward pass of a call without gradients."""
    return convolve(Convolution.of(call))


def convolve(conv: Convolution) -> Tensor:
    """act(norm([a, b] @ weight^T + bias)) + residual, the norm by its running statistics."""
    y = conv.a.new_empty(*conv.a.shape[:-1], conv.weight.shape[0])
    if y.numel() > 0:
        _launch(conv, None, y)
    return y


def pointwise_conv_forward(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches the forward pass: y, the batch's mean and variance where the norm is in training, and p where backward
    needs it; empty tensors where not."""
    if call.dropout > 0:
        y, *kept = pointwise_conv_forward(call._replace(dropout=0.0, residual=None))
        return drop(y, call.dropout, call.seed, *contiguous(call.residual)), *kept
    a, conv, training = call.a, Convolution.of(call), call.training
    outputs = call.weight.shape[0]
    y = a.new_empty(*a.shape[:-1], outputs)
    p = a.new_empty(0) if conv.norm is None and call.act == IDENTITY.value else torch.empty_like(y)
    if y.numel() == 0 or not training:
        make = torch.zeros if training else torch.empty
        mean, var = (make(outputs if training else 0, dtype=torch.float32, device=a.device) for _ in range(2))
        if y.numel() > 0:
            _launch(conv, p if p.numel() > 0 else None, y)
        return y, mean, var, p
    partials = _launch(conv._replace(norm=None, residual=None), p, None)
    return *normalize(p, conv.norm, call.act, call.residual, partials), p


def pointwise_conv_backward(call: Call) -> tuple[Tensor, ...]:
    """The gradients of a, b, weight, bias, norm weight and norm bias; empty tensors for what is not there."""
    if call.dropout > 0:
        dy = drop(call.dy.contiguous(), call.dropout, call.seed, None)
        return pointwise_conv_backward(call._replace(dropout=0.0, dy=dy))
    weight = call.weight
    dp, dbias, dnorm_weight, dnorm_bias = _product_backward(call)
    dp, matrix = dp.view(-1, weight.shape[0]), weight.flatten(1).to(dp.dtype)
    dinputs, dmatrix, first = [], [], 0
    for x in (call.a, call.b):
        if x is None:
            dinputs.append(dp.new_empty(0))
            continue
        channels = x.shape[-1]
        dinputs.append((dp @ matrix[:, first : first + channels]).view(x.shape))
        dmatrix.append(product_in(weight.dtype, dp.t(), x.reshape(-1, channels)))
        first += channels
    dweight = dmatrix[0] if call.b is None else torch.cat(dmatrix, 1)
    given = ((dbias, call.bias), (dnorm_weight, call.norm_weight), (dnorm_bias, call.norm_bias))
    return (
        *dinputs,
        dweight.view(weight.shape),
        *(dp.new_empty(0) if t is None else g.to(t.dtype) for g, t in given),
    )


def _product_backward(call: Call) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of p, bias (None without one), norm weight and norm bias (None without a norm). Without a bias
    nothing is launched for its sake."""
    dy, bias, training, eps = call.dy, call.bias, call.training, call.eps
    if call.norm_weight is not None:
        norm = BatchNorm(call.norm_weight, call.norm_bias, call.mean, call.var, training, eps)
        dp, dnorm_weight, dnorm_bias = normalize_backward(dy, call.p, norm, call.act)
        if bias is None:
            dbias = None
        elif training:  # behind such a norm a bias has no effect; NaN stays NaN
            dbias = 0 * (dnorm_bias + dnorm_weight)
        else:
            dbias = dnorm_bias * norm.weight * (call.var + eps).rsqrt()
        return dp, dbias, dnorm_weight, dnorm_bias
    if call.act != IDENTITY.value:
        one = dy.new_ones(dy.shape[-1], dtype=torch.float32)
        zero = torch.zeros_like(one)
        norm = BatchNorm(one, zero, zero, one, False, 0.0)
        dp, _, dbias = normalize_backward(dy, call.p, norm, call.act)
        return dp, None if bias is None else dbias, None, None
    dp = dy.contiguous()
    return dp, None if bias is None else dp.flatten(0, 2).sum(0, dtype=torch.float32), None, None
