"""What a batch norm in training does to its buffers, from the moments that an op measured."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .sizes import values_per_channel
from .types import Moments


@torch.no_grad()
def update_running_stats(norm: nn.BatchNorm2d, moments: Moments | None, y: Tensor) -> None:
    """Does to the buffers of `norm` what `torch.nn.BatchNorm2d` does after a batch. Ops leave them alone and return
    the moments.

    Args:
        norm: the batch norm, or a module with its attributes; changed in place where it is in training and tracks
            statistics.
        moments: of its input, as the op returned them; None leaves the buffers as they are.
        y: a map (B, H, W, C) of the size of its input.
    """
    if moments is None or not (norm.training and norm.track_running_stats):
        return
    if norm.num_batches_tracked is not None:  # an empty batch counts, too
        norm.num_batches_tracked.add_(1)
    if norm.running_mean is None or y.numel() == 0:
        return
    momentum = norm.momentum
    if momentum is None:  # a cumulative average, which stands still where nobody counts
        count = norm.num_batches_tracked
        momentum = 0.0 if count is None else 1.0 / count.to(norm.running_mean.dtype)
    rows = values_per_channel(y)
    norm.running_mean.lerp_(moments.mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_((moments.var * (rows / (rows - 1))).to(norm.running_var.dtype), momentum)
