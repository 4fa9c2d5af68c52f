"""The MobileNetV2 block: 1x1 expansion, depth-wise 3x3, 1x1 projection, each with batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from .. import dispatch, registry
from ..checks import check_activation, check_batch_norm, check_depthwise, check_group, check_map, check_weight
from ..depthwise_conv import depthwise_conv
from ..pointwise_conv import pointwise_conv
from ..registry import Call, batch_norm_schema, flat, register
from ..rounded_weights import find_rounded
from ..sizes import values_per_channel
from ..types import ACTIVATIONS, ConvNorm, Linear, Moments
from . import reference
from .cost import (
    MOST_INPUTS_IN_BACKWARD,
    evaluation_why_not,
    few_pixels_why_not,
    local_why_not,
    one_launch_why_not,
    storing_is_cheaper,
)

__all__ = ["inverted_residual"]

# Training on the CPU recomputes the expanded tensor in backward where that costs at most this many multiply-adds for
# each of its elements, else it stores the tensor (benchmarks/NOTES.md).
MOST_RECOMPUTED_PRODUCTS = 96
# With a handful of values per channel a normalised value hardly depends on its input, and what the recomputing way
# leaves of the gradient after its correction on the narrow side is mostly rounding.
LEAST_POSITIONS = 32


def _positions(x: Tensor, stride: int) -> int:
    """Of the filtered map, in all samples."""
    return x.shape[0] * -(-x.shape[1] // stride) * -(-x.shape[2] // stride)


def _norms_why_not(kind: str, x: Tensor, expand: ConvNorm, depthwise: ConvNorm, project: ConvNorm) -> str | None:
    """Why a kernel of all three convolutions cannot take a call, by the modes of their norms."""
    parts = (expand, depthwise, project)
    training = [part.norm.training for part in parts]
    if any(training) != all(training):
        return "some of its norms are in training and some are not"
    if not all(training):
        parameters = [t for part in parts for t in (part.weight, part.norm.weight, part.norm.bias)]
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
        return f"its {kind} kernel has gradients in training only" if needs_grad else None
    return "x is empty" if x.numel() == 0 else None


def _cpu_why_not(x: Tensor, expand: ConvNorm, depthwise: ConvNorm, project: ConvNorm, *_: object) -> str | None:
    reason = dispatch.cpu_why_not(x)
    if reason is not None:
        return reason
    parameters = [t for part in (expand, depthwise, project) for t in (part.weight, part.norm.weight, part.norm.bias)]
    if any(t.dtype not in dispatch.KERNEL_DTYPES for t in parameters):
        return "its CPU kernel takes parameters in float32, bfloat16 and float16"
    return _norms_why_not("CPU", x, expand, depthwise, project)


def _cuda_why_not(
    x: Tensor, expand: ConvNorm, depthwise: ConvNorm, project: ConvNorm, stride: int, dilation: int
) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"its CUDA kernels take bfloat16 and float16, x is {x.dtype}"
    if dilation > (1024 if stride == 1 else 1):
        return (
            f"its CUDA kernels take a dilation of at most 1024, and of 1 with stride 2, got {dilation} with stride "
            f"{stride}"
        )
    reason = _native.cuda_why_not(x) or _norms_why_not("CUDA", x, expand, depthwise, project)
    if reason is not None:
        return reason
    if not expand.norm.training:
        return None if dispatch.forced_backend() == "cuda" else evaluation_why_not(x, expand.weight.shape[0], stride)
    if _positions(x, stride) < LEAST_POSITIONS:
        return f"training on fewer than {LEAST_POSITIONS} positions is left to separate convolutions"
    (expanded, inputs), outputs = expand.weight.shape[:2], project.weight.shape[0]
    if storing_is_cheaper(inputs, expanded, outputs, stride):
        widths = f"{inputs}, {expanded} and {outputs}"
        return f"at {widths} channels storing the expanded map is cheaper than computing it again"
    return _triton_why_not(x, expand)  # what comes before and after the fused kernels


def _triton_why_not(x: Tensor, expand: ConvNorm, *_: object) -> str | None:
    if x.shape[1] * x.shape[2] * expand.weight.shape[0] >= 2**31:
        return "its kernels take expanded maps of less than 2^31 elements a sample"
    return dispatch.triton_32_bit_why_not(x)


def _stores(x: Tensor, expanded: int, stride: int) -> bool:
    """Whether training on the CPU keeps the expanded tensor, `expanded` channels, for backward."""
    inputs = x.shape[-1]
    # the element again; moments of the input and correction on the narrow side
    products = inputs + 2 * inputs**2 / expanded
    return products > MOST_RECOMPUTED_PRODUCTS or _positions(x, stride) < LEAST_POSITIONS


def _triton_training_why_not(
    x: Tensor, expand: ConvNorm, depthwise: ConvNorm, project: ConvNorm, stride: int, *_: object
) -> str | None:
    reason = _triton_why_not(x, expand)
    if reason is not None:
        return reason
    if not all(part.norm.training for part in (expand, depthwise, project)):
        return "its Triton kernels are of training; evaluation is one launch for each of three ops"
    if _positions(x, stride) < LEAST_POSITIONS:
        return f"training on fewer than {LEAST_POSITIONS} positions is left to separate convolutions"
    return None


def _small_tiles_why_not(x: Tensor, parts: tuple[ConvNorm, ...], *others: Tensor) -> str | None:
    """Why no Triton kernel of small tiles can evaluate a call."""
    reason = _triton_why_not(x, parts[0]) or dispatch.hopper_why_not(x)
    if reason is not None:
        return reason
    if x.dtype is torch.float32:
        return "small tiles evaluate maps of 16 bits"
    if any(part.norm.training for part in parts):
        return "small tiles are of evaluation"
    parameters = [t for part in parts for t in (part.weight, part.norm.weight, part.norm.bias)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters, *others)):
        return "small tiles have no gradients"
    return None


def _one_launch_why_not(
    x: Tensor, expand: ConvNorm, depthwise: ConvNorm, project: ConvNorm, stride: int, dilation: int
) -> str | None:
    """Why evaluation is not one launch of Triton."""
    expanded, outputs = expand.weight.shape[0], project.weight.shape[0]
    reason = _small_tiles_why_not(x, (expand, depthwise, project))
    return reason or one_launch_why_not(x, expanded, outputs, stride, dilation)


def _few_pixels_why_not(
    x: Tensor, expand: ConvNorm, depthwise: ConvNorm, project: ConvNorm, stride: int, *_: object
) -> str | None:
    """Why evaluation is not two launches, of which the second filters and projects."""
    reason = _small_tiles_why_not(x, (expand, depthwise, project))
    return reason or few_pixels_why_not(x, expand.weight.shape[0], stride)


def _local_why_not(x: Tensor, depthwise: ConvNorm, project: Tensor) -> str | None:
    """Why a depth-wise convolution and a 1x1 one behind it are not one launch."""
    return _small_tiles_why_not(x, (depthwise,), project) or local_why_not(x, project.shape[0])


# In Triton: all of the block; the expansion, and all that follows; the three convolutions as ops of their own.
ONE_LAUNCH = dispatch.Kernel("triton", _one_launch_why_not)
FEW_PIXELS = dispatch.Kernel("triton", _few_pixels_why_not)
LOCAL = dispatch.Kernel("triton", _local_why_not)  # of `filter_and_project`
SEPARATE = dispatch.Kernel("triton", _triton_why_not)
KERNELS = (
    dispatch.Kernel("cpu", _cpu_why_not),
    ONE_LAUNCH,
    dispatch.Kernel("cuda", _cuda_why_not),
    FEW_PIXELS,
    dispatch.Kernel("triton", _triton_training_why_not),
    SEPARATE,
)


def inverted_residual(
    x: Tensor,
    expand: ConvNorm,
    depthwise: ConvNorm,
    project: ConvNorm,
    stride: int = 1,
    dilation: int = 1,
    act: str = "silu",
    skip: bool | None = None,
) -> tuple[Tensor, tuple[Moments | None, Moments | None, Moments | None]]:
    """1x1 expansion (norm, act), depth-wise 3x3 (norm, act), 1x1 projection (norm); + x where `skip` says so.

    Args:
        x: feature map (B, H, W, C), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under
            autocast.
        expand: weight (E, C) or (E, C, 1, 1) and its batch normalisation over E channels.
        depthwise: weight (E, 1, 3, 3) and its batch normalisation over E channels.
        project: weight (O, E) or (O, E, 1, 1) and its batch normalisation over O channels.
        stride, dilation: of the depth-wise convolution; stride 1 or 2.
        act: "identity", "silu" or "relu".
        skip: whether x is added, which takes stride 1 and C = O; None: wherever it can be. Kernels of all three
            convolutions add it there; without it the convolutions are ops of their own.

    Returns:
        y, (B, ceil(H / stride), ceil(W / stride), O); and the moments of the three convolutions, each None unless its
        norm is in training.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64; more in training on maps of which
    one pixel is some 300 times as large as the others (docs/algebra.md, A).
    Passes over memory in training on a GPU: forward reads x twice (statistics of the expansion, product), writes z, the
    filtered map, and reads it; backward reads x and z twice. The expanded map is on chip only (CUDA C++, for 16 bits;
    with more than 64 inputs backward writes its gradient and reads it twice) or, in float32, without that extension and
    where it is cheaper by count, written once and read twice, its gradient written and read once or twice over
    (Triton). Saved for backward: x, z, the product before the last norm, and the expanded map where it is stored.
    Source: Sandler et al., arXiv 1801.04381.
    """
    check_map("x", x)
    x = dispatch.autocast(x)
    for name, part in (("expand", expand), ("depthwise", depthwise), ("project", project)):
        check_group(name, part, ConvNorm)
    expanded = check_weight("expand.weight", expand.weight, x.shape[-1], None, x)
    check_batch_norm("expand.norm", expand.norm, values_per_channel(x), expanded, x)
    rows = check_depthwise("depthwise.weight", depthwise.weight, x, stride, dilation, expanded)
    check_batch_norm("depthwise.norm", depthwise.norm, rows, expanded, x)
    outputs = check_weight("project.weight", project.weight, expanded, None, x)
    check_batch_norm("project.norm", project.norm, rows, outputs, x)
    check_activation(act)
    can_skip = stride == 1 and bool(x.shape[-1] == outputs)  # under torch.jit.trace a size is a tensor
    if skip and not can_skip:
        raise ValueError(f"skip needs stride 1 and equal widths, got stride {stride}, {x.shape[-1]} and {outputs}")
    alone = skip is not None and bool(skip) is not can_skip
    kernel = (
        None
        if alone
        else dispatch.select("inverted_residual", KERNELS, x, expand, depthwise, project, stride, dilation)
    )
    if kernel is None or kernel is SEPARATE:
        return reference.inverted_residual(
            x,
            expand,
            depthwise,
            project,
            stride,
            dilation,
            act,
            can_skip and not alone,
            pointwise_conv=pointwise_conv,
            depthwise_conv=depthwise_conv,
        )
    parts, geometry = (expand, depthwise, project), (stride, dilation, ACTIVATIONS.index(act))
    if kernel is FEW_PIXELS:
        e, _ = pointwise_conv(x, Linear(expand.weight), expand.norm, act)
        fixed = [value for weight, n in parts[1:] for value in (weight, *n[:4], n.eps)]
        op = torch.ops.mvit3.inverted_residual_project_inference
        return registry.run_without_gradient(op, e, *fixed, *geometry, x if can_skip else None), (None, None, None)
    if not expand.norm.training:
        fixed = [
            value for weight, n in parts for value in (weight, n.weight, n.bias, n.running_mean, n.running_var, n.eps)
        ]
        ops = torch.ops.mvit3
        op = ops.inverted_residual_tile_inference if kernel is ONE_LAUNCH else ops.inverted_residual_inference
        y = registry.run_without_gradient(op, x, *fixed, *geometry)
        return y, (None, None, None)
    learned = [value for weight, n in parts for value in (weight, n.weight, n.bias, n.eps)]
    store = _stores(x, expanded, stride) if kernel.backend == "cpu" else kernel.backend == "triton"
    # the fused kernels round for themselves
    rounded = find_rounded(x, expand.weight, project.weight) if store else None
    if rounded is None:
        results = torch.ops.mvit3.inverted_residual_forward(x, *learned, *geometry, store)
    else:
        results = torch.ops.mvit3.inverted_residual_forward_rounded(x, *learned, *rounded, *geometry, store)
    y, mean0, var0, mean1, var1, mean2, var2, *_ = results
    return y, (Moments(mean0, var0), Moments(mean1, var1), Moments(mean2, var2))


def filter_and_project(
    x: Tensor, depthwise: ConvNorm, project: Tensor, dilation: int = 1, act: str = "silu"
) -> Tensor | None:
    """The local representation of a MobileViT block in evaluation, by the kernel of what follows an expansion:
    act(norm(depth-wise 3x3(x))) @ project^T of a map (B, H, W, C) for a weight (O, C) or (O, C, 1, 1). None where the
    two ops are cheaper, or the kernel cannot take the call."""
    check_map("x", x)
    if dispatch.forced_backend() not in (None, "triton") or dispatch.writes_aten() or dispatch.transform() is not None:
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return None
    cast = dispatch.as_autocast(x)  # which knows of no gradient
    if LOCAL.why_not(cast, depthwise, project) is not None:
        return None
    rows = check_depthwise("depthwise.weight", depthwise.weight, cast, 1, dilation, cast.shape[-1])
    check_batch_norm("depthwise.norm", depthwise.norm, rows, cast.shape[-1], cast)
    check_weight("project", project, cast.shape[-1], None, cast)
    check_activation(act)
    dispatch.select("filter_and_project", (LOCAL,), cast, depthwise, project)
    (weight, norm), op = depthwise, torch.ops.mvit3.inverted_residual_project_inference
    rest = (project, None, None, None, None, 0.0, 1, dilation, ACTIVATIONS.index(act), None)
    return registry.run_without_gradient(op, dispatch.autocast(x), weight, *norm[:4], norm.eps, *rest)


# The flat arguments of the three convolutions and their norms: with all that a batch norm has, without running
# statistics (training), and with the statistics to use.
_PARTS = ("expand", "depthwise", "project")
_GEOMETRY = "int stride, int dilation, int act"
_NORMED = ", ".join(f"Tensor {part}, {batch_norm_schema(f'{part}_')}" for part in _PARTS)
_LEARNED = ", ".join(f"Tensor {part}, Tensor {part}_weight, Tensor {part}_bias, float {part}_eps" for part in _PARTS)
_FIXED, _FIXED_DEPTHWISE, _FILTERING = (
    ", ".join(
        f"Tensor {part}, Tensor {part}_weight, Tensor {part}_bias, Tensor {part}_mean, Tensor {part}_var, "
        f"float {part}_eps"
        for part in parts
    )
    for parts in (_PARTS, _PARTS[1:2], _PARTS[:2])
)
_MOMENTS = ", ".join(f"Tensor {part}_mean, Tensor {part}_var" for part in _PARTS)
_GRADIENTS, _GRADIENTS_TO_FILTER = (
    ", ".join(f"Tensor d{part}, Tensor d{part}_weight, Tensor d{part}_bias" for part in parts)
    for parts in (_PARTS, _PARTS[:2])
)


@register("inverted_residual", f"(Tensor x, {_NORMED}, {_GEOMETRY}, bool? skip=None) -> (Tensor y, {_MOMENTS})")
def _op(call: Call) -> tuple[Tensor, ...]:
    parts = (ConvNorm(getattr(call, part), registry.batch_norm(call, f"{part}_")) for part in _PARTS)
    y, moments = inverted_residual(call.x, *parts, call.stride, call.dilation, ACTIVATIONS[call.act], call.skip)
    return flat(y, *moments)


def _empty_map(x: Tensor, stride: int, channels: int) -> Tensor:
    return x.new_empty(x.shape[0], -(-x.shape[1] // stride), -(-x.shape[2] // stride), channels)


@registry.kernel("inverted_residual_inference", f"(Tensor x, {_FIXED}, {_GEOMETRY}) -> Tensor y")
@registry.kernel("inverted_residual_tile_inference", f"(Tensor x, {_FIXED}, {_GEOMETRY}) -> Tensor y", triton=__name__)
def _inference_fake(call: Call) -> Tensor:
    return _empty_map(call.x, call.stride, call.project.shape[0])


@registry.kernel(
    "inverted_residual_project_inference",
    f"(Tensor e, {_FIXED_DEPTHWISE}, Tensor project, Tensor? project_weight, Tensor? project_bias, "
    "Tensor? project_mean, Tensor? project_var, float project_eps, "
    f"{_GEOMETRY}, Tensor? residual) -> Tensor y",
    triton=__name__,
)
def _project_inference_fake(call: Call) -> Tensor:
    return _empty_map(call.e, call.stride, call.project.shape[0])


# What training keeps for backward: z (the filtered map), p (the product before the last norm), and: on the CPU either e
# (the expanded map) or the moments of x; on a GPU the moments of x and, in the Triton way, e behind its norm and
# activation. The rest is empty.
_KEPT = "Tensor e, Tensor z, Tensor p, Tensor mean, Tensor covariance"


def _forward_fake(call: Call) -> tuple[Tensor, ...]:
    x, expanded, outputs = call.x, call.expand.shape[0], call.project.shape[0]
    y, z, p = (_empty_map(x, call.stride, channels) for channels in (outputs, expanded, outputs))
    widths = (expanded, expanded, outputs)
    moments = [x.new_empty(channels, dtype=torch.float32) for channels in widths for _ in range(2)]
    e = _empty_map(x, 1, expanded) if call.store else x.new_empty(0)
    on_cpu = x.device.type == "cpu" and not dispatch.INTERPRETED
    inputs = 0 if call.store and on_cpu else x.shape[-1]
    covariance = x.new_empty(inputs, inputs, dtype=torch.float64 if on_cpu else torch.float32)
    return y, *moments, e, z, p, x.new_empty(inputs, dtype=torch.float32), covariance


# Those with `_rounded` are a GPU's, and take two of the weights in the dtype of x, too.
for _way, _rounded in (("", ""), ("_rounded", "Tensor rounded_expand, Tensor rounded_project, ")):
    registry.forward(
        f"inverted_residual_forward{_way}",
        f"(Tensor x, {_LEARNED}, {_rounded}{_GEOMETRY}, bool store) -> (Tensor y, {_MOMENTS}, {_KEPT})",
        triton=__name__,
    )(_forward_fake)
    registry.backward(
        f"inverted_residual_backward{_way}",
        f"(Tensor dy, Tensor x, {_FIXED}, {_KEPT}, {_rounded}{_GEOMETRY}) -> (Tensor dx, {_GRADIENTS})",
        triton=__name__,
    )

# The fused CUDA way calls two ops of csrc/cuda/inverted_residual*.cu (x in bfloat16 or float16). The first makes z, the
# filtered map of act(scale * (x @ expand^T) + shift), and of each of `parts` parts of it, as stored, and each channel
# the mean and the sum of squared deviations, and how many values a part has: some may have none. The second takes the
# gradient dp of p to those of all parameters and, without the correction of the first norm, of x: `part` is what
# project_bwd_kernel leaves, `mean` and `covariance` are those of x. With G for the gradient of the first norm's output
#   dx0 = (G * scale) @ expand, and correction (2, expanded) is what expand_gradient_kernel says.
# Gradients of parameters are float32. With more inputs than MOST_INPUTS_IN_BACKWARD dx0, correction and the gradients
# of the expansion and its norm are empty, and `gradient` is G and `scaled` is expand times the norm's scale, which else
# are empty.
_SOURCE = "Tensor x, Tensor expand, Tensor scale, Tensor shift, Tensor depthwise"


@registry.kernel(
    "inverted_residual_filter",
    f"({_SOURCE}, {_GEOMETRY}, int parts) -> (Tensor z, Tensor moments, Tensor counts)",
)
def _filter_fake(call: Call) -> tuple[Tensor, ...]:
    expanded, new = call.depthwise.shape[0], call.scale.new_empty
    return _empty_map(call.x, call.stride, expanded), new(2, call.parts, expanded), new(call.parts)


@registry.kernel(
    "inverted_residual_filter_backward",
    f"(Tensor dp, Tensor z, Tensor part, Tensor project, Tensor x, Tensor mean, Tensor covariance, {_FILTERING}, "
    f"{_GEOMETRY}) -> (Tensor dx0, Tensor gradient, Tensor scaled, Tensor correction, {_GRADIENTS_TO_FILTER}, "
    "Tensor dproject)",
)
def _filter_backward_fake(call: Call) -> tuple[Tensor, ...]:
    x, expanded, inputs = call.x, call.depthwise.shape[0], call.x.shape[-1]

    def new(*shape: int) -> Tensor:
        return call.part.new_empty(shape)

    of_middle = new(expanded, 1, 3, 3), new(expanded), new(expanded), new(*call.project.shape)
    if inputs > MOST_INPUTS_IN_BACKWARD:
        gradient, scaled = _empty_map(x, 1, expanded), x.new_empty(expanded, inputs)
        return x.new_empty(0), gradient, scaled, *(new(0) for _ in range(4)), *of_middle
    dx0 = torch.empty_like(x, memory_format=torch.contiguous_format)
    of_first = new(2, expanded), new(*call.expand.shape), new(expanded), new(expanded)
    return dx0, x.new_empty(0), x.new_empty(0), *of_first, *of_middle
