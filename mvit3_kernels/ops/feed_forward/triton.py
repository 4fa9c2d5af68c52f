"""Triton kernels of feed_forward.

Forward, the hidden tensor exists in registers and shared memory only: a program holds its rows, normalised once, and the sums of their
outputs, and walks over the hidden channels; a block of them is made, activated, and multiplied into the sums. Nothing of it is saved.
Backward makes it again and writes it, beside its gradient, for the products that follow: norm_linear's backward, and the second weight's.
Making both again inside each of those instead would cost 8 products where these are 5, and save 10 passes over C channels (about as long,
by count, at C = 144); but a row, two weights and sums together do not fit the registers of any configuration that was tried.
Launches: 1 forward and 6 backward, for a norm of samples 2 and 7.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..triton_common import SILU, activate, activate_backward, dot, dropout_threshold, dropped, on_device
from ..triton_rows import (
    NOT_SPECIALIZED,
    Rows,
    load_tile,
    load_vector,
    load_weight,
    multiply_rows,
    normalise_rows,
    store_tile,
)

_NOT_SPECIALIZED = [*NOT_SPECIALIZED, "hidden_keep", "hidden_scale", "output_keep", "output_scale"]


def configurations(rows: Rows) -> list[dict[str, int]]:
    """BLOCK_M rows of a program, and the blocks of BLOCK_F hidden channels that it walks over."""
    if rows.x.dtype is torch.float32:
        return [{"BLOCK_M": 16, "BLOCK_F": 16, "num_warps": 4, "num_stages": 2}]
    first = {"BLOCK_M": rows.block(), "BLOCK_F": 32 if rows.block() == 64 else 16, "num_warps": 8, "num_stages": 1}
    others = ({"num_stages": 2}, {"num_warps": 4}, {"BLOCK_F": 16}, {"BLOCK_M": 32, "BLOCK_F": 32, "num_warps": 4})
    return [first, *(first | other for other in others)]


def configuration(kernel: str, rows: Rows, hidden: int) -> dict[str, int]:
    return tuning.choose(f"feed_forward_{kernel}", rows.x, (rows.channels, hidden), lambda: configurations(rows))


def bytes_moved(x: Tensor, hidden: int, per_sample: bool) -> tuple[int, int]:
    """Bytes of full-size tensors that the forward and the backward pass read and write: x and y; x and dy three times, dx, and of the
    tensors of the hidden width two writes and three reads. Of samples, x once more forward, and backward x once and dx twice."""
    size = x.numel() * x.element_size()
    return size * (3 if per_sample else 2), size * (10 if per_sample else 7) + 5 * size // x.shape[-1] * hidden


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _feed_forward_fwd_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, y_ptr, mean_ptr, rstd_ptr,
    hidden_seed_ptr, output_seed_ptr, rows, rows_per_sample, eps, hidden_keep, hidden_scale, output_keep, output_scale,
    PER_SAMPLE: tl.constexpr, F: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    head_column, tail_column, lane = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL), tl.arange(0, BLOCK_M)
    row = tl.program_id(0) * BLOCK_M + lane
    start, valid = tl.program_id(0).to(tl.int64) * BLOCK_M, row < rows
    x_ptr += start * C
    head_normed, tail_normed = normalise_rows(
        x_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, lane, row, valid, rows_per_sample, eps, True, PER_SAMPLE, C, HEAD, TAIL
    )
    head = tl.zeros((BLOCK_M, HEAD), tl.float32)
    tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    for first in range(0, F, BLOCK_F):
        column = first + tl.arange(0, BLOCK_F)
        head_weight, tail_weight = load_weight(weight1_ptr, column, head_normed, C, F, HEAD, TAIL)
        pre = multiply_rows(head_normed, tail_normed, head_weight, tail_weight) + load_vector(bias1_ptr, column, F)[None, :]
        hidden = activate(pre, SILU)
        if hidden_seed_ptr is not None:
            hidden = dropped(hidden, hidden_seed_ptr, row, column, rows_per_sample, hidden_keep, hidden_scale, 0, F)
        hidden = hidden.to(head_normed.dtype)
        weight = load_tile(weight2_ptr, head_column, head_column < C, column, F, F).to(hidden.dtype)
        head = dot(hidden, tl.trans(weight), head)
        weight = load_tile(weight2_ptr, tail_column, tail_column < C, column, F, F).to(hidden.dtype)
        tail = dot(hidden, tl.trans(weight), tail)
    head += load_vector(bias2_ptr, head_column, C)[None, :]
    tail += load_vector(bias2_ptr, tail_column, C)[None, :]
    if output_seed_ptr is not None:
        head = dropped(head, output_seed_ptr, row, head_column, rows_per_sample, output_keep, output_scale, 1, C)
        tail = dropped(tail, output_seed_ptr, row, tail_column, rows_per_sample, output_keep, output_scale, 1, C)
    head += load_tile(x_ptr, lane, valid, head_column, C, C).to(tl.float32)
    tail += load_tile(x_ptr, lane, valid, tail_column, C, C).to(tl.float32)
    store_tile(y_ptr + start * C, lane, valid, head_column, head, C, C)
    store_tile(y_ptr + start * C, lane, valid, tail_column, tail, C, C)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _hidden_bwd_kernel(
    dy_ptr, x_ptr, norm_weight_ptr, norm_bias_ptr, weight1_ptr, bias1_ptr, weight2_ptr, mean_ptr, rstd_ptr, hidden_ptr, dpre_ptr,
    hidden_seed_ptr, output_seed_ptr, rows, rows_per_sample, hidden_keep, hidden_scale, output_keep, output_scale,
    PER_SAMPLE: tl.constexpr, F: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The hidden tensor once more, and the gradient of what is activated."""
    head_column, tail_column, lane = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL), tl.arange(0, BLOCK_M)
    row = tl.program_id(0) * BLOCK_M + lane
    start, valid = tl.program_id(0).to(tl.int64) * BLOCK_M, row < rows
    head, tail = normalise_rows(
        x_ptr + start * C, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, lane, row, valid, rows_per_sample, 0.0,
        False, PER_SAMPLE, C, HEAD, TAIL,
    )  # fmt: skip
    head_dy = load_tile(dy_ptr + start * C, lane, valid, head_column, C, C)
    tail_dy = load_tile(dy_ptr + start * C, lane, valid, tail_column, C, C)
    if output_seed_ptr is not None:
        grad = dropped(head_dy.to(tl.float32), output_seed_ptr, row, head_column, rows_per_sample, output_keep, output_scale, 1, C)
        head_dy = grad.to(head_dy.dtype)
        grad = dropped(tail_dy.to(tl.float32), output_seed_ptr, row, tail_column, rows_per_sample, output_keep, output_scale, 1, C)
        tail_dy = grad.to(tail_dy.dtype)
    for first in range(0, F, BLOCK_F):
        column = first + tl.arange(0, BLOCK_F)
        head_weight, tail_weight = load_weight(weight1_ptr, column, head, C, F, HEAD, TAIL)
        pre = multiply_rows(head, tail, head_weight, tail_weight) + load_vector(bias1_ptr, column, F)[None, :]
        hidden = activate(pre, SILU)
        dhidden = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
        dhidden = dot(head_dy, load_tile(weight2_ptr, head_column, head_column < C, column, F, F).to(head_dy.dtype), dhidden)
        dhidden = dot(tail_dy, load_tile(weight2_ptr, tail_column, tail_column < C, column, F, F).to(head_dy.dtype), dhidden)
        if hidden_seed_ptr is not None:
            hidden = dropped(hidden, hidden_seed_ptr, row, column, rows_per_sample, hidden_keep, hidden_scale, 0, F)
            dhidden = dropped(dhidden, hidden_seed_ptr, row, column, rows_per_sample, hidden_keep, hidden_scale, 0, F)
        store_tile(hidden_ptr + start * F, lane, valid, column, hidden, F, F)
        store_tile(dpre_ptr + start * F, lane, valid, column, activate_backward(dhidden, pre, SILU), F, F)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _second_gradient_kernel(
    product_ptr, sums_ptr, dweight_ptr, dbias_ptr, parts, C: tl.constexpr, F: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    """Adds up the parts of the second weight's gradient, which are (F, C), and turns them round."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    hidden = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    product = tl.zeros((BLOCK_F, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for part in range(parts):
        product += load_tile(product_ptr + part * (F * C), hidden, hidden < F, column, C, C)
        total += load_vector(sums_ptr + part * C, column, C)
    store_tile(dweight_ptr, column, column < C, hidden, tl.trans(product), F, F)
    if dbias_ptr is not None and tl.program_id(1) == 0:
        tl.store(dbias_ptr + column, total.to(dbias_ptr.dtype.element_ty), mask=column < C)


def _dropouts(hidden: float, output: float, seed: Tensor | None) -> tuple[tuple[Tensor | None, ...], tuple[float, ...]]:
    """(seeds of the hidden and of the output dropout, None where it is off), (threshold and scale of each)."""
    seeds = tuple(seed if p > 0 else None for p in (hidden, output))
    return seeds, (dropout_threshold(hidden), 1 / (1 - hidden), dropout_threshold(output), 1 / (1 - output))


def feed_forward_forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, per_sample: bool, weight1: Tensor, bias1: Tensor | None,
    weight2: Tensor, bias2: Tensor | None, hidden_dropout: float, output_dropout: float, seed: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the forward pass: y, mean and 1 / deviation of each token or sample, and nothing of the hidden tensor."""
    if keep:
        raise ValueError("keep: the backward pass computes the hidden tensor again, it must be False")
    rows = Rows.of(x)
    y = torch.empty_like(rows.x)
    mean, rstd = rows.statistics(eps, per_sample)
    if rows.rows:
        config = configuration("fwd", rows, weight1.shape[0])
        seeds, dropouts = _dropouts(hidden_dropout, output_dropout, seed)
        parameters = (None if t is None else t.contiguous() for t in (norm_weight, norm_bias, weight1, bias1, weight2, bias2))
        with on_device(x):
            _feed_forward_fwd_kernel[(triton.cdiv(rows.rows, config["BLOCK_M"]),)](
                rows.x, *parameters, y, mean, rstd, *seeds, rows.rows, rows.rows_per_sample, eps, *dropouts,
                PER_SAMPLE=per_sample, F=weight1.shape[0], **rows.tiles, **config,
            )  # fmt: skip
    return y, mean, rstd, x.new_empty(0)


def feed_forward_backward(
    dy: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, per_sample: bool, weight1: Tensor, bias1: Tensor | None,
    weight2: Tensor, bias2: Tensor | None, hidden_dropout: float, output_dropout: float, seed: Tensor | None, mean: Tensor, rstd: Tensor,
    _: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Launches the backward pass: the gradients of x, norm weight, norm bias, weight1, bias1, weight2 and bias2 (empty without one)."""
    rows, hidden = Rows.of(x), weight1.shape[0]
    config = configuration("bwd", rows, hidden)
    dy, weight2 = dy.contiguous(), weight2.contiguous()
    parameters = (norm_weight.contiguous(), norm_bias.contiguous(), weight1.contiguous(), None if bias1 is None else bias1.contiguous())
    seeds, dropouts = _dropouts(hidden_dropout, output_dropout, seed)
    wide, dpre = (x.new_empty(rows.rows, hidden) for _ in range(2))
    dweight2, dbias2 = torch.empty_like(weight2), None if bias2 is None else torch.empty_like(bias2, memory_format=torch.contiguous_format)
    with on_device(x):
        if rows.rows:
            _hidden_bwd_kernel[(triton.cdiv(rows.rows, config["BLOCK_M"]),)](
                dy, rows.x, *parameters, weight2, mean, rstd, wide, dpre, *seeds, rows.rows, rows.rows_per_sample, *dropouts,
                PER_SAMPLE=per_sample, F=hidden, **rows.tiles, **config,
            )  # fmt: skip
        product, sums = rows._replace(x=dy).products(wide, hidden, None, None, per_sample, output_dropout, seed)
        _second_gradient_kernel[(triton.cdiv(rows.channels, 32), triton.cdiv(hidden, 32))](
            product, sums, dweight2, dbias2, product.shape[0], C=rows.channels, F=hidden, BLOCK_C=32, BLOCK_F=32, num_warps=4
        )
    gradients = rows.norm_linear_backward(dpre, dy, norm_weight, norm_bias, per_sample, weight1, bias1, mean, rstd)
    return *gradients, dweight2, x.new_empty(0) if dbias2 is None else dbias2
