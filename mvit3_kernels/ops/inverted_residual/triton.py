"""Triton kernels of inverted_residual in training, and the launchers of both GPU ways through it.

    stored (Triton)   the activated expansion a is written once and read twice: by the depth-wise convolution, and by
                      the gradient of its weight.
    fused (CUDA C++)  a exists on chip only: two ops of csrc/cuda, `inverted_residual_filter` and `.._filter_backward`,
                      hold it in shared memory and make it again in backward. What comes before and after them is the
                      same. With more than 64 inputs the latter writes the gradient of the first norm's output, for the
                      stored way's products.

In both ways the statistics of the expansion come from the moments of the inputs (identity A of the design), so that the
product is written after its norm and activation; and what these statistics contribute to the gradient is a correction
of dx, which has as few channels as the inputs (identity B). The expansion before its activation is never stored: where
backward needs it, it is the product of the inputs again. The depth-wise convolution writes its result z and the moments
of z; norm and activation of z happen in the kernels that read it. Gradients of parameters are sums over parts of the
rows in a float32 workspace, which one launch adds up in a fixed order.

Evaluation of a map of few pixels is one launch of evaluation_kernels.py, of some more of them two, pointwise_conv's for
the expansion and one for all that follows; of other maps each convolution is one launch of its own op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import tuning
from ..batch_norm_act.triton import normalize, normalize_backward
from ..depthwise_conv.triton import depthwise, depthwise_backward
from ..pointwise_conv.triton import Convolution, convolve
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
    split_rows,
)
from ..types import BatchNorm
from . import backward_kernels, correction_kernels, evaluation_kernels, kernels
from .cost import MOST_LOCAL_TILES, fits_a_program, tile_of, values_moved

MOST_FEW = 72  # parts up to which a program adds up one after the other


def configurations(kernel: str, x: Tensor, columns: int, inner: int) -> list[dict[str, int]]:
    """Of a kernel, the shipped one first: BLOCK_M rows at a time, BLOCK_N of `columns` columns of its tile, and BLOCK_K
    of the `inner` columns that it multiplies or, where it sums over rows, of the other side of its product."""

    def tile(
        rows: int, most_columns: int, most_inner: int, warps: int, stages: int = 2, registers: int | None = None
    ) -> dict[str, int]:
        n, k = (
            max(16, min(next_power_of_2(width), most)) for width, most in ((columns, most_columns), (inner, most_inner))
        )
        if kernel in ("project", "project_few") and x.dtype is not torch.float32 and multiplies_from_shared_memory(x):
            n = max(n, 64)  # rows of its products
        config = {"BLOCK_M": rows, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        return config if registers is None or not multiplies_from_shared_memory(x) else config | {"maxnreg": registers}

    if x.dtype is torch.float32:  # no matrix units of this precision: products are made in registers
        if kernel in _OUTER:
            return [tile(16, 32, 32, 4)]
        return [tile(32, 32, 16, 8 if kernel == "project" else 4)]
    return [tile(*shape) for shape in _tiles(kernel, x, columns, inner)]


def _tiles(kernel: str, x: Tensor, columns: int, inner: int) -> tuple[tuple[int | None, ...], ...]:
    """Of maps in 16 bits. On sm_90 a block may have 227 KB and products take their operands from there: so weights of
    up to 256 channels stay, and tiles are larger."""
    tiles, hopper = _TILES[kernel], multiplies_from_shared_memory(x)
    if kernel == "moments" and (columns <= 64 or not hopper):
        # few channels have few bytes a row: fewer warps, each with more rows
        step = 64 if OLD_TRITON else 128  # which spills a few bytes
        few = (step, 32, 32, 4) if columns > 16 else (step, 16, 16, 2, 2 if OLD_TRITON else 3)
        tiles = tiles[1:] if columns > 32 else (few, *tiles[1:])
    if kernel == "moments" and hopper and columns > 128 and columns % 128:  # whose last block spills
        tiles = tiles[1:]
    if kernel == "expanded_bwd" and hopper and inner <= 256:
        tiles = ((64, 128, 256, 8, 2, 128), *tiles)
    if kernel == "products_bwd" and not hopper:
        tiles = tiles[1:]
    if kernel == "project" and hopper and (columns % 128 or OLD_TRITON):  # whose 128 outputs spill a few bytes
        tiles = tiles[1:]
    if kernel == "project_bwd":  # small tiles, while all outputs fit a program
        whole = 256 if hopper else 128
        tiles = tiles if inner <= 64 else tiles[1:] if inner <= 128 else tiles[2:] if inner <= whole else tiles[3:]
    if kernel == "correct_bwd" and hopper and inner > 64:
        limit = 128 if x.dtype is torch.bfloat16 else None
        tiles = ((64, 128, 256, 8, 2, limit) if inner <= 256 else (64, 128, 64, 8), *tiles)
    return tiles


# Rows, columns, inner columns, warps; stages, and registers of a thread at most.
_TILES = {
    "moments": ((32, 128, 64, 8, 3, 128), (64, 64, 64, 4), (128, 64, 64, 4)),
    "project": ((128, 128, 32, 8, 2, 128), (128, 64, 64, 8, 2, 128), (128, 64, 32, 8, 2, 128)),
    "project_few": ((16, 64, 128, 8),),
    "project_bwd": ((32, 64, 64, 4), (32, 64, 128, 8), (32, 64, 256, 8, 2, 128), (64, 64, 128, 8), (64, 64, 64, 8)),
    "filtered_bwd": ((64, 64, 64, 8), (128, 64, 32, 8)),
    "expanded_bwd": ((128, 64, 32, 8, 3, 128), (128, 64, 32, 8), (64, 64, 64, 8)),
    "expand_bwd": ((16, 256, 64, 8),),
    "products_bwd": ((64, 128, 128, 8, 3, 128), (64, 128, 64, 8), (64, 64, 64, 4)),
    "correct_bwd": ((64, 64, 64, 4), (128, 64, 32, 8)),
}
_OUTER = ("moments", "project_bwd", "products_bwd")  # sums over rows


def configuration(kernel: str, x: Tensor, columns: int, inner: int) -> dict[str, int]:
    return tuning.choose(
        f"inverted_residual_{kernel}", x, (columns, inner), lambda: configurations(kernel, x, columns, inner)
    )


def _project_configuration(z: Tensor, outputs: int, expanded: int) -> dict[str, int]:
    """Of a map so small that most of a GPU would be idle, tiles of few rows."""
    config = configuration("project", z, outputs, expanded)
    programs = cdiv(z.shape[:-1].numel(), config["BLOCK_M"]) * cdiv(outputs, config["BLOCK_N"])
    few = z.dtype is not torch.float32 and multiplies_from_shared_memory(z) and 4 * programs <= multiprocessors(z)
    return configuration("project_few", z, outputs, expanded) if few else config


def bytes_moved(x: Tensor, expanded: int, outputs: int, stride: int, store: bool) -> tuple[int, int]:
    """Bytes of maps that the forward and the backward pass of a training step read and write; `store` is the Triton
    way, not the fused."""
    batch, height, width, inputs = x.shape
    pixels, out_pixels = batch * height * width, batch * -(-height // stride) * -(-width // stride)
    moved = values_moved(
        inputs, expanded, outputs, stride == 1 and inputs == outputs, store, fits_a_program(x, expanded)
    )
    forward, backward = (pixels * moved[i] + out_pixels * moved[i + 1] for i in (0, 2))
    return x.element_size() * forward, x.element_size() * backward


def _float32(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _norm(call: Call, part: str, mean: Tensor | None, var: Tensor | None) -> BatchNorm:
    """The norm behind one of the three convolutions, with these statistics of the batch."""
    weight, bias = contiguous(getattr(call, f"{part}_weight"), getattr(call, f"{part}_bias"))
    return BatchNorm(weight, bias, mean, var, True, getattr(call, f"{part}_eps"))


def _norm_backward(call: Call, part: str) -> BatchNorm:
    """The same in a backward pass, which receives the statistics."""
    return _norm(call, part, *contiguous(getattr(call, f"{part}_mean"), getattr(call, f"{part}_var")))


def _split(x: Tensor, rows: int, config: dict[str, int], blocks: int) -> tuple[int, int]:
    """(number of parts, rows of each), where a part is `blocks` programs, all of which run at once; not more than 6
    on a multiprocessor, or adding up the parts takes long."""
    at_once = min(16 // config["num_warps"], 6) * multiprocessors(x)
    return split_rows(rows, max(at_once // blocks, 1), config["BLOCK_M"])


def _parts(x: Tensor, rows: int, config: dict[str, int], blocks: int, count: int) -> tuple[Tensor, int]:
    """A workspace for `count` values of each part of the rows, and the rows of a part, where a part is `blocks`
    programs."""
    parts, rows_per_part = _split(x, rows, config, blocks)
    return _float32(x, parts, count), rows_per_part


def _sums(x: Tensor, parts: int, count: int) -> dict[str, int | bool]:
    """How programs add up so many parts of `count` values: BLOCK columns each. One part after the other, unless the
    many columns of such a program left most of a GPU to wait for few of them."""
    few = parts <= MOST_FEW and (parts <= 16 or count > 64 * multiprocessors(x))
    return {"FEW": few, "BLOCK": 256 if few else 32, "num_warps": 4}


def _add_parts(part: Tensor) -> Tensor:
    """(parts, N) to (N,)."""
    (parts, count), config = part.shape, _sums(part, *part.shape)
    total = _float32(part, count)
    kernels.add_parts_kernel[(cdiv(count, config["BLOCK"]),)](part, total, parts, N=count, **config)
    return total


def _rounded(call: Call) -> tuple[Tensor, Tensor]:
    """The weights of expansion and projection for products with maps: rounded beforehand, or not at all."""
    return contiguous(*(getattr(call, f"rounded_{part}", getattr(call, part)) for part in ("expand", "project")))


# Forward


def _expansion_moments(x: Tensor, weight: Tensor, norm: BatchNorm) -> tuple[Tensor, ...]:
    """Mean and covariance of x, mean and variance of its expansion, and scale and shift of the norm by these."""
    rows, inputs, expanded = x.shape[:-1].numel(), x.shape[-1], weight.shape[0]
    config = configuration("moments", x, inputs, inputs)
    blocks = cdiv(inputs, config["BLOCK_N"]) ** 2
    part, rows_per_part = _parts(x, rows, config, blocks, inputs * (inputs + 1))
    pivot, mean, covariance = _float32(x, inputs), _float32(x, inputs), _float32(x, inputs, inputs)
    expanded_mean, expanded_var, folded = _float32(x, expanded), _float32(x, expanded), _float32(x, 2, expanded)
    kernels.moments_fwd_kernel[(blocks * len(part),)](x, pivot, part, rows, rows_per_part, C=inputs, **config)
    block = 32 if x.dtype is torch.float32 else max(16, min(next_power_of_2(inputs), 64))
    kernels.expanded_moments_kernel[(cdiv(expanded, 16),)](
        x, weight, *norm[:2], _add_parts(part), pivot, mean, covariance, expanded_mean, expanded_var, folded,
        rows, norm.eps, C=inputs, E=expanded, BLOCK_E=16, BLOCK_C=block,
        num_warps=4 if block <= 32 else 8 if inputs <= 64 or OLD_TRITON else 16, num_stages=2,
    )  # fmt: skip
    return mean, covariance, expanded_mean, expanded_var, folded


def _project(
    z: Tensor, moments: tuple[Tensor, Tensor], weight: Tensor, norm: BatchNorm, act: int
) -> tuple[Tensor, tuple[Tensor, int, int], Tensor, Tensor]:
    """p and its partial moments: (workspace, parts, rows of each); mean and variance of z from the moments of its parts
    and their counts."""
    outputs, expanded, rows = weight.shape[0], z.shape[-1], z.shape[:-1].numel()
    p = z.new_empty(*z.shape[:-1], outputs)
    config = _project_configuration(z, outputs, expanded)
    blocks = cdiv(outputs, config["BLOCK_N"])
    parts, rows_per_part = split_rows(rows, max(2 * multiprocessors(z) // blocks, 1), config["BLOCK_M"])
    part, folded, pivot = _float32(z, 2, parts, outputs), _float32(z, 2, expanded), _float32(z, outputs)
    packed, (mean, var) = z.new_empty(outputs, expanded), (_float32(z, expanded) for _ in range(2))
    kernels.prepare_project_kernel[(cdiv(expanded, 16) + cdiv(outputs, 16),)](
        *norm[:2], *moments, weight, mean, var, folded, pivot, packed, moments[0].shape[1], norm.eps,
        ACT=act, E=expanded, OUT=outputs, BLOCK_E=128, BLOCK=16, num_warps=4,
    )  # fmt: skip
    kernels.project_fwd_kernel[(blocks * parts,)](
        z, folded, pivot, packed, p, part, rows, parts, rows_per_part, ACT=act, E=expanded, OUT=outputs, **config
    )
    return p, (part, parts, rows_per_part), mean, var


def _filter_parts(x: Tensor, expanded: int, stride: int) -> int:
    """Blocks of the fused filter for 64 expanded channels: two a multiprocessor, and none without a tile of 8 x 16 or
    4 x 8 outputs."""
    outputs = x.shape[0] * -(-x.shape[1] // stride) * -(-x.shape[2] // stride)
    tiles = cdiv(outputs, 128 if stride == 1 else 32)
    return max(min(2 * multiprocessors(x) // cdiv(expanded, 64), tiles), 1)


def inverted_residual_forward(call: Call) -> tuple[Tensor, ...]:
    """Launches the forward pass: y, mean and variance of the three convolutions, and what backward needs: a, the
    activated expansion, or nothing, z, p, mean and covariance of x."""
    x, expand, depthwise_weight, project = contiguous(call.x, call.expand, call.depthwise, call.project)
    act, geometry = call.act, (call.stride, call.dilation)
    with on_device(x):
        mean, covariance, *first, folded = _expansion_moments(x, expand, _norm(call, "expand", None, None))
        norm = _norm(call, "expand", *first)
        if call.store:
            a = convolve(Convolution(x, None, _rounded(call)[0], None, norm, act, None))
            z, *moments = depthwise(a, depthwise_weight, *geometry)
        else:
            a = x.new_empty(0)
            z, *moments = torch.ops.mvit3.inverted_residual_filter(
                x, expand, *folded, depthwise_weight, *geometry, act, _filter_parts(x, len(expand), call.stride)
            )
        p, partials, *middle = _project(z, moments, project, _norm(call, "depthwise", None, None), act)
        residual = x if call.stride == 1 and x.shape[-1] == p.shape[-1] else None
        y, *last = normalize(p, _norm(call, "project", None, None), IDENTITY.value, residual, partials)
    return y, *first, *middle, *last, a, z, p, mean, covariance


# Backward


def _project_backward(dp: Tensor, z: Tensor, weight: Tensor, rounded: Tensor, norm: BatchNorm, act: int) -> Tensor:
    """Parts of the sums over z that give the gradients of the projection and of the middle norm: (parts, outputs + 2,
    expanded). `rounded`: the weight, or what `_rounded` has of it."""
    outputs, expanded, rows = weight.shape[0], z.shape[-1], z.shape[:-1].numel()
    config = configuration("project_bwd", z, expanded, outputs)
    columns, blocks = cdiv(expanded, config["BLOCK_N"]), cdiv(outputs, config["BLOCK_K"])
    part, rows_per_part = _parts(z, rows, config, columns, (outputs + 2) * expanded)
    rest = (*norm[:4], part, rows, rows_per_part, norm.eps)
    flags = {"ACT": act, "E": expanded, "OUT": outputs, **config}
    if blocks == 1:
        backward_kernels.project_bwd_kernel[(columns * len(part),)](dp, z, weight, *rest, **flags)
    else:
        tensors = (dp, z, *multiplied(z, rounded), *rest)
        backward_kernels.project_sums_bwd_kernel[(columns * len(part),)](*tensors, **flags)
        backward_kernels.project_product_bwd_kernel[(columns * blocks * len(part),)](dp, z, *rest, **flags)
    return part.view(len(part), outputs + 2, expanded)


def _project_gradient(
    part: Tensor, z: Tensor, weight: Tensor, first: BatchNorm, norm: BatchNorm, expand: Tensor, scales: bool
) -> tuple[Tensor, ...]:
    """The gradients of the projection's weight and of the middle norm's weight and bias, that norm's coefficients (4,
    E), and, where it `scales`, the expansion's weight times the scale of the first norm."""
    outputs, expanded, rows = weight.shape[0], z.shape[-1], z.shape[:-1].numel()
    gradients = tuple(torch.empty_like(t) for t in (weight, *norm[:2]))
    coefficients, inputs = _float32(z, 4, expanded), expand.shape[1]
    scaled, config = z.new_empty(expanded, inputs) if scales else None, _sums(z, len(part), (outputs + 2) * expanded)
    programs = sum(cdiv(n, config["BLOCK"]) for n in (expanded, outputs * expanded))
    programs += cdiv(inputs * expanded, 1024) if scales else 0
    backward_kernels.project_gradient_kernel[(programs,)](
        part, *norm[:4], *first[:4], *gradients, coefficients, expand, scaled,
        rows, len(part), norm.eps, first.eps,
        CENTRED=z.dtype is torch.float32, C=inputs, E=expanded, OUT=outputs, BLOCK_W=1024, **config,
    )  # fmt: skip
    return *gradients, coefficients, scaled


def _filtered_backward(dp: Tensor, z: Tensor, weight: Tensor, coefficients: Tensor, act: int) -> Tensor:
    """The gradient of z."""
    outputs, expanded, rows = weight.shape[0], z.shape[-1], z.shape[:-1].numel()
    dz = torch.empty_like(z)
    config = configuration("filtered_bwd", z, expanded, outputs)
    grid = (cdiv(rows, config["BLOCK_M"]) * cdiv(expanded, config["BLOCK_N"]),)
    backward_kernels.filtered_bwd_kernel[grid](
        dp, z, *multiplied(z, weight), coefficients, dz, rows, ACT=act, E=expanded, OUT=outputs, **config
    )
    return dz


Sums = tuple[Tensor, Tensor, bool]  # G^T (x - mean) or, where the third is False, G^T x; and sum G


def _expand_backward(
    da: Tensor, x: Tensor, weight: Tensor, norm: BatchNorm, scaled: Tensor | None, mean: Tensor, act: int
) -> tuple[Tensor, Sums]:
    """dx without the norm's correction, and the sums for the gradient G of the first norm's output, which may replace
    da. scaled: the weight times the norm's scale, where its gradient does not fit a program."""
    rows, inputs, expanded = x.shape[:-1].numel(), x.shape[-1], weight.shape[0]
    flags = {"C": inputs, "E": expanded}
    if fits_a_program(x, expanded):
        config = configuration("expand_bwd", x, expanded, inputs)
        part, rows_per_part = _parts(x, rows, config, 1, expanded * (inputs + 1))
        dx = torch.empty_like(x)
        backward_kernels.expand_bwd_kernel[(len(part),)](
            da, x, mean, weight, *norm[:4], dx, part, rows, rows_per_part, norm.eps, ACT=act, **flags, **config
        )
        total = _add_parts(part)
        return dx, (total[: expanded * inputs], total[expanded * inputs :], True)
    config = configuration("expanded_bwd", x, expanded, inputs)
    columns = cdiv(expanded, config["BLOCK_N"])
    parts, rows_per_part = _split(x, rows, config, columns)
    (rounded,) = multiplied(x, weight)
    backward_kernels.expanded_bwd_kernel[(parts * columns,)](
        x, rounded, *norm[:4], da, rows, rows_per_part, norm.eps, ACT=act, **flags, **config
    )
    return _products_backward(da, x, scaled, mean)


def _products_backward(gradient: Tensor, x: Tensor, scaled: Tensor, mean: Tensor) -> tuple[Tensor, Sums]:
    """The same from the gradient G of the first norm's output."""
    rows, (expanded, inputs) = x.shape[:-1].numel(), scaled.shape
    config = configuration("products_bwd", x, expanded, inputs)
    blocks = cdiv(expanded, config["BLOCK_N"]) * cdiv(inputs, config["BLOCK_K"])
    part, rows_per_part = _parts(x, rows, config, blocks, expanded * (inputs + 1))
    # x - mean rounded to 16 bits is no more exact than x; in float32 x is, by far.
    centred = x.dtype is torch.float32
    backward_kernels.products_bwd_kernel[(blocks * len(part),)](
        gradient, x, mean if centred else None, part, rows, rows_per_part, C=inputs, E=expanded, **config
    )
    total = _add_parts(part)
    dx = (gradient.view(rows, expanded) @ scaled).view(x.shape)
    return dx, (total[: expanded * inputs], total[expanded * inputs :], centred)


def _expand_gradient(
    sums: Sums, x: Tensor, weight: Tensor, norm: BatchNorm, mean: Tensor, covariance: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The gradients of weight, norm weight and norm bias of the expansion, and what the correction of dx is made of."""
    rows, inputs, expanded = x.shape[:-1].numel(), x.shape[-1], weight.shape[0]
    product, total, centred = sums
    gradients = tuple(torch.empty_like(t) for t in (weight, norm.weight, norm.bias))
    correction = _float32(x, 2, expanded)
    inner = max(16, min(next_power_of_2(inputs), 128))
    block = 32 if inputs > 128 and x.dtype is not torch.float32 else 16
    backward_kernels.expand_gradient_kernel[(cdiv(expanded, 16), cdiv(inputs, block))](
        x, product, total, weight, norm.weight, mean, covariance, norm.running_var, *gradients, correction,
        rows, norm.eps, CENTRED=centred, C=inputs, E=expanded,
        SHARES=inner // 16, BLOCK_E=16, BLOCK_C=block, BLOCK_K=inner, num_warps=inner // 16,
    )  # fmt: skip
    return gradients, correction


def _correct(dx: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, correction: Tensor, mean: Tensor) -> None:
    """Completes dx in place: what the first norm's statistics contribute, and a residual's gradient."""
    rows, inputs, expanded = x.shape[:-1].numel(), x.shape[-1], weight.shape[0]
    config = configuration("correct_bwd", x, inputs, inputs)
    columns = cdiv(inputs, config["BLOCK_N"])
    sizes = {"C": inputs, "E": expanded, "BLOCK_E": 64 if inputs <= 64 else 128}
    matrix = shift = None
    if x.dtype is torch.float32 or inputs > min(config["BLOCK_N"], config["BLOCK_K"], 64):  # else each program has it
        # K is of the order of 1 / rows, which float16 may not hold.
        dtype = torch.float32 if x.dtype is torch.float16 else x.dtype
        matrix, shift = x.new_empty(inputs, inputs, dtype=dtype), _float32(x, inputs)
        correction_kernels.correction_bwd_kernel[(cdiv(inputs, 16) ** 2,)](
            x, weight, correction, matrix, shift, C=inputs, E=expanded, SHARES=8, BLOCK_E=128, BLOCK_C=16, num_warps=8
        )
    parts, rows_per_part = _split(x, rows, config, columns)
    correction_kernels.correct_bwd_kernel[(parts * columns,)](
        x, residual, mean, matrix, shift, weight, correction, dx, rows, rows_per_part, **sizes, **config
    )


def inverted_residual_backward(call: Call) -> tuple[Tensor, ...]:
    """Launches the backward pass: the gradients of x, then of weight, norm weight and norm bias of the three
    convolutions."""
    dy, x, expand, project = contiguous(call.dy, call.x, call.expand, call.project)
    depthwise_weight, a, z, mean = call.depthwise.contiguous(), call.e, call.z, call.mean
    first, middle, last = (_norm_backward(call, part) for part in ("expand", "depthwise", "project"))
    act, geometry = call.act, (call.stride, call.dilation)
    residual = dy if call.stride == 1 and x.shape[-1] == call.p.shape[-1] else None
    sums = None
    with on_device(x):
        dp, *dlast = normalize_backward(dy, call.p, last, IDENTITY.value)
        rounded_expand, rounded_project = _rounded(call)
        part = _project_backward(dp, z, project, rounded_project, middle, act)
        if a.numel() > 0:
            scales = not fits_a_program(x, len(expand))
            dproject, *dmiddle, coefficients, scaled = _project_gradient(
                part, z, project, first, middle, expand, scales
            )
            # The gradient of z lives no longer than it is read.
            da, ddepthwise = depthwise_backward(
                _filtered_backward(dp, z, rounded_project, coefficients, act), a, depthwise_weight, *geometry
            )
            dx, sums = _expand_backward(da, x, rounded_expand if scales else expand, first, scaled, mean, act)
        else:
            norms = (expand, *first[:4], first.eps, depthwise_weight, *middle[:4], middle.eps)
            dx, gradient, scaled, correction, *dfirst, ddepthwise, dmiddle_weight, dmiddle_bias, dproject = (
                torch.ops.mvit3.inverted_residual_filter_backward(
                    dp, z, part, project, x, mean, call.covariance, *norms, *geometry, act
                )
            )
            dmiddle = dmiddle_weight, dmiddle_bias
            if scaled.numel() > 0:
                dx, sums = _products_backward(gradient, x, scaled, mean)
        if sums is not None:
            dfirst, correction = _expand_gradient(sums, x, expand, first, mean, call.covariance)
        _correct(dx, x, residual, expand, correction, mean)
    of_parameters = (*dfirst, ddepthwise.view(depthwise_weight.shape), *dmiddle, dproject)
    parameters = (expand, *first[:2], depthwise_weight, *middle[:2], project)
    return dx, *(d.to(t.dtype) for d, t in zip(of_parameters, parameters, strict=True)), *dlast


# With weights rounded beforehand.
inverted_residual_forward_rounded = inverted_residual_forward
inverted_residual_backward_rounded = inverted_residual_backward


def _norms(call: Call, *parts: str) -> list[Tensor | None]:
    return [getattr(call, f"{part}_{name}") for part in parts for name in ("weight", "bias", "mean", "var")]


def inverted_residual_project_inference(call: Call) -> Tensor:
    """Launches all that follows the expansion, in evaluation; also without a norm behind the projection."""
    e, outputs, expanded = call.e.contiguous(), call.project.shape[0], call.e.shape[-1]
    batch, height, width, _ = e.shape
    out_height, out_width = -(-height // call.stride), -(-width // call.stride)
    y = e.new_empty(batch, out_height, out_width, outputs)
    pixels = y.numel() // outputs if y.numel() else 0
    if pixels == 0:
        return y
    norms = _norms(call, "depthwise", "project")
    config = {"BLOCK_M": 16, "BLOCK_N": min(max(next_power_of_2(outputs), 32), 128), "BLOCK_K": 64}
    tiles = cdiv(pixels, 16)
    if call.project_weight is None:  # as many programs as a GPU has multiprocessors, of 16 warps
        config["BLOCK_N"] = max(next_power_of_2(outputs), 32) if tiles > MOST_LOCAL_TILES // 2 else 64
        config["BLOCK_K"] = min(max(next_power_of_2(expanded), 16), 128)
    elif expanded % 128 == 0:  # taps, which a warp loads one by one, for twice as many pixels
        config |= {"BLOCK_M": 32, "BLOCK_K": 128}
    grid = cdiv(pixels, config["BLOCK_M"]), cdiv(outputs, config["BLOCK_N"])
    with on_device(e):
        evaluation_kernels.filter_project_kernel[grid](
            e, *contiguous(call.depthwise, call.project, *norms, call.residual), y,
            pixels, height, width, out_height, out_width, call.depthwise_eps, call.project_eps,
            STRIDE=call.stride, DILATION=call.dilation, ACT=call.act, E=expanded, OUT=outputs, **config,
            num_warps=16 if call.project_weight is None else config["BLOCK_M"] // 2, num_stages=2,
        )  # fmt: skip
    return y


def inverted_residual_tile_inference(call: Call) -> Tensor:
    """Launches the whole block, in evaluation."""
    x, (outputs, expanded), stride = call.x.contiguous(), call.project.shape[:2], call.stride
    batch, height, width, inputs = x.shape
    out_height, out_width = -(-height // stride), -(-width // stride)
    y = x.new_empty(batch, out_height, out_width, outputs)
    if y.numel() == 0:
        return y
    rows, columns, warps = tile_of(x, expanded, stride)
    places = ((rows - 1) * stride + 3) * ((columns - 1) * stride + 3)
    tiles = batch * cdiv(out_height, rows) * cdiv(out_width, columns)
    norms = _norms(call, "expand", "depthwise", "project")
    config = {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}
    config |= {
        "BLOCK_P": 64 if rows * columns == 32 else 128,  # 4 x 8 pixels see 60, with stride 2 153
        "BLOCK_C": max(next_power_of_2(inputs), 16),
        "BLOCK_N": max(next_power_of_2(outputs), 32),
        "BLOCK_K": min(max(next_power_of_2(expanded), 16), 8 * warps),
    }
    residual = x if stride == 1 and inputs == outputs else None
    with on_device(x):
        evaluation_kernels.expand_filter_project_kernel[(tiles,)](
            x, *contiguous(call.expand, call.depthwise, call.project, *norms), residual,
            x.new_empty(tiles, places, expanded), y,
            height, width, out_height, out_width, call.expand_eps, call.depthwise_eps, call.project_eps,
            STRIDE=stride, ACT=call.act, C=inputs, E=expanded, OUT=outputs, PLACES=places, **config, num_stages=2,
        )  # fmt: skip
    return y
