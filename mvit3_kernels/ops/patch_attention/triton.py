"""Triton kernels of patch_attention.

A group is one attention head of the pixels of a sample that share their position inside a patch. A program owns a block
of its tokens and walks over all of them. The heads of a block run side by side because they share cache lines: the part
of a pixel that belongs to a head is 32 to 128 bytes. Backward takes the block first as keys, then as queries, and
computes the scores twice. So nothing is added up across programs, and the result is the same in every run. What the
backward pass of the softmax subtracts, the product of out and its gradient, is computed by a launch of its own: for
each block of queries again it was a quarter of the instructions. With dropout it still is: what the mask takes beside
a second pointer would spill.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..registry import Call
from ..triton_common import (
    contiguous,
    dot,
    dropout_kept,
    dropout_key,
    dropout_threshold,
    next_tokens,
    on_device,
    pixel_of_token,
    token_step,
)

# Two binaries for all maps: sequences of at most 16 tokens (8x8 maps in 2x2 patches) fit a single tile of the matrix
# units.
SHORT = 16
LOG2E = 1 / math.log(2)

_NOT_SPECIALIZED = ["pixels_per_sample", "width", "tokens", "blocks", "threshold", "scale", "keep_scale"]


def configurations(dim: int, short: bool, dtype: torch.dtype, backward: bool) -> list[dict[str, int]]:
    """A program's BLOCK of tokens, and the STEP that it walks over the others in. Float32 has no matrix units of its
    own precision: its products are made in registers, so its tiles are small."""
    columns = max(triton.next_power_of_2(dim), 16)
    float32 = dtype is torch.float32
    if short:
        tiles = [(16, 16, 4 if float32 or columns > 64 else 2)]
    elif float32:
        tiles = [(32, 16, 8) if columns <= 64 else (16, 16, 4)]
    elif columns > 64:
        tiles = [(32, 32, 4 if backward else 8)]
    elif backward:
        tiles = [(32, 32, 4), (64, 32, 8), (32, 64, 4)]
        if dim % 4:  # rows that are loaded element by element would spill with 4 warps
            tiles[:2] = tiles[1::-1]
    else:
        tiles = [(64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 8)]
    tiles = dict.fromkeys((*tile, stages) for stages in ((2,) if float32 else (2, 1)) for tile in tiles)
    return [
        {"BLOCK": block, "STEP": step, "BLOCK_D": columns, "num_warps": warps, "num_stages": n}
        for block, step, warps, n in tiles
    ]


def configuration(qkv: Tensor, dim: int, tokens: int, backward: bool) -> dict[str, int]:
    short = tokens <= SHORT
    kernel = f"patch_attention{'_short' if short else ''}_{'bwd' if backward else 'fwd'}"
    return tuning.choose(kernel, qkv, (dim,), lambda: configurations(dim, short, qkv.dtype, backward))


def bytes_moved(qkv: Tensor) -> tuple[int, int]:
    """Bytes of full-size tensors that the forward and the backward pass read and write; the log-sum-exp is a few per
    cent more."""
    size = qkv.numel() * qkv.element_size()
    return size * 4 // 3, size * 8 // 3


@triton.jit
def _group(blocks, HEADS: tl.constexpr, POSITIONS: tl.constexpr):
    """(sample, position inside a patch, block of tokens, head) of this program."""
    program = tl.program_id(0)
    head = program % HEADS
    program = program // HEADS
    block = program % blocks
    program = program // blocks
    return program // POSITIONS, program % POSITIONS, block, head


@triton.jit
def _first(position, width, STEP: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr):
    """Column, in patches, and pixel of the first STEP tokens of a group, from which next_tokens goes on."""
    token = tl.arange(0, STEP)
    return token % (width // PATCH_W), pixel_of_token(token, position, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)


@triton.jit
def _load(ptr, pixel, valid, channel, STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head of some tokens, (tokens, BLOCK_D); zeros beyond the head and where a token is not valid."""
    lane = tl.arange(0, BLOCK_D)
    mask = valid[:, None]
    if DIM != BLOCK_D:
        mask = mask & (lane < DIM)[None, :]
    return tl.load(ptr + pixel[:, None] * STRIDE + (channel + lane)[None, :], mask=mask, other=0.0)


@triton.jit
def _store(ptr, pixel, valid, channel, tile, STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    lane = tl.arange(0, BLOCK_D)
    mask = valid[:, None]
    if DIM != BLOCK_D:
        mask = mask & (lane < DIM)[None, :]
    tl.store(ptr + pixel[:, None] * STRIDE + (channel + lane)[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _attention_fwd_kernel(
    qkv_ptr, seed_ptr,  # (B, H, W, 3 HEADS DIM); one int64, or None without dropout
    out_ptr, lse_ptr,  # written: (B, H, W, HEADS DIM), like qkv; (B, positions, HEADS, tokens), float32
    pixels_per_sample, width, tokens, blocks, scale, threshold, keep_scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = dropout(softmax(q k^T / sqrt(DIM))) v for the tokens of each group, and lse = log2(sum(exp2(scores))) of
    each query, where scores = q k^T * scale and scale = log2(e) / sqrt(DIM).

    A program has BLOCK queries of a group and walks over the keys, STEP at a time, with a running maximum. Reads q
    once, k and v once for each block of queries, from cache; writes out and lse once."""
    POSITIONS: tl.constexpr = PATCH_H * PATCH_W
    CHANNELS: tl.constexpr = HEADS * DIM
    sample, position, block, head = _group(blocks, HEADS=HEADS, POSITIONS=POSITIONS)
    channel = head * DIM
    group = position * HEADS + head  # of this sample
    pixels = sample.to(tl.int64) * pixels_per_sample
    qkv_ptr += pixels * (3 * CHANNELS)
    out_ptr += pixels * CHANNELS
    lse_ptr += pixels * HEADS + group * tokens
    query = block * BLOCK + tl.arange(0, BLOCK)
    query_pixel = pixel_of_token(query, position, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    q = _load(qkv_ptr, query_pixel, query < tokens, channel, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
    if seed_ptr is not None:
        mask_key = dropout_key(seed_ptr, sample, SITE=0)

    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    step = token_step(width, STEP=STEP, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    column, pixel = _first(position, width, STEP=STEP, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    for first in range(0, tokens, STEP):
        key = first + tl.arange(0, STEP)
        if seed_ptr is not None:  # what the mask takes leaves no registers for a walk
            pixel = pixel_of_token(key, position, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
        k = _load(qkv_ptr, pixel, key < tokens, CHANNELS + channel, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
        scores = dot(q, tl.trans(k), tl.zeros((BLOCK, STEP), tl.float32)) * scale
        scores = tl.where((key < tokens)[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        shrink = tl.exp2(maximum - new_maximum)
        probabilities = tl.exp2(scores - new_maximum[:, None])
        total = total * shrink + tl.sum(probabilities, 1)
        maximum = new_maximum
        if seed_ptr is not None:
            kept = dropout_kept(mask_key, (group * tokens + query[:, None]) * tokens + key[None, :], threshold)
            probabilities *= tl.where(kept, keep_scale, 0.0)
        v = _load(qkv_ptr, pixel, key < tokens, 2 * CHANNELS + channel, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
        sums = dot(probabilities.to(v.dtype), v, sums * shrink[:, None])
        if seed_ptr is None:
            column, pixel = next_tokens(column, pixel, step, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)

    _store(
        out_ptr, query_pixel, query < tokens, channel, sums / total[:, None], STRIDE=CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D
    )
    tl.store(lse_ptr + query, maximum + tl.log2(total), mask=query < tokens)


@triton.jit
def _product_of_out(dout, out):
    """What softmax's backward subtracts from the gradient of each query's probabilities."""
    return tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _delta_bwd_kernel(
    dout_ptr, out_ptr,  # (B, H, W, HEADS DIM)
    delta_ptr,  # written: (B, positions, HEADS, tokens), float32
    pixels_per_sample, width, tokens, blocks,
    HEADS: tl.constexpr, DIM: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta = sum(dout * out) of each query, which softmax's backward subtracts from the gradient of its
    probabilities. A program has BLOCK tokens of a group; everything is read and written once."""
    sample, position, block, head = _group(blocks, HEADS=HEADS, POSITIONS=PATCH_H * PATCH_W)
    pixels = sample.to(tl.int64) * pixels_per_sample
    token = block * BLOCK + tl.arange(0, BLOCK)
    pixel = pixel_of_token(token, position, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    at = pixels * (HEADS * DIM)
    dout = _load(dout_ptr + at, pixel, token < tokens, head * DIM, STRIDE=HEADS * DIM, DIM=DIM, BLOCK_D=BLOCK_D)
    out = _load(out_ptr + at, pixel, token < tokens, head * DIM, STRIDE=HEADS * DIM, DIM=DIM, BLOCK_D=BLOCK_D)
    delta = _product_of_out(dout, out)
    tl.store(delta_ptr + pixels * HEADS + (position * HEADS + head) * tokens + token, delta, mask=token < tokens)


@triton.jit
def _query_gradient(
    dout_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, seed_ptr, mine, my_pixel, position, width, tokens, group, channel,
    mask_key, threshold, scale, keep_scale,
    CHANNELS: tl.constexpr, DIM: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq * sqrt(DIM) of the tokens `mine` of a group, for attention_bwd_kernel."""
    valid = mine < tokens
    my_q = _load(qkv_ptr, my_pixel, valid, channel, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
    my_dout = _load(dout_ptr, my_pixel, valid, channel, STRIDE=CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
    if delta_ptr is not None:
        my_delta = tl.load(delta_ptr + mine, mask=valid, other=0.0)
    else:
        my_out = _load(out_ptr, my_pixel, valid, channel, STRIDE=CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
        my_delta = _product_of_out(my_dout, my_out)
    my_lse = tl.load(lse_ptr + mine, mask=valid, other=float("inf"))
    dq = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    step = token_step(width, STEP=STEP, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    column, pixel = _first(position, width, STEP=STEP, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    for first in range(0, tokens, STEP):
        key = first + tl.arange(0, STEP)
        if seed_ptr is not None:  # what the mask takes leaves no registers for a walk
            pixel = pixel_of_token(key, position, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
        k = _load(qkv_ptr, pixel, key < tokens, CHANNELS + channel, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
        v = _load(qkv_ptr, pixel, key < tokens, 2 * CHANNELS + channel, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
        scores = tl.where(
            (key < tokens)[None, :], dot(my_q, tl.trans(k), tl.zeros((BLOCK, STEP), tl.float32)) * scale, float("-inf")
        )
        probabilities = tl.exp2(scores - my_lse[:, None])
        grads = dot(my_dout, tl.trans(v), tl.zeros((BLOCK, STEP), tl.float32))
        if seed_ptr is not None:
            kept = dropout_kept(mask_key, (group * tokens + mine[:, None]) * tokens + key[None, :], threshold)
            grads *= tl.where(kept, keep_scale, 0.0)
        dq = dot((probabilities * (grads - my_delta[:, None])).to(k.dtype), k, dq)
        if seed_ptr is None:
            column, pixel = next_tokens(column, pixel, step, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    return dq


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _attention_bwd_kernel(
    dout_ptr, qkv_ptr, out_ptr,  # like out and qkv
    lse_ptr, delta_ptr,  # (B, positions, HEADS, tokens), float32; no delta with dropout
    seed_ptr,  # one int64, or None without dropout
    dqkv_ptr,  # written: like qkv
    pixels_per_sample, width, tokens, blocks, scale, threshold, keep_scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """With p = exp2(scores - lse), the mask of the dropout m and delta = sum(dout * out) of each query:

        dv = (p * m)^T dout;  dscores = p * (dout v^T * m - delta)
        dq = dscores k / sqrt(DIM);  dk = dscores^T q / sqrt(DIM)

    A program has BLOCK tokens of a group, first as keys, then as queries, and walks over the others STEP at a time.
    Reads dout and qkv about twice for each block, from cache; writes dqkv once."""
    POSITIONS: tl.constexpr = PATCH_H * PATCH_W
    CHANNELS: tl.constexpr = HEADS * DIM
    sample, position, block, head = _group(blocks, HEADS=HEADS, POSITIONS=POSITIONS)
    channel = head * DIM
    group = position * HEADS + head
    pixels = sample.to(tl.int64) * pixels_per_sample
    qkv_ptr += pixels * (3 * CHANNELS)
    dqkv_ptr += pixels * (3 * CHANNELS)
    dout_ptr += pixels * CHANNELS
    out_ptr += pixels * CHANNELS
    lse_ptr += pixels * HEADS + group * tokens
    if delta_ptr is not None:
        delta_ptr += pixels * HEADS + group * tokens
    mine = block * BLOCK + tl.arange(0, BLOCK)
    valid = mine < tokens
    my_pixel = pixel_of_token(mine, position, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    mask_key = 0 if seed_ptr is None else dropout_key(seed_ptr, sample, SITE=0)
    score_scale = scale * 0.6931471805599453  # of the natural scores

    # The block as keys, transposed: (keys, queries).
    my_k = _load(qkv_ptr, my_pixel, valid, CHANNELS + channel, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
    my_v = _load(qkv_ptr, my_pixel, valid, 2 * CHANNELS + channel, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
    dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    step = token_step(width, STEP=STEP, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    column, pixel = _first(position, width, STEP=STEP, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    for first in range(0, tokens, STEP):
        query = first + tl.arange(0, STEP)
        if seed_ptr is not None:  # what the mask takes leaves no registers for a walk
            pixel = pixel_of_token(query, position, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
        q = _load(qkv_ptr, pixel, query < tokens, channel, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
        dout = _load(dout_ptr, pixel, query < tokens, channel, STRIDE=CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
        if delta_ptr is not None:
            delta = tl.load(delta_ptr + query, mask=query < tokens, other=0.0)
        else:
            out = _load(out_ptr, pixel, query < tokens, channel, STRIDE=CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)
            delta = _product_of_out(dout, out)
        # queries beyond the last have no probabilities
        lse = tl.load(lse_ptr + query, mask=query < tokens, other=float("inf"))
        probabilities = tl.exp2(dot(my_k, tl.trans(q), tl.zeros((BLOCK, STEP), tl.float32)) * scale - lse[None, :])
        grads = dot(my_v, tl.trans(dout), tl.zeros((BLOCK, STEP), tl.float32))
        weights = probabilities
        if seed_ptr is not None:
            kept = dropout_kept(mask_key, (group * tokens + query[None, :]) * tokens + mine[:, None], threshold)
            weights = probabilities * tl.where(kept, keep_scale, 0.0)
            grads *= tl.where(kept, keep_scale, 0.0)
        dv = dot(weights.to(dout.dtype), dout, dv)
        dk = dot((probabilities * (grads - delta[None, :])).to(q.dtype), q, dk)
        if seed_ptr is None:
            column, pixel = next_tokens(column, pixel, step, width, PATCH_H=PATCH_H, PATCH_W=PATCH_W)
    _store(
        dqkv_ptr, my_pixel, valid, CHANNELS + channel, dk * score_scale, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D
    )
    _store(dqkv_ptr, my_pixel, valid, 2 * CHANNELS + channel, dv, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)

    dq = _query_gradient(
        dout_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr, seed_ptr, mine, my_pixel, position, width, tokens, group,
        channel, mask_key, threshold, scale, keep_scale,
        CHANNELS=CHANNELS, DIM=DIM, PATCH_H=PATCH_H, PATCH_W=PATCH_W, BLOCK=BLOCK, STEP=STEP, BLOCK_D=BLOCK_D,
    )  # fmt: skip
    _store(dqkv_ptr, my_pixel, valid, channel, dq * score_scale, STRIDE=3 * CHANNELS, DIM=DIM, BLOCK_D=BLOCK_D)


class _Launch:
    """Grid and arguments that both kernels share."""

    def __init__(self, call: Call, backward: bool):
        batch, height, width, channels = call.qkv.shape
        heads, patch_height, patch_width = call.num_heads, call.patch_height, call.patch_width
        dim = channels // (3 * heads)
        tokens = (height // patch_height) * (width // patch_width)
        config = configuration(call.qkv, dim, tokens, backward)
        blocks = triton.cdiv(tokens, config["BLOCK"])
        self.grid = (batch * patch_height * patch_width * heads * blocks,)
        self.seed = call.seed if call.dropout > 0 else None
        keep = (dropout_threshold(call.dropout), 1 / (1 - call.dropout))
        self.sizes = (height * width, width, tokens, blocks, LOG2E / math.sqrt(dim), *keep)
        self.flags = {"HEADS": heads, "DIM": dim, "PATCH_H": patch_height, "PATCH_W": patch_width, **config}
        self.lse_shape = (batch, patch_height * patch_width, heads, tokens)


def patch_attention_forward(call: Call) -> tuple[Tensor, Tensor]:
    """Launches the forward pass: out, and the binary logarithm of each query's sum, (B, positions, heads, tokens)."""
    launch, qkv = _Launch(call, backward=False), call.qkv.contiguous()
    out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
    lse = qkv.new_empty(launch.lse_shape, dtype=torch.float32)
    if out.numel() > 0:
        with on_device(qkv):
            _attention_fwd_kernel[launch.grid](qkv, launch.seed, out, lse, *launch.sizes, **launch.flags)
    return out, lse


def patch_attention_backward(call: Call) -> Tensor:
    """Launches the backward pass: the gradient of qkv."""
    launch = _Launch(call, backward=True)
    dout, qkv, out, lse = contiguous(call.dout, call.qkv, call.out, call.lse)
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse) if launch.seed is None else None
    if out.numel() > 0:
        with on_device(qkv):
            if delta is not None:
                flags = {name: value for name, value in launch.flags.items() if name not in ("STEP", "num_stages")}
                _delta_bwd_kernel[launch.grid](dout, out, delta, *launch.sizes[:4], **flags)
            _attention_bwd_kernel[launch.grid](
                dout, qkv, out, lse, delta, launch.seed, dqkv, *launch.sizes, **launch.flags
            )
    return dqkv
