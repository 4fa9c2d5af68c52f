"""Triton kernels of norm_linear.

A program holds whole rows of x: it measures and normalises them, rounds them once to the dtype of x, and multiplies
them by blocks of the weight that come from cache. So the normalised tensor exists nowhere, and the norm's parameters
are not folded into weight and bias beforehand, which would cost a launch for every call in training. Backward is two
products: the gradient of x over whole rows, with the norm's own gradient at its end, and the weight's, in parts of the
rows, from which the gradients of the norm's parameters follow as sums over the weight's rows (identity C). Launches: 1
forward and 3 backward where the norm is of tokens, 2 and 4 where it is of samples, whose statistics and sums need all
rows first; and those of `multiplied`, where the weight has another dtype than x.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..registry import Call
from ..sizes import cdiv
from ..triton_common import OLD_TRITON, contiguous, load_vector, on_device, store_tile
from ..triton_launch import jit_kernel
from ..triton_row_kernels import NOT_SPECIALIZED, load_weight, measure_and_normalise_rows, multiply_rows
from ..triton_rows import Rows
from ..types import LayerNorm, Linear


def configurations(rows: Rows) -> list[dict[str, int]]:
    """BLOCK_M rows of a program, and the blocks of BLOCK_N outputs that it walks over."""
    float32 = rows.x.dtype is torch.float32
    block = 16 if float32 or rows.width() > 256 else 32
    first = {"BLOCK_M": rows.block(), "BLOCK_N": block, "num_warps": 8, "num_stages": 2}
    if float32:
        return [first]
    if rows.small():
        return rows.small_tiles("BLOCK_N")
    if _tall(rows):
        first = {"BLOCK_M": _tallest(rows), "BLOCK_N": 64, "num_warps": 16, "num_stages": 2}
    elif rows.from_shared_memory and rows.width() <= 256:
        few = rows.width() <= 192
        first = {"BLOCK_M": 128 if few else 64, "BLOCK_N": 64 if few else 32, "num_warps": 8, "num_stages": 2}
        first["maxnreg"] = 128
    others = ({"num_warps": 4}, {"num_stages": 1}, {"BLOCK_M": 32, "num_warps": 4}, {"num_stages": 3})
    return [first, *(first | other for other in others)]


def _tallest(rows: Rows) -> int:
    """Rows of a program with a multiprocessor to itself."""
    return 256 if rows.width() <= (160 if OLD_TRITON else 192) else 128  # where they do not spill


def _tall(rows: Rows) -> bool:
    return rows.tall(_tallest(rows))


def configuration(rows: Rows, outputs: int) -> dict[str, int]:
    name = f"norm_linear_fwd{'_few' if rows.few() else '_tall' if _tall(rows) else ''}"
    return tuning.choose(name, rows.x, (rows.channels, outputs), lambda: configurations(rows))


def bytes_moved(x: Tensor, outputs: int, per_sample: bool) -> tuple[int, int]:
    """Bytes of full-size tensors that the forward and the backward pass read and write: x and y; dy and x twice, dx. Of
    samples, forward x once more, and backward x once more and dx twice."""
    size = x.numel() * x.element_size()
    size_of_y = size // x.shape[-1] * outputs
    return size * (2 if per_sample else 1) + size_of_y, size * (6 if per_sample else 3) + 2 * size_of_y


@jit_kernel(do_not_specialize=NOT_SPECIALIZED)
def _norm_linear_fwd_kernel(
    x_ptr,  # (rows, C)
    norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr,  # (C,), (C,), (OUT, C), (OUT,) or None
    y_ptr,  # written: (rows, OUT), like x
    mean_ptr, rstd_ptr,  # (rows,), written, or, PER_SAMPLE, (samples,), read; float32
    rows, rows_per_sample, blocks_per_program, eps,
    PER_SAMPLE: tl.constexpr, OUT: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = norm(x) weight^T + bias, where norm(x) = (x - mean) * rstd * norm_weight + norm_bias.

    A program has BLOCK_M rows and `blocks_per_program` blocks of outputs. Reads x once for each program of its rows,
    and again from cache, the weight once for each block of rows; writes y once."""
    lane = tl.arange(0, BLOCK_M)
    row = tl.program_id(0) * BLOCK_M + lane
    start, valid = tl.program_id(0).to(tl.int64) * BLOCK_M, row < rows
    head, tail = measure_and_normalise_rows(
        x_ptr + start * C, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, lane, row, valid, rows_per_sample, eps,
        PER_SAMPLE=PER_SAMPLE, C=C, HEAD=HEAD, TAIL=TAIL,
    )  # fmt: skip
    begin = tl.program_id(1) * blocks_per_program
    for block in range(begin, tl.minimum(begin + blocks_per_program, tl.cdiv(OUT, BLOCK_N))):
        output = block * BLOCK_N + tl.arange(0, BLOCK_N)  # a multiple that is known: 16 bytes are written at a time
        head_weight, tail_weight = load_weight(weight_ptr, output, head, C=C, OUT=OUT, HEAD=HEAD, TAIL=TAIL)
        sums = multiply_rows(head, tail, head_weight, tail_weight) + load_vector(bias_ptr, output, WIDTH=OUT)[None, :]
        store_tile(y_ptr + start * OUT, lane, valid, output, sums, WIDTH=OUT)


def norm_linear_forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the forward pass: y, and mean and rstd = 1 / sqrt(variance + eps) of each token or sample."""
    x, weight = call.x, call.weight
    rows, outputs = Rows.of(x), weight.shape[0]
    y = x.new_empty(*x.shape[:-1], outputs)
    mean, rstd = rows.statistics(call.eps, call.per_sample)
    if y.numel() > 0:
        config = configuration(rows, outputs)
        blocks, pieces = cdiv(rows.rows, config["BLOCK_M"]), cdiv(outputs, config["BLOCK_N"])
        per_program = rows.shares(blocks, pieces)
        norm_weight, norm_bias, bias = contiguous(call.norm_weight, call.norm_bias, call.bias)
        with on_device(x):
            _norm_linear_fwd_kernel[(blocks, cdiv(pieces, per_program))](
                rows.x, norm_weight, norm_bias, *rows.weights(weight), bias, y, mean, rstd,
                rows.rows, rows.rows_per_sample, per_program, call.eps,
                PER_SAMPLE=call.per_sample, OUT=outputs, **rows.tiles, **config,
            )  # fmt: skip
    return y, mean, rstd


def norm_linear_backward(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches the backward pass: the gradients of x, norm weight, norm bias, weight and bias (empty without one)."""
    norm = LayerNorm(call.norm_weight, call.norm_bias, per_sample=call.per_sample)
    linear = Linear(call.weight, call.bias)
    return Rows.of(call.x).norm_linear_backward(call.dy.contiguous(), norm, linear, call.mean, call.rstd)
