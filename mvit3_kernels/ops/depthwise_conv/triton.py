"""Triton kernels of depthwise_conv, and of the depth-wise convolution by itself, forward and backward.

A program owns a block of channels and walks down BLOCK_X columns of pixels, which are counted through all samples:
where a map has fewer columns than the block, columns of the next samples fill it. A row of the input is read at three
columns and added to the unfinished sums of the three rows of the output that it belongs to. So there are three loads
for each output, where gathering takes nine, and nothing but sums is carried from row to row. With a dilation a walk
keeps to rows that are a multiple of it apart.

The rows of all blocks of columns are shared evenly by a few programs for each multiprocessor, so that the nine weights
are loaded once for many rows, and few partial sums are left.

z, the convolution before its norm, is computed again wherever it is needed. In training: its moments, then y (x is read
twice, y written); the sums of the norm's gradient, then dz (x and dy are read twice, dz written); then dx and the
gradient of the weight (dz and x are read, dx written). Storing z takes 4 passes instead of 3 forward, as many backward,
and twice the memory, but the instructions of filtering only once where this is four times: what the way with CUDA does,
where norm and activation are batch_norm_act's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import tuning
from ..batch_norm_act.triton import normalize, normalize_backward
from ..registry import Call
from ..sizes import cdiv, next_power_of_2
from ..triton_common import contiguous, multiprocessors, on_device, split_rows
from ..types import BatchNorm
from . import backward_kernels, kernels

PartMoments = tuple[Tensor, Tensor]  # of parts: means and sums of squared deviations (2, parts, C), and counts (parts,)

# Three of a program's size fit a multiprocessor with their registers: two rounds.
PROGRAMS_PER_SM = 6
MIN_ROWS = 4  # of a program: fewer would read more rows around its own than rows of its own


def bytes_moved(x: Tensor, stride: int, training: bool) -> tuple[int, int]:
    """Bytes of full-size tensors that the forward and the backward pass read and write: x and y, x twice in training; x
    and dy, twice in training, dz, which is written and read, and x and dx."""
    size_of_x, size_of_y = (
        x.shape[0] * pixels[0] * pixels[1] * x.shape[-1] * x.element_size()
        for pixels in (x.shape[1:3], _output_size(x, stride))
    )
    reads = 2 if training else 1
    return size_of_x * reads + size_of_y, size_of_x * (reads + 2) + size_of_y * (reads + 2)


def configurations(channels: int, itemsize: int, backward: bool) -> list[dict[str, int]]:
    """Tiles of pixels and channels, and their warps, the one that is used first. A thread has 16 bytes of a row forward
    and 4 channels backward, where it holds nine taps and the sums of their gradients."""
    values = 4 if backward else 16 // itemsize
    tiles = ((32, 16, 4), (64, 8, 4), (64, 16, 8)) if values == 4 else ((64, 16, 4), (32, 32, 4), (64, 8, 2))
    chosen = []
    for width, pixels, warps in tiles:
        block_c = min(next_power_of_2(channels), width)
        block_x = min(pixels * (width // block_c), 64)
        config = {
            "BLOCK_X": block_x,
            "BLOCK_C": block_c,
            "num_warps": max(min(warps, block_x * block_c // (32 * values)), 1),
        }
        if config not in chosen:
            chosen.append(config)
    return chosen


def _few_configuration(channels: int) -> dict[str, int]:
    """Of the forward pass where a map is too small to fill a GPU: two values a thread, so that a program ends soon."""
    block_c = min(next_power_of_2(channels), 64)
    return {"BLOCK_X": min(512 // block_c, 64), "BLOCK_C": block_c, "num_warps": 8}


def configuration(kernel: str, x: Tensor) -> dict[str, int]:
    channels, backward = x.shape[-1], kernel.endswith("bwd")
    return tuning.choose(
        f"depthwise_conv_{kernel}", x, (channels,), lambda: configurations(channels, x.element_size(), backward)
    )


class _Work:
    """How a launch divides a map: `columns` of all samples in blocks, and of each block `rows` rows in walks of every
    dilation-th."""

    def __init__(self, x: Tensor, width: int, rows: int, dilation: int, config: dict[str, int]):
        channels = x.shape[-1]
        self.columns, self.depth = x.shape[0] * width, cdiv(rows, dilation)
        self.units = cdiv(self.columns, config["BLOCK_X"]) * min(dilation, rows) * self.depth
        blocks = cdiv(channels, config["BLOCK_C"])
        self.few = blocks * self.units < MIN_ROWS * multiprocessors(x)  # rows that are read twice cost no time then
        self.parts, self.units_per_part = split_rows(
            self.units, PROGRAMS_PER_SM * multiprocessors(x) // blocks, 1 if self.few else MIN_ROWS
        )
        self.grid = (blocks, self.parts)

    def sizes(self, x: Tensor, out: tuple[int, int]) -> tuple[int, ...]:
        return self.columns, *x.shape[1:3], *out, self.depth, self.units, self.units_per_part, self.parts


def _output_size(x: Tensor, stride: int) -> tuple[int, int]:
    return -(-x.shape[1] // stride), -(-x.shape[2] // stride)


def _at_most_the_map(dilation: int, x: Tensor) -> int:
    """Taps that reach beyond the map everywhere reach no further with a larger dilation."""
    return min(dilation, max(*x.shape[1:3], 1))


def _launch(
    x: Tensor, weight: Tensor, norm: BatchNorm | None, act: int, y: Tensor | None, stride: int, dilation: int,
    measured: bool = False,
) -> PartMoments | None:  # fmt: skip
    """Fills y, where given, with the convolution or, with a norm, whose statistics are known, with its activation.
    Returns the moments of parts of the convolution where `measured`. All tensors are contiguous."""
    channels, out, dilation = x.shape[-1], _output_size(x, stride), _at_most_the_map(dilation, x)
    config = configuration("fwd", x)
    work = _Work(x, out[1], out[0], dilation, config)
    if work.few and x.dtype is not torch.float32:
        config = _few_configuration(channels)
        work = _Work(x, out[1], out[0], dilation, config)
    part = count = None
    if measured:
        part = torch.empty((2, work.parts, channels), dtype=torch.float32, device=x.device)
        count = torch.empty(work.parts, dtype=torch.float32, device=x.device)
    parameters, eps = ((None,) * 4, 0.0) if norm is None else (norm[:4], norm.eps)
    with on_device(x):
        kernels.depthwise_fwd_kernel[work.grid](
            x, weight, *parameters, y, part, count, *work.sizes(x, out), eps,
            ACT=act, STRIDE=stride, DILATION=dilation, C=channels, **config,
        )  # fmt: skip
    return (part, count) if measured else None


def _joined(part: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (C,), from the moments of parts."""
    _, parts, channels = part.shape
    mean, var = (torch.empty(channels, dtype=torch.float32, device=part.device) for _ in range(2))
    kernels.moments_fwd_kernel[(cdiv(channels, 16),)](
        part, count, mean, var, parts, C=channels, BLOCK_C=16, num_warps=4
    )
    return mean, var


def depthwise(x: Tensor, weight: Tensor, stride: int, dilation: int) -> tuple[Tensor, Tensor, Tensor]:
    """The depth-wise convolution z of x (B, H, W, C) by weight (C, 1, 3, 3) with a padding of `dilation`: (B, ceil(H /
    stride), ceil(W / stride), C), contiguous, in the dtype of x; and, float32, of parts of z as it is stored mean and
    sum of squared deviations of each channel, (2, parts, C), and how many values they are of, (parts,): zeros where z
    is empty. Sums in float32; the same result in every run."""
    x, weight = contiguous(x, weight)
    z = x.new_empty(x.shape[0], *_output_size(x, stride), x.shape[-1])
    if z.numel() == 0:
        shapes = (2, 1, x.shape[-1]), (1,)
        return z, *(torch.zeros(shape, dtype=torch.float32, device=x.device) for shape in shapes)
    return z, *_launch(x, weight, None, 0, z, stride, dilation, measured=True)


def depthwise_backward(dz: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int) -> tuple[Tensor, Tensor]:
    """The gradients of x, in its dtype, and of weight, in its dtype, for the gradient `dz` of z, (B, ceil(H / stride),
    ceil(W / stride), C) in the dtype of x. One pass over dz and x, sums in float32; the same result in every run."""
    dz, x, weight = contiguous(dz, x, weight)
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    if x.numel() == 0:
        return dx, dweight.zero_()
    channels, out, dilation = x.shape[-1], _output_size(x, stride), _at_most_the_map(dilation, x)
    by_parity = stride == 2 and dilation == 1
    config = configuration("stride_2_bwd" if by_parity else "bwd", x)
    work = _Work(x, out[1] if by_parity else x.shape[2], out[0] if by_parity else x.shape[1], 1, config)
    part = torch.empty((9, work.parts, channels), dtype=torch.float32, device=x.device)
    arguments = (dz, x, weight, dx, part, *work.sizes(x, out))
    with on_device(x):
        if by_parity:
            backward_kernels.depthwise_stride_2_bwd_kernel[work.grid](*arguments, C=channels, **config)
        else:
            backward_kernels.depthwise_bwd_kernel[work.grid](
                *arguments, STRIDE=stride, DILATION=dilation, C=channels, **config
            )
        backward_kernels.taps_bwd_kernel[(cdiv(channels, 16), 9)](
            part, dweight, work.parts, C=channels, BLOCK_C=16, num_warps=4
        )
    return dx, dweight


def depthwise_conv_forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the forward pass: y and, in training, the batch's mean and variance (empty in evaluation)."""
    x, weight = contiguous(call.x, call.weight)
    statistics = (call.running_mean, call.running_var)
    y = x.new_empty(x.shape[0], *_output_size(x, call.stride), x.shape[-1])
    # Two tensors, not two halves of one: the outputs of an op may not share memory.
    make = torch.zeros if y.numel() == 0 else torch.empty
    moments = tuple(make(x.shape[-1] if call.training else 0, dtype=torch.float32, device=x.device) for _ in range(2))
    if y.numel() == 0:
        return y, *moments
    if call.training:
        part = _launch(x, weight, None, 0, None, call.stride, call.dilation, measured=True)
        with on_device(x):
            statistics = moments = _joined(*part)
    norm = BatchNorm(*contiguous(call.norm_weight, call.norm_bias, *statistics), call.training, call.eps)
    _launch(x, weight, norm, call.act, y, call.stride, call.dilation)
    return y, *moments


def depthwise_conv_backward(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, norm weight and norm bias."""
    return _gradients(call, depthwise_backward)


def depthwise_conv_forward_cuda(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward pass that returns z too, in training; an empty tensor in evaluation. Both convolutions, from x to z
    and from the gradient of z to those of x and weight, are in CUDA C++."""
    if not call.training:
        return *depthwise_conv_forward(call), call.x.new_empty(0)
    x, weight = contiguous(call.x, call.weight)
    height, width = _output_size(x, call.stride)
    # Two blocks a multiprocessor, of at most 64 groups of four channels, and no fewer than four rows of each thread.
    values, slices = x.shape[0] * height * width * x.shape[-1], cdiv(x.shape[-1], 256)
    parts = max(min(2 * multiprocessors(x) // slices, values // 8192), 1)
    z, moments, counts = torch.ops.mvit3.depthwise_conv_filter(x, weight, call.stride, call.dilation, parts)
    if z.numel() == 0:
        return torch.empty_like(z), *(torch.zeros_like(moments[0, 0]) for _ in range(2)), z
    norm = BatchNorm(call.norm_weight, call.norm_bias, None, None, True, call.eps)
    return *normalize(z, norm, call.act, None, (moments, len(counts), 0), counts), z


def depthwise_conv_backward_cuda(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Its gradients."""
    last = torch.ops.mvit3.depthwise_conv_filter_backward
    if not call.training:
        return _gradients(call, last)
    norm = BatchNorm(call.norm_weight, call.norm_bias, call.mean, call.var, True, call.eps)
    dz, *dnorm = normalize_backward(call.dy, call.z, norm, call.act)
    return *last(dz, *contiguous(call.x, call.weight), call.stride, call.dilation), *dnorm


def _gradients(call: Call, from_dz: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches the backward pass: the gradients of x, weight, norm weight and norm bias. `mean` and `var` of the call
    are those that normalised; `from_dz` takes the gradient of z to those of x and weight."""
    dy, x, weight = contiguous(call.dy, call.x, call.weight)
    norm = contiguous(call.norm_weight, call.norm_bias, call.mean, call.var)
    training, stride = call.training, call.stride
    dnorm_weight, dnorm_bias = torch.empty_like(norm[0]), torch.empty_like(norm[1])
    if dy.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(weight), dnorm_weight.zero_(), dnorm_bias.zero_()
    channels, out, reach = x.shape[-1], _output_size(x, stride), _at_most_the_map(call.dilation, x)
    config = configuration("norm_bwd", x)
    work = _Work(x, out[1], out[0], reach, config)
    part = torch.empty((2, work.parts, channels), dtype=torch.float32, device=x.device)
    means = torch.empty((2, channels), dtype=torch.float32, device=x.device) if training else None
    dz = torch.empty_like(dy)
    # In training dz waits for the sums.
    passes = ((None, None, part), (means, dz, None)) if training else ((None, dz, part),)
    with on_device(x):
        for targets in passes:
            backward_kernels.norm_bwd_kernel[work.grid](
                dy, x, weight, *norm, *targets, *work.sizes(x, out), call.eps,
                ACT=call.act, STRIDE=stride, DILATION=reach, C=channels, **config,
            )  # fmt: skip
            if targets[2] is not None:
                backward_kernels.norm_sums_bwd_kernel[(cdiv(channels, 16),)](
                    part, dnorm_weight, dnorm_bias, means, dy.numel() // channels, work.parts,
                    C=channels, BLOCK_C=16, num_warps=4,
                )  # fmt: skip
    return *from_dz(dz, x, weight, stride, call.dilation), dnorm_weight, dnorm_bias
