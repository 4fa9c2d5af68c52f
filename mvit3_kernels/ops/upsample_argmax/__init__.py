"""The label map of bilinearly up-sampled logits, without the up-sampled logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch, registry
from ..checks import check_map, check_target
from ..registry import Call, register
from . import reference

__all__ = ["upsample_argmax"]

KERNELS = (
    dispatch.Kernel("cpu", lambda logits, size: dispatch.cpu_why_not(logits)),
    dispatch.Kernel("triton", dispatch.triton_upsampling_why_not),
)


def upsample_argmax(
    logits: Tensor, size: Sequence[int], align_corners: bool = False, target: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The class of the largest of bilinearly up-sampled logits at each pixel and, given labels, the confusion matrix.

    Args:
        logits: small map (B, h, w, C), float32, bfloat16, float16 or float64, any strides.
        size: (H, W) of the label map.
        align_corners: of the interpolation, as in torch.nn.functional.interpolate.
        target: labels (B, H, W) int64; those outside of 0 to C - 1 are not counted.

    Returns:
        labels (B, H, W) int64, of equal logits the first; and, with `target`, pixels (C, C) int64, rows by label,
        columns by prediction, else None. Neither has a gradient.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Bound: the logit of the class that it names is the largest but for rounding: where the two largest differ by more
    than twice the reference's error the label is that of float64.
    Passes over memory: the small map is read, the label map written.
    """
    check_map("logits", logits)
    size = tuple(size) if isinstance(size, Sequence) else (size,)
    if len(size) != 2 or any(not isinstance(side, int | torch.SymInt) or side < 1 for side in size):
        raise ValueError(f"size must be two positive numbers (H, W), got {size}")
    if 0 in logits.shape[1:]:
        raise ValueError(f"logits must have at least one pixel and one class, got shape {tuple(logits.shape)}")
    if target is not None:
        check_target("target", target, logits)
        if tuple(target.shape[1:]) != size:
            raise ValueError(f"target must have the size {size}, got {tuple(target.shape[1:])}")
    logits = logits.detach()
    if dispatch.select("upsample_argmax", KERNELS, logits, size) is None:
        found, confusion = reference.upsample_argmax(logits, size, align_corners, target)
    else:
        op = torch.ops.mvit3.upsample_argmax_inference
        found, confusion = registry.run_without_gradient(op, logits, *size, bool(align_corners), target)
    return found, None if target is None else confusion


@register(
    "upsample_argmax",
    "(Tensor logits, int[2] size, bool align_corners, Tensor? target) -> (Tensor labels, Tensor confusion)",
)
def _op(call: Call) -> tuple[Tensor, Tensor]:
    labels, confusion = upsample_argmax(*call)
    return labels, labels.new_zeros(0, 0) if confusion is None else confusion


@registry.kernel(
    "upsample_argmax_inference",
    "(Tensor logits, int height, int width, bool align_corners, Tensor? target) -> (Tensor labels, Tensor confusion)",
    triton=__name__,
)
def _inference_fake(call: Call) -> tuple[Tensor, Tensor]:
    batch, _, _, classes = call.logits.shape
    counted = 0 if call.target is None else classes
    new = call.logits.new_empty
    return new(batch, call.height, call.width, dtype=torch.int64), new(counted, counted, dtype=torch.int64)
