"""The loss of bilinearly up-sampled logits, without the up-sampled logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch, registry
from ..checks import check_map, check_parameter, check_target
from ..registry import Call, register
from . import reference

__all__ = ["upsample_cross_entropy"]


def _why_not(logits: Tensor, weight: Tensor | None) -> str | None:
    if logits.shape[-1] == 1:
        return "of one class the loss is 0, exactly"
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        return "weight requires a gradient, which PyTorch refuses with its own words"
    return None


def _cpu_why_not(logits: Tensor, weight: Tensor | None, size: Sequence[int]) -> str | None:
    return _why_not(logits, weight) or dispatch.cpu_why_not(logits)


def _triton_why_not(logits: Tensor, weight: Tensor | None, size: Sequence[int]) -> str | None:
    return _why_not(logits, weight) or dispatch.triton_upsampling_why_not(logits, size)


KERNELS = (dispatch.Kernel("cpu", _cpu_why_not), dispatch.Kernel("triton", _triton_why_not))


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    align_corners: bool = False,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean cross-entropy over the pixels of `target`, of `logits` up-sampled bilinearly to its size.

    Args:
        logits: small map (B, h, w, C), float32, bfloat16, float16 or float64, any strides.
        target: labels (B, H, W) int64, 0 to C - 1 or `ignore_index`; H x W of any size.
        align_corners: of the interpolation, as in torch.nn.functional.interpolate.
        ignore_index: pixels of this label do not count.
        weight: of each class (C,), float32 or the dtype of logits, or None.
        label_smoothing: 0 to 1, as in torch.nn.functional.cross_entropy.

    Returns:
        () float32 (float64 for float64 logits): the loss, weighted mean over pixels; NaN where every pixel is ignored.

    Raises:
        TypeError, ValueError: an argument does not fit. RuntimeError, IndexError: a label is none of the above; on a
            GPU, as PyTorch's, not before something waits for it.

    Bound: error <= 2 x that of the reference in the same dtype, both against float64.
    Passes over memory: forward reads the small map and the labels and, where a gradient is wanted, writes the small
    gradient in float32; backward scales it. Nothing of size B x H x W x C exists.
    Source: the training of segmentation in the MobileViT releases (arXiv 2110.02178, 2206.02680, 2209.15159).
    """
    check_map("logits", logits)
    check_target("target", target, logits)
    if weight is not None:
        check_parameter("weight", weight, (logits.shape[-1],), logits)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be 0 to 1, got {label_smoothing}")
    options = (bool(align_corners), int(ignore_index), weight, float(label_smoothing))
    if dispatch.select("upsample_cross_entropy", KERNELS, logits, weight, target.shape[1:]) is None:
        return reference.upsample_cross_entropy(logits, target, *options)
    keep = torch.is_grad_enabled() and logits.requires_grad
    return torch.ops.mvit3.upsample_cross_entropy_forward(logits, target, *options, keep)[0]


_ARGUMENTS = "Tensor logits, Tensor target, bool align_corners, int ignore_index, Tensor? weight, float label_smoothing"


@register("upsample_cross_entropy", f"({_ARGUMENTS}) -> Tensor loss")
def _op(call: Call) -> Tensor:
    return upsample_cross_entropy(*call)


# The kernel. `gradient` is that of the sum over pixels, `total` the weight of the pixels: backward divides.


@registry.forward(
    "upsample_cross_entropy_forward",
    f"({_ARGUMENTS}, bool keep) -> (Tensor loss, Tensor total, Tensor gradient)",
    triton=__name__,
)
def _forward_fake(call: Call) -> tuple[Tensor, ...]:
    new = call.logits.new_empty
    gradient = new(call.logits.shape if call.keep else 0, dtype=torch.float32)
    return new((), dtype=torch.float32), new((), dtype=torch.float32), gradient


registry.backward(
    "upsample_cross_entropy_backward",
    "(Tensor dloss, Tensor logits, Tensor total, Tensor gradient) -> Tensor dlogits",
    triton=__name__,
)
