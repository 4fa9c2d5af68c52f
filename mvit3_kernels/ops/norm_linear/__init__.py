"""Layer normalisation, then a linear map: the query-key-value projection."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, registry
from ..checks import check_layer_norm, check_linear, check_map
from ..registry import register
from ..types import LayerNorm, Linear
from . import reference

__all__ = ["norm_linear"]

WIDEST_ROW = 512  # of the Triton kernels, which hold whole rows in registers and shared memory


def triton_why_not(x: Tensor, widest: int = WIDEST_ROW) -> str | None:
    """Why the Triton kernels of a norm in front of a linear map cannot take a call on `x`."""
    if x.shape[-1] > widest:
        return f"its kernels take rows of at most {widest} channels of {x.dtype}, x has {x.shape[-1]}"
    return dispatch.triton_32_bit_why_not(x)


KERNELS = (dispatch.Kernel("cpu", dispatch.cpu_why_not), dispatch.Kernel("triton", triton_why_not))


def norm_linear(x: Tensor, norm: LayerNorm, projection: Linear) -> Tensor:
    """Layer normalisation (of each token, or of each sample as one-group group normalisation), then a linear map.

    Args:
        x: feature map (B, H, W, D), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under autocast.
        norm: weight and bias (D,), float32 or the dtype of x.
        projection: weight (O, D) or (O, D, 1, 1), bias (O,) or None.

    Returns:
        (B, H, W, O) of the dtype of x.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
    Source: pre-norm attention of MobileViT (arXiv 2110.02178) and MobileViTv2 (arXiv 2206.02680).
    """
    check_map("x", x)
    x = dispatch.autocast(x)
    check_layer_norm("norm", norm, x.shape[-1], x)
    check_linear("projection", projection, x.shape[-1], None, x)
    if dispatch.select("norm_linear", KERNELS, x) is None:
        return reference.norm_linear(x, norm, projection)
    return torch.ops.mvit3.norm_linear_forward(x, *norm, *projection)[0]


@register(
    "norm_linear", "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, bool per_sample, Tensor weight, Tensor? bias) -> Tensor"
)
def _op(x, norm_weight, norm_bias, eps, per_sample, weight, bias):
    return norm_linear(x, LayerNorm(norm_weight, norm_bias, eps, per_sample), Linear(weight, bias))


# The kernel. mean and rstd, of each token or of each sample, are all that backward needs beside the inputs.

torch.library.define(
    "mvit3::norm_linear_forward",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, bool per_sample, Tensor weight, Tensor? bias) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "mvit3::norm_linear_backward",
    "(Tensor dy, Tensor x, Tensor norm_weight, Tensor norm_bias, bool per_sample, Tensor weight, Tensor? bias, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _name in ("forward", "backward"):
    dispatch.register_triton(f"norm_linear_{_name}", __name__)


def statistics_fake(x: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    """mean and rstd of layer normalisation, of each token or of each sample."""
    count = x.shape[0] if per_sample else x.shape[0] * x.shape[1] * x.shape[2]
    return x.new_empty(count, dtype=torch.float32), x.new_empty(count, dtype=torch.float32)


def gradient_fake(t: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of a parameter: empty where there is none."""
    return like.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)


@torch.library.register_fake("mvit3::norm_linear_forward")
def _forward_fake(x, norm_weight, norm_bias, eps, per_sample, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0]), *statistics_fake(x, per_sample)


@torch.library.register_fake("mvit3::norm_linear_backward")
def _backward_fake(dy, x, norm_weight, norm_bias, per_sample, weight, bias, mean, rstd):
    return tuple(gradient_fake(t, x) for t in (x, norm_weight, norm_bias, weight, bias))


def _setup_context(ctx, inputs, output):
    x, norm_weight, norm_bias, _, ctx.per_sample, weight, bias = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, mean, rstd)


def _gradients(ctx, dy, *_):
    if dy is None:
        return (None,) * 7
    x, norm_weight, norm_bias, weight, bias, mean, rstd = ctx.saved_tensors
    arguments = (dy, x, norm_weight, norm_bias, ctx.per_sample, weight, bias, mean, rstd)
    dx, dnorm_weight, dnorm_bias, dweight, dbias = torch.ops.mvit3.norm_linear_backward(*arguments)
    return dx, dnorm_weight, dnorm_bias, None, None, dweight, None if bias is None else dbias


registry.register_gradient("norm_linear_forward", _gradients, _setup_context)
registry.forbid_second_derivative("norm_linear_backward")
