"""1x1 convolution, batch normalisation, activation, dropout and residual."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, registry
from ..batch_norm_act import batch_norm_act
from ..checks import check_activation, check_batch_norm, check_dropout, check_linear, check_map, check_same
from ..registry import Call, batch_norm_schema, flat, register
from ..rounded_weights import find_rounded
from ..sizes import MOST_FEW_ROWS, values_per_channel
from ..types import ACTIVATIONS, BatchNorm, Linear, Moments
from . import reference

__all__ = ["pointwise_conv"]

KERNELS = (dispatch.Kernel("cpu", dispatch.cpu_why_not), dispatch.Kernel("triton", dispatch.triton_32_bit_why_not))


def pointwise_conv(
    x: Tensor,
    conv: Linear,
    norm: BatchNorm | None = None,
    act: str = "identity",
    residual: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Moments | None]:
    """1x1 convolution, optional batch normalisation, activation, dropout, addition of a residual: y =
    dropout(act(norm(conv(x)))) + residual.

    Args:
        x: feature map (B, H, W, C), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under
            autocast.
        conv: weight (O, C) or (O, C, 1, 1) and bias (O,) or None, float32 or the dtype of x.
        norm: batch normalisation over O channels, or None.
        act: "identity", "silu" or "relu".
        residual: (B, H, W, O) of the dtype of y, or None.
        dropout: probability of dropping an element of what the activation returns; the mask is that of `dropout`.
        seed: int64 tensor of shape (), needed where that is positive; the same seed gives the same mask on every
            backend.

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
    check_dropout(seed, x, dropout=dropout)
    if dispatch.select("pointwise_conv", KERNELS, x) is None:
        return reference.pointwise_conv(x, conv, norm, act, residual, dropout, seed, batch_norm_act=batch_norm_act)
    return run(x, None, conv, norm, act, residual, dropout, seed)


def few_rows(rows: int, size_of_weight: int) -> bool:
    """Whether so few rows ask for the weight that a smaller tile, and float32, cost less than they save."""
    return rows <= MOST_FEW_ROWS or (rows <= 4 * MOST_FEW_ROWS and size_of_weight <= 256 * 128)


def run(
    a: Tensor,
    b: Tensor | None,
    conv: Linear,
    norm: BatchNorm | None,
    act: str,
    residual: Tensor | None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Moments | None]:
    """The kernels of this op and, with a second input b, of pointwise_fusion: one computation."""
    weight, bias, mean, var, training, eps = norm or _NO_NORM
    code = ACTIVATIONS.index(act)
    inputs = (a, b, *conv, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, residual))
    if not (training or needs_grad or dropout > 0):
        few = few_rows(values_per_channel(a), conv.weight.numel())
        rounded = None if few else find_rounded(a, conv.weight)
        inputs = (a, b, *(rounded or conv[:1]), *inputs[3:])
        op = torch.ops.mvit3.pointwise_conv_inference
        return registry.run_without_gradient(op, *inputs, mean, var, eps, code, residual), None
    rest = (mean, var, training, eps, code, dropout, seed, residual)
    rounded = find_rounded(a, conv.weight)
    if rounded is None:
        y, *moments, _ = torch.ops.mvit3.pointwise_conv_forward(*inputs, *rest)
    else:
        y, *moments, _ = torch.ops.mvit3.pointwise_conv_forward_rounded(*inputs, *rounded, *rest)
    return y, Moments(*moments) if training else None


def product_for_two(x: Tensor, conv: Linear) -> tuple[Tensor, Tensor]:
    """The y of `pointwise_conv(x, conv)`, for each of two readers. Where a kernel of backward takes the gradients of
    both and adds them up itself, the two share their memory and are two results for autograd; elsewhere they are one
    tensor.

    Raises, bound: as of `pointwise_conv`.
    """
    check_map("x", x)
    x = dispatch.autocast(x)
    check_linear("conv", conv, x.shape[-1], None, x)
    kernel = dispatch.select("pointwise_conv", KERNELS, x)
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or conv.weight.requires_grad)
    apart = kernel is not None and kernel.backend == "triton" and needs_grad and conv.bias is None
    if apart and not torch.compiler.is_compiling():
        (rounded,) = find_rounded(x, conv.weight) or (None,)
        return torch.ops.mvit3.pointwise_conv_twice_forward(x, conv.weight, rounded)
    if kernel is None:
        y, _ = reference.pointwise_conv(x, conv, None, "identity", None, batch_norm_act=batch_norm_act)
    else:
        y, _ = run(x, None, conv, None, "identity", None)
    return y, y


_NO_NORM = (None, None, None, None, False, 0.0)


_RUNNING = "Tensor? running_mean, Tensor? running_var"


@register(
    "pointwise_conv",
    f"(Tensor x, Tensor weight, Tensor? bias, {batch_norm_schema('norm_', optional=True)}, int act, Tensor? residual, "
    "float dropout=0.0, Tensor? seed=None) -> (Tensor y, Tensor mean, Tensor var)",
)
def _op(call: Call) -> tuple[Tensor, ...]:
    norm = None if call.norm_weight is None else registry.batch_norm(call, "norm_")
    rest = (ACTIVATIONS[call.act], call.residual, call.dropout, call.seed)
    return flat(*pointwise_conv(call.x, Linear(call.weight, call.bias), norm, *rest))


# The kernels. What backward needs beside its inputs is p, the product, unless neither norm nor activation follows it.

_INPUTS = "Tensor a, Tensor? b, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias"


@registry.kernel(
    "pointwise_conv_inference",
    f"({_INPUTS}, {_RUNNING}, float eps, int act, Tensor? residual) -> Tensor y",
    triton=__name__,
)
def _inference_fake(call: Call) -> Tensor:
    return call.a.new_empty(*call.a.shape[:-1], call.weight.shape[0])


def _forward_fake(call: Call) -> tuple[Tensor, ...]:
    y = _inference_fake(call)
    mean, var = (y.new_empty(y.shape[-1] if call.training else 0, dtype=torch.float32) for _ in range(2))
    return y, mean, var, y.new_empty(0) if call.norm_weight is None and call.act == 0 else torch.empty_like(y)


# Those with `_rounded` are a GPU's. They take the weight in the dtype of a, too, which multiplies in both passes.
for _way, _rounded in (("", ""), ("_rounded", ", Tensor rounded")):
    registry.forward(
        f"pointwise_conv_forward{_way}",
        f"({_INPUTS}{_rounded}, {_RUNNING}, bool training, float eps, int act, float dropout, Tensor? seed, "
        "Tensor? residual) -> (Tensor y, Tensor mean, Tensor var, Tensor p)",
        triton=__name__,
    )(_forward_fake)
    registry.backward(
        f"pointwise_conv_backward{_way}",
        f"(Tensor dy, {_INPUTS}{_rounded}, Tensor? mean, Tensor? var, Tensor p, bool training, float eps, int act, "
        "float dropout, Tensor? seed) "
        "-> (Tensor da, Tensor db, Tensor dweight, Tensor dbias, Tensor dnorm_weight, Tensor dnorm_bias)",
        triton=__name__,
        choices=registry.BATCH_STATISTICS,
        residual="residual",
    )


@registry.forward(
    "pointwise_conv_twice_forward",
    "(Tensor x, Tensor weight, Tensor? rounded) -> (Tensor y, Tensor again)",
    triton=__name__,
)
def _twice_fake(call: Call) -> tuple[Tensor, Tensor]:
    return call.x.new_empty(*call.x.shape[:-1], call.weight.shape[0]), call.x.new_empty(0)


registry.backward(
    "pointwise_conv_twice_backward",
    "(Tensor dy, Tensor? dagain, Tensor x, Tensor weight, Tensor? rounded) -> (Tensor dx, Tensor dweight)",
    triton=__name__,
    again="again",
)
