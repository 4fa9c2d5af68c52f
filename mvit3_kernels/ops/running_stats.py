"""What batch norms in training do to their buffers, from the moments that an op measured."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .sizes import values_per_channel
from .types import Moments

Batch = tuple[nn.BatchNorm2d, Moments | None, Tensor]


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


@torch.no_grad()
def update_all_running_stats(*batches: Batch) -> None:
    """`update_running_stats` of each, in three launches on a GPU where the norms are different ones of one momentum:
    counts, unbiased variances, and all buffers."""
    batches = tuple(b for b in batches if b[1] is not None and b[0].training and b[0].track_running_stats)
    norms = {id(norm): norm for norm, *_ in batches}
    if len(norms) < len(batches) or len({norm.momentum for norm in norms.values()}) > 1:
        for batch in batches:  # what one of them writes another may read
            update_all_running_stats(batch)
        return
    counts = [norm.num_batches_tracked for norm in norms.values() if norm.num_batches_tracked is not None]
    if counts:  # an empty batch counts, too
        torch._foreach_add_(counts, 1)
    batches = tuple(b for b in batches if b[0].running_mean is not None and b[2].numel() > 0)
    if not batches:
        return
    rows = [values_per_channel(y) for *_, y in batches]
    means = [moments.mean.to(norm.running_mean.dtype) for norm, moments, _ in batches]
    variances = torch._foreach_mul([moments.var for _, moments, _ in batches], [n / (n - 1) for n in rows])
    variances = [var.to(norm.running_var.dtype) for (norm, *_), var in zip(batches, variances, strict=True)]
    buffers = [norm.running_mean for norm, *_ in batches] + [norm.running_var for norm, *_ in batches]
    momentum = batches[0][0].momentum
    if momentum is not None:
        torch._foreach_lerp_(buffers, (*means, *variances), momentum)
        return
    for (norm, *_), *pair in zip((*batches, *batches), buffers, (*means, *variances), strict=True):
        count = norm.num_batches_tracked  # a cumulative average, which stands still where nobody counts
        pair[0].lerp_(pair[1], 0.0 if count is None else 1.0 / count.to(pair[0].dtype))
