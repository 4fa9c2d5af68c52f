"""What batch norms in training do to their buffers, from the moments that an op measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from .sizes import values_per_channel
from .types import Moments

Batch = tuple[nn.BatchNorm2d, Moments | None, Tensor]
Measured = tuple[nn.BatchNorm2d, Moments, int]  # the last: values of a channel

# What was measured inside of `written_together` and is not written yet.
_waiting: ContextVar[list[Measured] | None] = ContextVar("mvit3_running_stats", default=None)


def update_running_stats(norm: nn.BatchNorm2d, moments: Moments | None, y: Tensor) -> None:
    """Does to the buffers of `norm` what `torch.nn.BatchNorm2d` does after a batch. Ops leave them alone and return
    the moments.

    Args:
        norm: the batch norm, or a module with its attributes; changed in place where it is in training and tracks
            statistics.
        moments: of its input, as the op returned them; None leaves the buffers as they are.
        y: a map (B, H, W, C) of the size of its input.
    """
    update_all_running_stats((norm, moments, y))


@contextmanager
def written_together() -> Iterator[None]:
    """Buffers of all norms that are measured inside are written at the end, in launches that do not grow with their
    number; where an error ends it, those that were measured before. Nothing inside may read or write these buffers."""
    token = _waiting.set([])
    try:
        yield
    finally:
        waiting = _waiting.get()
        _waiting.reset(token)
        _write(waiting)


def update_all_running_stats(*batches: Batch) -> None:
    """`update_running_stats` of each, in three launches on a GPU where the norms are different ones of one momentum:
    counts, unbiased variances, and all buffers."""
    measured = [
        (norm, moments, values_per_channel(y) if y.numel() > 0 else 0)
        for norm, moments, y in batches
        if moments is not None and norm.training and norm.track_running_stats
    ]
    waiting = None if torch.compiler.is_compiling() else _waiting.get()
    if waiting is None:
        _write(measured)
    else:
        waiting += measured


@torch.no_grad()
def _write(batches: list[Measured]) -> None:
    norms = {id(norm): norm for norm, *_ in batches}
    if len(norms) < len(batches) or len({norm.momentum for norm in norms.values()}) > 1:
        for batch in batches:  # what one of them writes another may read
            _write([batch])
        return
    counts = [norm.num_batches_tracked for norm in norms.values() if norm.num_batches_tracked is not None]
    if counts:  # an empty batch counts, too
        torch._foreach_add_(counts, 1)
    batches = [batch for batch in batches if batch[0].running_mean is not None and batch[2] > 0]
    if not batches:
        return
    means = [moments.mean.to(norm.running_mean.dtype) for norm, moments, _ in batches]
    variances = torch._foreach_mul([moments.var for _, moments, _ in batches], [n / (n - 1) for *_, n in batches])
    variances = [var.to(norm.running_var.dtype) for (norm, *_), var in zip(batches, variances, strict=True)]
    buffers = [norm.running_mean for norm, *_ in batches] + [norm.running_var for norm, *_ in batches]
    momentum = batches[0][0].momentum
    if momentum is not None:
        torch._foreach_lerp_(buffers, (*means, *variances), momentum)
        return
    for (norm, *_), *pair in zip((*batches, *batches), buffers, (*means, *variances), strict=True):
        count = norm.num_batches_tracked  # a cumulative average, which stands still where nobody counts
        pair[0].lerp_(pair[1], 0.0 if count is None else 1.0 / count.to(pair[0].dtype))
