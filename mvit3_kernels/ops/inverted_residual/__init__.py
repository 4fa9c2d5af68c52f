"""The MobileNetV2 block: 1x1 expansion, depth-wise 3x3, 1x1 projection, each with batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from .. import dispatch, registry
from ..checks import check_activation, check_batch_norm, check_depthwise, check_group, check_map, check_weight
from ..depthwise_conv import depthwise_conv
from ..pointwise_conv import pointwise_conv
from ..registry import batch_norm_schema, flat, register
from ..sizes import values_per_channel
from ..types import ACTIVATIONS, BatchNorm, ConvNorm, Moments
from . import reference
from .cost import storing_is_cheaper

__all__ = ["inverted_residual"]

# Training on the CPU recomputes the expanded tensor in backward where that costs at most this many multiply-adds for each of its elements,
# else it stores the tensor (benchmarks/NOTES.md).
MOST_RECOMPUTED_PRODUCTS = 96
# With a handful of values per channel a normalised value hardly depends on its input, and what the recomputing way leaves of the gradient
# after its correction on the narrow side is mostly rounding.
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


def _cuda_why_not(x: Tensor, expand: ConvNorm, depthwise: ConvNorm, project: ConvNorm, stride: int, dilation: int) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"its CUDA kernels take bfloat16 and float16, x is {x.dtype}"
    if dilation > (1024 if stride == 1 else 1):
        return f"its CUDA kernels take a dilation of at most 1024, and of 1 with stride 2, got {dilation} with stride {stride}"
    reason = _native.cuda_why_not(x) or _norms_why_not("CUDA", x, expand, depthwise, project)
    if reason is not None or not expand.norm.training:
        return reason
    if _positions(x, stride) < LEAST_POSITIONS:
        return f"training on fewer than {LEAST_POSITIONS} positions is left to separate convolutions"
    (wide, inputs), outputs = expand.weight.shape[:2], project.weight.shape[0]
    if storing_is_cheaper(inputs, wide, outputs, stride):
        return f"at {inputs}, {wide} and {outputs} channels storing the expanded map is cheaper than computing it again"
    return _triton_why_not(x, expand)  # what comes before and after the fused kernels


def _triton_why_not(x: Tensor, expand: ConvNorm, *_: object) -> str | None:
    if x.shape[1] * x.shape[2] * expand.weight.shape[0] >= 2**31:
        return "its kernels take expanded maps of less than 2^31 elements a sample"
    return dispatch.triton_32_bit_why_not(x)


def _stores(x: Tensor, wide: int, stride: int) -> bool:
    """Whether training on the CPU keeps the expanded tensor, `wide` channels, for backward."""
    inputs = x.shape[-1]
    products = inputs + 2 * inputs**2 / wide  # the element again; moments of the input and correction on the narrow side
    return products > MOST_RECOMPUTED_PRODUCTS or _positions(x, stride) < LEAST_POSITIONS


KERNELS = (
    dispatch.Kernel("cpu", _cpu_why_not),
    dispatch.Kernel("cuda", _cuda_why_not),
    dispatch.Kernel("triton", _triton_why_not),
)


def inverted_residual(
    x: Tensor, expand: ConvNorm, depthwise: ConvNorm, project: ConvNorm, stride: int = 1, dilation: int = 1, act: str = "silu"
) -> tuple[Tensor, tuple[Moments | None, Moments | None, Moments | None]]:
    """1x1 expansion (norm, act), depth-wise 3x3 (norm, act), 1x1 projection (norm); + x where stride is 1 and the widths agree.

    Args:
        x: feature map (B, H, W, C), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under autocast.
        expand: weight (E, C) or (E, C, 1, 1) and its batch normalisation over E channels.
        depthwise: weight (E, 1, 3, 3) and its batch normalisation over E channels.
        project: weight (O, E) or (O, E, 1, 1) and its batch normalisation over O channels.
        stride, dilation: of the depth-wise convolution; stride 1 or 2.
        act: "identity", "silu" or "relu".

    Returns:
        y, (B, ceil(H / stride), ceil(W / stride), O); and the moments of the three convolutions, each None unless its norm is in training.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
    Passes over memory in training on a GPU: forward reads x twice (statistics of the expansion, product), writes z, the filtered map, and
    reads it; backward reads x and z twice. The expanded map is on chip only (CUDA C++, for 16 bits) or, in float32, without that extension
    and where it is cheaper by count, written once and read twice, its gradient written and read once or twice over (Triton). Saved for
    backward: x, z, the product before the last norm, and the expanded map where it is stored.
    Source: Sandler et al., arXiv 1801.04381.
    """
    check_map("x", x)
    x = dispatch.autocast(x)
    for name, part in (("expand", expand), ("depthwise", depthwise), ("project", project)):
        check_group(name, part, ConvNorm)
    wide = check_weight("expand.weight", expand.weight, x.shape[-1], None, x)
    check_batch_norm("expand.norm", expand.norm, values_per_channel(x), wide, x)
    rows = check_depthwise("depthwise.weight", depthwise.weight, x, stride, dilation, wide)
    check_batch_norm("depthwise.norm", depthwise.norm, rows, wide, x)
    outputs = check_weight("project.weight", project.weight, wide, None, x)
    check_batch_norm("project.norm", project.norm, rows, outputs, x)
    check_activation(act)
    kernel = dispatch.select("inverted_residual", KERNELS, x, expand, depthwise, project, stride, dilation)
    norms = (expand.norm, depthwise.norm, project.norm)
    # In Triton evaluation is one launch for each of the three ops, and a handful of positions is left to them too.
    trains = all(norm.training for norm in norms) and _positions(x, stride) >= LEAST_POSITIONS
    if kernel is None or (kernel.backend == "triton" and not trains):
        return reference.inverted_residual(
            x, expand, depthwise, project, stride, dilation, act, pointwise_conv=pointwise_conv, depthwise_conv=depthwise_conv
        )
    parts, geometry = (expand, depthwise, project), (stride, dilation, ACTIVATIONS.index(act))
    if not expand.norm.training:
        fixed = [value for weight, n in parts for value in (weight, n.weight, n.bias, n.running_mean, n.running_var, n.eps)]
        y = registry.run_without_gradient(torch.ops.mvit3.inverted_residual_inference, x, *fixed, *geometry)
        return y, (None, None, None)
    learned = [value for weight, n in parts for value in (weight, n.weight, n.bias, n.eps)]
    store = _stores(x, wide, stride) if kernel.backend == "cpu" else kernel.backend == "triton"
    y, *moments = torch.ops.mvit3.inverted_residual_training(x, *learned, *geometry, store)[:7]
    return y, (Moments(*moments[:2]), Moments(*moments[2:4]), Moments(*moments[4:]))


@register(
    "inverted_residual",
    f"(Tensor x, Tensor expand, {batch_norm_schema('expand_')}, Tensor depthwise, {batch_norm_schema('depthwise_')}, "
    f"Tensor project, {batch_norm_schema('project_')}, int stride, int dilation, int act) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _op(x, *args):
    expand, depthwise, project = (ConvNorm(args[i], BatchNorm(*args[i + 1 : i + 7])) for i in (0, 7, 14))
    stride, dilation, act = args[21:]
    y, moments = inverted_residual(x, expand, depthwise, project, stride, dilation, ACTIVATIONS[act])
    return flat(y, *moments)


# The kernels. What training keeps for backward: z (the filtered map), p (the product before the last norm), and: on the CPU either e (the
# expanded map) or the moments of x; on a GPU the moments of x and, in the Triton way, e behind its norm and activation. The rest is empty.

_PARTS = ("expand", "depthwise", "project")
_LEARNED = ", ".join(f"Tensor {part}, Tensor {part}_weight, Tensor {part}_bias, float {part}_eps" for part in _PARTS)
_FIXED = ", ".join(
    f"Tensor {part}, Tensor {part}_weight, Tensor {part}_bias, Tensor {part}_mean, Tensor {part}_var, float {part}_eps" for part in _PARTS
)
_KEPT = "Tensor e, Tensor z, Tensor p, Tensor mean, Tensor covariance"
_GEOMETRY = "int stride, int dilation, int act"


def _tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


for _name, _schema in {
    "inference": f"(Tensor x, {_FIXED}, {_GEOMETRY}) -> Tensor",
    "training": f"(Tensor x, {_LEARNED}, {_GEOMETRY}, bool store) -> {_tensors(12)}",
    "backward": f"(Tensor dy, Tensor x, {_FIXED}, {_KEPT}, {_GEOMETRY}) -> {_tensors(10)}",
}.items():
    torch.library.define(f"mvit3::inverted_residual_{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


for _name in ("training", "backward"):
    dispatch.register_triton(f"inverted_residual_{_name}", __name__)

# The fused CUDA way calls two ops of csrc/cuda/inverted_residual.cu (x in bfloat16 or float16). The first makes z, the filtered map of
# act(scale * (x @ expand^T) + shift), and its mean and biased variance as stored. The second takes the gradient of p to that of x without
# the correction of the first norm, with g = (dp @ project) * act'(z_scale * z + z_shift), c0 g + c1 + c2 z for the gradient of z, and G for
# that of the first norm's output: dx0 = (G * scale) @ expand, G^T x, sum G, and the gradient of the taps, all three float32.
_SOURCE = "Tensor x, Tensor expand, Tensor scale, Tensor shift, Tensor depthwise"
_MIDDLE = "Tensor dp, Tensor project, Tensor z, Tensor z_scale, Tensor z_shift, Tensor c0, Tensor c1, Tensor c2"
for _name, _schema in {
    "filter": f"({_SOURCE}, {_GEOMETRY}) -> {_tensors(3)}",
    "filter_backward": f"({_MIDDLE}, {_SOURCE}, {_GEOMETRY}) -> {_tensors(4)}",
}.items():
    torch.library.define(f"mvit3::inverted_residual_{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _empty_map(x: Tensor, stride: int, channels: int) -> Tensor:
    return x.new_empty(x.shape[0], -(-x.shape[1] // stride), -(-x.shape[2] // stride), channels)


@torch.library.register_fake("mvit3::inverted_residual_inference")
def _inference_fake(x, *args):
    return _empty_map(x, args[-3], args[12].shape[0])


@torch.library.register_fake("mvit3::inverted_residual_training")
def _training_fake(x, *args):
    wide, outputs, stride, store = args[0].shape[0], args[8].shape[0], args[-4], args[-1]
    y, z, p = (_empty_map(x, stride, channels) for channels in (outputs, wide, outputs))
    moments = [x.new_empty(channels, dtype=torch.float32) for channels in (wide, wide, wide, wide, outputs, outputs)]
    on_cpu = x.device.type == "cpu" and not dispatch.INTERPRETED
    inputs = 0 if store and on_cpu else x.shape[-1]
    covariance = x.new_empty(inputs, inputs, dtype=torch.float64 if on_cpu else torch.float32)
    narrow = (x.new_empty(inputs, dtype=torch.float32), covariance)
    return y, *moments, _empty_map(x, 1, wide) if store else x.new_empty(0), z, p, *narrow


@torch.library.register_fake("mvit3::inverted_residual_backward")
def _backward_fake(dy, x, *args):
    parameters = [args[i + k] for i in (0, 6, 12) for k in range(3)]
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, *parameters))


@torch.library.register_fake("mvit3::inverted_residual_filter")
def _filter_fake(x, expand, scale, shift, depthwise, stride, dilation, act):
    wide = depthwise.shape[0]
    return _empty_map(x, stride, wide), scale.new_empty(wide), scale.new_empty(wide)


@torch.library.register_fake("mvit3::inverted_residual_filter_backward")
def _filter_backward_fake(dp, project, z, z_scale, z_shift, c0, c1, c2, x, expand, scale, shift, depthwise, stride, dilation, act):
    wide, inputs = depthwise.shape[0], x.shape[-1]
    dx0 = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx0, scale.new_empty(wide, inputs), scale.new_empty(wide), scale.new_empty(wide, 1, 3, 3)


def _setup_context(ctx, inputs, output):
    x, *parameters = inputs[:13]
    ctx.eps, ctx.geometry = parameters[3::4], inputs[13:16]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *(t for i, t in enumerate(parameters) if i % 4 != 3), *output[1:])


def _gradients(ctx, dy, *_):
    if dy is None:
        return (None,) * 17
    x, *saved = ctx.saved_tensors
    learned, moments, kept = saved[:9], saved[9:15], saved[15:]
    fixed = [v for i in range(3) for v in (*learned[3 * i : 3 * i + 3], *moments[2 * i : 2 * i + 2], ctx.eps[i])]
    dx, *grads = torch.ops.mvit3.inverted_residual_backward(dy, x, *fixed, *kept, *ctx.geometry)
    return dx, *(g for i in range(3) for g in (*grads[3 * i : 3 * i + 3], None)), None, None, None, None


registry.register_gradient("inverted_residual_training", _gradients, _setup_context)
for _name in ("inference", "filter", "filter_backward"):
    registry.forbid_gradient(f"inverted_residual_{_name}")
registry.forbid_second_derivative("inverted_residual_backward")
