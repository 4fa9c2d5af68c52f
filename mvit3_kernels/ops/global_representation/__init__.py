"""All pre-norm layers of a stage and the final norm: the global representation of a MobileViT block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle

import torch
from torch import Tensor

from .. import dispatch, registry
from ..checks import check_dropout, check_group, check_layer_norm, check_linear, check_map, check_patches
from ..feed_forward import feed_forward
from ..feed_forward import triton_why_not as feed_forward_why_not
from ..norm_linear import empty_statistics, norm_linear
from ..patch_attention import patch_attention
from ..patch_attention import triton_why_not as attention_why_not
from ..pointwise_conv import pointwise_conv
from ..registry import Call, register
from ..rounded_weights import aligned, find_packed, find_rounded
from ..separable_attention import separable_attention
from ..separable_attention import triton_why_not as separable_why_not
from ..sizes import MOST_FEW_ROWS, most_sample_parts, values_per_channel
from ..types import Layer, LayerNorm, Linear
from . import reference

__all__ = ["global_representation"]

# What the kernels that spread a layer over a GPU hold in registers and shared memory.
WIDEST_ROW = 256  # channels
WIDEST_HEAD = 64  # channels
# Tokens up to which two launches a layer that are spread over a GPU take less time than the ops of a layer, by the
# model of benchmarks/gpu_model: with more, what their programs compute again costs more than the launches.
MOST_SPREAD, MOST_SPREAD_SEPARABLE = 2048, 8192
LONGEST_SPREAD_GROUP = 256  # with multi-head attention, whose keys a program of these kernels holds at once


def _flat(layers: Sequence[Layer]) -> list[Tensor | None]:
    """Weight and bias of norm1, qkv, out_proj, norm2, fc1 and fc2 of each layer in turn."""
    return [t for layer in layers for norm_or_linear in layer for t in norm_or_linear[:2]]


def _rounded(x: Tensor, layers: Sequence[Layer]) -> Sequence[Layer]:
    """The layers with their weights rounded, where a pass of a network has them so; few rows read them as they are."""
    if not layers or values_per_channel(x) <= MOST_FEW_ROWS:
        return layers
    weights = find_rounded(x, *(part.weight for layer in layers for part in layer if isinstance(part, Linear)))
    if weights is None:
        return layers
    given = iter(weights)
    return [
        Layer(*(part._replace(weight=next(given)) if isinstance(part, Linear) else part for part in layer))
        for layer in layers
    ]


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _stage_why_not(
    x: Tensor,
    layers: Sequence[Layer],
    norm: LayerNorm | None,
    num_heads: int | None,
    patch_size: tuple[int, int],
    training: bool,
) -> str | None:
    """Why the op of a whole stage cannot run a call; it runs as the ops of its layers then."""
    if training:
        return "the op of a whole stage has neither gradients nor dropout"
    if not layers:
        return "there is no layer"
    if not _one_kind(layers, norm):
        return "the op of a whole stage takes norms of one kind and with one eps"
    if num_heads is not None and 3 * math.prod(x.shape[1:]) >= 2**31:
        return "the op of a whole stage takes queries, keys and values of less than 2^31 elements a sample"
    return feed_forward_why_not(x) or (
        separable_why_not(x) if num_heads is None else attention_why_not(x, num_heads, x.shape[-1])
    )


def _one_kind(layers: Sequence[Layer], norm: LayerNorm | None) -> bool:
    """Whether all norms are of tokens or all of samples, with one eps."""
    norms = [norm for layer in layers for norm in (layer.norm1, layer.norm2)] + ([] if norm is None else [norm])
    return len({other[2:] for other in norms}) == 1


def _spread_why_not(
    x: Tensor,
    layers: Sequence[Layer],
    norm: LayerNorm | None,
    num_heads: int | None,
    patch_size: tuple[int, int],
    training: bool,
) -> str | None:
    """Why the kernels that spread a layer over a GPU cannot, or should not, run a call."""
    if reason := dispatch.triton_32_bit_why_not(x) or dispatch.hopper_why_not(x):
        return reason
    if training:
        return "the spread kernels have neither gradients nor dropout"
    if x.dtype is torch.float32:
        return "the spread kernels take maps of 16 bits"
    if not layers:
        return "there is no layer"
    if not _one_kind(layers, norm):
        return "the spread kernels take norms of one kind and with one eps"
    if len({layer.fc1.weight.shape[0] for layer in layers}) > 1:
        return "the spread kernels take layers with as many hidden channels each"
    channels = x.shape[-1]
    if channels > WIDEST_ROW:
        return f"the spread kernels take at most {WIDEST_ROW} channels, x has {channels}"
    if num_heads is not None and channels // num_heads > WIDEST_HEAD:
        return f"the spread kernels take heads of at most {WIDEST_HEAD} channels, these have {channels // num_heads}"
    if layers[0].norm1.per_sample is not (num_heads is None):
        return "the spread kernels take norms of tokens with multi-head attention, of samples with separable attention"
    rows, positions = values_per_channel(x), patch_size[0] * patch_size[1]
    if num_heads is not None and rows // positions // max(x.shape[0], 1) > LONGEST_SPREAD_GROUP:
        return f"the spread kernels take sequences of at most {LONGEST_SPREAD_GROUP} tokens"
    most = MOST_SPREAD if num_heads is not None else MOST_SPREAD_SEPARABLE
    return f"the spread kernels take at most {most} tokens, x has {rows}" if rows > most else None


def _layerwise_why_not(
    x: Tensor,
    layers: Sequence[Layer],
    norm: LayerNorm | None,
    num_heads: int | None,
    patch_size: tuple[int, int],
    training: bool,
) -> str | None:
    """Why the layers of a call cannot be one node of autograd each; it runs as their ops then."""
    if not training:
        return "layers are one node of autograd each, and there are no gradients and no dropout"
    if not layers:
        return "there is no layer"
    for layer in layers:
        if len({norm[2:] for norm in (layer.norm1, layer.norm2)}) > 1:
            return "one node of autograd takes norms of one kind and with one eps"
        if len({linear.weight.dtype for linear in (layer.qkv, layer.out_proj, layer.fc1, layer.fc2)}) > 1:
            return "one node of autograd takes weights of one dtype"
        if len({t.dtype for norm in (layer.norm1, layer.norm2) for t in norm[:2]}) > 1:
            return "one node of autograd takes norms of one dtype"
    if num_heads is None:
        return feed_forward_why_not(x)
    if 3 * math.prod(x.shape[1:]) >= 2**31:
        return "one node of autograd takes queries, keys and values of less than 2^31 elements a sample"
    return feed_forward_why_not(x) or attention_why_not(x, num_heads, x.shape[-1])


STAGE = dispatch.Kernel("triton", _stage_why_not)
SPREAD = dispatch.Kernel("triton", _spread_why_not)
LAYERWISE = dispatch.Kernel("triton", _layerwise_why_not)
# Every other call is made of ops, on the backend that is forced or on the best that each can have.
KERNELS = (
    SPREAD,
    STAGE,
    LAYERWISE,
    dispatch.Kernel("cpu", lambda x, *_: dispatch.cpu_why_not(x)),
    dispatch.Kernel("triton", lambda x, *_: dispatch.triton_32_bit_why_not(x)),
)


OPS = reference.Ops(norm_linear, patch_attention, pointwise_conv, separable_attention, feed_forward)


def global_representation(
    x: Tensor,
    layers: Sequence[Layer],
    norm: LayerNorm | None = None,
    num_heads: int | None = None,
    patch_size: tuple[int, int] = (2, 2),
    attention_dropout: float = 0.0,
    hidden_dropout: float = 0.0,
    output_dropout: float = 0.0,
    seed: Tensor | None = None,
    ffn_output_dropout: float | None = None,
) -> Tensor:
    """Every layer of a stage, then the final norm; tokens stay at their pixels throughout.

    A layer is attention and feed-forward network, each behind a norm and inside a residual: `patch_attention` with
    `num_heads` heads (MobileViTv1 and MobileViTv3-XXS/XS/S) or, with num_heads None, `separable_attention` (MobileViTv2
    and MobileViTv3-w).

    Args:
        x: feature map (B, H, W, D), float32, bfloat16, float16 or float64, any strides; cast to autocast's dtype under
            autocast.
        layers: the parameters of each layer; shapes as in the ops named above and in `feed_forward`.
        norm: the final norm, weight and bias (D,), or None.
        num_heads: divides D; None for separable attention.
        patch_size: (ph, pw); H and W are multiples of them.
        attention_dropout: probability of dropping an attention probability or a score.
        hidden_dropout: of dropping an element of the feed-forward network's hidden tensor.
        output_dropout: of dropping an element of attention's output.
        seed: int64 tensor of shape (), needed where a probability is positive; the same seed gives the same masks on
            every backend.
        ffn_output_dropout: probability of dropping an element of the feed-forward network's output; None: that of
            attention's.

    Returns:
        (B, H, W, D) of the dtype of x.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
    Source: MobileViT (arXiv 2110.02178), MobileViTv2 (arXiv 2206.02680), MobileViTv3 (arXiv 2209.15159).
    """
    check_map("x", x)
    x = dispatch.autocast(x)
    width = x.shape[-1]
    for i, layer in enumerate(layers):
        check_group(f"layers[{i}]", layer, Layer)
        check_layer_norm(f"layers[{i}].norm1", layer.norm1, width, x)
        check_linear(f"layers[{i}].qkv", layer.qkv, width, 1 + 2 * width if num_heads is None else 3 * width, x)
        check_linear(f"layers[{i}].out_proj", layer.out_proj, width, width, x)
        check_layer_norm(f"layers[{i}].norm2", layer.norm2, width, x)
        hidden = check_linear(f"layers[{i}].fc1", layer.fc1, width, None, x)
        check_linear(f"layers[{i}].fc2", layer.fc2, hidden, width, x)
    if norm is not None:
        check_layer_norm("norm", norm, width, x)
    if num_heads is not None and (num_heads < 1 or width % num_heads):
        raise ValueError(f"num_heads must be positive and divide the {width} channels of x, got {num_heads}")
    check_patches("x", x, patch_size)
    if ffn_output_dropout is None:
        ffn_output_dropout = output_dropout
    dropouts = reference.Dropouts(attention_dropout, hidden_dropout, output_dropout, ffn_output_dropout)
    check_dropout(seed, x, **{f"{place}_dropout": p for place, p in dropouts._asdict().items()})
    training = any(p > 0 for p in dropouts) or _needs_grad(x, *_flat(layers), *(norm or ())[:2])
    kernel = dispatch.select("global_representation", KERNELS, x, layers, norm, num_heads, patch_size, training)
    if kernel is STAGE or kernel is SPREAD:
        final, kind = (None, None) if norm is None else norm[:2], layers[0].norm1[2:]
        way = "_spread" if kernel is SPREAD else ""
        layers = _rounded(x, layers) if kernel is STAGE else layers
        op = getattr(torch.ops.mvit3, f"global_representation{way}_inference")
        return registry.run_without_gradient(op, x, _flat(layers), *final, *kind, num_heads, *patch_size)
    if kernel is LAYERWISE:
        moments, hidden = None, None
        for i, layer in enumerate(layers):
            own = None if seed is None else seed + 3 * i
            if num_heads is None:
                settings = (*layer.norm1[2:], *patch_size, *dropouts, own)
                same = layer.norm1.per_sample and (i > 0 and layers[i - 1].norm1.per_sample)
                same = same and layer.fc1.weight.shape[0] == hidden
                results = torch.ops.mvit3.global_representation_separable_layer_forward(
                    x, *_flat([layer]), *settings, moments if same else None
                )
                x, moments, hidden = results[0], results[-1], layer.fc1.weight.shape[0]
            else:
                settings = (*layer.norm1[2:], num_heads, *patch_size, *dropouts, own)
                packed = find_packed(x, layer.qkv.weight, layer.out_proj.weight, layer.fc1.weight, layer.fc2.weight)
                x = torch.ops.mvit3.global_representation_layer_forward(x, *_flat([layer]), packed, *settings)[0]
        if norm is None or norm.per_sample:
            return x if norm is None else reference.final_norm(x, norm)
        return torch.ops.mvit3.global_representation_norm_forward(x, *norm[:3])[0]
    return reference.global_representation(x, layers, norm, num_heads, patch_size, dropouts, seed, OPS)


_PARAMETERS = "Tensor?[] layers, Tensor? norm_weight, Tensor? norm_bias, float eps, bool per_sample, int? num_heads"


@register(
    "global_representation",
    f"(Tensor x, {_PARAMETERS}, int[2] patch_size, float attention_dropout, float hidden_dropout, "
    "float output_dropout, Tensor? seed, float? ffn_output_dropout=None) -> Tensor y",
)
def _op(call: Call) -> Tensor:
    """`call.layers` holds what `_flat` says."""

    def norm(weight: Tensor, bias: Tensor) -> LayerNorm:
        return LayerNorm(weight, bias, call.eps, call.per_sample)

    parts = (norm, Linear, Linear, norm, Linear, Linear)
    pairs = zip(call.layers[::2], call.layers[1::2], strict=True)
    each = [part(*pair) for part, pair in zip(cycle(parts), pairs, strict=False)]
    layers = [Layer(*each[i : i + len(parts)]) for i in range(0, len(each), len(parts))]
    final = None if call.norm_weight is None else norm(call.norm_weight, call.norm_bias)
    dropout = (call.attention_dropout, call.hidden_dropout, call.output_dropout, call.seed, call.ffn_output_dropout)
    return global_representation(call.x, layers, final, call.num_heads, tuple(call.patch_size), *dropout)


# The kernels of calls without gradients and without dropout.


for _way in ("", "_spread"):

    @registry.kernel(
        f"global_representation{_way}_inference",
        f"(Tensor x, {_PARAMETERS}, int patch_height, int patch_width) -> Tensor y",
        triton=__name__,
    )
    def _inference_fake(call: Call) -> Tensor:
        return torch.empty_like(call.x, memory_format=torch.contiguous_format)


# A layer of multi-head attention in training as one node of autograd: its weights are rounded to the dtype of x in one
# launch for all kernels of both passes, and the gradients of its residuals are added where the kernels of the norms
# write. Backward needs beside the inputs what the ops of the layer keep, the tokens between its two branches and the
# rounded weights, one behind the other (empty where they have that dtype, or are `rounded` so already).

_LAYER = (
    "Tensor norm1_weight, Tensor norm1_bias, Tensor qkv_weight, Tensor? qkv_bias, Tensor out_weight, Tensor? out_bias, "
    "Tensor norm2_weight, Tensor norm2_bias, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2"
)
_SETTINGS = (
    "bool per_sample, int num_heads, int patch_height, int patch_width, float attention_dropout, "
    "float hidden_dropout, float output_dropout, float ffn_output_dropout, Tensor? seed"
)
_LAYER_KEPT = (
    "Tensor qkv, Tensor out, Tensor lse, Tensor mean1, Tensor rstd1, Tensor middle, Tensor mean2, Tensor rstd2, "
    "Tensor packed"
)
_LAYER_GRADIENTS = "(Tensor dx, {})".format(
    ", ".join(
        f"Tensor d{name}"
        for name in (
            *("norm1_weight", "norm1_bias", "qkv_weight", "qkv_bias", "out_weight", "out_bias"),
            *("norm2_weight", "norm2_bias", "weight1", "bias1", "weight2", "bias2"),
        )
    )
)


def weights_of_layer(call: Call) -> tuple[Tensor, ...]:
    """Of its four linear maps."""
    return call.qkv_weight, call.out_weight, call.weight1, call.weight2


def packed_sizes(x: Tensor, weights: Sequence[Tensor]) -> list[int]:
    """Elements that each weight takes among the rounded ones, which begin on 128 bytes; none where nothing is
    rounded."""
    if all(weight.dtype is x.dtype for weight in weights):
        return [0] * len(weights)
    return [aligned(weight) for weight in weights]


@registry.forward(
    "global_representation_layer_forward",
    f"(Tensor x, {_LAYER}, Tensor? rounded, float eps, {_SETTINGS}) -> (Tensor y, {_LAYER_KEPT})",
    triton=__name__,
)
def _layer_forward_fake(call: Call) -> tuple[Tensor, ...]:
    x, positions = call.x, call.patch_height * call.patch_width
    batch, height, width, channels = x.shape
    tokens = (height // call.patch_height) * (width // call.patch_width)
    y, out, middle = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(3))
    qkv = x.new_empty(batch, height, width, 3 * channels)
    lse = x.new_empty(batch, positions, call.num_heads, tokens, dtype=torch.float32)
    first, second = (empty_statistics(x, call.per_sample) for _ in range(2))
    size = sum(packed_sizes(x, weights_of_layer(call))) if call.rounded is None else 0
    return y, qkv, out, lse, *first, middle, *second, x.new_empty(size)


registry.backward(
    "global_representation_layer_backward",
    f"(Tensor dy, Tensor x, {_LAYER}, {_LAYER_KEPT}, Tensor? rounded, {_SETTINGS}) -> {_LAYER_GRADIENTS}",
    triton=__name__,
)


# A layer of separable attention in training, as one node of autograd too. Beside what backward needs, forward gives the
# moments of the samples of y, in parts, for a next layer with the same widths and dropouts.

_SEPARABLE_SETTINGS = _SETTINGS.replace("int num_heads, ", "")
_SEPARABLE_KEPT = (
    "Tensor mean1, Tensor rstd1, Tensor scores, Tensor pooled, Tensor context, Tensor sums, Tensor middle, "
    "Tensor mean2, Tensor rstd2, Tensor packed, Tensor folded"
)


@registry.forward(
    "global_representation_separable_layer_forward",
    f"(Tensor x, {_LAYER}, float eps, {_SEPARABLE_SETTINGS}, Tensor? moments) "
    f"-> (Tensor y, {_SEPARABLE_KEPT}, Tensor next_moments)",
    triton=__name__,
)
def _separable_layer_forward_fake(call: Call) -> tuple[Tensor, ...]:
    x, positions, weights = call.x, call.patch_height * call.patch_width, weights_of_layer(call)
    batch, height, width, channels = x.shape
    y, middle = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    first, second = (empty_statistics(x, call.per_sample) for _ in range(2))

    def float32(*shape: int) -> Tensor:
        return x.new_empty(*shape, dtype=torch.float32)

    scores, lanes = float32(batch, positions, height * width // positions), -(-channels // 16) * 16
    pooled, context, sums = float32(2, batch, positions, lanes), float32(batch, positions, lanes), batch * positions
    packed = x.new_empty(sum(aligned(weight) for weight in weights))
    folded = float32(2 * (weights[0].shape[0] + weights[2].shape[0]))
    moments = float32(3, batch, most_sample_parts(height * width)) if call.per_sample else float32(0)
    return y, *first, scores, pooled, context, float32(3, sums), middle, *second, packed, folded, moments


registry.backward(
    "global_representation_separable_layer_backward",
    f"(Tensor dy, Tensor x, {_LAYER}, {_SEPARABLE_KEPT}, {_SEPARABLE_SETTINGS}) -> {_LAYER_GRADIENTS}",
    triton=__name__,
)


# The final norm in training, of tokens.


@registry.forward(
    "global_representation_norm_forward",
    "(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    triton=__name__,
)
def _norm_forward_fake(call: Call) -> tuple[Tensor, ...]:
    return torch.empty_like(call.x, memory_format=torch.contiguous_format), *empty_statistics(call.x, False)


registry.backward(
    "global_representation_norm_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    triton=__name__,
)
