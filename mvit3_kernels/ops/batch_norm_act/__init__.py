"""Batch normalisation, activation and residual in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, registry
from ..checks import check_activation, check_batch_norm, check_map, check_same
from ..sizes import values_per_channel
from ..types import ACTIVATIONS, BatchNorm, Moments
from . import reference

__all__ = ["batch_norm_act"]

KERNELS = (
    dispatch.Kernel("cpu", dispatch.cpu_why_not),
    dispatch.Kernel("triton", dispatch.triton_why_not),
)


def batch_norm_act(x: Tensor, norm: BatchNorm, act: str = "identity", residual: Tensor | None = None) -> tuple[Tensor, Moments | None]:
    """Batch normalisation, then an activation, then the addition of a residual: y = act(batch_norm(x)) + residual.

    Args:
        x: feature map (B, H, W, C), float32, bfloat16, float16 or float64 (float64 runs on the reference), any strides.
        norm: weight, bias and running statistics, each (C,), float32 or the dtype of x. In training the statistics are the batch's,
            accumulated in float32; nothing is mutated, the caller updates its running buffers from the returned moments.
        act: "identity", "silu" or "relu".
        residual: (B, H, W, C) of the dtype of x, or None.

    Returns:
        y, (B, H, W, C), contiguous, of the dtype of x; and `Moments` (mean and biased variance, each (C,), float32) in training, else
        None. With batch 0 the moments are zeros.

    Raises:
        TypeError, ValueError: an argument does not fit; training with one value per channel.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64, for y and for all gradients.
    Passes over memory: training reads x twice and writes y, backward reads x and dy twice and writes dx; nothing but x is saved.
    Source: Ioffe and Szegedy, arXiv 1502.03167; SiLU as in the MobileViT papers (arXiv 2110.02178, section 4).
    """
    check_map("x", x)
    check_batch_norm("norm", norm, values_per_channel(x), x.shape[-1], x)
    check_activation(act)
    if residual is not None:
        check_same("residual", residual, x.shape, x)
    if dispatch.select("batch_norm_act", KERNELS, x) is None:
        y, moments = reference.batch_norm_act(x, norm, act, residual)
        return y.contiguous(), moments
    y, mean, var = torch.ops.mvit3.batch_norm_act(x, *norm, ACTIVATIONS.index(act), residual)
    return y, Moments(mean, var) if norm.training else None


torch.library.define(
    "mvit3::batch_norm_act",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? running_mean, Tensor? running_var, bool training, float eps, int act, "
    "Tensor? residual) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "mvit3::batch_norm_act_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, bool training, float eps, int act) "
    "-> (Tensor, Tensor, Tensor)",
)
dispatch.register_triton("batch_norm_act", __name__)
dispatch.register_triton("batch_norm_act_backward", __name__)


def _forward(x, weight, bias, running_mean, running_var, training, eps, act, residual):
    norm = BatchNorm(weight, bias, running_mean, running_var, training, eps)
    y, moments = reference.batch_norm_act(x, norm, ACTIVATIONS[act], residual)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, var = moments or (x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype))
    return y.contiguous(), mean, var


torch.library.impl("mvit3::batch_norm_act", "CompositeExplicitAutograd", _forward)


@torch.library.register_fake("mvit3::batch_norm_act")
def _forward_fake(x, weight, bias, running_mean, running_var, training, eps, act, residual):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    channels = x.shape[-1] if training else 0
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return y, x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype)


@torch.library.impl("mvit3::batch_norm_act_backward", "CompositeExplicitAutograd")
def _backward(dy, x, weight, bias, mean, var, training, eps, act):
    dx, dweight, dbias = reference.batch_norm_act_backward(dy, x, weight, bias, mean, var, training, eps, ACTIVATIONS[act])
    return dx.contiguous(), dweight, dbias


@torch.library.register_fake("mvit3::batch_norm_act_backward")
def _backward_fake(dy, x, weight, bias, mean, var, training, eps, act):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx, inputs, output):
    x, weight, bias, running_mean, running_var, ctx.training, ctx.eps, ctx.act, residual = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, weight, bias, *((mean, var) if ctx.training else (running_mean, running_var)))


def _autograd(ctx, dy, *_):
    dx, dweight, dbias = torch.ops.mvit3.batch_norm_act_backward(dy, *ctx.saved_tensors, ctx.training, ctx.eps, ctx.act)
    return dx, dweight, dbias, None, None, None, None, None, dy if ctx.has_residual else None


registry.register_gradient("batch_norm_act", _autograd, _setup_context, reference=_forward)
registry.forbid_second_derivative("batch_norm_act_backward")
