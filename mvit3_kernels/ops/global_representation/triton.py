"""Triton kernels of global_representation: without gradients all layers of a stage and its final norm in one launch;
with them the launches of a layer, which are those of its ops (of separable attention: separable_layer.py).

Without gradients:

A program owns tokens on which nothing else of the map has an effect, takes them through all layers, and walks over them
a tile of rows at a time. Between two walks they lie in y, and the queries, keys and values of one layer in a small
workspace. Both belong to this program alone and are read again within microseconds, so that they stay in cache, and a
barrier of the program is all the order that they need. The price is that a program's tokens wait for each other: a map
that would keep fewer than half of the multiprocessors busy is left to the ops.

- Multi-head attention never leaves a group, the tokens of a sample that share their position inside a patch, nor does
  anything else of a layer whose norms are of tokens. So the unit is a few groups that fill a tile: one or two of a
  16x16 map in 2x2 patches, four or eight of an 8x8 map. Where norms are of samples it is a sample.
- Separable attention has norms of samples in all networks, so the unit is a sample of any size. A layer is three walks:
  the scores and the mean of tokens that they weight (identity D: no keys), the values, the feed-forward network. Who
  writes tokens adds up their moments for the norm that comes next.

Weights stream from the second-level cache, once for each tile of rows, which is why tiles are as high as registers
allow. They are passed as a tuple of pointers, of which a program selects its layer's: no copy of weights into one
buffer, no table of addresses that a CUDA graph would have to upload, and one binary for each number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..dropout.triton import drop
from ..feed_forward.triton import feed_forward_forward, hidden_backward, parameters
from ..norm_linear.triton import norm_linear_forward
from ..patch_attention.triton import patch_attention_backward, patch_attention_forward
from ..pointwise_conv.triton import Convolution, convolve
from ..registry import FORMS, Call
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
    TILE,
    kernels,
    layer_kernels,
    norm_kernels,
    packed_sizes,
    separable_kernels,
    spread_kernels,
    weights_of_layer,
)
from .separable_layer import (  # noqa: F401 -- launchers are looked up here
    global_representation_separable_layer_backward,
    global_representation_separable_layer_forward,
)
from .walks import FC1, NORM1, NORM2, QKV, TENSORS

_OLD_TRITON = triton.__version__.startswith(("3.6.", "3.7."))
TALL = 128  # rows of a tile where there are more than TILE for each multiprocessor
# Of the kernels that are spread over a GPU: tokens of a program, outputs of qkv and hidden channels at a time, and the
# most shares that the hidden channels are divided into.
SPREAD_TOKENS, SPREAD_OUTPUTS, SPREAD_HIDDEN, MOST_SHARES = 16, 64, 64, 8
# Of those with separable attention: values and hidden channels at a time.
SPREAD_VALUES, SEPARABLE_HIDDEN = 32, 64


def configuration(x: Tensor, weight: Tensor, num_heads: int | None, rows: int = 0) -> dict[str, int]:
    """BLOCK_M rows of a tile, BLOCK_Q of them in attention, and the blocks of BLOCK_N outputs and BLOCK_F hidden
    channels that a program walks over, none of which spills. `rows`: how many rows may be split freely. Where they are
    more than one tile for each multiprocessor, a tall tile halves the traffic of weights, which is what bounds these
    kernels."""
    if x.dtype is torch.float32:  # no matrix units of this precision: products are made in registers
        warps, stages = (8, 1) if num_heads is None else (16, 2)
        return {"BLOCK_M": 16, "BLOCK_Q": 16, "BLOCK_N": 16, "BLOCK_F": 16, "num_warps": warps, "num_stages": stages}
    if multiplies_from_shared_memory(x):
        config = {"BLOCK_M": TILE, "BLOCK_Q": TILE, "BLOCK_N": 32, "BLOCK_F": 32, "num_warps": 8, "num_stages": 2}
        if num_heads is None and x.shape[-1] > 192:
            config["BLOCK_F"] = 16
        tall = num_heads is not None and x.shape[-1] > 128 and rows > TILE * multiprocessors(x)
        if _OLD_TRITON:
            tall = tall and x.shape[-1] <= 192 and weight.dtype is torch.float32  # the others spill
        if tall and x.dtype is torch.bfloat16:  # float16 spills in all that were tried
            config["BLOCK_M"] = TALL
            if x.shape[-1] > 192:
                config |= {"BLOCK_N": 64, "BLOCK_F": 16}
            elif weight.dtype is not torch.float32:
                config["BLOCK_F"] = 16
        return config
    hip = triton.runtime.driver.active.get_current_target().backend == "hip"  # 64 KiB of shared memory
    stages = 1 if hip or (num_heads is None and weight.dtype is not torch.float32) else 2  # 2 would spill there
    return {"BLOCK_M": 32, "BLOCK_Q": 32, "BLOCK_N": 16, "BLOCK_F": 16, "num_warps": 4, "num_stages": stages}


def bytes_moved(x: Tensor, layers: int) -> int:
    """Bytes of full-size tensors that a call reads and writes: x and y, however many layers there are. (What a program
    hands from one walk to the next stays in cache.)"""
    return 2 * x.numel() * x.element_size()


def global_representation_inference(call: Call) -> Tensor:
    """Launches all layers and the final norm."""
    x = call.x.contiguous()
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    head, tail = two_tiles(x.shape[-1], even=False)
    pointers = contiguous(*call.layers)
    inputs = (x, pointers, *contiguous(call.norm_weight, call.norm_bias), y)
    flags = {
        "PER_SAMPLE": call.per_sample, "LAYERS": len(pointers) // TENSORS.value,
        "PATCH_H": call.patch_height, "PATCH_W": call.patch_width,
        "F": pointers[FC1.value].shape[0], "C": x.shape[-1], "HEAD": head, "TAIL": tail,
    }  # fmt: skip
    with on_device(x):
        launch = _launch_separable if call.num_heads is None else _launch_transformer
        launch(call, inputs, flags)
    return y


def _launch_separable(call: Call, inputs: tuple, flags: dict[str, int]) -> None:
    x = inputs[0]
    batch, height, width, channels = x.shape
    positions, pixels = call.patch_height * call.patch_width, height * width
    config = configuration(x, call.layers[QKV.value], None)
    config.pop("BLOCK_Q")
    context = x.new_empty(batch, positions, channels, dtype=torch.float32)
    tiles = triton.cdiv(pixels, config["BLOCK_M"])
    lanes = max(triton.next_power_of_2(positions), 16)  # which a product needs
    kernels.separable_fwd_kernel[(batch,)](
        *inputs, context, pixels, width, tiles, call.eps, POSITIONS=lanes, **flags, **config
    )


def _launch_transformer(call: Call, inputs: tuple, flags: dict[str, int]) -> None:
    x = inputs[0]
    batch, height, width, channels = x.shape
    positions, pixels = call.patch_height * call.patch_width, height * width
    groups, tokens, dim = batch * positions, pixels // positions, channels // call.num_heads
    group = max(triton.next_power_of_2(tokens), 16)  # rows that a group takes
    config = configuration(x, call.layers[QKV.value], call.num_heads, 0 if call.per_sample else groups * group)
    block = config["BLOCK_M"]
    per_program = positions if call.per_sample else max(max(TILE, block) // group, 1)
    programs, tiles = triton.cdiv(groups, per_program), triton.cdiv(per_program * group, block)
    qkv = x.new_empty(programs * tiles * block, 3 * channels)
    scale = kernels.LOG2E.value / math.sqrt(dim)
    kernels.transformer_fwd_kernel[(programs,)](
        *inputs, qkv, groups, per_program, tokens, pixels, width, tiles, call.eps, scale,
        HEADS=call.num_heads, DIM=dim, GROUP=group, BLOCK_D=max(triton.next_power_of_2(dim), 16), **flags, **config,
    )  # fmt: skip


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
    return triton.cdiv(triton.cdiv(channels, step), shares) * step


def spread(x: Tensor, tokens: int, groups: int, hidden: int) -> Spread:
    """Small blocks of tokens, and shares of what they are multiplied by until programs fill a GPU once."""
    block = SPREAD_TOKENS
    blocks, tiles = triton.cdiv(tokens, block), triton.cdiv(tokens * groups, block)
    keys = max(triton.next_power_of_2(tokens), 16)
    outputs = _share(x, 3 * x.shape[-1], tiles, SPREAD_OUTPUTS, 16)
    return Spread(block, blocks, keys, outputs, _share(x, hidden, groups * blocks, SPREAD_HIDDEN, MOST_SHARES))


def _rounded(x: Tensor, layers: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What the layers are made of, with weights of linear maps in the dtype of x: all of a stage in one launch. Each
    program reads them as it finds them in the cache, which would be twice the bytes, and conversions, in float32."""
    pointers = contiguous(*layers)
    weights = [i for i in range(0, len(pointers), 2) if i % TENSORS.value not in (NORM1.value, NORM2.value)]
    given = tuple(pointers[i] for i in weights)
    rounded = dict(zip(weights, _unpack(_pack(x, given), given), strict=True))
    return tuple(rounded.get(i, t) for i, t in enumerate(pointers))


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
    pointers = _rounded(x, call.layers)
    hidden = pointers[FC1.value].shape[0]
    plan = spread(x, tokens, groups, hidden)
    parts = triton.cdiv(hidden, plan.hidden)
    head, tail = two_tiles(channels, even=False)
    # tiles of more columns than rows, whose products Triton divides among warps by columns
    tiles = {"C": channels, "HEAD": max(head, 32), "TAIL": max(tail, 32)}
    heads = {"HEADS": call.num_heads, "DIM": dim, "BLOCK_D": max(triton.next_power_of_2(dim), 16)}
    before, between, qkv = (x.new_empty(rows, n * channels) for n in (1, 1, 3))
    part = x.new_empty(parts, rows, channels, dtype=torch.float32)
    programs = groups * plan.blocks
    counter = x.new_empty(programs, dtype=torch.int32)
    of_qkv = {**patch, **tiles, "PARTS": parts, "PROGRAMS": triton.next_power_of_2(programs)}
    last, final = (x, None, None), contiguous(call.norm_weight, call.norm_bias)
    with on_device(x):
        for first in range(0, len(pointers), TENSORS.value):
            norm1, to_qkv, out, norm2, fc1, fc2 = zip(*[iter(pointers[first : first + TENSORS.value])] * 2, strict=True)
            spread_kernels.qkv_fwd_kernel[(triton.cdiv(rows, plan.block), triton.cdiv(3 * channels, plan.outputs))](
                *last, *norm1, *to_qkv, before, qkv, None if first else counter,
                rows, tokens, pixels, width, programs, call.eps,
                SHARE=plan.outputs, BLOCK_M=plan.block, BLOCK_N=SPREAD_OUTPUTS, **of_qkv, num_warps=8, num_stages=2,
            )  # fmt: skip
            ends = first + TENSORS.value == len(pointers)
            spread_kernels.layer_fwd_kernel[(programs, parts)](
                before, qkv, *out, *norm2, *fc1, fc2[0], between, part,
                *((fc2[1], *final, counter, y) if ends else (None,) * 5),
                rows, tokens, pixels, width, plan.blocks, call.eps, kernels.LOG2E.value / math.sqrt(dim),
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
    blocks = triton.cdiv(tokens, block)
    pointers = _rounded(x, call.layers)
    hidden = pointers[FC1.value].shape[0]
    programs = groups * blocks
    values = _share(x, channels, programs, SPREAD_VALUES, MOST_SHARES)
    features = _share(x, hidden, programs, SEPARABLE_HIDDEN, MOST_SHARES)
    attend_shares, feed_shares = triton.cdiv(channels, values), triton.cdiv(hidden, features)
    head, tail = two_tiles(channels, even=False)
    # tiles of more columns than rows, whose products Triton divides among warps by columns
    tiles = {"C": channels, "HEAD": max(head, 32), "TAIL": max(tail, 32), "BLOCK_M": block}
    of_sample = {"BLOCKS": triton.next_power_of_2(positions * blocks)}
    patch = {"PATCH_H": call.patch_height, "PATCH_W": call.patch_width}
    layer = {**of_sample, "POSITIONS": positions, **tiles, "num_warps": 16, "num_stages": 2}
    keys = min(max(triton.next_power_of_2(tokens), 16), 64 if channels <= 128 else 32)  # 64 wider rows would spill
    t, between = (x.new_empty(rows, channels) for _ in range(2))
    moments, new_moments = (x.new_empty(2, programs, dtype=torch.float32) for _ in range(2))
    counter = x.new_empty(programs, dtype=torch.int32)
    part = x.new_empty(max(attend_shares, feed_shares), rows, channels, dtype=torch.float32)
    with on_device(x):
        separable_kernels.enter_fwd_kernel[(programs,)](
            x, t, moments, counter, tokens, pixels, width, blocks, **patch, **tiles, num_warps=4
        )
        for first in range(0, len(pointers), TENSORS.value):
            norm1, qkv, out, norm2, fc1, fc2 = zip(*[iter(pointers[first : first + TENSORS.value])] * 2, strict=True)
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
    rounded = packed.split(packed_sizes(packed, weights))
    return tuple(t[: weight.numel()].view(weight.shape) for t, weight in zip(rounded, weights, strict=True))


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
    packed = _pack(x, weights)
    qkv_weight, out_weight, weight1, weight2 = _unpack(packed, weights)
    seed, output_seed, ffn_seed = _seeds(call)
    kind = (call.eps, call.per_sample)
    norm = (call.norm1_weight, call.norm1_bias, *kind)
    qkv, *first = norm_linear_forward(FORMS["norm_linear_forward"].call(x, *norm, qkv_weight, call.qkv_bias))
    out, lse = patch_attention_forward(FORMS["patch_attention_forward"].call(qkv, *_attention(call, seed)))
    residual = x if call.output_dropout == 0 else None
    middle = convolve(Convolution(out, None, out_weight, call.out_bias, None, IDENTITY.value, residual))
    if residual is None:
        middle = drop(middle, call.output_dropout, output_seed, x)
    norm = (call.norm2_weight, call.norm2_bias, *kind)
    rest = (*_feed_forward(call, weight1, weight2, ffn_seed), False)
    y, *second, _ = feed_forward_forward(FORMS["feed_forward_forward"].call(middle, *norm, *rest))
    return y, qkv, out, lse, *first, middle, *second, packed


def global_representation_layer_backward(call: Call) -> tuple[Tensor, ...]:
    """Launches the backward pass of a layer: the gradients of x and of its parameters (empty where there is none)."""
    dy, x, out, packed = contiguous(call.dy, call.x, call.out, call.packed)
    weights = contiguous(*weights_of_layer(call))
    qkv_weight, out_weight, weight1, weight2 = _unpack(packed, weights)
    seed, output_seed, ffn_seed = _seeds(call)
    rows, channels = Rows.of(x), x.shape[-1]

    norm = (call.norm2_weight, call.norm2_bias, call.per_sample)
    rest = (*_feed_forward(call, *weights[2:], ffn_seed), call.mean2, call.rstd2, x.new_empty(0))
    ffn = FORMS["feed_forward_backward"].call(dy, call.middle, *norm, *rest)
    norm, linear1, linear2 = parameters(ffn)
    hidden, dpre, _ = hidden_backward(ffn, dy, weight1, weight2)
    dmiddle, fc1 = Rows.of(call.middle).norm_linear_parts(dpre, norm, linear1, ffn.mean, ffn.rstd, dy, weight1)
    fc2 = rows.second_weight_parts(dy, hidden, linear2, call.ffn_output_dropout, ffn_seed)
    del hidden, dpre

    dout = dmiddle if call.output_dropout == 0 else drop(dmiddle, call.output_dropout, output_seed, None)
    projection = Linear(weights[1], call.out_bias)
    out_proj = rows.second_weight_parts(dout, out.view(-1, channels), projection, 0.0, None)
    dout = (dout.view(-1, channels) @ out_weight.flatten(1)).view(x.shape)
    dqkv = patch_attention_backward(
        FORMS["patch_attention_backward"].call(dout, call.qkv, out, call.lse, *_attention(call, seed))
    )
    norm = LayerNorm(call.norm1_weight, call.norm1_bias, per_sample=call.per_sample)
    linear, statistics = Linear(weights[0], call.qkv_bias), contiguous(call.mean1, call.rstd1)
    dx, qkv = rows.norm_linear_parts(dqkv, norm, linear, *statistics, dmiddle, qkv_weight)
    parts, features = (qkv, fc1, out_proj, fc2), weight1.shape[0]
    blocks = triton.cdiv(channels, 32), triton.cdiv(max(3 * channels, features), 16)
    with on_device(x):
        layer_kernels.layer_gradient_kernel[(*blocks, len(parts))](
            *(p.tensors for p in parts), *(count for p in parts for count in p.counts),
            C=channels, F=features, BLOCK_C=32, BLOCK_O=16, BLOCK_F=32, num_warps=4,
        )  # fmt: skip
    first, second, third, fourth = (p.gradients(x) for p in parts)
    return dx, *first, *third, *second, *fourth


# The final norm in training


def global_representation_norm_forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the forward pass: y, and mean and rstd = 1 / sqrt(variance + eps) of each token."""
    rows = Rows.of(call.x)
    y = torch.empty_like(rows.x)
    mean, rstd = (rows.float32(rows.rows) for _ in range(2))
    if rows.rows:
        with on_device(y):
            norm_kernels.norm_fwd_kernel[(triton.cdiv(rows.rows, 16),)](
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
        norm_kernels.norm_gradient_kernel[(triton.cdiv(channels, 32),)](
            part, dweight, dbias, parts, C=channels, BLOCK=32, num_warps=4
        )
    return dx, dweight, dbias
