"""Triton kernels of pointwise_conv and, with a second input b, of pointwise_fusion: one computation.

Forward is one product; for a concatenation [a, b] two products are added up in the same registers. Where the statistics
of the norm are known, norm, activation and residual are applied before the product leaves the registers. In training a
program walks down its rows and writes p, the product with its bias, and the moments of its part of p; batch_norm_act's
second kernel does the rest, so that p is read once more, not twice. p is rounded with the bias: where the two cancel, a
product rounded alone is wrong by more than their sum is, and by its sign, which is what ReLU asks for. (The moments of
the inputs would give the statistics too, identity A of the design, without p. But backward needs p, or the product
again; and these layers have as many inputs as outputs or more, so that another read of the inputs and their product
with themselves cost more than p does.)

On sm_90 a program of many rows holds the weights of its outputs in shared memory while it walks (a kernel of its own,
for inputs that fit beside them); elsewhere weights are read anew for each 128 rows.

Dropout is that op's kernel, on what the product's returned forward and on dy backward.

Backward is batch_norm_act's on p, and two plain products for each input, which are torch.mm's, whose kernels are good
at the shapes of this op; those of a concatenation write their part of the weight's gradient. On sm_90 the gradient of p
is made and multiplied by the weight in one launch (backward_kernels.py), behind a norm in training and with enough
rows: it is written for the gradient of the weight and not read for those of the inputs, two outputs of that launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import tuning
from ..batch_norm_act.triton import gradient_sums, normalize, normalize_backward
from ..dropout.triton import drop
from ..registry import Call
from ..sizes import cdiv, next_power_of_2
from ..triton_common import (
    IDENTITY,
    OLD_TRITON,
    contiguous,
    multiplied,
    multiplies_from_shared_memory,
    multiprocessors,
    on_device,
    product_in,
    rows_at_one_distance,
    split_rows,
)
from ..types import BatchNorm
from . import backward_kernels, few_rows, kernels

# Of a block on sm_90; beside its tiles it keeps one of the outputs for a while.
SHARED_MEMORY = 227 * 1024
MOST_OUTPUTS = 512  # whose gradient a program of the backward pass holds beside two stages of the weight


def configurations(a: Tensor, b: Tensor | None, wide: bool = False) -> list[dict[str, int]]:
    """Of the product: BLOCK_M rows, BLOCK_N outputs, BLOCK_K inputs at a time. `wide`: where blocks of 128 outputs are
    enough to fill a GPU."""
    if a.dtype is torch.float32:  # no matrix units of this precision: products are made in registers
        return [{"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}]  # two spill on sm_80
    even = _even(a, b)
    first = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64 if even else 32, "num_warps": 8, "num_stages": 2}
    offered = [first]
    if multiplies_from_shared_memory(a):
        first |= {"BLOCK_K": 32, "num_stages": 3, "maxnreg": 128}
        if wide:  # the inputs are read half as often; two blocks of 8 warps would spill what follows the product
            offered = [first | {"BLOCK_N": 128, "num_warps": 16}, first]
    others = (
        {"num_warps": 4},
        {"BLOCK_K": 64} if even else {"num_stages": 2},
        {"BLOCK_M": 64, "num_warps": 4},
        {"BLOCK_N": 128},
        {"BLOCK_M": 64, "BLOCK_N": 128},
    )
    return offered + [c for other in others if (c := first | other) not in offered]


def _even(a: Tensor, b: Tensor | None) -> bool:
    return a.shape[-1] % 64 == 0 and (b is None or b.shape[-1] % 64 == 0)


def _few_configuration(a: Tensor, b: Tensor | None, outputs: int, rows: int) -> dict[str, int]:
    """Where tiles of any other would leave most of a GPU idle: the larger of two of which there are enough."""
    tile = (16, 32)
    if 4 * cdiv(rows, 32) * cdiv(outputs, 64) >= 3 * multiprocessors(a):
        tile = (32, 64)
    inputs = 64 if _even(a, b) else 32
    return {"BLOCK_M": tile[0], "BLOCK_N": tile[1], "BLOCK_K": inputs, "num_warps": 4, "num_stages": 3}


def _held_configurations(a: Tensor, channels: tuple[int, int, int], norm: bool, measured: bool) -> list[dict[str, int]]:
    """Of programs that hold the weights of BLOCKS blocks of outputs; none where no block fits beside two stages of
    the inputs. Norms and sums of moments take registers of each block, float16's SiLU and wide inputs some more."""
    inputs, outputs = channels[0] + channels[1], channels[2]
    rows, columns = 128, 64
    config = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
    room = SHARED_MEMORY - 2 * rows * columns - 4 * rows * inputs  # an output on its way to memory takes some, too
    blocks = cdiv(outputs, columns)
    tight = channels[0] > 256 if measured else norm and channels[1] > 0 and a.dtype is torch.float16
    fit = 1 if tight else 2 if norm or measured else 3
    most = min(room // (2 * columns * inputs), blocks, fit)
    if most < 1 or channels[0] % 16 or channels[1] % 16:
        return []
    offered = [config | {"BLOCKS": cdiv(blocks, cdiv(blocks, most))}]
    if channels[0] in (128, 256) and channels[1] == 0 and outputs >= 256 and not measured:
        # One product of all inputs: a sum of several would keep 16 warps from sharing the outputs.
        wide = {"BLOCK_N": 128, "BLOCK_K": channels[0], "BLOCKS": 1, "num_warps": 16}
        offered.insert(0, config | wide)
    return [*offered, config | {"BLOCKS": 1}] if offered[-1]["BLOCKS"] > 1 else offered


def configuration(a: Tensor, b: Tensor | None, outputs: int, norm: bool, measured: bool) -> dict[str, int]:
    """With BLOCKS where programs hold their weights and walk down the rows: few rows and float32 are left to the
    others."""
    channels = (a.shape[-1], 0 if b is None else b.shape[-1], outputs)
    tiles, half = cdiv(a.shape[:-1].numel(), 128), a.dtype is not torch.float32
    if half and multiplies_from_shared_memory(a) and tiles >= 2 * multiprocessors(a):
        held = _held_configurations(a, channels, norm, measured)
        if held:
            purpose = "_moments" if measured else "_norm" if norm else ""
            return tuning.choose(f"pointwise_conv_held{purpose}", a, channels, lambda: held)
    wide = outputs > 64 and tiles * cdiv(outputs, 128) >= multiprocessors(a)
    wide = wide and not (measured and b is not None)  # moments of a sum of two products spill there
    name = f"pointwise_conv_fwd{'_wide' if wide else ''}{'_moments' if measured else ''}"
    config = tuning.choose(name, a, channels, lambda: configurations(a, b, wide))
    rows = a.shape[:-1].numel()
    programs = cdiv(outputs, config["BLOCK_N"]) * cdiv(rows, config["BLOCK_M"])
    few = half and programs <= multiprocessors(a) and few_rows(rows, outputs * sum(channels[:2]))
    return _few_configuration(a, b, outputs, rows) if few else config


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


def _multiplying(call: Call) -> Tensor:
    """The weight for products with maps: rounded beforehand, or as it is."""
    rounded = getattr(call, "rounded", None)
    return call.weight if rounded is None else rounded


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
        return Convolution(call.a, call.b, _multiplying(call), call.bias, norm, call.act, call.residual)


def _launch(conv: Convolution, p: Tensor | None, y: Tensor | None) -> tuple[Tensor | None, int, int]:
    """Fills p and y, where given, y by a norm's running statistics; without y, for a norm in training, returns p's
    partial moments: (workspace, parts, rows of each)."""
    a, b, residual, bias = contiguous(conv.a, conv.b, conv.residual, conv.bias)
    norm = (None,) * 4 if conv.norm is None else contiguous(*conv.norm[:4])
    outputs, rows, measured = conv.weight.shape[0], a.shape[:-1].numel(), y is None
    config = configuration(a, b, outputs, conv.norm is not None, measured)
    held = "BLOCKS" in config
    kernel = kernels.pointwise_held_fwd_kernel if held else kernels.pointwise_fwd_kernel
    (weight,) = contiguous(conv.weight) if config["BLOCK_M"] <= 32 else multiplied(a, conv.weight)  # few rows, float32
    blocks = cdiv(outputs, config["BLOCK_N"] * config.get("BLOCKS", 1))
    programs = cdiv(rows, config["BLOCK_M"])
    if held or measured:
        at_once = 1 if held or config["num_warps"] == 16 else 2
        programs = at_once * multiprocessors(a) // blocks
    parts, rows_per_part = split_rows(rows, programs, config["BLOCK_M"])
    part = torch.empty((2, parts, outputs), dtype=torch.float32, device=a.device) if measured else None
    with on_device(a):
        kernel[(blocks * parts,)](
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
    measured = call.norm_weight is not None and call.training
    config = _inputs_configuration(call.a, call.b, weight.shape[0]) if measured else None
    if config is None:
        dp, dbias, dnorm_weight, dnorm_bias = _product_backward(call)
        inputs = _inputs_backward(call, dp)
    else:
        dp, dnorm_weight, dnorm_bias, *inputs = _product_and_inputs_backward(call, config)
        dbias = None if call.bias is None else _bias_behind_batch(dnorm_weight, dnorm_bias)
    dp, first = dp.view(-1, weight.shape[0]), 0
    dmatrix = torch.empty_like(weight, memory_format=torch.contiguous_format).flatten(1)
    for x in (call.a, call.b):
        if x is not None:
            columns = slice(first, first := first + x.shape[-1])
            product_in(weight.dtype, dp.t(), x.reshape(-1, x.shape[-1]), dmatrix[:, columns])
    given = ((dbias, call.bias), (dnorm_weight, call.norm_weight), (dnorm_bias, call.norm_bias))
    return (
        *inputs,
        dmatrix.view(weight.shape),
        *(dp.new_empty(0) if t is None else g.to(t.dtype) for g, t in given),
    )


def _inputs_backward(call: Call, dp: Tensor) -> list[Tensor]:
    """The gradients of a and b, an empty tensor without b, from that of p."""
    inputs, first, dp = [], 0, dp.view(-1, dp.shape[-1])
    matrix = _multiplying(call).flatten(1).to(dp.dtype)
    for x in (call.a, call.b):
        if x is None:
            inputs.append(dp.new_empty(0))
        else:
            inputs.append((dp @ matrix[:, first : first + x.shape[-1]]).view(x.shape))
            first += x.shape[-1]
    return inputs


def _inputs_configuration(a: Tensor, b: Tensor | None, outputs: int) -> dict[str, int] | None:
    """Of the kernel that makes the gradient of p and multiplies it; None where two launches or more do that: it is for
    sm_90, for channels that are whole 32 bytes, and for enough rows to fill a GPU."""
    channels = (a.shape[-1], 0 if b is None else b.shape[-1], outputs)
    if a.dtype is torch.float32 or outputs > MOST_OUTPUTS or not multiplies_from_shared_memory(a):
        return None
    if any(c % 16 for c in channels):
        return None
    rows, sms = a.shape[:-1].numel(), multiprocessors(a)
    inputs = min(c for c in channels[:2] if c > 0)
    # others spill
    tall = inputs >= 64 and outputs in ((128,) if OLD_TRITON and a.dtype is torch.float16 else (128, 192, 256))
    blocks = (256, 128, 64) if tall else (128, 64)
    block = next((m for m in blocks if 4 * rows >= 3 * m * sms), None)
    if block is None:
        return None
    name = f"pointwise_conv_inputs_bwd_{block}"
    return tuning.choose(name, a, channels, lambda: _inputs_configurations(block, inputs, outputs))


def _inputs_configurations(block: int, inputs: int, outputs: int) -> list[dict[str, int]]:
    """BLOCK_M rows at a time, BLOCK_K outputs of which the gradient of p is made, BLOCK_N inputs."""
    # A block of inputs is a turn of a loop: of one turn the compiler would make none, and spill.
    wide = 64 if inputs > 64 else 32
    config = {"BLOCK_M": block, "BLOCK_N": wide, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
    if block == 256:
        tall = config | {"BLOCK_N": wide if outputs <= 128 else 32, "num_warps": 16}
        return [tall, config | {"BLOCK_M": 128}]
    if outputs > 320:
        config |= {"BLOCK_N": wide if outputs <= 384 else 32, "num_warps": 16}
    return [config, config | {"num_warps": 24 - config["num_warps"]}]


def _product_and_inputs_backward(call: Call, config: dict[str, int]) -> tuple[Tensor, ...]:
    """The gradients of p, norm weight, norm bias, a and b (an empty tensor without b), in two launches."""
    a, b, outputs = call.a, call.b, call.weight.shape[0]
    dy, dy_stride = rows_at_one_distance(call.dy)
    p, *parameters = contiguous(call.p, call.norm_weight, call.norm_bias, call.mean, call.var)
    (weight,) = multiplied(p, _multiplying(call))
    dp, dnorm_weight, dnorm_bias = (torch.empty_like(t) for t in (p, *parameters[:2]))
    da, db = (None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a, b))
    part, parts = gradient_sums(dy, dy_stride, p, BatchNorm(*parameters, True, call.eps), call.act, dp)
    rows = p.shape[:-1].numel()
    programs, rows_per_program = split_rows(rows, multiprocessors(p), config["BLOCK_M"])
    coefficients = torch.empty((programs, 4, outputs), dtype=torch.float32, device=p.device)
    with on_device(p):
        backward_kernels.inputs_bwd_kernel[(programs,)](
            dy, None, p, *parameters, part, weight, coefficients, dp, da, db, dnorm_weight, dnorm_bias,
            rows, parts, rows_per_program, call.eps,
            ACT=call.act, CA=a.shape[-1], CB=0 if b is None else b.shape[-1], OUT=outputs, DY_STRIDE=dy_stride,
            WIDTH=next_power_of_2(outputs), **config,
        )  # fmt: skip
    return dp, dnorm_weight, dnorm_bias, da, dp.new_empty(0) if db is None else db


def _bias_behind_batch(dnorm_weight: Tensor, dnorm_bias: Tensor) -> Tensor:
    """The gradient of a bias behind which a norm subtracts the batch's mean: zero, but NaN stays NaN."""
    return 0 * (dnorm_bias + dnorm_weight)


def _product_backward(call: Call) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of p, bias (None without one), norm weight and norm bias (None without a norm). Without a bias
    nothing is launched for its sake."""
    dy, bias, training, eps = call.dy, call.bias, call.training, call.eps
    if call.norm_weight is not None:
        norm = BatchNorm(call.norm_weight, call.norm_bias, call.mean, call.var, training, eps)
        dp, dnorm_weight, dnorm_bias = normalize_backward(dy, call.p, norm, call.act)
        if bias is None:
            dbias = None
        elif training:
            dbias = _bias_behind_batch(dnorm_weight, dnorm_bias)
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


def pointwise_conv_twice_forward(call: Call) -> tuple[Tensor, Tensor]:
    """Launches the forward pass of a product alone: y, and an empty tensor in the place of y for its second reader."""
    return convolve(Convolution(call.x, None, _multiplying(call), None, None, IDENTITY.value, None)), call.x.new_empty(
        0
    )


def pointwise_conv_twice_backward(call: Call) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight, for those of y from both of its readers."""
    outputs = call.weight.shape[0]
    x, dy, more = contiguous(call.x, call.dy, call.dagain)
    config = None if more is None else _inputs_configuration(x, None, outputs)
    if config is None:
        dp = dy if more is None else dy + more
        dx = (dp.view(-1, outputs) @ _multiplying(call).flatten(1).to(dp.dtype)).view(x.shape)
    else:
        dp, dx, rows = torch.empty_like(dy), torch.empty_like(x), x.shape[:-1].numel()
        programs, rows_per_program = split_rows(rows, multiprocessors(x), config["BLOCK_M"])
        with on_device(x):
            backward_kernels.inputs_bwd_kernel[(programs,)](
                dy, more, *(None,) * 6, *multiplied(x, _multiplying(call)), None, dp, dx, *(None,) * 3,
                rows, 0, rows_per_program, 0.0,
                ACT=IDENTITY.value, CA=x.shape[-1], CB=0, OUT=outputs, DY_STRIDE=outputs, WIDTH=16, **config,
            )  # fmt: skip
    dweight = product_in(call.weight.dtype, dp.view(-1, outputs).t(), x.view(-1, x.shape[-1]))
    return dx, dweight.view(call.weight.shape)


# With the weight rounded beforehand.
pointwise_conv_forward_rounded = pointwise_conv_forward
pointwise_conv_backward_rounded = pointwise_conv_backward
