"""The border between PyTorch's module convention and the ops: modules take and return (B, C, H, W), ops work on (B, H,
W, C).

In channels_last memory both are views of the same bytes, so crossing the border costs nothing; other layouts are copied
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..ops import dispatch


def to_nhwc(x: Tensor) -> Tensor:
    """(B, C, H, W) of any strides to contiguous (B, H, W, C)."""
    return x.permute(0, 2, 3, 1).contiguous()


def to_nchw(x: Tensor) -> Tensor:
    """(B, H, W, C) to (B, C, H, W) in channels_last memory."""
    return _Handed.apply(x) if _may_be_sharded(x) else x.permute(0, 3, 1, 2)


def _may_be_sharded(x: Tensor) -> bool:
    """Whether a module may be one of FSDP2's, which hangs a hook on each result that it returns: a write to it, were it
    a view, would lose that hook, and with it the weights in backward."""
    return (
        dist.is_available()
        and dist.is_initialized()
        and x.requires_grad
        and not torch.compiler.is_compiling()
        and dispatch.transform() is None
    )


class _Handed(torch.autograd.Function):
    """The same bytes and the same count of writes, but for autograd a tensor of its own, not a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2).detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy.permute(0, 2, 3, 1)


def resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Bilinear resize of (B, C, H, W) to (B, C, *size); the same tensor where the size already fits."""
    # In an exported program whose height or width is open both cases must be one: to its own size the resize changes
    # nothing.
    is_open = dispatch.writes_aten() and any(isinstance(side, torch.SymInt) for side in x.shape[2:])
    if not is_open and tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)


def whole_patches(x: Tensor, patch_size: tuple[int, int]) -> tuple[int, int]:
    """The smallest multiple of the patch size that covers the map (B, C, H, W)."""
    return tuple((side + patch - 1) // patch * patch for side, patch in zip(x.shape[2:], patch_size, strict=True))


def unfold(x: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """A map (B, H, W, D) to tokens (B, P, N, D): P = ph * pw positions inside a patch, N patches, both in reading
    order."""
    (batch, height, width, dim), (ph, pw) = x.shape, patch_size
    x = x.view(batch, height // ph, ph, width // pw, pw, dim).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, ph * pw, (height // ph) * (width // pw), dim)


def fold(t: Tensor, shape: Sequence[int], patch_size: tuple[int, int]) -> Tensor:
    """Tokens (B, P, N, D) back to a map of `shape` (B, H, W, D)."""
    (batch, height, width, dim), (ph, pw) = shape, patch_size
    t = t.view(batch, ph, pw, height // ph, width // pw, dim).permute(0, 3, 1, 4, 2, 5)
    return t.reshape(batch, height, width, dim)
