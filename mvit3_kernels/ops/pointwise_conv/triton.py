"""Triton kernels of pointwise_conv and, with a second input b, of pointwise_fusion: one computation.

Forward is one product; a concatenation is two sums into the same accumulators. Where the statistics are known, what follows the product
happens before it leaves the registers. In training a program walks down its rows and leaves the moments of p, the plain product, beside it,
and batch_norm_act's second kernel does the rest: p is read once more, not twice. (The moments of the input would give the statistics too,
identity A of the design, without p. But backward needs p, or its product again; and the inputs of these layers are as wide as their
outputs or wider, so that another read of them and their own product cost more than the write and the reads of p.)

Backward is batch_norm_act's on p, and two plain products with nothing to fuse but the read of one tensor: those are the library's, whose
kernels have the shapes of this op.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..batch_norm_act.triton import batch_norm_act_backward, normalize
from ..triton_common import activate, at_least_zero, dot, inverse_std, multiprocessors, on_device, split_rows
from ..triton_rows import load_tile, load_vector, store_tile
from ..types import ACTIVATIONS

IDENTITY = ACTIVATIONS.index("identity")

_NOT_SPECIALIZED = ["rows", "parts", "rows_per_part", "eps"]


def configurations(a: Tensor, b: Tensor | None) -> list[dict[str, int]]:
    """Of the product: BLOCK_M rows, BLOCK_N outputs, BLOCK_K inputs at a time."""
    if a.dtype is torch.float32:  # no matrix units of this precision: products are made in registers
        return [{"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}]
    even = a.shape[-1] % 64 == 0 and (b is None or b.shape[-1] % 64 == 0)
    first = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64 if even else 32, "num_warps": 8, "num_stages": 2}
    others = ({"num_warps": 4}, {"num_stages": 3}, {"BLOCK_M": 64, "num_warps": 4}, {"BLOCK_N": 128}, {"BLOCK_M": 64, "BLOCK_N": 128})
    return [first, *(first | other for other in others)]


def configuration(a: Tensor, b: Tensor | None, outputs: int) -> dict[str, int]:
    channels = (a.shape[-1], 0 if b is None else b.shape[-1], outputs)
    return tuning.choose("pointwise_conv_fwd", a, channels, lambda: configurations(a, b))


def bytes_moved(a: Tensor, b: Tensor | None, outputs: int, training: bool, keeps_p: bool, residual: bool) -> tuple[int, int]:
    """Bytes of full-size tensors that the forward and the backward pass of a call with gradients read and write: the inputs, a residual
    and y, and p where it is kept; the inputs and their gradients, dy and p (twice where a norm is in training), and the gradient of p,
    which each product reads."""
    size = a.numel() // a.shape[-1] * a.element_size()
    narrow, wide = size * (a.shape[-1] + (0 if b is None else b.shape[-1])), size * outputs
    forward = narrow + wide * (1 + residual + keeps_p * (2 if training else 1))
    products = 2 if b is None else 4
    return forward, 2 * narrow + wide * (products + keeps_p * (5 if training else 3))


@triton.jit
def _add_product(
    sums, x_ptr, weight_ptr, lane, valid, output, C: tl.constexpr, STRIDE: tl.constexpr, OUT: tl.constexpr, BLOCK_K: tl.constexpr
):
    """sums + x @ weight^T; `weight_ptr` points to the first of x's columns of a weight with rows of STRIDE values."""
    for first in range(0, C, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, lane, valid, column, C, C)
        weight = load_tile(weight_ptr, output, output < OUT, column, STRIDE, C).to(x.dtype)
        sums = dot(x, tl.trans(weight), sums)
    return sums


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _pointwise_fwd_kernel(
    a_ptr, b_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, residual_ptr, p_ptr, y_ptr, part_ptr,
    rows, parts, rows_per_part, eps,
    ACT: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Programs of one part side by side: they read the same rows. One axis, for a second one ends at 65,535.
    blocks: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    output, lane = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    part = tl.program_id(0) // blocks
    shift = load_vector(bias_ptr, output, OUT)
    if norm_weight_ptr is not None and y_ptr is not None:
        scale = load_vector(norm_weight_ptr, output, OUT) * inverse_std(load_vector(var_ptr, output, OUT), eps)
        shift = (shift - load_vector(mean_ptr, output, OUT)) * scale + load_vector(norm_bias_ptr, output, OUT)
    count = tl.zeros((BLOCK_N,), tl.float32)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    m2 = tl.zeros((BLOCK_N,), tl.float32)
    begin = part * rows_per_part
    length = tl.minimum(rows - begin, rows_per_part)
    for first in range(0, length, BLOCK_M):
        start, valid = begin.to(tl.int64) + first, first + lane < length
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sums = _add_product(sums, a_ptr + start * CA, weight_ptr, lane, valid, output, CA, CA + CB, OUT, BLOCK_K)
        if b_ptr is not None:
            sums = _add_product(sums, b_ptr + start * CB, weight_ptr + CA, lane, valid, output, CB, CA + CB, OUT, BLOCK_K)
        if p_ptr is not None:
            store_tile(p_ptr + start * OUT, lane, valid, output, sums, OUT, OUT)
        if part_ptr is not None:
            # Moments of what is stored, joined by Chan's formula.
            value = sums.to(p_ptr.dtype.element_ty).to(tl.float32)
            added = tl.sum(valid.to(tl.float32), 0)
            tile_mean = tl.sum(value, 0) / added  # rows beyond the last are zeros
            offset = tl.where(valid[:, None], value - tile_mean[None, :], 0.0)
            correction = tl.sum(offset, 0) / added
            tile_m2 = tl.sum(offset * offset, 0) - added * correction * correction
            count += added
            delta = tile_mean + correction - mean
            m2 += tile_m2 + delta * delta * (added * (count - added) / count)
            mean += delta * (added / count)
        if y_ptr is not None:
            if norm_weight_ptr is not None:
                sums *= scale[None, :]
            y = activate(sums + shift[None, :], ACT)
            if residual_ptr is not None:
                y += load_tile(residual_ptr + start * OUT, lane, valid, output, OUT, OUT).to(tl.float32)
            store_tile(y_ptr + start * OUT, lane, valid, output, y, OUT, OUT)
    if part_ptr is not None:
        tl.store(part_ptr + part * OUT + output, mean, mask=output < OUT)
        tl.store(part_ptr + (parts + part) * OUT + output, at_least_zero(m2), mask=output < OUT)


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _launch(
    inputs: tuple[Tensor | None, ...], statistics: tuple, residual: Tensor | None, p: Tensor | None, y: Tensor | None, eps: float, act: int
):
    """Fills p and y, where given, from (a, b, weight, bias, norm weight, norm bias); without y, for a norm in training, returns p's partial
    moments: (workspace, parts, rows of each)."""
    a, b, weight, *vectors = _dense(*inputs)
    outputs, rows, config = weight.shape[0], a.shape[:-1].numel(), configuration(a, b, weight.shape[0])
    blocks = triton.cdiv(outputs, config["BLOCK_N"])
    measured = y is None
    programs = 2 * multiprocessors(a) // blocks if measured else triton.cdiv(rows, config["BLOCK_M"])
    parts, rows_per_part = split_rows(rows, programs, config["BLOCK_M"])
    part = torch.empty((2, parts, outputs), dtype=torch.float32, device=a.device) if measured else None
    with on_device(a):
        _pointwise_fwd_kernel[(blocks * parts,)](
            a, b, weight, *vectors, *_dense(*statistics, residual), p, y, part, rows, parts, rows_per_part, eps,
            ACT=act, CA=a.shape[-1], CB=0 if b is None else b.shape[-1], OUT=outputs, **config,
        )  # fmt: skip
    return part, parts, rows_per_part


def pointwise_conv_inference(
    a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, eps: float, act: int, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """Launches the forward pass of a call without gradients."""
    y = a.new_empty(*a.shape[:-1], weight.shape[0])
    if y.numel() > 0:
        _launch((a, b, weight, bias, norm_weight, norm_bias), (running_mean, running_var), residual, None, y, eps, act)
    return y


def pointwise_conv_training(
    a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, training: bool, eps: float, act: int, residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the forward pass: y, the batch's mean and variance where the norm is in training, and p where backward needs it; empty
    tensors where not."""
    outputs = weight.shape[0]
    y = a.new_empty(*a.shape[:-1], outputs)
    p = a.new_empty(0) if norm_weight is None and act == IDENTITY else torch.empty_like(y)
    inputs = (a, b, weight, bias, norm_weight, norm_bias)
    if y.numel() == 0 or not training:
        mean, var = (torch.zeros(outputs if training else 0, dtype=torch.float32, device=a.device) for _ in range(2))
        if y.numel() > 0:
            _launch(inputs, (running_mean, running_var), residual, p if p.numel() > 0 else None, y, eps, act)
        return y, mean, var, p
    partials = _launch((a, b, weight, None, norm_weight, norm_bias), (None, None), None, p, None, eps, act)
    y, mean, var = normalize(p, norm_weight, norm_bias, eps, act, residual, *partials)
    return y, mean if bias is None else mean + bias, var, p


def pointwise_conv_backward(
    dy: Tensor, a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    mean: Tensor | None, var: Tensor | None, p: Tensor, training: bool, eps: float, act: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of a, b, weight, bias, norm weight and norm bias; empty tensors for what is not there."""
    outputs, matrix = weight.shape[0], weight.flatten(1)
    dnorm_weight, dnorm_bias = None, None
    offset = torch.zeros(outputs, dtype=torch.float32, device=a.device) if bias is None else bias.float()
    if norm_weight is not None:
        dp, dnorm_weight, dnorm_bias = batch_norm_act_backward(dy, p, norm_weight, norm_bias, mean - offset, var, training, eps, act)
        # Behind a norm in training a bias has no effect; NaN stays NaN.
        dbias = 0 * (dnorm_bias + dnorm_weight) if training else dnorm_bias * norm_weight * (var + eps).rsqrt()
    elif act != IDENTITY:
        one = torch.ones_like(offset)
        dp, _, dbias = batch_norm_act_backward(dy, p, one, torch.zeros_like(offset), -offset, one, False, 0.0, act)
    else:
        dp = dy.contiguous()
        dbias = dp.flatten(0, 2).sum(0, dtype=torch.float32)
    dp = dp.view(-1, outputs)
    dinputs, dmatrix, first = [], [], 0
    for x in (a, b):
        if x is None:
            dinputs.append(a.new_empty(0))
            continue
        channels = x.shape[-1]
        dinputs.append((dp @ matrix[:, first : first + channels].to(dp.dtype)).view(x.shape))
        dmatrix.append(dp.t() @ x.reshape(-1, channels))
        first += channels
    dweight = dmatrix[0] if b is None else torch.cat(dmatrix, 1)
    given = ((dbias, bias), (dnorm_weight, norm_weight), (dnorm_bias, norm_bias))
    return *dinputs, dweight.view(weight.shape).to(weight.dtype), *(a.new_empty(0) if t is None else g.to(t.dtype) for g, t in given)
