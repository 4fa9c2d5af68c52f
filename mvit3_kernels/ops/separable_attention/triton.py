"""Triton kernels of separable_attention without keys (identity D).

The context of a group, the tokens of a sample that share their position inside a patch, is linear in the normalised
tokens. So the keys are never made: the tokens' mean under the softmax of the scores goes through W_k once for each
group, and two products remain for each token, W_v and W_o. Forward reads x once for the scores and that mean, and once
more for the values; where the norm is of samples, a first time for their statistics. The tokens of a group may be cut
into splits, for several programs, which a batch of one needs: each leaves its largest score, its sums relative to that
and its sum of tokens, and the kernel of the contexts joins them in a fixed order.

Backward has the same shape. Its first kernel writes what out_proj saw and the gradient of the values, for the products
that follow, as feed_forward's does, and the gradient of each context, in splits. From the contexts' gradients follows
what each token receives through its score and through its share of the mean, which the kernel of the gradient of x adds
to its product. Launches: 3 forward and 8 backward, for a norm of samples 4 and 9.

The normalised tokens are rounded as the reference rounds them, the norm's weight and bias applied, before the product
of the values: where a value changes its sign in front of ReLU it does so in both. (The norm folded into W_v, identity
C, would round other numbers.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .. import tuning
from ..registry import Call
from ..triton_common import contiguous, dropout_threshold, multiprocessors, on_device, split_rows
from ..triton_rows import Rows
from ..types import Linear
from . import backward_kernels, kernels

GROUPS = 16  # that a program of the contexts takes: the rows of a product


def configurations(rows: Rows) -> list[dict[str, int]]:
    """Of the kernels with products: BLOCK_M rows of a program, the blocks of BLOCK_F values that it walks over. The
    first is shipped."""
    if rows.x.dtype is torch.float32:
        return [{"BLOCK_M": 16, "BLOCK_F": 16, "num_warps": 8, "num_stages": 2}]
    shipped = {"BLOCK_M": rows.block(), "BLOCK_F": 32 if rows.block() == 64 else 16, "num_warps": 8, "num_stages": 1}
    others = (
        {"num_stages": 2},
        {"num_warps": 4},
        {"BLOCK_M": 32, "BLOCK_F": 32, "num_warps": 4},
        {"BLOCK_M": 16, "num_warps": 4},
    )
    return [shipped, *(shipped | other for other in others)]


def configuration(kernel: str, rows: Rows) -> dict[str, int]:
    return tuning.choose(f"separable_attention_{kernel}", rows.x, (rows.channels,), lambda: configurations(rows))


def input_configuration(rows: Rows) -> dict[str, int]:
    """Of the kernel of the gradient of x, which holds a row three times: rows, the blocks of values that it walks
    over."""
    config = configurations(rows)[0]
    if rows.width() <= 192:
        return config
    return config | {"BLOCK_M": min(config["BLOCK_M"], 32 if rows.width() <= 256 else 16)}


def pool_configuration(rows: Rows) -> dict[str, int]:
    """Of the kernel of the scores: BLOCK_M tokens at a time, whose sums stay apart, in registers, until the end."""
    block = min(max(4096 // triton.next_power_of_2(rows.width()), 8), 32)
    return {"BLOCK_M": block, "num_warps": 4 if block > 8 else 8, "num_stages": 2}


def bytes_moved(x: Tensor, training: bool, per_sample: bool = True) -> tuple[int, int]:
    """Bytes of full-size tensors that the forward and the backward pass read and write: x twice and y, and in training
    the scores, written, read and written; backward x, dy and what both products saw (two written, three read), x twice
    more, dx, and dy twice more. Of samples, x once more forward, and backward x once more and dx twice."""
    size = x.numel() * x.element_size()
    scores = 4 * x.numel() // max(x.shape[-1], 1)
    return size * (4 if per_sample else 3) + (3 * scores if training else 0), size * (
        15 if per_sample else 12
    ) + 3 * scores


class _Groups(NamedTuple):
    """The groups of a map, for the launchers."""

    rows: Rows
    count: int
    tokens: int  # of a group
    width: int
    positions: int
    lanes: int  # values of a kept context: C, rounded up to 16
    patch: dict[str, int]

    @staticmethod
    def of(call: Call) -> _Groups:
        batch, height, width, channels = call.x.shape
        positions = call.patch_height * call.patch_width
        patch = {"PATCH_H": call.patch_height, "PATCH_W": call.patch_width}
        count, tokens, lanes = batch * positions, height * width // positions, -(-channels // 16) * 16
        return _Groups(Rows.of(call.x), count, tokens, width, positions, lanes, patch)

    def blocks(self) -> int:
        """Programs along the groups of the kernels of the contexts."""
        return triton.cdiv(self.count, GROUPS)

    def context_flags(self, columns: int) -> tuple[tuple[int, int], dict[str, int]]:
        """Grid and flags of a kernel of the contexts, where `columns` are cut into blocks."""
        tiles = {"BLOCK_M": GROUPS, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
        flags = {"LANES": self.lanes, "C": self.rows.channels, **tiles}
        return (self.blocks(), triton.cdiv(columns, tiles["BLOCK_N"])), flags


class _Dropout(NamedTuple):
    """A dropout as a kernel takes it: the seed, None where it is off, and (threshold, scale of what is kept)."""

    seed: Tensor | None = None
    keep: tuple[int, float] = (0, 1.0)

    @staticmethod
    def of(p: float, seed: Tensor | None) -> _Dropout:
        return _Dropout(seed if p > 0 else None, (dropout_threshold(p), 1 / (1 - p)))


def _parameters(call: Call) -> tuple[Tensor | None, ...]:
    """Weights and biases of norm, qkv and out_proj."""
    return contiguous(call.norm_weight, call.norm_bias, call.qkv_weight, call.qkv_bias, call.out_weight, call.out_bias)


def _forward(call: Call, score: _Dropout, output: _Dropout, training: bool) -> tuple[Tensor | None, ...]:
    x, per_sample, groups = call.x, call.per_sample, _Groups.of(call)
    rows = groups.rows
    y = torch.empty_like(rows.x)
    mean, rstd = (rows.float32(x.shape[0] if per_sample else rows.rows) for _ in range(2))
    scores, pooled = (
        rows.float32(x.shape[0], groups.positions, n) if training else None for n in (groups.tokens, groups.lanes)
    )
    context = rows.float32(x.shape[0], groups.positions, groups.lanes)
    if not y.numel():
        return y, mean, rstd, scores, pooled, context
    *in_front, out_weight, out_bias = _parameters(call)
    pool, config = pool_configuration(rows), configuration("fwd", rows)
    splits, per_split = split_rows(groups.tokens, 4 * multiprocessors(x) // groups.count, pool["BLOCK_M"])
    part_mean, part_m2, rows_per_part, parts = rows.part_statistics() if per_sample else (None, None, 0, 0)
    softmax, sums = rows.float32(3, splits, groups.count), rows.float32(splits, groups.count, rows.channels)
    with on_device(x):
        kernels.pool_fwd_kernel[(groups.count * splits,)](
            rows.x, *in_front, part_mean, part_m2, score.seed, mean, rstd, scores, softmax, sums,
            groups.count, groups.tokens, groups.width, rows.rows_per_sample, rows_per_part, parts, splits, per_split,
            call.eps, *score.keep, PER_SAMPLE=per_sample, **groups.patch, **rows.tiles, **pool,
        )  # fmt: skip
        grid, flags = groups.context_flags(groups.lanes)
        kernels.context_fwd_kernel[grid](
            softmax, sums, *in_front, score.seed, scores, pooled, context, groups.count, groups.tokens, splits, **flags
        )
        kernels.attend_fwd_kernel[(triton.cdiv(rows.rows, config["BLOCK_M"]),)](
            rows.x, *in_front, out_weight, out_bias, mean, rstd, context, output.seed, y,
            rows.rows, rows.rows_per_sample, groups.width, *output.keep,
            PER_SAMPLE=per_sample, **groups.patch, LANES=groups.lanes, **rows.tiles, **config,
        )  # fmt: skip
    return y, mean, rstd, scores, pooled, context


def separable_attention_inference(call: Call) -> Tensor:
    """Launches the forward pass where no backward pass follows."""
    return _forward(call, _Dropout(), _Dropout(), training=False)[0]


def separable_attention_forward(call: Call) -> tuple[Tensor, ...]:
    """Launches the forward pass: y; mean and rstd = 1 / sqrt(variance + eps) of each token or sample; the softmax of
    the scores, (B, positions, tokens); and of each group the weighted mean of the normalised tokens, without the norm's
    weight and bias, and the context, (B, positions, lanes)."""
    score, output = (_Dropout.of(p, call.seed) for p in (call.attention_dropout, call.output_dropout))
    return _forward(call, score, output, training=True)


def separable_attention_backward(call: Call) -> tuple[Tensor, ...]:
    """Launches the backward pass: the gradients of x, norm weight and bias, qkv weight and bias, out_proj weight and
    bias (empty without a bias)."""
    rows = Rows.of(call.x)
    norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias = _parameters(call)
    gradients = [None if t is None else torch.empty_like(t) for t in (norm_weight, norm_bias, qkv_weight, qkv_bias)]
    if not rows.x.numel():
        gradients += [None if t is None else torch.empty_like(t) for t in (out_weight, out_bias)]
        return torch.empty_like(rows.x), *(call.x.new_empty(0) if t is None else t.zero_() for t in gradients)
    dy = call.dy.contiguous()
    dx, attended, value, key = _maps_backward(call, dy, (norm_weight, norm_bias, qkv_weight, qkv_bias), out_weight)
    with on_device(rows.x):
        backward_kernels.parameters_bwd_kernel[(triton.cdiv(rows.channels, 16),)](
            *value, *key, norm_weight, norm_bias, qkv_weight, *gradients, len(value[0]), len(key[0]), len(key[1]),
            LANES=key[0].shape[-1], C=rows.channels, BLOCK_C=16, BLOCK_O=64, num_warps=4,
        )  # fmt: skip
    out_proj = Linear(out_weight, out_bias)
    dout = rows.second_weight_backward(dy, attended, out_proj, call.output_dropout, call.seed)
    return dx, *(rows.x.new_empty(0) if t is None else t for t in gradients), *dout


def _maps_backward(
    call: Call, dy: Tensor, in_front: tuple[Tensor | None, ...], out_weight: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The gradient of x; what out_proj saw; and parts of products and sums, from which the gradients of the weights of
    the values (the score's beside them) and of the keys follow. `in_front`: weight and bias of norm and qkv."""
    groups = _Groups.of(call)
    rows, per_sample = groups.rows, call.per_sample
    score, output = (_Dropout.of(p, call.seed) for p in (call.attention_dropout, call.output_dropout))
    norm_weight, norm_bias, qkv_weight, qkv_bias = in_front
    mean, rstd, scores, context = contiguous(call.mean, call.rstd, call.scores, call.context)
    config, channels = configuration("bwd", rows), rows.channels
    block, flags = config["BLOCK_M"], {"PER_SAMPLE": per_sample, **groups.patch, **rows.tiles}
    splits, per_block = triton.cdiv(groups.tokens, block), max(block // groups.tokens, 1)
    dx = torch.empty_like(rows.x)
    attended, dvalues = (dx.new_empty(rows.rows, channels) for _ in range(2))
    parts, dbias = rows.float32(splits, groups.count, channels), rows.float32(groups.blocks(), channels)
    dcontext, dpooled = (rows.float32(groups.count, channels) for _ in range(2))
    slope, dtotal = (rows.float32(groups.count) for _ in range(2))
    dscores, sums = rows.float32(rows.rows), rows.float32(2, rows.rows) if per_sample else None
    with on_device(dx):
        backward_kernels.values_bwd_kernel[(triton.cdiv(groups.count, per_block) * splits,)](
            dy, rows.x, *in_front, out_weight, mean, rstd, context, output.seed, attended, dvalues, parts,
            groups.count, groups.tokens, groups.width, rows.rows_per_sample, splits, per_block, *output.keep,
            LANES=groups.lanes, **flags, **config,
        )  # fmt: skip
        grid, context_flags = groups.context_flags(channels)
        backward_kernels.context_bwd_kernel[grid](
            parts, context, scores, qkv_weight, qkv_bias, score.seed, dcontext, dpooled, slope, dtotal, dbias,
            groups.count, groups.tokens, splits, *score.keep, POSITIONS=groups.positions, **context_flags,
        )  # fmt: skip
        config = input_configuration(rows)
        backward_kernels.input_bwd_kernel[(triton.cdiv(rows.rows, config["BLOCK_M"]),)](
            dvalues, rows.x, dy, norm_weight, norm_bias, qkv_weight, mean, rstd, scores, dpooled, slope, dtotal,
            score.seed, dx, sums, dscores, rows.rows, rows.rows_per_sample, groups.width, groups.tokens, *score.keep,
            **flags, **config,
        )  # fmt: skip
        if sums is not None:
            rows.finish_input_gradient(dx, dy, mean, rstd, sums)
        value = rows.normalised_products(dvalues, mean, rstd, per_sample, extra=dscores)
        key, _ = Rows.of(call.pooled[:, :, None].contiguous()).products(dcontext)
    return dx, attended, value, (key, dbias)
