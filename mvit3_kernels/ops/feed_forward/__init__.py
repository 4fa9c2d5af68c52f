"""The pre-norm feed-forward network with its residual."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, registry
from ..checks import check_dropout, check_layer_norm, check_linear, check_map
from ..norm_linear import WIDEST_ROW, empty_statistics, norm_linear
from ..norm_linear import triton_why_not as rows_why_not
from ..registry import LAYER_NORM, Call, register
from ..types import LayerNorm, Linear
from . import reference

__all__ = ["feed_forward"]


def triton_why_not(x: Tensor) -> str | None:
    return rows_why_not(x, WIDEST_ROW // 2 if x.dtype is torch.float32 else WIDEST_ROW)


KERNELS = (dispatch.Kernel("cpu", dispatch.cpu_why_not), dispatch.Kernel("triton", triton_why_not))


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
        x: feature map (B, H, W, D), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under
            autocast.
        norm: layer normalisation, weight and bias (D,).
        fc1: weight (F, D) or (F, D, 1, 1), bias (F,) or None.
        fc2: weight (D, F) or (D, F, 1, 1), bias (D,) or None.
        hidden_dropout, output_dropout: probabilities of dropping an element of the hidden tensor and of the branch's
            output.
        seed: int64 tensor of shape (), needed where a probability is positive; the same seed gives the same masks on
            every backend.

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
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, norm.weight, norm.bias, *fc1, *fc2)
    )
    keep = kernel.backend == "cpu" and differentiable
    return torch.ops.mvit3.feed_forward_forward(x, *norm, *fc1, *fc2, hidden_dropout, output_dropout, seed, keep)[0]


_LINEARS = "Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2"
_DROPOUT = "float hidden_dropout, float output_dropout, Tensor? seed"


@register("feed_forward", f"(Tensor x, {LAYER_NORM}, {_LINEARS}, {_DROPOUT}) -> Tensor y")
def _op(call: Call) -> Tensor:
    norm = LayerNorm(call.norm_weight, call.norm_bias, call.eps, call.per_sample)
    fc1, fc2 = Linear(call.weight1, call.bias1), Linear(call.weight2, call.bias2)
    return feed_forward(call.x, norm, fc1, fc2, call.hidden_dropout, call.output_dropout, call.seed)


# The kernels. Backward needs beside the inputs: mean and rstd of the norm, and on the CPU the hidden tensor before its
# activation, which forward returns with `keep`, else an empty tensor. (Computing it again would cost a seventh of a
# training step's products there; a GPU's kernel does so, on chip.)


@registry.forward(
    "feed_forward_forward",
    f"(Tensor x, {LAYER_NORM}, {_LINEARS}, {_DROPOUT}, bool keep) "
    "-> (Tensor y, Tensor mean, Tensor rstd, Tensor hidden)",
    triton=__name__,
)
def _forward_fake(call: Call) -> tuple[Tensor, ...]:
    x = call.x
    hidden = x.new_empty(*x.shape[:-1], call.weight1.shape[0]) if call.keep else x.new_empty(0)
    return torch.empty_like(x, memory_format=torch.contiguous_format), *empty_statistics(x, call.per_sample), hidden


registry.backward(
    "feed_forward_backward",
    f"(Tensor dy, Tensor x, Tensor norm_weight, Tensor norm_bias, bool per_sample, {_LINEARS}, {_DROPOUT}, Tensor "
    "mean, "
    "Tensor rstd, Tensor hidden) -> (Tensor dx, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dweight1, Tensor "
    "dbias1, "
    "Tensor dweight2, Tensor dbias2)",
    triton=__name__,
)
