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
to its product. Launches: 3 forward and 8 backward, for a norm of samples 4 and 9; and those of `multiplied`. A layer in
training (global_representation/separable_layer.py) shares them, and needs fewer.

The kernels with products take a block of tokens of one group, whose context is one row, or of a few small groups, never
of two samples: so a block's sums are of one group or of one sample.

The normalised tokens are rounded as the reference rounds them, the norm's weight and bias applied, before the product
of the values: where a value changes its sign in front of ReLU it does so in both. (The norm folded into W_v, identity
C, would round other numbers.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import tuning
from ..registry import Call
from ..sizes import cdiv, most_sample_parts, next_power_of_2
from ..triton_common import (
    OLD_TRITON,
    contiguous,
    dropout_threshold,
    multiplied,
    multiprocessors,
    on_device,
    split_rows,
)
from ..triton_rows import Rows
from ..types import Linear
from . import backward_kernels, kernels

GROUPS = 16  # that a program of the contexts takes: the rows of a product


def configurations(kernel: str, rows: Rows, drops: bool) -> list[dict[str, int]]:
    """Of the kernels with products, "fwd", "values_bwd" and "input_bwd": BLOCK_M tokens of a program, the blocks of
    BLOCK_F values that it walks over; `drops`: with dropout, whose words take registers. The first is shipped."""
    width, tall = rows.width(), _tall(rows)
    if rows.small() and not drops:
        # with 16 warps more channels spill: float32 weights forward, float16 backward
        return rows.small_tiles("BLOCK_F", shared=kernel != "values_bwd" and (width > 192 or OLD_TRITON))
    if rows.x.dtype is torch.float32:
        return [{"BLOCK_M": 16, "BLOCK_F": 16, "num_warps": 8, "num_stages": 2}]
    if not rows.from_shared_memory or width > 256:
        first = {"BLOCK_M": 32, "BLOCK_F": 16, "num_warps": 8, "num_stages": 1}
        if kernel == "input_bwd" and width > 256:
            first["BLOCK_M"] = 16
        return [first, first | {"BLOCK_M": 16, "num_warps": 4}]
    if kernel == "fwd":  # blocks of 4 warps, two or three at once, hold normalised rows and sums of outputs
        warps = 4 if width <= (128 if drops else 192) else 8
        first = {"BLOCK_M": 64, "BLOCK_F": 32, "num_warps": warps, "num_stages": 1}
    elif kernel == "input_bwd" or tall:
        block = 128 if tall else 64
        stages = 1 if kernel == "input_bwd" else 2
        first = {"BLOCK_M": block, "BLOCK_F": 32, "num_warps": 8, "num_stages": stages, "maxnreg": 128}
    else:
        first = {"BLOCK_M": 64, "BLOCK_F": 32, "num_warps": 4, "num_stages": 1}
    others = ({"num_stages": 3 - first["num_stages"]}, {"BLOCK_F": 48 - first["BLOCK_F"]}, {"num_warps": 4})
    return [first, *(first | other for other in others)]


def _tall(rows: Rows) -> bool:
    return rows.width() <= 128 and rows.rows_per_sample > 64


def configuration(kernel: str, rows: Rows, drops: bool) -> dict[str, int]:
    size = "_few" if rows.few() else "_tall" if _tall(rows) else ""
    name = f"separable_attention_{kernel}{size}{'_dropout' if drops else ''}"
    return tuning.choose(name, rows.x, (rows.channels,), lambda: configurations(kernel, rows, drops))


def pool_configuration(rows: Rows) -> dict[str, int]:
    """Of the kernel of the scores: BLOCK_M tokens at a time, whose sums stay apart, in registers, until the end."""
    block = min(max(4096 // next_power_of_2(rows.width()), 8), 32)
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


class _Blocks(NamedTuple):
    """How the tokens of a map are divided into blocks, none of which has tokens of two samples."""

    programs: int
    of_sample: int
    division: tuple[int, int]  # splits of a group; groups of a block
    one: bool  # whether a block is of one group


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

    def in_blocks(self, block: int) -> _Blocks:
        """Of `block` tokens."""
        splits, per_block = cdiv(self.tokens, block), max(min(block // max(self.tokens, 1), self.positions), 1)
        of_sample = cdiv(self.positions, per_block) * splits
        return _Blocks(self.count // self.positions * of_sample, of_sample, (splits, per_block), per_block == 1)

    def blocks(self) -> int:
        """Programs along the groups of the kernels of the contexts."""
        return cdiv(self.count, GROUPS)

    def context_flags(self, columns: int) -> tuple[tuple[int, int], dict[str, int]]:
        """Grid and flags of a kernel of the contexts, where `columns` are cut into blocks."""
        tiles = {"BLOCK_M": GROUPS, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
        if self.blocks() * cdiv(columns, 32) < multiprocessors(self.rows.x):  # which end sooner in larger steps
            inner = max(min(next_power_of_2(self.rows.channels), 128), 16)
            tiles |= {"BLOCK_N": 16, "BLOCK_K": inner, "num_warps": 8}
        tiles |= self.rows.unhurried()
        flags = {"LANES": self.lanes, "C": self.rows.channels, **tiles}
        return (self.blocks(), cdiv(columns, tiles["BLOCK_N"])), flags


class _Dropout(NamedTuple):
    """A dropout as a kernel takes it: the seed, None where it is off, and (threshold, scale of what is kept)."""

    seed: Tensor | None = None
    keep: tuple[int, float] = (0, 1.0)

    @staticmethod
    def of(p: float, seed: Tensor | None) -> _Dropout:
        return _Dropout(seed if p > 0 else None, (dropout_threshold(p), 1 / (1 - p)))


def _dropouts(call: Call) -> tuple[_Dropout, _Dropout]:
    """Of scores and of the output."""
    return _Dropout.of(call.attention_dropout, call.seed), _Dropout.of(call.output_dropout, call.seed)


def _parameters(call: Call) -> tuple[Tensor | None, ...]:
    """Weights and biases of norm, qkv and out_proj."""
    return contiguous(call.norm_weight, call.norm_bias, call.qkv_weight, call.qkv_bias, call.out_weight, call.out_bias)


class Kept(NamedTuple):
    """Of a forward pass beside y: see separable_attention_forward. sums, of a layer in training: (3, groups), those of
    w, w * score and p * score; pooled has a second token for each group there, the sum of w * score * n."""

    mean: Tensor
    rstd: Tensor
    scores: Tensor | None
    pooled: Tensor | None
    context: Tensor
    sums: Tensor | None


class Moments(NamedTuple):
    """Of the samples of a map, in parts: (3, samples, ..), as part_statistics_kernel writes them, and their number."""

    tensor: Tensor | None
    parts: int


class Attention:
    """The launches of a forward pass. `rounded`: the weights of qkv and out_proj of a layer in training."""

    def __init__(self, call: Call, training: bool, rounded: tuple[Tensor, Tensor] | None = None) -> None:
        self.call, self.groups = call, _Groups.of(call)
        rows, batch, layer = self.groups.rows, call.x.shape[0], rounded is not None
        positions, lanes = self.groups.positions, self.groups.lanes
        self.score, self.output = _dropouts(call) if training else (_Dropout(), _Dropout())
        self.parameters = _parameters(call)
        self.rounded = rounded or rows.weights(self.parameters[2], self.parameters[4])
        self.config = configuration("fwd", rows, self.output.seed is not None)
        self.blocks = self.groups.in_blocks(self.config["BLOCK_M"])
        self.kept = Kept(
            *(rows.float32(batch if call.per_sample else rows.rows) for _ in range(2)),
            rows.float32(batch, positions, self.groups.tokens) if training else None,
            rows.float32(1 + layer, batch, positions, lanes) if training else None,
            rows.float32(batch, positions, lanes),
            rows.float32(3, self.groups.count) if layer else None,
        )

    def measures(self) -> bool:
        """Whether the moments of the samples of y are found: in a layer, where they are of few enough parts."""
        few = self.blocks.of_sample <= most_sample_parts(self.groups.rows.rows_per_sample)
        return few and self.call.per_sample and self.kept.sums is not None

    def launch(self, moments: Moments | None = None) -> tuple[Tensor, Moments | None]:
        """y, and the moments of its samples if it `measures` them. `moments`: of x, where they are at hand."""
        call, rows = self.call, self.groups.rows
        y = torch.empty_like(rows.x)
        if not y.numel():
            return y, None
        if moments is None:
            moments = Moments(*rows.part_statistics()) if call.per_sample else Moments(None, 0)
        found = Moments(rows.moments(), self.blocks.of_sample) if self.measures() else None
        with on_device(rows.x):
            self._launch_contexts(moments)
            self._launch_values(y, None if found is None else found.tensor)
        return y, found

    def _launch_contexts(self, moments: Moments) -> None:
        call, groups, rows = self.call, self.groups, self.groups.rows
        mean, rstd, scores, pooled, context, slopes = self.kept
        pool, layer = pool_configuration(rows), slopes is not None
        splits, per_split = split_rows(groups.tokens, 4 * multiprocessors(rows.x) // groups.count, pool["BLOCK_M"])
        softmax = rows.float32(5 if layer else 3, splits, groups.count)
        sums = rows.float32(1 + layer, splits, groups.count, rows.channels)
        most = 0 if moments.tensor is None else moments.tensor.shape[2]
        in_front = self.parameters[:4]
        kernels.pool_fwd_kernel[(groups.count * splits,)](
            rows.x, *in_front, moments.tensor, self.score.seed, mean, rstd, scores, softmax, sums,
            groups.count, groups.tokens, groups.width, rows.rows_per_sample, moments.parts, most, splits, per_split,
            call.eps, *self.score.keep, SLOPES=layer, PER_SAMPLE=call.per_sample, **groups.patch, **rows.tiles, **pool,
        )  # fmt: skip
        grid, flags = groups.context_flags(groups.lanes)
        kernels.context_fwd_kernel[grid](
            softmax, sums, *in_front, self.score.seed, scores, pooled, context, slopes,
            groups.count, groups.tokens, splits, **flags,
        )  # fmt: skip

    def _launch_values(self, y: Tensor, moments: Tensor | None) -> None:
        groups, rows, (qkv_weight, out_weight) = self.groups, self.groups.rows, self.rounded
        norm_weight, norm_bias, _, qkv_bias, _, out_bias = self.parameters
        kernels.attend_fwd_kernel[(self.blocks.programs,)](
            rows.x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias,
            self.kept.mean, self.kept.rstd, self.kept.context, self.output.seed, y, moments,
            rows.rows_per_sample, groups.tokens, groups.width, *self.blocks.division,
            rows.samples(), 0 if moments is None else moments.shape[2], *self.output.keep,
            PER_SAMPLE=self.call.per_sample, **groups.patch, LANES=groups.lanes, ONE=self.blocks.one,
            **rows.tiles, **self.config,
        )  # fmt: skip


def separable_attention_inference(call: Call) -> Tensor:
    """Launches the forward pass where no backward pass follows."""
    return Attention(call, training=False).launch()[0]


def separable_attention_forward(call: Call) -> tuple[Tensor, ...]:
    """Launches the forward pass: y; mean and rstd = 1 / sqrt(variance + eps) of each token or sample; the softmax of
    the scores, (B, positions, tokens); and of each group the weighted mean of the normalised tokens, without the norm's
    weight and bias, and the context, (B, positions, lanes)."""
    attention = Attention(call, training=True)
    y, _ = attention.launch()
    mean, rstd, scores, pooled, context, _ = attention.kept
    return y, mean, rstd, scores, pooled[0], context


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
    maps = maps_backward(call, dy, multiplied(rows.x, qkv_weight, out_weight))
    value, key, dbias = maps.value, maps.key, maps.dbias
    with on_device(rows.x):
        backward_kernels.parameters_bwd_kernel[(cdiv(rows.channels, 16),)](
            *value, key, dbias, norm_weight, norm_bias, qkv_weight, *gradients, len(value[0]), len(key), len(dbias),
            LANES=key.shape[-1], C=rows.channels, BLOCK_C=16, BLOCK_O=64, num_warps=4,
        )  # fmt: skip
    out_proj = Linear(out_weight, out_bias)
    dout = rows.second_weight_backward(dy, maps.attended, out_proj, call.output_dropout, call.seed)
    return maps.dx, *(rows.x.new_empty(0) if t is None else t for t in gradients), *dout


class Maps(NamedTuple):
    """Of a backward pass: the gradient of x; what out_proj saw; and, for the gradients of the parameters, parts of
    products and sums of the values (the score's beside them, of a layer also of the norm's) and of products of the
    keys, of their bias and, of a layer, of the norm's share of them."""

    dx: Tensor
    attended: Tensor
    value: tuple[Tensor, ...]
    key: Tensor
    dbias: Tensor
    norm: Tensor | None


def maps_backward(
    call: Call,
    dy: Tensor,
    rounded: tuple[Tensor, Tensor],
    folded: Tensor | None = None,
    sums: Tensor | None = None,
) -> Maps:
    """Launches what reads or writes maps, with the weights of qkv and out_proj `rounded`. Of a layer: its weights times
    those of the norm, `folded` by separable_layer_kernels.pack_kernel, and `sums` of `Kept`."""
    groups, per_sample, layer = _Groups.of(call), call.per_sample, sums is not None
    rows, channels, (score, output) = groups.rows, groups.rows.channels, _dropouts(call)
    norm_weight, norm_bias, qkv_weight, qkv_bias, *_ = _parameters(call)
    mean, rstd, scores, context, pooled = contiguous(call.mean, call.rstd, call.scores, call.context, call.pooled)
    flags = {"PER_SAMPLE": per_sample, **groups.patch, **rows.tiles}
    config = configuration("values_bwd", rows, output.seed is not None)
    blocks = groups.in_blocks(config["BLOCK_M"])
    splits = blocks.division[0]
    dx = torch.empty_like(rows.x)
    attended, dvalues = (dx.new_empty(rows.rows, channels) for _ in range(2))
    parts, dbias = rows.float32(splits, groups.count, channels), rows.float32(groups.blocks(), channels)
    dcontext, dpooled = (rows.float32(groups.count, channels) for _ in range(2))
    slope, dtotal, dscores = rows.float32(groups.count), rows.float32(groups.count), rows.float32(rows.rows)
    grid, context_flags = groups.context_flags(channels)
    known, unknown, sums_parts = None, None, blocks.of_sample + groups.positions * grid[1]
    if layer and per_sample:
        known = rows.float32(2, rows.samples(), sums_parts)
    elif per_sample:
        unknown = rows.float32(2, rows.rows)
    norm = rows.float32(groups.blocks(), 2, channels) if layer else None
    with on_device(dx):
        backward_kernels.values_bwd_kernel[(blocks.programs,)](
            dy, rows.x, norm_weight, norm_bias, rounded[0], qkv_bias, rounded[1], mean, rstd, context,
            None if known is None else folded, output.seed, attended, dvalues, parts, known,
            groups.count, groups.tokens, groups.width, rows.rows_per_sample, *blocks.division,
            rows.samples(), sums_parts, *output.keep, LANES=groups.lanes, ONE=blocks.one, **flags, **config,
        )  # fmt: skip
        backward_kernels.context_bwd_kernel[grid](
            parts, context, scores, qkv_weight, qkv_bias, score.seed, norm_weight, norm_bias,
            pooled if layer else None, sums, dcontext, dpooled, slope, dtotal, dbias, norm, known,
            groups.count, groups.tokens, splits, rows.samples(), sums_parts, blocks.of_sample, *score.keep,
            POSITIONS=groups.positions, **context_flags,
        )  # fmt: skip
        config = configuration("input_bwd", rows, score.seed is not None)
        blocks = groups.in_blocks(config["BLOCK_M"])
        backward_kernels.input_bwd_kernel[(blocks.programs,)](
            dvalues, rows.x, dy, norm_weight, norm_bias, rounded[0], mean, rstd, scores, dpooled, slope, dtotal, known,
            score.seed, dx, unknown, dscores, rows.rows, rows.rows_per_sample, groups.width, groups.tokens,
            *blocks.division, rows.samples(), sums_parts, *score.keep, ONE=blocks.one, **flags, **config,
        )  # fmt: skip
        if unknown is not None:
            rows.finish_input_gradient(dx, dy, mean, rstd, unknown)
        weight = rounded[0].view(-1, channels)[1 + channels :] if layer else None
        value = rows.normalised_products(dvalues, mean, rstd, per_sample, extra=dscores, weight=weight)
        of_groups = pooled.view(-1, *call.scores.shape[:2], 1, groups.lanes)[0]
        key, _ = Rows.of(of_groups).products(dcontext)
    return Maps(dx, attended, value, key, dbias, norm)
