"""Triton kernels of norm_linear.

A program holds whole rows of x: it measures and normalises them, rounds them once to the dtype of x, and multiplies them by blocks of the
weight that come from cache. So the normalised tensor exists nowhere, and neither weight nor bias is folded beforehand, which would cost a
launch for every call in training. Backward is two products: the gradient of x over whole rows, with the norm's own gradient as its
epilogue, and the weight's, in parts of the rows, from which the gradients of scale and shift follow as sums over the weight's columns
(identity C). Launches: 1 forward and 3 backward where the norm is of tokens, 2 and 4 where it is of samples, whose statistics and sums
need all rows first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..triton_common import multiprocessors, on_device
from ..triton_rows import (
    NOT_SPECIALIZED,
    Rows,
    load_vector,
    load_weight,
    multiply_rows,
    normalise_rows,
    store_tile,
)


def configurations(rows: Rows) -> list[dict[str, int]]:
    """BLOCK_M rows of a program, and the blocks of BLOCK_N outputs that it walks over."""
    narrow = rows.x.dtype is torch.float32
    wide = rows.width() > 256
    first = {"BLOCK_M": rows.block(), "BLOCK_N": 16 if narrow or wide else 32, "num_warps": 8, "num_stages": 2}
    if narrow:
        return [first]
    others = ({"num_warps": 4}, {"num_stages": 1}, {"BLOCK_M": 32, "num_warps": 4}, {"num_stages": 3})
    return [first, *(first | other for other in others)]


def configuration(rows: Rows, outputs: int) -> dict[str, int]:
    return tuning.choose("norm_linear_fwd", rows.x, (rows.channels, outputs), lambda: configurations(rows))


def bytes_moved(x: Tensor, outputs: int, per_sample: bool) -> tuple[int, int]:
    """Bytes of full-size tensors that the forward and the backward pass read and write: x and y; dy and x twice, dx. Of samples, forward
    x once more, and backward x once more and dx twice."""
    narrow = x.numel() * x.element_size()
    wide = narrow // x.shape[-1] * outputs
    return narrow * (2 if per_sample else 1) + wide, narrow * (6 if per_sample else 3) + 2 * wide


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _norm_linear_fwd_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, rows, rows_per_sample, outputs_per_program, eps,
    PER_SAMPLE: tl.constexpr, OUT: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK_M)
    row = tl.program_id(0) * BLOCK_M + lane
    start, valid = tl.program_id(0).to(tl.int64) * BLOCK_M, row < rows
    head, tail = normalise_rows(
        x_ptr + start * C, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, lane, row, valid, rows_per_sample, eps,
        True, PER_SAMPLE, C, HEAD, TAIL,
    )  # fmt: skip
    begin = tl.program_id(1) * outputs_per_program
    for first in range(begin, tl.minimum(begin + outputs_per_program, OUT), BLOCK_N):
        output = first + tl.arange(0, BLOCK_N)
        head_weight, tail_weight = load_weight(weight_ptr, output, head, C, OUT, HEAD, TAIL)
        sums = multiply_rows(head, tail, head_weight, tail_weight) + load_vector(bias_ptr, output, OUT)[None, :]
        store_tile(y_ptr + start * OUT, lane, valid, output, sums, OUT, OUT)


def norm_linear_forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, per_sample: bool, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the forward pass: y, and mean and 1 / deviation of each token or sample."""
    rows, outputs = Rows.of(x), weight.shape[0]
    y = x.new_empty(*x.shape[:-1], outputs)
    mean, rstd = rows.statistics(eps, per_sample)
    if y.numel() > 0:
        config = configuration(rows, outputs)
        blocks, pieces = triton.cdiv(rows.rows, config["BLOCK_M"]), triton.cdiv(outputs, config["BLOCK_N"])
        # Where rows alone do not fill the GPU, programs share a block of rows, and each takes some of the outputs.
        shares = min(pieces, max(1, multiprocessors(x) // blocks))
        per_program = triton.cdiv(pieces, shares) * config["BLOCK_N"]
        parameters = (None if t is None else t.contiguous() for t in (norm_weight, norm_bias, weight, bias))
        with on_device(x):
            _norm_linear_fwd_kernel[(blocks, triton.cdiv(outputs, per_program))](
                rows.x, *parameters, y, mean, rstd, rows.rows, rows.rows_per_sample, per_program, eps,
                PER_SAMPLE=per_sample, OUT=outputs, **rows.tiles, **config,
            )  # fmt: skip
    return y, mean, rstd


def norm_linear_backward(
    dy: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, per_sample: bool, weight: Tensor, bias: Tensor | None, mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the backward pass: the gradients of x, norm weight, norm bias, weight and bias (empty without one)."""
    return Rows.of(x).norm_linear_backward(dy.contiguous(), None, norm_weight, norm_bias, per_sample, weight, bias, mean, rstd)
