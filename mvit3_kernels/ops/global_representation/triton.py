"""Triton kernels of global_representation without gradients: all layers of a stage and its final norm in one launch.

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
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..registry import Call
from ..triton_common import contiguous, multiplies_from_shared_memory, multiprocessors, on_device
from ..triton_rows import two_tiles
from . import TILE, kernels, spread_kernels
from .walks import FC1, QKV, TENSORS

_OLD_TRITON = triton.__version__.startswith(("3.6.", "3.7."))
TALL = 128  # rows of a tile where there are more than TILE for each multiprocessor
# Of the kernels that are spread over a GPU: tokens of a program, outputs of qkv and hidden channels at a time, the most
# shares that the hidden channels are divided into, and tokens of a program of the final norm.
SPREAD_TOKENS, SPREAD_OUTPUTS, SPREAD_HIDDEN, MOST_SHARES, SPREAD_ROWS = 16, 64, 64, 8, 8


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


def spread(x: Tensor, tokens: int, groups: int, hidden: int) -> Spread:
    """Small blocks of tokens, and shares of what they are multiplied by until programs fill a GPU once."""
    block = SPREAD_TOKENS
    blocks, tiles = triton.cdiv(tokens, block), triton.cdiv(tokens * groups, block)
    keys = max(triton.next_power_of_2(tokens), 16)

    def share(channels: int, programs: int, step: int, most: int) -> int:
        shares = min(max(multiprocessors(x) // programs, 1), most)
        shares = 1 << (shares.bit_length() - 1)  # few numbers of parts, each of which makes a binary
        return triton.cdiv(triton.cdiv(channels, step), shares) * step

    outputs = share(3 * x.shape[-1], tiles, SPREAD_OUTPUTS, 16)
    return Spread(block, blocks, keys, outputs, share(hidden, groups * blocks, SPREAD_HIDDEN, MOST_SHARES))


def global_representation_spread_inference(call: Call) -> Tensor:
    """Launches two kernels a layer, and the final norm."""
    x = call.x.contiguous()
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    batch, height, width, channels = x.shape
    pixels, patch = height * width, {"PATCH_H": call.patch_height, "PATCH_W": call.patch_width}
    groups = batch * call.patch_height * call.patch_width
    rows, tokens, dim = batch * pixels, batch * pixels // groups, channels // call.num_heads
    pointers = contiguous(*call.layers)
    hidden = pointers[FC1.value].shape[0]
    plan = spread(x, tokens, groups, hidden)
    parts = triton.cdiv(hidden, plan.hidden)
    head, tail = two_tiles(channels, even=False)
    # tiles of more columns than rows, whose products Triton divides among warps by columns
    tiles = {"C": channels, "HEAD": max(head, 32), "TAIL": max(tail, 32)}
    heads = {"HEADS": call.num_heads, "DIM": dim, "BLOCK_D": max(triton.next_power_of_2(dim), 16)}
    before, between, qkv = (x.new_empty(rows, n * channels) for n in (1, 1, 3))
    part = x.new_empty(parts, rows, channels, dtype=torch.float32)
    last: tuple[Tensor | None, ...] = (x, None, None)
    with on_device(x):
        for first in range(0, len(pointers), TENSORS.value):
            norm1, to_qkv, out, norm2, fc1, fc2 = zip(*[iter(pointers[first : first + TENSORS.value])] * 2, strict=True)
            spread_kernels.qkv_fwd_kernel[(triton.cdiv(rows, plan.block), triton.cdiv(3 * channels, plan.outputs))](
                *last, *norm1, *to_qkv, before, qkv, rows, tokens, pixels, width, call.eps,
                PARTS=parts, SHARE=plan.outputs, BLOCK_M=plan.block, BLOCK_N=SPREAD_OUTPUTS, **patch, **tiles,
                num_warps=8, num_stages=2,
            )  # fmt: skip
            spread_kernels.layer_fwd_kernel[(groups * plan.blocks, parts)](
                before, qkv, *out, *norm2, *fc1, fc2[0], between, part,
                rows, tokens, plan.blocks, call.eps, kernels.LOG2E.value / math.sqrt(dim),
                F=hidden, SHARE=plan.hidden, BLOCK_M=plan.block, BLOCK_K=plan.keys, BLOCK_F=SPREAD_HIDDEN,
                **heads, **tiles, num_warps=16, num_stages=2,
            )  # fmt: skip
            last = (between, part, fc2[1])
        spread_kernels.finish_fwd_kernel[(triton.cdiv(rows, SPREAD_ROWS),)](
            *last, *contiguous(call.norm_weight, call.norm_bias), y, rows, tokens, pixels, width, call.eps,
            PARTS=parts, **patch, **tiles, BLOCK_M=SPREAD_ROWS, num_warps=4,
        )  # fmt: skip
    return y
