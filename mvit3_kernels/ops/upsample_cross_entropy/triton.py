"""Triton kernels of upsample_cross_entropy. Launches:

- forward: loss and parts of the gradient in one walk over the labels, the gradient from its parts, sums of the loss
  (PyTorch's), loss, and PyTorch's check on the device that no label was wrong. Classes that do not fit a program's
  registers are walked over twice: largest logit and sum of exponentials of each pixel first;
- backward: the gradient of the sum over pixels, scaled.

Nothing waits for the GPU. Parts are added up in a fixed order, so the result is the same in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Call
from ..sizes import cdiv, next_power_of_2
from ..triton_common import contiguous, on_device
from ..triton_upsampling import Upsampling
from . import kernels


def bytes_moved(logits: Tensor, pixels: int) -> tuple[int, int]:
    """Bytes that the forward and the backward pass must read and write, of `pixels` labels: logits, labels and the
    gradient in float32; that and the gradient of logits."""
    small, kept = logits.numel() * logits.element_size(), logits.numel() * 4
    return small + 8 * pixels + kept, kept + small


def upsample_cross_entropy_forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    logits, target, weight = contiguous(call.logits, call.target, call.weight)
    new = logits.new_empty
    loss, total = new((), dtype=torch.float32), new((), dtype=torch.float32)
    gradient = new(logits.shape if call.keep else 0, dtype=torch.float32)
    if target.numel() == 0:  # a mean over nothing
        return loss.fill_(torch.nan), total.fill_(1), gradient
    up = Upsampling(logits, target.shape[1:], call.align_corners, "upsample_cross_entropy_fwd")
    sums = new((3, up.programs), dtype=torch.float32)
    part = new((up.programs, up.slots, 2, up.classes), dtype=torch.float32) if call.keep else None
    right = new((), dtype=torch.bool)
    options, smooth = (call.ignore_index, call.label_smoothing), call.label_smoothing != 0
    with on_device(logits):
        statistics = (None, None)
        if up.many:
            statistics = tuple(new(target.shape, dtype=torch.float32) for _ in range(3))
            kernels.statistics_fwd_kernel[(up.programs,)](
                logits, target, weight, *statistics, sums, *up.sizes, *options, up.programs, up.groups,
                SMOOTH=smooth, **up.flags,
            )  # fmt: skip
        if call.keep or not up.many:
            kernels.loss_fwd_kernel[(up.programs, up.groups)](
                logits, target, weight, *statistics[:2], sums, part, *up.sizes, *options, up.slots,
                up.programs, SMOOTH=smooth, KEEP=call.keep, **up.flags,
            )  # fmt: skip
        if call.keep:
            block = min(next_power_of_2(up.classes), 256)
            pixels = logits.shape[0] * logits.shape[1] * logits.shape[2]
            kernels.gradient_fwd_kernel[(pixels, cdiv(up.classes, block))](
                part, gradient, *up.sizes, up.slots, C=up.classes, COLUMNS=up.config["COLUMNS"], BLOCK_C=block,
                num_warps=max(block // 64, 1),
            )  # fmt: skip
        kernels.finish_fwd_kernel[(1,)](sums.sum(1, dtype=torch.float64), loss, total, right, num_warps=1)
        torch._assert_async(right, f"target must hold labels of 0 to {up.classes - 1} or ignore_index")
    return loss, total, gradient


def upsample_cross_entropy_backward(call: Call) -> Tensor:
    dlogits = torch.empty_like(call.logits, memory_format=torch.contiguous_format)
    block = 1024
    if dlogits.numel():
        with on_device(dlogits):
            kernels.scale_bwd_kernel[(cdiv(dlogits.numel(), block),)](
                call.dloss, call.total, call.gradient, dlogits, dlogits.numel(), BLOCK=block, num_warps=4
            )
    return dlogits
