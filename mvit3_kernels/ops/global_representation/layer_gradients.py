"""The launchers of what finishes a layer of multi-head attention: the gradients of its parameters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..sizes import cdiv
from ..triton_common import OLD_TRITON, multiprocessors, on_device, split_rows
from ..triton_rows import Parts, Rows, gradient_like
from ..types import LayerNorm, Linear
from . import gradient_kernels


class Summed(NamedTuple):
    """A linear map as the gradients of its parameters see it: the gradient `a` of its outputs and its inputs x, before
    the norm that may be in front of it. `rounded`: the weight as `multiplied`."""

    a: Tensor
    x: Tensor
    linear: Linear
    norm: LayerNorm | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None
    rounded: Tensor | None = None


def products_configuration(rows: Rows) -> dict[str, int]:
    """BLOCK_M rows at a time, BLOCK_N columns of what they are multiplied by in a program."""
    if rows.x.dtype is torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
    short = rows.width() <= 256
    if short and rows.from_shared_memory:
        block = 128 if rows.width() < 160 and not rows.few() and not OLD_TRITON else 64
        return {"BLOCK_M": 32, "BLOCK_N": block, "num_warps": 8, "num_stages": 2, "maxnreg": 128}
    return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1 if short else 2}


def parameter_gradients(rows: Rows, maps: tuple[Summed, ...]) -> list[tuple[Tensor, ...]]:
    """The gradients of norm weight, norm bias, weight and bias of qkv and fc1, and of weight and bias of out and fc2,
    in two launches."""
    config, channels, features = products_configuration(rows), rows.channels, maps[1].a.shape[-1]
    pieces = (1, 1, 1, cdiv(features, channels))  # of inputs, as many as C at a time
    blocks = [cdiv(m.a.shape[-1], config["BLOCK_N"]) for m in maps]
    programs = sum(count * each for count, each in zip(blocks, pieces, strict=True))
    parts, rows_per_part = split_rows(rows.rows, 2 * multiprocessors(rows.x) // programs, config["BLOCK_M"])
    summed, finished = [], []
    for m, count in zip(maps, blocks, strict=True):
        outputs, inputs = m.a.shape[-1], m.x.shape[-1]
        workspaces, norm = (rows.float32(parts, outputs, inputs), rows.float32(parts, outputs)), ()
        if m.norm is None:
            summed.append((m.a, m.x, *workspaces))
        else:
            norm = (m.norm.weight, m.norm.bias)
            workspaces = (*workspaces, rows.float32(parts * count, 2, channels))
            summed.append((m.a, m.x, m.mean, m.rstd, m.rounded, *workspaces))
        written = tuple(gradient_like(t) for t in (*norm, *m.linear))
        finished.append(Parts((*workspaces, *norm, *written), (len(workspaces[-1]),), len(written)))
    with on_device(rows.x):
        if rows.rows:
            gradient_kernels.layer_products_kernel[(programs, parts)](
                *summed, rows.rows, rows.rows_per_sample, rows_per_part,
                PER_SAMPLE=maps[0].norm.per_sample, F=features, **rows.tiles, **config,
            )  # fmt: skip
        grid = sum(cdiv(m.a.shape[-1], 16) for m in maps), cdiv(max(channels, features), 32)
        gradient_kernels.layer_gradient_kernel[grid](
            *(p.tensors for p in finished), parts, *(count for p in finished[:2] for count in p.counts),
            C=channels, F=features, BLOCK_C=32, BLOCK_O=16, num_warps=4,
        )  # fmt: skip
    return [p.gradients(rows.x) for p in finished]
