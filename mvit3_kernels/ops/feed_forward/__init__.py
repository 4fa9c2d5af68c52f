"""The pre-norm feed-forward network with its residual."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, registry
from ..checks import check_dropout, check_layer_norm, check_linear, check_map
from ..norm_linear import WIDEST_ROW, gradient_fake, norm_linear, statistics_fake, triton_why_not
from ..registry import register
from ..types import LayerNorm, Linear
from . import reference

__all__ = ["feed_forward"]


def _triton_why_not(x: Tensor) -> str | None:
    return triton_why_not(x, WIDEST_ROW // 2 if x.dtype is torch.float32 else WIDEST_ROW)


KERNELS = (dispatch.Kernel("cpu", dispatch.cpu_why_not), dispatch.Kernel("triton", _triton_why_not))


def feed_forward(
    x: Tensor,
    norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    hidden_dropout: float = 0.0,
    output_dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x + dropout(fc2(dropout(SiLU(fc1(norm(x)))))).

    Args:
        x: feature map (B, H, W, D), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under autocast.
        norm: layer normalisation, weight and bias (D,).
        fc1: weight (F, D) or (F, D, 1, 1), bias (F,) or None.
        fc2: weight (D, F) or (D, F, 1, 1), bias (D,) or None.
        hidden_dropout, output_dropout: probabilities of dropping an element of the hidden tensor and of the branch's output.
        seed: int64 tensor of shape (), needed where a probability is positive; the same seed gives the same masks on every backend.

    Returns:
        (B, H, W, D) of the dtype of x.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
    Source: MobileViT (arXiv 2110.02178) and MobileViTv2 (arXiv 2206.02680); the activation is SiLU, not GELU.
    """
    check_map("x", x)
    x = dispatch.autocast(x)
    width = x.shape[-1]
    check_layer_norm("norm", norm, width, x)
    hidden = check_linear("fc1", fc1, width, None, x)
    check_linear("fc2", fc2, hidden, width, x)
    check_dropout(seed, x, hidden_dropout=hidden_dropout, output_dropout=output_dropout)
    kernel = dispatch.select("feed_forward", KERNELS, x)
    if kernel is None:
        return reference.feed_forward(x, norm, fc1, fc2, hidden_dropout, output_dropout, seed, norm_linear=norm_linear)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, norm.weight, norm.bias, *fc1, *fc2))
    keep = kernel.backend == "cpu" and differentiable
    return torch.ops.mvit3.feed_forward_forward(x, *norm, *fc1, *fc2, hidden_dropout, output_dropout, seed, keep)[0]


@register(
    "feed_forward",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, bool per_sample, Tensor weight1, Tensor? bias1, "
    "Tensor weight2, Tensor? bias2, float hidden_dropout, float output_dropout, Tensor? seed) -> Tensor",
)
def _op(x, norm_weight, norm_bias, eps, per_sample, weight1, bias1, weight2, bias2, hidden_dropout, output_dropout, seed):
    norm = LayerNorm(norm_weight, norm_bias, eps, per_sample)
    return feed_forward(x, norm, Linear(weight1, bias1), Linear(weight2, bias2), hidden_dropout, output_dropout, seed)


# The kernels. Backward needs beside the inputs: mean and rstd of the norm, and on the CPU the hidden tensor before its activation, which
# forward returns with `keep`, else an empty tensor. (Computing it again would cost a seventh of a training step's products there; a GPU's
# kernel does so, on chip.)

_PARAMETERS = "Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, float hidden_dropout, float output_dropout, Tensor? seed"
torch.library.define(
    "mvit3::feed_forward_forward",
    f"(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, bool per_sample, {_PARAMETERS}, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "mvit3::feed_forward_backward",
    f"(Tensor dy, Tensor x, Tensor norm_weight, Tensor norm_bias, bool per_sample, {_PARAMETERS}, Tensor mean, Tensor rstd, Tensor hidden) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

for _name in ("forward", "backward"):
    dispatch.register_triton(f"feed_forward_{_name}", __name__)


@torch.library.register_fake("mvit3::feed_forward_forward")
def _forward_fake(x, norm_weight, norm_bias, eps, per_sample, weight1, *parameters):
    hidden = x.new_empty(*x.shape[:-1], weight1.shape[0]) if parameters[-1] else x.new_empty(0)
    return torch.empty_like(x, memory_format=torch.contiguous_format), *statistics_fake(x, per_sample), hidden


@torch.library.register_fake("mvit3::feed_forward_backward")
def _backward_fake(dy, x, norm_weight, norm_bias, per_sample, *parameters):
    return tuple(gradient_fake(t, x) for t in (x, norm_weight, norm_bias, *parameters[:4]))


def _setup_context(ctx, inputs, output):
    x, norm_weight, norm_bias, _, ctx.per_sample, *linears, hidden_dropout, output_dropout, seed, _ = inputs
    ctx.dropouts = hidden_dropout, output_dropout
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, norm_weight, norm_bias, *linears, seed, *output[1:])


def _gradients(ctx, dy, *_):
    if dy is None:
        return (None,) * 13
    x, norm_weight, norm_bias, *linears, seed, mean, rstd, hidden = ctx.saved_tensors
    arguments = (x, norm_weight, norm_bias, ctx.per_sample, *linears, *ctx.dropouts, seed, mean, rstd, hidden)
    dx, dnorm_weight, dnorm_bias, *grads = torch.ops.mvit3.feed_forward_backward(dy, *arguments)
    grads = (None if t is None else grad for t, grad in zip(linears, grads, strict=True))
    return dx, dnorm_weight, dnorm_bias, None, None, *grads, None, None, None, None


registry.register_gradient("feed_forward_forward", _gradients, _setup_context)
registry.forbid_second_derivative("feed_forward_backward")
