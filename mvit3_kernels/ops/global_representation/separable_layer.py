"""Launchers of a layer of separable attention in training.

Its launches are those of its two ops, but for what they can hand on to each other where norms are of samples: who
writes tokens leaves their moments, so that no launch measures them; and the sums over a sample that the gradient of a
norm needs are those of the gradient of the linear map behind it, weighted by that map's weights times the norm's, so
that the kernel which makes that gradient adds them up, and the gradient of x is complete where it is made. The weights
are rounded, and multiplied by the norms', in one launch, and one finishes the gradients of all parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..feed_forward.triton import feed, hidden_backward, parameters, parts_of_samples
from ..registry import FORMS, Call
from ..separable_attention.triton import Attention, Maps, Moments, maps_backward
from ..sizes import cdiv
from ..triton_common import contiguous, on_device
from ..triton_rows import Parts, Rows
from ..types import Linear
from . import separable_layer_kernels, weights_of_layer


def _places(weights: tuple[Tensor, ...]) -> list[int]:
    """Where each packed weight begins, on 128 bytes, and where the last one ends."""
    places = [0]
    for weight in weights:
        places.append(places[-1] + -(-weight.numel() // 64) * 64)
    return places


def _pack(call: Call, x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The weights in the dtype of x, one behind the other, and those behind norms times weight and bias of these."""
    places, (outputs, _, hidden, _) = _places(weights), (weight.shape[0] for weight in weights)
    packed = x.new_empty(places[-1])
    folded = x.new_empty(2 * (outputs + hidden), dtype=torch.float32)
    norms = contiguous(call.norm1_weight, call.norm1_bias, call.norm2_weight, call.norm2_bias)
    with on_device(x):
        separable_layer_kernels.pack_kernel[(cdiv(max(outputs, hidden), 16), 4)](
            *weights, norms[:2], norms[2:], packed, folded,
            OUT_AT=places[1], WEIGHT1_AT=places[2], WEIGHT2_AT=places[3],
            C=x.shape[-1], F=hidden, BLOCK_O=16, BLOCK_C=64, num_warps=4,
        )  # fmt: skip
    return packed, folded


def _unpack(packed: Tensor, weights: tuple[Tensor, ...]) -> list[Tensor]:
    places = _places(weights)
    return [
        packed[begin : begin + weight.numel()].view(weight.shape)
        for begin, weight in zip(places, weights, strict=False)
    ]


def _attention(call: Call, form: str, x: Tensor, *more: Any) -> Call:
    """The call of separable_attention's form; `more`: what stands in front of the patch."""
    first = (x, call.norm1_weight, call.norm1_bias)
    kind = (call.eps, call.per_sample) if form == "forward" else (call.per_sample,)
    linears = (call.qkv_weight, call.qkv_bias, call.out_weight, call.out_bias)
    rest = (call.patch_height, call.patch_width, call.attention_dropout, call.output_dropout, call.seed)
    inputs = (*first, *kind, *linears, *more, *rest)
    form = f"separable_attention_{form}"
    return FORMS[form].call(*(inputs if form.endswith("forward") else (call.dy, *inputs)))


def _feed_forward(call: Call, form: str, x: Tensor, *more: Any) -> Call:
    """The call of feed_forward's form; `more`: what stands at its end."""
    first = (x, call.norm2_weight, call.norm2_bias)
    kind = (call.eps, call.per_sample) if form == "forward" else (call.per_sample,)
    drops = call.hidden_dropout > 0 or call.ffn_output_dropout > 0
    seed = call.seed + 2 if drops else None
    linears = (call.weight1, call.bias1, call.weight2, call.bias2)
    inputs = (*first, *kind, *linears, call.hidden_dropout, call.ffn_output_dropout, seed, *more)
    form = f"feed_forward_{form}"
    return FORMS[form].call(*(inputs if form.endswith("forward") else (call.dy, *inputs)))


def global_representation_separable_layer_forward(call: Call) -> tuple[Tensor, ...]:
    """Launches the forward pass of a layer: y, what backward needs, and the moments of the samples of y, which a next
    layer with the same widths and dropouts takes as `call.moments`."""
    x, weights = call.x.contiguous(), contiguous(*weights_of_layer(call))
    packed, folded = _pack(call, x, weights)
    qkv_weight, out_weight, *both = _unpack(packed, weights)
    ffn = _feed_forward(call, "forward", x, False)
    attention = Attention(_attention(call, "forward", x), True, (qkv_weight, out_weight))
    parts = parts_of_samples(ffn) if attention.measures() else 0
    given = None if call.moments is None or not parts else Moments(call.moments, parts)
    middle, moments = attention.launch(given)
    y, mean, rstd, found = feed(ffn._replace(x=middle), tuple(both), moments, wanted=parts > 0)
    if found is None:
        found = Rows.of(x).moments() if call.per_sample else x.new_empty(0, dtype=torch.float32)
    mean1, rstd1, scores, pooled, context, sums = attention.kept
    return y, mean1, rstd1, scores, pooled, context, sums, middle, mean, rstd, packed, folded, found


def global_representation_separable_layer_backward(call: Call) -> tuple[Tensor, ...]:
    """Launches the backward pass of a layer: the gradients of x and of its parameters (empty where there is none)."""
    dy, x, middle, packed, folded = contiguous(call.dy, call.x, call.middle, call.packed, call.folded)
    weights = contiguous(*weights_of_layer(call))
    if not x.numel():
        attention = (call.norm1_weight, call.norm1_bias, weights[0], call.qkv_bias, weights[1], call.out_bias)
        ffn = (call.norm2_weight, call.norm2_bias, weights[2], call.bias1, weights[3], call.bias2)
        zeros = (x.new_empty(0) if t is None else torch.zeros_like(t) for t in (*attention, *ffn))
        return torch.empty_like(x), *zeros
    qkv_weight, out_weight, weight1, weight2 = _unpack(packed, weights)
    of_qkv = folded[: 2 * weights[0].shape[0]]
    of_weight1 = folded[2 * weights[0].shape[0] :] if call.per_sample else None
    rows = Rows.of(x)

    call = call._replace(dy=dy)
    ffn = _feed_forward(call, "backward", middle, call.mean2, call.rstd2, x.new_empty(0))
    norm, linear1, linear2 = parameters(ffn)
    hidden, dpre, known = hidden_backward(ffn, dy, weight1, weight2, of_weight1)
    dmiddle, fc1 = Rows.of(middle).norm_linear_parts(
        dpre, norm, linear1._replace(weight=weights[2]), call.mean2, call.rstd2, dy, weight1, known
    )
    fc2 = rows.second_weight_parts(dy, hidden, linear2._replace(weight=weights[3]), call.ffn_output_dropout, ffn.seed)
    del hidden, dpre

    kept = (call.mean1, call.rstd1, call.scores, call.pooled, call.context)
    attention = _attention(call._replace(dy=dmiddle), "backward", x, *kept)
    maps = maps_backward(attention, dmiddle, (qkv_weight, out_weight), of_qkv, call.sums)
    projection = Linear(weights[1], call.out_bias)
    out = rows.second_weight_parts(dmiddle, maps.attended, projection, call.output_dropout, call.seed)
    return maps.dx, *_parameters_backward(call, weights[0], maps, fc1, out, fc2)


def _parameters_backward(
    call: Call, qkv_weight: Tensor, maps: Maps, fc1: Parts, out: Parts, fc2: Parts
) -> tuple[Tensor, ...]:
    """The gradients of all parameters, in the order of the arguments."""
    channels, hidden = call.x.shape[-1], call.weight1.shape[0]
    norm = contiguous(call.norm1_weight, call.norm1_bias)
    of_norm = tuple(torch.empty_like(t) for t in norm)
    of_qkv = torch.empty_like(qkv_weight), None if call.qkv_bias is None else torch.empty_like(call.qkv_bias)
    parts = (len(maps.value[0]), len(maps.value[2]), len(maps.key), len(maps.dbias))
    grid = (cdiv(channels, 32), cdiv(max(channels, hidden), 16), 6)
    with on_device(call.x):
        separable_layer_kernels.separable_gradient_kernel[grid](
            maps.value, (maps.key, maps.dbias, maps.norm), (*norm, *of_norm), (qkv_weight, *of_qkv),
            fc1.tensors, out.tensors, fc2.tensors, *parts, *fc1.counts, *out.counts, *fc2.counts,
            LANES=maps.key.shape[-1], C=channels, F=hidden, BLOCK_C=32, BLOCK_O=16, BLOCK_F=32, num_warps=4,
            **Rows.of(call.x).unhurried(),
        )  # fmt: skip
    like = maps.dx
    qkv = tuple(like.new_empty(0) if t is None else t for t in of_qkv)
    return *of_norm, *qkv, *out.gradients(like), *fc1.gradients(like), *fc2.gradients(like)
