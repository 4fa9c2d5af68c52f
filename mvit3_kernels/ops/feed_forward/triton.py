"""Triton kernels of feed_forward.

Forward, the hidden tensor exists in registers and shared memory only: a program holds its rows, normalised once, and
the sums of their outputs, and walks over the hidden channels; a block of them is made, activated, and multiplied into
the sums. Nothing of it is saved. In a layer of multi-head attention a program makes its rows as well, from what
attention found (`Projected`). Backward makes the hidden tensor again and writes it, beside its gradient, for the
products that follow: norm_linear's backward, and the second weight's. Making both again inside each of those instead
would cost 8 products where these are 5, and save 10 passes over C channels (about as long, by count, at C = 144); but a
row, two weights and sums together do not fit the registers of any configuration that was tried. Launches: 1 forward and
6 backward, for a norm of samples 2 and 7; and those of `multiplied`, where weights have another dtype than x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..registry import Call
from ..sizes import cdiv, most_sample_parts
from ..triton_common import (
    SILU,
    activate,
    activate_backward,
    contiguous,
    dropout_threshold,
    dropped,
    load_tile,
    load_vector,
    multiplied,
    on_device,
    store_tile,
)
from ..triton_launch import jit_kernel
from ..triton_math import opaque
from ..triton_row_gradients import load_folded
from ..triton_row_kernels import (
    NOT_SPECIALIZED,
    add_columns_product,
    drop_rows,
    load_row_vector,
    load_rows,
    load_rows_in_float32,
    load_sample_statistics,
    load_weight,
    measure_and_normalise_rows,
    multiply_by_columns,
    multiply_rows,
    normalise,
    normalise_rows,
    store_moments_of_rows,
    store_rows,
)
from ..triton_rows import Rows
from ..types import LayerNorm, Linear

_NOT_SPECIALIZED = [*NOT_SPECIALIZED, "hidden_keep", "hidden_scale", "output_keep", "output_scale"]


def configurations(rows: Rows, forward: bool, drops: bool, shared: bool = False) -> list[dict[str, int]]:
    """BLOCK_M rows of a program, and the blocks of BLOCK_F hidden channels that it walks over or, `shared`, some of
    them; `drops`: with dropout, whose words leave no registers for more rows. One group of 4 warps multiplies 64 rows
    from shared memory: of two groups, each would do the same work for half of the columns,
    unless there are 128 rows."""
    width = rows.width()
    if rows.x.dtype is torch.float32:
        return [{"BLOCK_M": 16, "BLOCK_F": 16, "num_warps": 4, "num_stages": 2}]
    if rows.small() and not drops:
        return rows.small_tiles("BLOCK_F", shared=shared)
    if not rows.from_shared_memory or width > 256:
        first = {"BLOCK_M": 32, "BLOCK_F": 16, "num_warps": 8, "num_stages": 1}
    elif drops:
        first = {"BLOCK_M": 64, "BLOCK_F": 32, "num_warps": 4 if width <= 192 else 8, "num_stages": 1}
    elif forward and _tall(rows):
        block_f = 64 if 160 < width <= 192 else 32
        first = {"BLOCK_M": _tallest(rows), "BLOCK_F": block_f, "num_warps": 16, "num_stages": 2}
    elif not forward:
        block = 128 if width <= 192 else 64
        first = {"BLOCK_M": block, "BLOCK_F": 32, "num_warps": block // 16, "num_stages": 1}
    else:  # 32 hidden channels spill a few bytes on Triton 3.6, but for 192 columns
        block_f = 32 if 160 < width <= 192 else 16
        first = {"BLOCK_M": 128 if width <= 160 else 64, "BLOCK_F": block_f, "num_warps": 8, "num_stages": 2}
        first["maxnreg"] = 128
    others = (
        {"num_stages": 3 - first["num_stages"]},
        {"BLOCK_M": 64, "num_warps": 4},
        {"BLOCK_F": 16, "num_warps": 8},
        {"BLOCK_M": 32, "BLOCK_F": 32, "num_warps": 4},
    )
    return [first, *(first | other for other in others)]


def _tallest(rows: Rows) -> int:
    """Rows of a program of the forward pass with a multiprocessor to itself."""
    return 256 if rows.width() <= 160 else 128


def _tall(rows: Rows) -> bool:
    return rows.tall(_tallest(rows))


def configuration(kernel: str, rows: Rows, hidden: int, drops: bool) -> dict[str, int]:
    forward, shared = kernel == "fwd", kernel == "bwd"
    size = "_few" if rows.few() else "_tall" if forward and _tall(rows) and not drops else ""
    name = f"feed_forward_{kernel}{size}{'_dropout' if drops else ''}"
    return tuning.choose(name, rows.x, (rows.channels, hidden), lambda: configurations(rows, forward, drops, shared))


def bytes_moved(x: Tensor, hidden: int, per_sample: bool) -> tuple[int, int]:
    """Bytes of full-size tensors that the forward and the backward pass read and write: x and y; x and dy three times,
    dx, and of the tensors of the hidden width two writes and three reads. Of samples, x once more forward, and backward
    x once and dx twice."""
    size = x.numel() * x.element_size()
    return size * (3 if per_sample else 2), size * (10 if per_sample else 7) + 5 * size // x.shape[-1] * hidden


@triton.jit
def _project_rows(
    attended_ptr, weight_ptr, bias_ptr, residual_ptr,  # (.., C), (C, C), (C,) or None, (.., C)
    x_ptr,  # written: (.., C)
    at, valid, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x = attended weight^T + bias + residual for rows `at`, BLOCK_N channels at a time."""
    head, tail = load_rows(attended_ptr, at, valid, C=C, HEAD=HEAD, TAIL=TAIL)
    for first in range(0, C, BLOCK_N):
        output = first + tl.arange(0, BLOCK_N)
        head_weight, tail_weight = load_weight(weight_ptr, output, head, C=C, OUT=C, HEAD=HEAD, TAIL=TAIL)
        sums = multiply_rows(head, tail, head_weight, tail_weight)
        residual = load_tile(residual_ptr, at, valid, output, WIDTH=C).to(tl.float32)
        store_tile(x_ptr, at, valid, output, sums + load_vector(bias_ptr, output, WIDTH=C)[None, :] + residual, WIDTH=C)


@triton.jit
def _finish_rows(
    head, tail, x_ptr, bias_ptr, seed_ptr, lane, row, valid, rows_per_sample, keep, keep_scale,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The sums with their bias; with a seed after dropout, which x does not take part in and is added behind."""
    head_bias, tail_bias = load_row_vector(bias_ptr, C=C, HEAD=HEAD, TAIL=TAIL)
    head += head_bias
    tail += tail_bias
    if seed_ptr is not None:
        head, tail = drop_rows(
            head, tail, seed_ptr, row, rows_per_sample, keep, keep_scale, SITE=1, C=C, HEAD=HEAD, TAIL=TAIL
        )
        head_again, tail_again = load_rows_in_float32(x_ptr, lane, valid, C=C, HEAD=HEAD, TAIL=TAIL, AGAIN=True)
        head += head_again
        tail += tail_again
    return head, tail


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def _feed_forward_fwd_kernel(
    projected,  # None, or what x is made of first: attended, weight, bias and residual, as of _project_rows
    x_ptr,  # (rows, C), written where it is made first
    norm_weight_ptr, norm_bias_ptr, weight1_ptr, bias1_ptr,  # (C,), (C,), (F, C), (F,) or None
    weight2_ptr, bias2_ptr,  # (C, F), (C,) or None
    hidden_seed_ptr, output_seed_ptr,  # one int64, or None without dropout
    y_ptr,  # written: (rows, C), like x
    mean_ptr, rstd_ptr,  # (rows,), written, or, PER_SAMPLE, (samples,), read; float32
    moments_ptr, next_ptr,  # of samples of x, whose statistics are written then, and, written, of y; float32, or None
    rows, rows_per_sample, samples, parts, most_parts, eps, hidden_keep, hidden_scale, output_keep, output_scale,
    PER_SAMPLE: tl.constexpr, F: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """y = x + dropout(dropout(SiLU(norm(x) weight1^T + bias1)) weight2^T + bias2).

    A program has BLOCK_M rows, with `moments_ptr` of one sample. It leaves norm(x) in y, ROWS rows at a time, and reads
    it from there: it has no registers for an operand. Reads x once and again from cache, both weights once; where x is
    `projected`, the norm is of tokens."""
    ROWS: tl.constexpr = min(BLOCK_M, 64)
    lane = tl.arange(0, BLOCK_M)
    begin_row, end = tl.program_id(0) * BLOCK_M, rows
    if moments_ptr is not None:
        blocks = tl.cdiv(rows_per_sample, BLOCK_M)
        sample, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
        begin_row, end = sample * rows_per_sample + block * BLOCK_M, (sample + 1) * rows_per_sample
        sample_mean, sample_rstd = load_sample_statistics(moments_ptr, sample, samples, parts, most_parts, eps)
        tl.store(mean_ptr + sample, sample_mean, mask=block == 0)
        tl.store(rstd_ptr + sample, sample_rstd, mask=block == 0)
    row = begin_row + lane
    start, valid = begin_row.to(tl.int64), row < end
    x_ptr += start * C
    y_ptr += start * C
    if projected is not None:
        _project_rows(
            projected[0] + start * C, projected[1], projected[2], projected[3] + start * C, x_ptr, lane, valid,
            C=C, HEAD=HEAD, TAIL=TAIL, BLOCK_N=64,
        )  # fmt: skip
        tl.debug_barrier()
    for begin in range(0, BLOCK_M, ROWS):
        at = begin + tl.arange(0, ROWS)
        token = begin_row + at
        if moments_ptr is not None:
            head_x, tail_x = load_rows_in_float32(x_ptr, at, token < end, C=C, HEAD=HEAD, TAIL=TAIL)
            head_rows, tail_rows = normalise(
                head_x, tail_x, sample_mean, sample_rstd, norm_weight_ptr, norm_bias_ptr,
                DTYPE=x_ptr.dtype.element_ty, C=C, HEAD=HEAD, TAIL=TAIL,
            )  # fmt: skip
        else:
            head_rows, tail_rows = measure_and_normalise_rows(
                x_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, at, token, token < end, rows_per_sample, eps,
                PER_SAMPLE=PER_SAMPLE, C=C, HEAD=HEAD, TAIL=TAIL,
            )  # fmt: skip
        store_rows(y_ptr, at, token < end, head_rows, tail_rows, C=C, HEAD=HEAD, TAIL=TAIL)
    tl.debug_barrier()
    head_normed, tail_normed = load_rows(y_ptr, lane, valid, C=C, HEAD=HEAD, TAIL=TAIL)
    if output_seed_ptr is None:
        head, tail = load_rows_in_float32(x_ptr, lane, valid, C=C, HEAD=HEAD, TAIL=TAIL, AGAIN=True)
    else:
        head, tail = tl.zeros((BLOCK_M, HEAD), tl.float32), tl.zeros((BLOCK_M, TAIL), tl.float32)
    for first in range(0, F, BLOCK_F):
        column = first + tl.arange(0, BLOCK_F)
        head_weight, tail_weight = load_weight(weight1_ptr, column, head_normed, C=C, OUT=F, HEAD=HEAD, TAIL=TAIL)
        pre = multiply_rows(head_normed, tail_normed, head_weight, tail_weight)
        hidden = activate(pre + load_vector(bias1_ptr, column, WIDTH=F)[None, :], ACT=SILU, DTYPE=head_normed.dtype)
        if hidden_seed_ptr is not None:
            hidden = dropped(
                hidden, hidden_seed_ptr, row, column, rows_per_sample, hidden_keep, hidden_scale, SITE=0, WIDTH=F
            )
        hidden = hidden.to(head_normed.dtype)
        head, tail = add_columns_product(head, tail, hidden, weight2_ptr, column, WIDTH=F, C=C, HEAD=HEAD, TAIL=TAIL)
    if hidden_seed_ptr is None:
        lane = opaque(lane)  # anew, for the loop has no registers to keep rows and which are valid
        row = begin_row + lane
        valid = row < end
    head, tail = _finish_rows(
        head, tail, x_ptr, bias2_ptr, output_seed_ptr, lane, row, valid, rows_per_sample, output_keep, output_scale,
        C=C, HEAD=HEAD, TAIL=TAIL,
    )  # fmt: skip
    store_rows(y_ptr, lane, valid, head, tail, C=C, HEAD=HEAD, TAIL=TAIL)
    if next_ptr is not None:
        pivot = tl.load(moments_ptr + (samples + sample) * most_parts)  # the mean of the first part of x
        store_moments_of_rows(
            next_ptr, sample, samples, block, most_parts, head, tail, valid, pivot,
            EXACT=y_ptr.dtype.element_ty == tl.float32, C=C, HEAD=HEAD, TAIL=TAIL,
        )  # fmt: skip


@jit_kernel(do_not_specialize=_NOT_SPECIALIZED)
def _hidden_bwd_kernel(
    dy_ptr, x_ptr,  # (rows, C)
    norm_weight_ptr, norm_bias_ptr, weight1_ptr, bias1_ptr, weight2_ptr,  # (C,), (C,), (F, C), (F,) or None, (C, F)
    mean_ptr, rstd_ptr,  # (rows,) or, PER_SAMPLE, (samples,), float32
    folded_ptr,  # (2, F), float32: weight1 times the norm's weight and bias, or None
    hidden_seed_ptr, output_seed_ptr,  # one int64, or None without dropout
    hidden_ptr, dpre_ptr,  # written: (rows, F), like x
    known_ptr,  # written with folded_ptr: (2, rows), float32
    rows, rows_per_sample, blocks_per_program, hidden_keep, hidden_scale, output_keep, output_scale,
    PER_SAMPLE: tl.constexpr, F: tl.constexpr,
    C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """hidden = dropout(SiLU(pre)) once more, where pre = norm(x) weight1^T + bias1, and the gradient of pre,

        dpre = SiLU'(pre) * dropout(dropout(dy) weight2)

    and, with `folded_ptr`, what the gradient of a norm of samples needs of g = norm_weight * (dpre weight1): the sums
    over each row of g and of g * n, for normalised rows n, as those of dpre * (weight1 norm_weight) and of dpre times
    weight1 (n * norm_weight), which is pre without bias1 and weight1 norm_bias.

    A program has BLOCK_M rows. Reads dy and x once, both weights once for each program; writes hidden and dpre once."""
    lane = tl.arange(0, BLOCK_M)
    row = tl.program_id(0) * BLOCK_M + lane
    start, valid = tl.program_id(0).to(tl.int64) * BLOCK_M, row < rows
    head, tail = normalise_rows(
        x_ptr + start * C, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, lane, row, valid, rows_per_sample,
        PER_SAMPLE=PER_SAMPLE, C=C, HEAD=HEAD, TAIL=TAIL,
    )  # fmt: skip
    head_dy, tail_dy = load_rows(dy_ptr + start * C, lane, valid, C=C, HEAD=HEAD, TAIL=TAIL)
    if output_seed_ptr is not None:
        head_grad, tail_grad = drop_rows(
            head_dy.to(tl.float32), tail_dy.to(tl.float32), output_seed_ptr, row, rows_per_sample,
            output_keep, output_scale, SITE=1, C=C, HEAD=HEAD, TAIL=TAIL,
        )  # fmt: skip
        head_dy, tail_dy = head_grad.to(head_dy.dtype), tail_grad.to(tail_dy.dtype)
    total = tl.zeros((BLOCK_M,), tl.float32)
    product = tl.zeros((BLOCK_M,), tl.float32)
    begin = tl.program_id(1) * blocks_per_program
    for block in range(begin, tl.minimum(begin + blocks_per_program, tl.cdiv(F, BLOCK_F))):
        first = block * BLOCK_F
        column = first + tl.arange(0, BLOCK_F)
        head_weight, tail_weight = load_weight(weight1_ptr, column, head, C=C, OUT=F, HEAD=HEAD, TAIL=TAIL)
        linear = multiply_rows(head, tail, head_weight, tail_weight)
        pre = linear + load_vector(bias1_ptr, column, WIDTH=F)[None, :]
        hidden = activate(pre, ACT=SILU, DTYPE=head.dtype)
        dhidden = multiply_by_columns(head_dy, tail_dy, weight2_ptr, column, WIDTH=F, C=C, HEAD=HEAD, TAIL=TAIL)
        if hidden_seed_ptr is not None:
            hidden = dropped(
                hidden, hidden_seed_ptr, row, column, rows_per_sample, hidden_keep, hidden_scale, SITE=0, WIDTH=F
            )
            dhidden = dropped(
                dhidden, hidden_seed_ptr, row, column, rows_per_sample, hidden_keep, hidden_scale, SITE=0, WIDTH=F
            )
        store_tile(hidden_ptr + start * F, lane, valid, column, hidden, WIDTH=F)
        dpre = activate_backward(dhidden, pre, ACT=SILU, DTYPE=head.dtype)
        store_tile(dpre_ptr + start * F, lane, valid, column, dpre, WIDTH=F)
        if folded_ptr is not None:
            scale, shift = load_folded(folded_ptr, column, OUT=F, STRIDE=F)
            total += tl.sum(dpre * scale, 1)
            product += tl.sum(dpre * (linear - shift), 1)
    if folded_ptr is not None:
        tl.store(known_ptr + row, total, mask=valid)
        tl.store(known_ptr + rows + row, product, mask=valid)


def _dropouts(call: Call) -> tuple[tuple[Tensor | None, ...], tuple[float, ...]]:
    """(seeds of the hidden and of the output dropout, None where it is off), (threshold and scale of each)."""
    hidden, output = call.hidden_dropout, call.output_dropout
    seeds = tuple(call.seed if p > 0 else None for p in (hidden, output))
    return seeds, (dropout_threshold(hidden), 1 / (1 - hidden), dropout_threshold(output), 1 / (1 - output))


def feed_forward_forward(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches the forward pass: y, mean and rstd = 1 / sqrt(variance + eps) of each token or sample, and nothing of
    the hidden tensor."""
    if call.keep:
        raise ValueError("keep: the backward pass computes the hidden tensor again, it must be False")
    rows = Rows.of(call.x)
    y, mean, rstd, _ = feed(call, rows.weights(call.weight1, call.weight2))
    return y, mean, rstd, call.x.new_empty(0)


class Projected(NamedTuple):
    """What `feed` makes x of: attended @ weight^T + bias + residual, with the weight as it is multiplied."""

    attended: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor


def feed(
    call: Call,
    weights: tuple[Tensor, Tensor],
    moments: tuple[Tensor, int] | None = None,
    wanted: bool = False,
    projected: Projected | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Launches the forward pass with both weights as they are multiplied: y, mean, rstd. `moments`: of the samples of
    x in parts, as of part_statistics_kernel, and their number; if `wanted`, also those of y, in `parts_of_samples`.
    With `projected` the launch makes x itself, in the space of `call.x`; the norm is of tokens then."""
    rows, hidden = Rows.of(call.x), call.weight1.shape[0]
    y = torch.empty_like(rows.x)
    (seeds, dropouts), config = _dropouts(call), _forward_configuration(call, moments is not None)
    if moments is None:
        (mean, rstd), most = rows.statistics(call.eps, call.per_sample), 0
        measured, parts, programs = None, 0, cdiv(rows.rows, config["BLOCK_M"])
    else:
        (mean, rstd), most = (rows.float32(rows.samples()) for _ in range(2)), moments[0].shape[2]
        (measured, parts), programs = moments, rows.programs_of_samples(config["BLOCK_M"])
    found = rows.moments() if wanted else None
    made = None if projected is None else tuple(projected)  # as launches know it
    if rows.rows:
        norm_weight, norm_bias, bias1, bias2 = contiguous(call.norm_weight, call.norm_bias, call.bias1, call.bias2)
        with on_device(rows.x):
            _feed_forward_fwd_kernel[(programs,)](
                made, rows.x, norm_weight, norm_bias, weights[0], bias1, weights[1], bias2, *seeds,
                y, mean, rstd, measured, found, rows.rows, rows.rows_per_sample, rows.samples(), parts, most,
                call.eps, *dropouts, PER_SAMPLE=call.per_sample, F=hidden, **rows.tiles, **config,
            )  # fmt: skip
    return y, mean, rstd, found


def _forward_configuration(call: Call, of_samples: bool) -> dict[str, int]:
    """`of_samples`: a program's rows are of one sample."""
    rows, drops = Rows.of(call.x), call.hidden_dropout > 0 or call.output_dropout > 0
    config = configuration("fwd", rows, call.weight1.shape[0], drops)
    return rows.within_samples(config) if of_samples else config


def parts_of_samples(call: Call) -> int:
    """In how many parts `feed` finds the moments of each sample; 0: in too many, or the norm is of tokens."""
    rows = Rows.of(call.x)
    parts = cdiv(rows.rows_per_sample, _forward_configuration(call, True)["BLOCK_M"])
    return parts if call.per_sample and parts <= most_sample_parts(rows.rows_per_sample) else 0


def feed_forward_backward(call: Call) -> tuple[Tensor, ...]:
    """Launches the backward pass: the gradients of x, norm weight, norm bias, weight1, bias1, weight2 and bias2 (empty
    without one)."""
    rows, dy = Rows.of(call.x), call.dy.contiguous()
    norm, linear1, linear2 = parameters(call)
    weight1, weight2 = multiplied(rows.x, call.weight1, call.weight2)
    hidden, dpre, _ = hidden_backward(call, dy, weight1, weight2)
    return (
        *rows.norm_linear_backward(dpre, norm, linear1, call.mean, call.rstd, dy, weight1),
        *rows.second_weight_backward(dy, hidden, linear2, call.output_dropout, call.seed),
    )


def parameters(call: Call) -> tuple[LayerNorm, Linear, Linear]:
    """Those of a backward pass."""
    norm = LayerNorm(call.norm_weight, call.norm_bias, per_sample=call.per_sample)
    return norm, Linear(call.weight1, call.bias1), Linear(call.weight2, call.bias2)


def hidden_backward(
    call: Call, dy: Tensor, weight1: Tensor, weight2: Tensor, folded: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The hidden tensor after its dropout, and the gradient of it before its activation, (rows, F), for both weights as
    `multiplied`. With weight1 times the norm's weight and bias, `folded` (2, F), also the sums over each sample that
    the gradient of its norm needs, in parts, (2, samples, parts)."""
    rows, features = Rows.of(call.x), weight1.shape[0]
    norm_weight, norm_bias, bias1 = contiguous(call.norm_weight, call.norm_bias, call.bias1)
    seeds, dropouts = _dropouts(call)
    # sums over all hidden channels of a row are those of one program
    kernel = "bwd" if folded is None else "samples_bwd"
    config = configuration(kernel, rows, features, any(t is not None for t in seeds))
    hidden, dpre = (call.x.new_empty(rows.rows, features) for _ in range(2))
    known = None if folded is None else rows.float32(2, rows.samples(), rows.rows_per_sample)
    if rows.rows:
        blocks, pieces = cdiv(rows.rows, config["BLOCK_M"]), cdiv(features, config["BLOCK_F"])
        per_program = rows.shares(blocks, pieces) if known is None else pieces
        with on_device(rows.x):
            _hidden_bwd_kernel[(blocks, cdiv(pieces, per_program))](
                dy, rows.x, norm_weight, norm_bias, weight1, bias1, weight2, call.mean, call.rstd, folded,
                *seeds, hidden, dpre, known, rows.rows, rows.rows_per_sample, per_program, *dropouts,
                PER_SAMPLE=call.per_sample, F=features, **rows.tiles, **config,
            )  # fmt: skip
    return hidden, dpre, known
