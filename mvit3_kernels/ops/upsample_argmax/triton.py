"""The Triton kernel of upsample_argmax: one launch, which counts the confusion matrix as well."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Call
from ..triton_common import contiguous, on_device
from ..triton_upsampling import Upsampling
from . import kernels


def bytes_moved(logits: Tensor, pixels: int, counted: bool) -> int:
    """Bytes that must be read and written for `pixels` labels: logits and labels, and the target where it is given."""
    return logits.numel() * logits.element_size() + 8 * pixels * (2 if counted else 1)


def upsample_argmax_inference(call: Call) -> tuple[Tensor, Tensor]:
    logits, target = contiguous(call.logits, call.target)
    size, classes = (call.height, call.width), logits.shape[-1]
    counted = 0 if target is None else classes
    labels = logits.new_empty((logits.shape[0], *size), dtype=torch.int64)
    confusion = logits.new_zeros((counted, counted), dtype=torch.int64)
    if labels.numel() == 0:
        return labels, confusion
    up = Upsampling(logits, size, call.align_corners, "upsample_argmax")
    best = logits.new_empty(labels.shape, dtype=torch.float32) if up.many else None
    with on_device(logits):
        kernels.argmax_kernel[(up.programs,)](logits, target, best, labels, confusion, *up.sizes, up.groups, **up.flags)
    return labels, confusion
