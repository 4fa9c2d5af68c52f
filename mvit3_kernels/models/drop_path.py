"""Stochastic depth (Huang et al. 2016): in training an image leaves out the branch of a residual with a probability
that grows with depth.

Each residual of the network has it: x + block(x) of the inverted residuals that keep their size and of MobileViTv3
blocks, and in each layer of attention x + attention(norm(x)) and x + feed_forward(norm(x)). The probability grows
linearly from block to block, from 0 in the first to the rate in the last, and is one for all residuals of a block, as
in timm's networks of the family. A draw is for an image: for all patches of it, where timm's MobileViT draws for each
position inside a patch, and never for a block that adds nothing.

It works by hooks, which are on the modules in training only. A layer of attention with a hook calls its modules one by
one instead of one op, which `mvit3_kernels.explain` shows; the blocks around it stay fused. On a CPU a
step takes 3 to 10 % more time with transformers, 25 to 30 % with separable attention (v3-S and XXS, v2-1.0 and v3-1.0
at 128 pixels, one thread).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..nn import (
    InvertedResidual,
    MobileViTV3Block,
    MobileViTV3SeparableBlock,
    SeparableLayer,
    TransformerLayer,
)
from .network import LAYERS


class DropPath:
    """A forward hook that drops with probability `rate`, and divides what is kept by 1 - rate.

    On the module that ends a branch its output is the branch; `rows` rows of it, one behind the other, belong to an
    image. With `residual` it is on the block y = x + branch(x) itself, whose op stays fused.
    """

    def __init__(self, rate: float, rows: int = 1, residual: bool = False) -> None:
        self.rate, self.rows, self.residual = rate, rows, residual

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        if not module.training:
            return None
        if not self.residual:
            return self._drop(y)
        (x,) = inputs
        # a block that resizes its input adds the resized one
        return None if x.shape != y.shape else x + self._drop(y - x)

    def _drop(self, branch: Tensor) -> Tensor:
        images = len(branch) // self.rows
        kept = torch.empty(images, device=branch.device).bernoulli_(1 - self.rate) / (1 - self.rate)
        kept = kept.to(torch.promote_types(branch.dtype, torch.float32)).repeat_interleave(self.rows)
        return (branch * kept.view(-1, *(1,) * (branch.ndim - 1))).to(branch.dtype)


def residuals(block: nn.Module, rate: float) -> Iterator[tuple[nn.Module, DropPath]]:
    """The hooks of a block and of the layers inside it, each with the module that it belongs on."""
    for module in block.modules():
        if isinstance(module, (TransformerLayer, SeparableLayer)):
            # Transformers see tokens (B * P, N, D) with P positions inside a patch, separable attention (B, D, P, N).
            rows = math.prod(module.patch_size) if isinstance(module, TransformerLayer) else 1
            for branch in module.branches():
                yield branch[-1], DropPath(rate, rows)
    adds = isinstance(block, InvertedResidual) and block.has_skip
    if adds or isinstance(block, (MobileViTV3Block, MobileViTV3SeparableBlock)):
        yield block, DropPath(rate, residual=True)


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Puts the hooks of a rate on a network, in place of those that are there; 0 takes them off."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, DropPath)]:
            del module._forward_hooks[key]
    blocks = [block for layer in LAYERS for block in getattr(model, layer)] if rate else []
    for number, block in enumerate(blocks):
        if share := rate * number / (len(blocks) - 1):
            for module, hook in residuals(block, share):
                module.register_forward_hook(hook)
