"""1x1 convolution, batch normalisation, activation and residual."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, registry
from ..batch_norm_act import batch_norm_act
from ..checks import check_activation, check_batch_norm, check_linear, check_map, check_same
from ..registry import batch_norm_schema, flat, register
from ..sizes import values_per_channel
from ..types import ACTIVATIONS, BatchNorm, Linear, Moments
from . import reference

__all__ = ["pointwise_conv"]

KERNELS = (dispatch.Kernel("cpu", dispatch.cpu_why_not), dispatch.Kernel("triton", dispatch.triton_32_bit_why_not))


def pointwise_conv(
    x: Tensor, conv: Linear, norm: BatchNorm | None = None, act: str = "identity", residual: Tensor | None = None
) -> tuple[Tensor, Moments | None]:
    """1x1 convolution, optional batch normalisation, activation, addition of a residual: y = act(norm(conv(x))) + residual.

    Args:
        x: feature map (B, H, W, C), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under autocast.
        conv: weight (O, C) or (O, C, 1, 1) and bias (O,) or None, float32 or the dtype of x.
        norm: batch normalisation over O channels, or None.
        act: "identity", "silu" or "relu".
        residual: (B, H, W, O) of the dtype of y, or None.

    Returns:
        y, (B, H, W, O); and the moments of conv(x), each (O,), where `norm` is in training, else None.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
    Source: the ConvLayer of the MobileViT releases (arXiv 2110.02178, 2206.02680, 2209.15159).
    """
    check_map("x", x)
    x = dispatch.autocast(x)
    outputs = check_linear("conv", conv, x.shape[-1], None, x)
    shape = (*x.shape[:-1], outputs)
    if norm is not None:
        check_batch_norm("norm", norm, values_per_channel(x), outputs, x)
    check_activation(act)
    if residual is not None:
        check_map("residual", residual)
        residual = dispatch.autocast(residual)
        check_same("residual", residual, shape, x)
    if dispatch.select("pointwise_conv", KERNELS, x) is None:
        return reference.pointwise_conv(x, conv, norm, act, residual, batch_norm_act=batch_norm_act)
    return run(x, None, conv, norm, act, residual)


def run(
    a: Tensor, b: Tensor | None, conv: Linear, norm: BatchNorm | None, act: str, residual: Tensor | None
) -> tuple[Tensor, Moments | None]:
    """The kernels of this op and, with a second input b, of pointwise_fusion: one computation."""
    weight, bias, mean, var, training, eps = norm or _NO_NORM
    code = ACTIVATIONS.index(act)
    inputs = (a, b, *conv, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, residual))
    if not (training or needs_grad):
        op = torch.ops.mvit3.pointwise_conv_inference
        return registry.run_without_gradient(op, *inputs, mean, var, eps, code, residual), None
    y, *moments, _ = torch.ops.mvit3.pointwise_conv_training(*inputs, mean, var, training, eps, code, residual)
    return y, Moments(*moments) if training else None


_NO_NORM = (None, None, None, None, False, 0.0)


@register(
    "pointwise_conv",
    f"(Tensor x, Tensor weight, Tensor? bias, {batch_norm_schema('norm_', optional=True)}, int act, Tensor? residual) "
    "-> (Tensor, Tensor, Tensor)",
)
def _op(x, weight, bias, norm_weight, norm_bias, running_mean, running_var, training, eps, act, residual):
    norm = None if norm_weight is None else BatchNorm(norm_weight, norm_bias, running_mean, running_var, training, eps)
    return flat(*pointwise_conv(x, Linear(weight, bias), norm, ACTIVATIONS[act], residual))


# The kernels. What backward needs beside its inputs is p, the product without bias, unless neither norm nor activation follows it.

_INPUTS = "Tensor a, Tensor? b, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias"
for _name, _schema in {
    "inference": f"({_INPUTS}, Tensor? running_mean, Tensor? running_var, float eps, int act, Tensor? residual) -> Tensor",
    "training": f"({_INPUTS}, Tensor? running_mean, Tensor? running_var, bool training, float eps, int act, Tensor? residual) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "backward": f"(Tensor dy, {_INPUTS}, Tensor? mean, Tensor? var, Tensor p, bool training, float eps, int act) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}.items():
    torch.library.define(f"mvit3::pointwise_conv_{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
    dispatch.register_triton(f"pointwise_conv_{_name}", __name__)


@torch.library.register_fake("mvit3::pointwise_conv_inference")
def _inference_fake(a, b, weight, *_):
    return a.new_empty(*a.shape[:-1], weight.shape[0])


@torch.library.register_fake("mvit3::pointwise_conv_training")
def _training_fake(a, b, weight, bias, norm_weight, norm_bias, running_mean, running_var, training, eps, act, residual):
    y = a.new_empty(*a.shape[:-1], weight.shape[0])
    mean, var = (a.new_empty(weight.shape[0] if training else 0, dtype=torch.float32) for _ in range(2))
    return y, mean, var, a.new_empty(0) if norm_weight is None and act == 0 else torch.empty_like(y)


@torch.library.register_fake("mvit3::pointwise_conv_backward")
def _backward_fake(dy, *inputs_and_more):
    a = inputs_and_more[0]
    return tuple(a.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs_and_more[:6])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.training, ctx.eps, ctx.act, residual = inputs
    _, mean, var, p = output
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(mean, var, p)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors[:6], *((mean, var) if ctx.training else tensors[6:]), p)


def _gradients(ctx, dy, *_):
    if dy is None:
        return (None,) * 12
    saved = ctx.saved_tensors
    grads = torch.ops.mvit3.pointwise_conv_backward(dy, *saved, ctx.training, ctx.eps, ctx.act)
    present = (None if t is None else grad for t, grad in zip(saved[:6], grads, strict=True))
    return *present, None, None, None, None, None, dy if ctx.has_residual else None


registry.register_gradient("pointwise_conv_training", _gradients, _setup_context)
registry.forbid_gradient("pointwise_conv_inference")
registry.forbid_second_derivative("pointwise_conv_backward")
