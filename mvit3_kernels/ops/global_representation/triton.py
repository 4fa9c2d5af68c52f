"""Triton kernels of global_representation: the launches of all layers of a stage in one op, which are those of a
layer's ops and of the final norm.

Without gradients weights are rounded to the dtype of x for the whole stage at once, and nothing is kept that only a
backward pass would read. Of few tokens, where tiles of the ops would leave most of a GPU idle, a layer of multi-head
attention is two launches of spread_kernels.py, and programs of a stage's first launch round its weights.

With gradients a layer is a node of autograd (of separable attention: separable_layer.py).

A kernel that takes tokens through all layers in one launch moves the fewest bytes, but bytes are not what these layers
wait for: it had one block on a multiprocessor, whose phases do not overlap, and took half as long again as the
launches of the ops (benchmarks/NOTES.md).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..dropout.triton import drop
from ..feed_forward.triton import Projected, feed, feed_forward_forward, hidden_backward, parameters
from ..norm_linear.triton import norm_linear_forward
from ..patch_attention.triton import LOG2E, attend, patch_attention_backward, patch_attention_forward
from ..pointwise_conv.triton import Convolution, convolve
from ..registry import FORMS, Call
from ..separable_attention.triton import separable_attention_inference
from ..sizes import cdiv, next_power_of_2
from ..triton_common import (
    IDENTITY,
    contiguous,
    multiplies_from_shared_memory,
    multiprocessors,
    on_device,
    split_rows,
)
from ..triton_rows import Rows, two_tiles
from ..types import LayerNorm, Linear
from . import (
    MOST_SPREAD,
    norm_kernels,
    packed_sizes,
    separable_kernels,
    spread_kernels,
    weights_of_layer,
)
from .layer_gradients import Summed, parameter_gradients
from .separable_layer import (  # noqa: F401 -- launchers are looked up here
    global_representation_separable_layer_backward,
    global_representation_separable_layer_forward,
)

# Of the kernels that are spread over a GPU: tokens of a program, outputs of qkv and hidden channels at a time, and the
# most shares that the hidden channels are divided into.
SPREAD_TOKENS, SPREAD_OUTPUTS, SPREAD_HIDDEN, MOST_SHARES = 16, 64, 64, 8
# Of those with separable attention: values and hidden channels at a time.
SPREAD_VALUES, SEPARABLE_HIDDEN = 32, 64
ROUNDED_VALUES = 8192  # of a weight, by a program


def bytes_moved(x: Tensor, layers: int, num_heads: int | None) -> int:
    """Bytes of full-size tensors that the ops of a call read and write, with a norm of samples where attention is
    separable: of a layer of heads x and queries, keys and values, these and what attention makes of them, that, x and
    their sum, and twice as much as x in the feed-forward network; and the final norm."""
    of_layer, final = (7, 3) if num_heads is None else (13, 2)
    return (of_layer * layers + final) * x.numel() * x.element_size()


class _Layer(NamedTuple):
    """The tensors of a layer, as `_flat` of the package has them."""

    norm1_weight: Tensor
    norm1_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    norm2_weight: Tensor
    norm2_bias: Tensor
    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None


def _layers(call: Call) -> list[_Layer]:
    """The layers of a call without gradients."""
    tensors = contiguous(*call.layers)
    return [_Layer._make(own) for own in zip(*[iter(tensors)] * len(_Layer._fields), strict=True)]


def _weights(layers: list[_Layer]) -> tuple[Tensor, ...]:
    return tuple(weight for layer in layers for weight in weights_of_layer(layer))


def _with_weights(layers: list[_Layer], weights: tuple[Tensor, ...]) -> list[_Layer]:
    """The layers with these in the places of their weights."""
    names = ("qkv_weight", "out_weight", "weight1", "weight2")
    each = zip(*[iter(weights)] * len(names), strict=True)
    return [layer._replace(**dict(zip(names, own, strict=True))) for layer, own in zip(layers, each, strict=True)]


class Rounding(NamedTuple):
    """Weights that programs of a stage's first launch round, none where they have the dtype of x: the tensors, where
    they are then, the number of programs, and the constants of the kernel."""

    weights: tuple[Tensor, ...]
    packed: Tensor | None
    programs: int
    constants: dict[str, int | tuple[int, ...]]

    @staticmethod
    def of(x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Rounding, tuple[Tensor, ...]]:
        """Also the rounded weights, which the launch writes; those of several dtypes a launch of their own."""
        sizes = packed_sizes(x, weights)
        if not any(sizes) or len({weight.dtype for weight in weights}) > 1:
            return _NOTHING_ROUNDED, _unpack(_pack(x, weights), weights)
        numels = tuple(weight.numel() for weight in weights)
        programs = sum(cdiv(numel, ROUNDED_VALUES) for numel in numels)
        packed = x.new_empty(sum(sizes))
        constants = {"SIZES": numels, "BLOCK": ROUNDED_VALUES}
        return Rounding(weights, packed, programs, constants), _unpack(packed, weights)


_NOTHING_ROUNDED = Rounding((), None, 0, {"SIZES": (), "BLOCK": ROUNDED_VALUES})


def global_representation_inference(call: Call) -> Tensor:
    """Launches the ops of all layers, and the final norm."""
    x, kind, patch = call.x.contiguous(), (call.eps, call.per_sample), (call.patch_height, call.patch_width)
    if x.numel() == 0:
        return torch.empty_like(x)
    layers = _layers(call)
    if not Rows.of(x).few():  # of few rows a launch takes longer than it saves
        weights = _weights(layers)
        layers = _with_weights(layers, _unpack(_pack(x, weights), weights))
    for layer in layers:
        norm, qkv, out = layer[:2], layer[2:4], layer[4:6]
        if call.num_heads is None:
            attention = FORMS["separable_attention_inference"].call(x, *norm, *kind, *qkv, *out, *patch)
            x = separable_attention_inference(attention)
        else:
            projected, *_ = norm_linear_forward(FORMS["norm_linear_forward"].call(x, *norm, *kind, *qkv))
            tokens = attend(FORMS["patch_attention_forward"].call(projected, call.num_heads, *patch, 0.0, None), None)
        network = FORMS["feed_forward_forward"].call(x, *layer[6:8], *kind, *layer[8:], 0.0, 0.0, None, False)
        if call.num_heads is None:
            x, *_ = feed_forward_forward(network)
        else:
            _, x, *_ = _project_and_feed(network, tokens, Linear(*out), x)
    if call.norm_weight is None:
        return x
    if call.per_sample:
        return _norm_of_samples(x, call)
    return global_representation_norm_forward(
        FORMS["global_representation_norm_forward"].call(x, call.norm_weight, call.norm_bias, call.eps)
    )[0]


def _project_and_feed(ffn: Call, attended: Tensor, out: Linear, residual: Tensor) -> tuple[Tensor, ...]:
    """Attention's projection with its residual, and the feed-forward network behind it, which are one launch where the
    norm between them is of tokens and nothing is dropped: what is between them, y, mean and rstd. `ffn.x` is ignored;
    weights are as they are multiplied."""
    weights = ffn.weight1, ffn.weight2
    # Tiles of both products in float32 are more than an AMD GPU's shared memory.
    large = residual.dtype is torch.float32 and not multiplies_from_shared_memory(residual)
    if large or ffn.per_sample or ffn.hidden_dropout or ffn.output_dropout:
        middle = convolve(Convolution(attended, None, *out, None, IDENTITY.value, residual))
        return middle, *feed(ffn._replace(x=middle), weights)[:3]
    middle = torch.empty_like(residual)
    return middle, *feed(ffn._replace(x=middle), weights, projected=Projected(attended, *out, residual))[:3]


def _norm_of_samples(x: Tensor, call: Call) -> Tensor:
    """The final norm where it is of samples."""
    rows, y = Rows.of(x), torch.empty_like(x)
    mean, rstd = rows.statistics(call.eps, per_sample=True)
    with on_device(x):
        norm_kernels.sample_norm_fwd_kernel[(cdiv(rows.rows, 16),)](
            rows.x, *contiguous(call.norm_weight, call.norm_bias), mean, rstd, y, rows.rows, rows.rows_per_sample,
            **rows.tiles, BLOCK_M=16, num_warps=4,
        )  # fmt: skip
    return y


class Spread(NamedTuple):
    """How the launches of a layer are divided: BLOCK_M tokens, blocks of them and keys in a group; outputs of
    qkv and hidden channels of a program."""

    block: int
    blocks: int
    keys: int
    outputs: int
    hidden: int


def _share(x: Tensor, channels: int, programs: int, step: int, most: int) -> int:
    """Channels of a program, `step` at a time, of which there are at most `most` shares: so many that with `programs`
    blocks of tokens they fill a GPU once."""
    shares = min(max(multiprocessors(x) // programs, 1), most)
    shares = 1 << (shares.bit_length() - 1)  # few numbers of parts, each of which makes a binary
    return cdiv(cdiv(channels, step), shares) * step


def spread(x: Tensor, tokens: int, groups: int, hidden: int) -> Spread:
    """Small blocks of tokens, and shares of what they are multiplied by until programs fill a GPU once."""
    block = SPREAD_TOKENS
    blocks, tiles = cdiv(tokens, block), cdiv(tokens * groups, block)
    keys = max(next_power_of_2(tokens), 16)
    outputs = _share(x, 3 * x.shape[-1], tiles, SPREAD_OUTPUTS, 16)
    return Spread(block, blocks, keys, outputs, _share(x, hidden, groups * blocks, SPREAD_HIDDEN, MOST_SHARES))


def global_representation_spread_inference(call: Call) -> Tensor:
    """Launches two kernels a layer. Those of separable attention have one in front of them and one for the final
    norm."""
    x = call.x.contiguous()
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    if call.num_heads is None:
        _launch_spread_separable(call, x, y)
        return y
    batch, height, width, channels = x.shape
    pixels, patch = height * width, {"PATCH_H": call.patch_height, "PATCH_W": call.patch_width}
    groups = batch * call.patch_height * call.patch_width
    rows, tokens, dim = batch * pixels, batch * pixels // groups, channels // call.num_heads
    layers = _layers(call)
    first_qkv, *later = _weights(layers)  # the first launch reads its own weight as it is
    rounding, rounded = Rounding.of(x, tuple(later))
    layers = _with_weights(layers, (first_qkv, *rounded))
    hidden = layers[0].weight1.shape[0]
    plan = spread(x, tokens, groups, hidden)
    parts = cdiv(hidden, plan.hidden)
    head, tail = two_tiles(channels, even=False)
    # tiles of more columns than rows, whose products Triton divides among warps by columns
    tiles = {"C": channels, "HEAD": max(head, 32), "TAIL": max(tail, 32)}
    heads = {"HEADS": call.num_heads, "DIM": dim, "BLOCK_D": max(next_power_of_2(dim), 16)}
    before, between, qkv = (x.new_empty(rows, n * channels) for n in (1, 1, 3))
    part = x.new_empty(parts, rows, channels, dtype=torch.float32)
    programs = groups * plan.blocks
    counter = x.new_empty(programs, dtype=torch.int32)
    tiles_of_rows, shares = cdiv(rows, plan.block), cdiv(3 * channels, plan.outputs)
    of_qkv = {**patch, **tiles, "PARTS": parts, "PROGRAMS": next_power_of_2(programs)}
    last, final = (x, None, None), contiguous(call.norm_weight, call.norm_bias)
    with on_device(x):
        for layer in layers:
            norm1, to_qkv, out, norm2, fc1, fc2 = zip(*[iter(layer)] * 2, strict=True)
            is_first = layer is layers[0]
            own = rounding if is_first else _NOTHING_ROUNDED
            spread_kernels.qkv_fwd_kernel[(tiles_of_rows + cdiv(own.programs, shares), shares)](
                *last, *norm1, *to_qkv, before, qkv, counter if is_first else None, own.weights, own.packed,
                rows, tokens, pixels, width, programs, tiles_of_rows, call.eps, **own.constants,
                SHARE=plan.outputs, BLOCK_M=plan.block, BLOCK_N=SPREAD_OUTPUTS, **of_qkv, num_warps=8, num_stages=2,
            )  # fmt: skip
            spread_kernels.layer_fwd_kernel[(programs, parts)](
                before, qkv, *out, *norm2, *fc1, fc2[0], between, part,
                *((fc2[1], *final, counter, y) if layer is layers[-1] else (None,) * 5),
                rows, tokens, pixels, width, plan.blocks, call.eps, LOG2E / math.sqrt(dim),
                PARTS=parts, F=hidden, SHARE=plan.hidden, BLOCK_M=plan.block, BLOCK_K=plan.keys,
                BLOCK_F=SPREAD_HIDDEN, **patch, **heads, **tiles,
                num_warps=16 if channels > 64 else 8, num_stages=2,
            )  # fmt: skip
            last = (between, part, fc2[1])
    return y


def _launch_spread_separable(call: Call, x: Tensor, y: Tensor) -> None:
    batch, height, width, channels = x.shape
    pixels, positions = height * width, call.patch_height * call.patch_width
    groups, tokens = batch * positions, pixels // positions
    rows = batch * pixels
    block = SPREAD_TOKENS if rows <= MOST_SPREAD else 2 * SPREAD_TOKENS
    blocks = cdiv(tokens, block)
    layers = _layers(call)
    rounding, rounded = Rounding.of(x, _weights(layers))
    layers = _with_weights(layers, rounded)
    hidden = layers[0].weight1.shape[0]
    programs = groups * blocks
    values = _share(x, channels, programs, SPREAD_VALUES, MOST_SHARES)
    features = _share(x, hidden, programs, SEPARABLE_HIDDEN, MOST_SHARES)
    attend_shares, feed_shares = cdiv(channels, values), cdiv(hidden, features)
    head, tail = two_tiles(channels, even=False)
    # tiles of more columns than rows, whose products Triton divides among warps by columns
    tiles = {"C": channels, "HEAD": max(head, 32), "TAIL": max(tail, 32), "BLOCK_M": block}
    of_sample = {"BLOCKS": next_power_of_2(positions * blocks)}
    patch = {"PATCH_H": call.patch_height, "PATCH_W": call.patch_width}
    layer = {**of_sample, "POSITIONS": positions, **tiles, "num_warps": 16, "num_stages": 2}
    keys = min(max(next_power_of_2(tokens), 16), 64 if channels <= 128 else 32)  # 64 wider rows would spill
    t, between = (x.new_empty(rows, channels) for _ in range(2))
    moments, new_moments = (x.new_empty(2, programs, dtype=torch.float32) for _ in range(2))
    counter = x.new_empty(programs, dtype=torch.int32)
    part = x.new_empty(max(attend_shares, feed_shares), rows, channels, dtype=torch.float32)
    with on_device(x):
        separable_kernels.enter_fwd_kernel[(programs + rounding.programs,)](
            x, t, moments, counter, rounding.weights, rounding.packed, tokens, pixels, width, blocks, programs,
            **rounding.constants, **patch, **tiles, num_warps=4,
        )  # fmt: skip
        for of_layer in layers:
            norm1, qkv, out, norm2, fc1, fc2 = zip(*[iter(of_layer)] * 2, strict=True)
            separable_kernels.attend_fwd_kernel[(programs, attend_shares)](
                t, moments, *norm1, *qkv, *out, part, counter, between, new_moments, rows, tokens, blocks, call.eps,
                SHARES=attend_shares, SHARE=values, BLOCK_K=keys, BLOCK_N=SPREAD_VALUES, **layer,
            )  # fmt: skip
            separable_kernels.feed_fwd_kernel[(programs, feed_shares)](
                between, new_moments, *norm2, *fc1, *fc2, part, counter, t, moments, rows, tokens, blocks, call.eps,
                SHARES=feed_shares, F=hidden, SHARE=features, BLOCK_F=SEPARABLE_HIDDEN, **layer,
            )  # fmt: skip
        separable_kernels.leave_fwd_kernel[(programs,)](
            t, moments, *contiguous(call.norm_weight, call.norm_bias), y, tokens, pixels, width, blocks, call.eps,
            **patch, **of_sample, **tiles, num_warps=4,
        )  # fmt: skip


# A layer in training


def _pack(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """The weights in the dtype of x, one behind the other, in one launch."""
    sizes = packed_sizes(x, weights)
    packed = x.new_empty(sum(sizes))
    if packed.numel():
        torch._foreach_copy_(list(_unpack(packed, weights)), list(weights))
    return packed


def _unpack(packed: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The weights as products read them."""
    if not packed.numel():
        return weights
    rounded, first = [], packed.storage_offset()
    for weight, size in zip(weights, packed_sizes(packed, weights), strict=True):
        rounded.append(packed.as_strided(weight.shape, weight.stride(), first))  # one call of PyTorch for each
        first += size
    return tuple(rounded)


def _multiplying(call: Call, packed: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Those of a layer as products read them: rounded beforehand, for a whole network, or `packed` in forward."""
    return _unpack(packed if call.rounded is None else call.rounded, weights)


def _seeds(call: Call) -> tuple[Tensor | None, ...]:
    """Of attention, its output and the feed-forward network."""
    rates = ((call.attention_dropout,), (call.output_dropout,), (call.hidden_dropout, call.ffn_output_dropout))
    return tuple(call.seed + i if i and any(p) else call.seed for i, p in enumerate(rates))


def _attention(call: Call, seed: Tensor | None) -> tuple:
    """The last arguments of patch_attention."""
    return call.num_heads, call.patch_height, call.patch_width, call.attention_dropout, seed


def _feed_forward(call: Call, weight1: Tensor, weight2: Tensor, seed: Tensor | None) -> tuple:
    """The last arguments of feed_forward but for what backward keeps."""
    dropouts = call.hidden_dropout, call.ffn_output_dropout
    return weight1, call.bias1, weight2, call.bias2, *dropouts, seed


def global_representation_layer_forward(call: Call) -> tuple[Tensor, ...]:
    """Launches the forward pass of a layer: y, and what backward needs."""
    x, weights = call.x.contiguous(), contiguous(*weights_of_layer(call))
    packed = _pack(x, weights) if call.rounded is None else x.new_empty(0)
    qkv_weight, out_weight, weight1, weight2 = _multiplying(call, packed, weights)
    seed, output_seed, ffn_seed = _seeds(call)
    kind = (call.eps, call.per_sample)
    norm = (call.norm1_weight, call.norm1_bias, *kind)
    qkv, *first = norm_linear_forward(FORMS["norm_linear_forward"].call(x, *norm, qkv_weight, call.qkv_bias))
    out, lse = patch_attention_forward(FORMS["patch_attention_forward"].call(qkv, *_attention(call, seed)))
    projection = Linear(out_weight, *contiguous(call.out_bias))
    rest = (*_feed_forward(call, weight1, weight2, ffn_seed), False)
    ffn = FORMS["feed_forward_forward"].call(x, call.norm2_weight, call.norm2_bias, *kind, *rest)
    if call.output_dropout == 0:
        middle, y, *second = _project_and_feed(ffn, out, projection, x)
    else:
        middle = convolve(Convolution(out, None, *projection, None, IDENTITY.value, None))
        middle = drop(middle, call.output_dropout, output_seed, x)
        y, *second, _ = feed(ffn._replace(x=middle), (weight1, weight2))
    return y, qkv, out, lse, *first, middle, *second, packed


def global_representation_layer_backward(call: Call) -> tuple[Tensor, ...]:
    """Launches the backward pass of a layer: the gradients of x and of its parameters (empty where there is none)."""
    dy, x, out, packed = contiguous(call.dy, call.x, call.out, call.packed)
    weights = contiguous(*weights_of_layer(call))
    qkv_weight, out_weight, weight1, weight2 = _multiplying(call, packed, weights)
    seed, output_seed, ffn_seed = _seeds(call)
    rows, channels = Rows.of(x), x.shape[-1]

    norm = (*contiguous(call.norm2_weight, call.norm2_bias), call.per_sample)
    rest = (*_feed_forward(call, *weights[2:], ffn_seed), *contiguous(call.mean2, call.rstd2), x.new_empty(0))
    ffn = FORMS["feed_forward_backward"].call(dy, call.middle, *norm, *rest)
    norm2, linear1, linear2 = parameters(ffn)
    hidden, dpre, _ = hidden_backward(ffn, dy, weight1, weight2)
    statistics1, statistics2 = contiguous(call.mean1, call.rstd1), (ffn.mean, ffn.rstd)
    middle = Rows.of(call.middle)
    # the gradient of what attention hands its projection, where that of the projection is complete in one launch
    made = None if call.per_sample or call.output_dropout > 0 else (out_weight, torch.empty_like(x))
    with on_device(x):
        dmiddle = middle.input_gradient(dpre, dy, norm2, weight1, *statistics2, made=made)
    dout = dmiddle if call.output_dropout == 0 else drop(dmiddle, call.output_dropout, output_seed, None)
    dattended = (dout.view(-1, channels) @ out_weight.flatten(1)).view(x.shape) if made is None else made[1]
    dqkv = patch_attention_backward(
        FORMS["patch_attention_backward"].call(dattended, call.qkv, out, call.lse, *_attention(call, seed))
    )
    norm1 = LayerNorm(*contiguous(call.norm1_weight, call.norm1_bias), per_sample=call.per_sample)
    with on_device(x):
        dx = rows.input_gradient(dqkv, dmiddle, norm1, qkv_weight, *statistics1)
    if call.ffn_output_dropout > 0:
        dy = drop(dy, call.ffn_output_dropout, ffn_seed, None, site=1)
    maps = (
        Summed(dqkv, rows.x, Linear(weights[0], call.qkv_bias), norm1, *statistics1, qkv_weight),
        Summed(dpre, middle.x, linear1, norm2, *statistics2, weight1),
        Summed(dout, out, Linear(weights[1], call.out_bias)),
        Summed(dy, hidden, linear2),
    )
    first, second, third, fourth = parameter_gradients(rows, maps)
    return dx, *first, *third, *second, *fourth


# The final norm in training


def global_representation_norm_forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the forward pass: y, and mean and rstd = 1 / sqrt(variance + eps) of each token."""
    rows = Rows.of(call.x)
    y = torch.empty_like(rows.x)
    mean, rstd = (rows.float32(rows.rows) for _ in range(2))
    if rows.rows:
        with on_device(y):
            norm_kernels.norm_fwd_kernel[(cdiv(rows.rows, 16),)](
                rows.x, *contiguous(call.weight, call.bias), y, mean, rstd, rows.rows, call.eps,
                **rows.tiles, BLOCK_M=16, num_warps=4,
            )  # fmt: skip
    return y, mean, rstd


def global_representation_norm_backward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the backward pass: the gradients of x, weight and bias."""
    rows, channels = Rows.of(call.x), call.x.shape[-1]
    dy, weight, mean, rstd = contiguous(call.dy, call.weight, call.mean, call.rstd)
    dx, dweight, dbias = torch.empty_like(rows.x), torch.empty_like(weight), torch.empty_like(weight)
    if not rows.rows:
        return dx, dweight.zero_(), dbias.zero_()
    parts, rows_per_part = split_rows(rows.rows, 2 * multiprocessors(dx), 16)
    part = rows.float32(parts, 2, channels)
    with on_device(dx):
        norm_kernels.norm_bwd_kernel[(parts,)](
            dy, rows.x, weight, mean, rstd, dx, part, rows.rows, rows_per_part,
            **rows.tiles, BLOCK_M=16, num_warps=8,
        )  # fmt: skip
        norm_kernels.norm_gradient_kernel[(cdiv(channels, 32),)](
            part, dweight, dbias, parts, C=channels, BLOCK=32, num_warps=4
        )
    return dx, dweight, dbias
