"""MobileViTv2's layer branch: separable attention of linear cost, with its norm and residual."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, registry
from ..checks import check_dropout, check_layer_norm, check_linear, check_map, check_patches
from ..norm_linear import WIDEST_ROW, empty_statistics, norm_linear
from ..norm_linear import triton_why_not as rows_why_not
from ..registry import LAYER_NORM, Call, register
from ..types import LayerNorm, Linear
from . import reference

__all__ = ["separable_attention"]


def triton_why_not(x: Tensor) -> str | None:
    return rows_why_not(x, WIDEST_ROW // 2 if x.dtype is torch.float32 else WIDEST_ROW)


KERNELS = (dispatch.Kernel("cpu", dispatch.cpu_why_not), dispatch.Kernel("triton", triton_why_not))


def separable_attention(
    x: Tensor,
    norm: LayerNorm,
    qkv: Linear,
    out_proj: Linear,
    patch_size: tuple[int, int] = (2, 2),
    attention_dropout: float = 0.0,
    output_dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x + out_proj(ReLU(value) * context), where context is the mean of the keys weighted by the softmax of the scores.

    Scores, keys and values are qkv(norm(x)). The softmax and the weighted sum run over the patches, separately for each
    of the ph * pw positions inside a patch.

    Args:
        x: feature map (B, H, W, D), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under
            autocast.
        norm: layer normalisation (MobileViTv2: per_sample), weight and bias (D,).
        qkv: weight (1 + 2D, D) or with (1, 1) behind it, bias (1 + 2D,) or None: output 0 is the score, 1..D the key,
            D+1..2D the value.
        out_proj: weight (D, D) or with (1, 1) behind it, bias (D,) or None.
        patch_size: (ph, pw); H and W are multiples of them.
        attention_dropout, output_dropout: probabilities of dropping a score and an element of the branch's output.
        seed: int64 tensor of shape (), needed where a probability is positive; the same seed gives the same masks on
            every backend.

    Returns:
        (B, H, W, D) of the dtype of x.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64; but for gradients of the weight
    and the bias of qkv in float32 on a GPU where the norm's bias is about ten times its weight (up to 7 x).
    Source: MobileViTv2, arXiv 2206.02680, section 3.2.
    """
    check_map("x", x)
    x = dispatch.autocast(x)
    width = x.shape[-1]
    check_layer_norm("norm", norm, width, x)
    check_linear("qkv", qkv, width, 1 + 2 * width, x)
    check_linear("out_proj", out_proj, width, width, x)
    check_patches("x", x, patch_size)
    check_dropout(seed, x, attention_dropout=attention_dropout, output_dropout=output_dropout)
    if dispatch.select("separable_attention", KERNELS, x) is None:
        return reference.separable_attention(
            x, norm, qkv, out_proj, patch_size, attention_dropout, output_dropout, seed, norm_linear=norm_linear
        )
    parameters = (*norm, *qkv, *out_proj)
    wanted = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, *parameters))
    if wanted or attention_dropout > 0 or output_dropout > 0:
        return torch.ops.mvit3.separable_attention_forward(
            x, *parameters, *patch_size, attention_dropout, output_dropout, seed
        )[0]
    return registry.run_without_gradient(torch.ops.mvit3.separable_attention_inference, x, *parameters, *patch_size)


_INPUTS = "Tensor x, Tensor norm_weight, Tensor norm_bias"
_LINEARS = "Tensor qkv_weight, Tensor? qkv_bias, Tensor out_weight, Tensor? out_bias"
_PATCH = "int patch_height, int patch_width"
_DROPOUT = "float attention_dropout, float output_dropout, Tensor? seed"


@register("separable_attention", f"(Tensor x, {LAYER_NORM}, {_LINEARS}, int[2] patch_size, {_DROPOUT}) -> Tensor y")
def _op(call: Call) -> Tensor:
    norm = LayerNorm(call.norm_weight, call.norm_bias, call.eps, call.per_sample)
    qkv, out_proj = Linear(call.qkv_weight, call.qkv_bias), Linear(call.out_weight, call.out_bias)
    dropout = (call.attention_dropout, call.output_dropout, call.seed)
    return separable_attention(call.x, norm, qkv, out_proj, tuple(call.patch_size), *dropout)


# The kernels. In training, the statistics of the norm, the softmax of the scores, and for each position inside a patch
# the weighted mean of the tokens and the context are what backward needs beside the inputs: all but the scores are a
# few values a sample.


@registry.kernel(
    "separable_attention_inference",
    f"({_INPUTS}, float eps, bool per_sample, {_LINEARS}, {_PATCH}) -> Tensor y",
    triton=__name__,
)
def _inference_fake(call: Call) -> Tensor:
    return torch.empty_like(call.x, memory_format=torch.contiguous_format)


@registry.forward(
    "separable_attention_forward",
    f"({_INPUTS}, float eps, bool per_sample, {_LINEARS}, {_PATCH}, {_DROPOUT}) "
    "-> (Tensor y, Tensor mean, Tensor rstd, Tensor scores, Tensor pooled, Tensor context)",
    triton=__name__,
)
def _forward_fake(call: Call) -> tuple[Tensor, ...]:
    batch, height, width, channels = call.x.shape
    positions, lanes = call.patch_height * call.patch_width, -(-channels // 16) * 16
    scores = call.x.new_empty(batch, positions, height * width // positions, dtype=torch.float32)
    pooled, context = (scores.new_empty(batch, positions, lanes) for _ in range(2))
    return _inference_fake(call), *empty_statistics(call.x, call.per_sample), scores, pooled, context


registry.backward(
    "separable_attention_backward",
    f"(Tensor dy, {_INPUTS}, bool per_sample, {_LINEARS}, Tensor mean, Tensor rstd, Tensor scores, Tensor pooled, "
    f"Tensor context, {_PATCH}, {_DROPOUT}) -> (Tensor dx, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dqkv_weight, "
    "Tensor dqkv_bias, Tensor dout_weight, Tensor dout_bias)",
    triton=__name__,
)
