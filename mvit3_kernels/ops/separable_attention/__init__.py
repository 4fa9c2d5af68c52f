"""MobileViTv2's layer branch: separable attention of linear cost, with its norm and residual."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, registry
from ..checks import check_dropout, check_layer_norm, check_linear, check_map, check_patches
from ..norm_linear import WIDEST_ROW, gradient_fake, norm_linear, statistics_fake, triton_why_not
from ..registry import register
from ..types import LayerNorm, Linear
from . import reference

__all__ = ["separable_attention"]


def _triton_why_not(x: Tensor) -> str | None:
    return triton_why_not(x, WIDEST_ROW // 2 if x.dtype is torch.float32 else WIDEST_ROW)


KERNELS = (dispatch.Kernel("cpu", dispatch.cpu_why_not), dispatch.Kernel("triton", _triton_why_not))


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

    Scores, keys and values are qkv(norm(x)). The softmax and the weighted sum run over the patches, separately for each of the ph * pw
    positions inside a patch.

    Args:
        x: feature map (B, H, W, D), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under autocast.
        norm: layer normalisation (MobileViTv2: per_sample), weight and bias (D,).
        qkv: weight (1 + 2D, D) or with (1, 1) behind it, bias (1 + 2D,) or None: output 0 is the score, 1..D the key, D+1..2D the value.
        out_proj: weight (D, D) or with (1, 1) behind it, bias (D,) or None.
        patch_size: (ph, pw); H and W are multiples of them.
        attention_dropout, output_dropout: probabilities of dropping a score and an element of the branch's output.
        seed: int64 tensor of shape (), needed where a probability is positive; the same seed gives the same masks on every backend.

    Returns:
        (B, H, W, D) of the dtype of x.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
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
        return torch.ops.mvit3.separable_attention_training(x, *parameters, *patch_size, attention_dropout, output_dropout, seed)[0]
    return registry.run_without_gradient(torch.ops.mvit3.separable_attention_inference, x, *parameters, *patch_size)


@register(
    "separable_attention",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, bool per_sample, Tensor qkv_weight, Tensor? qkv_bias, Tensor out_weight, "
    "Tensor? out_bias, int[2] patch_size, float attention_dropout, float output_dropout, Tensor? seed) -> Tensor",
)
def _op(x, norm_weight, norm_bias, eps, per_sample, qkv_weight, qkv_bias, out_weight, out_bias, patch_size, *dropout):
    norm = LayerNorm(norm_weight, norm_bias, eps, per_sample)
    return separable_attention(x, norm, Linear(qkv_weight, qkv_bias), Linear(out_weight, out_bias), tuple(patch_size), *dropout)


# The kernels. In training, the statistics of the norm, the softmax of the scores, and for each position inside a patch the weighted mean of
# the tokens and the context are what backward needs beside the inputs: all but the scores are a few values a sample.

_INPUTS = "Tensor x, Tensor norm_weight, Tensor norm_bias"
_LINEARS = "Tensor qkv_weight, Tensor? qkv_bias, Tensor out_weight, Tensor? out_bias"
_KEPT = "Tensor mean, Tensor rstd, Tensor scores, Tensor pooled, Tensor context"
_PATCH = "int patch_height, int patch_width"
_DROPOUT = "float attention_dropout, float output_dropout, Tensor? seed"

for _name, _schema in {
    "inference": f"({_INPUTS}, float eps, bool per_sample, {_LINEARS}, {_PATCH}) -> Tensor",
    "training": f"({_INPUTS}, float eps, bool per_sample, {_LINEARS}, {_PATCH}, {_DROPOUT}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "backward": f"(Tensor dy, {_INPUTS}, bool per_sample, {_LINEARS}, {_KEPT}, {_PATCH}, {_DROPOUT}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}.items():
    torch.library.define(f"mvit3::separable_attention_{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
    dispatch.register_triton(f"separable_attention_{_name}", __name__)


@torch.library.register_fake("mvit3::separable_attention_inference")
def _inference_fake(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("mvit3::separable_attention_training")
def _training_fake(x, norm_weight, norm_bias, eps, per_sample, qkv_weight, qkv_bias, out_weight, out_bias, patch_height, patch_width, *_):
    batch, height, width, channels = x.shape
    positions, lanes = patch_height * patch_width, -(-channels // 16) * 16
    scores = x.new_empty(batch, positions, height * width // positions, dtype=torch.float32)
    pooled, context = (scores.new_empty(batch, positions, lanes) for _ in range(2))
    return _inference_fake(x), *statistics_fake(x, per_sample), scores, pooled, context


@torch.library.register_fake("mvit3::separable_attention_backward")
def _backward_fake(dy, x, norm_weight, norm_bias, per_sample, qkv_weight, qkv_bias, out_weight, out_bias, *_):
    return tuple(gradient_fake(t, x) for t in (x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias))


def _setup_context(ctx, inputs, output):
    x, norm_weight, norm_bias, _, ctx.per_sample, *linears, patch_height, patch_width, attention_dropout, output_dropout, seed = inputs
    ctx.options = (patch_height, patch_width, attention_dropout, output_dropout)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, norm_weight, norm_bias, *linears, *output[1:], seed)


def _gradients(ctx, dy, *_):
    if dy is None:
        return (None,) * 14
    *inputs, seed = ctx.saved_tensors
    (x, norm_weight, norm_bias, *linears), kept = inputs[:7], inputs[7:]
    arguments = (dy, x, norm_weight, norm_bias, ctx.per_sample, *linears, *kept, *ctx.options, seed)
    dx, dnorm_weight, dnorm_bias, *dlinears = torch.ops.mvit3.separable_attention_backward(*arguments)
    dlinears = (None if t is None else gradient for t, gradient in zip(linears, dlinears, strict=True))
    return dx, dnorm_weight, dnorm_bias, None, None, *dlinears, None, None, None, None, None


registry.register_gradient("separable_attention_training", _gradients, _setup_context)
registry.forbid_gradient("separable_attention_inference")
registry.forbid_second_derivative("separable_attention_backward")
