"""The loss of label maps, and their score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops


def segmentation_loss(
    logits: Tensor | Sequence[Tensor | None],
    labels: Tensor,
    *,
    ignore_index: int = 255,
    align_corners: bool = True,
    interpolation: str = "bilinear",
    auxiliary_weight: float = 0.4,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean cross-entropy over the pixels that are not ignored. Logits of another size than the labels are up-sampled,
    without the up-sampled logits in memory: hand over `SegmentationNetwork.small_logits` rather than its output.

    Args:
        logits: (B, C, h, w), or those of the head and of the auxiliary head, whose loss counts `auxiliary_weight`; None
            for a head that the network does not have.
        labels: (B, H, W) of an integer type, as masks are read from files or int64.
        align_corners: as the network up-samples (`SegmentationNetwork.align_corners`).
        interpolation: "bilinear" or, as MobileViTv1's release has it for logits of another size, "nearest".

    Source: the releases of MobileViTv2 and MobileViTv3 (arXiv 2206.02680, 2209.15159); NaN where all pixels are
    ignored, as there.
    """
    if interpolation not in ("bilinear", "nearest"):
        raise ValueError(f"interpolation must be 'bilinear' or 'nearest', got {interpolation!r}")
    if not isinstance(logits, Tensor):
        options = dict(
            ignore_index=ignore_index,
            align_corners=align_corners,
            interpolation=interpolation,
            weight=weight,
            label_smoothing=label_smoothing,
        )
        main, auxiliary = logits
        loss = segmentation_loss(main, labels, **options)
        return loss if auxiliary is None else loss + auxiliary_weight * segmentation_loss(auxiliary, labels, **options)
    labels = labels if labels.is_floating_point() else labels.long()  # a kernel refuses what is no label
    if logits.shape[2:] != labels.shape[1:]:
        if interpolation == "bilinear":
            small = logits.permute(0, 2, 3, 1)
            return ops.upsample_cross_entropy(small, labels, align_corners, ignore_index, weight, label_smoothing)
        logits = F.interpolate(logits, tuple(labels.shape[1:]), mode=interpolation)
    return F.cross_entropy(logits, labels, weight, ignore_index=ignore_index, label_smoothing=label_smoothing)


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Pixels (num_classes, num_classes) int64, rows by label, columns by prediction; labels outside of 0 to num_classes
    - 1 are ignored. Sums over images and processes.

    Raises:
        ValueError: a predicted class is none of them.
    """
    if predicted.numel() > 0 and not 0 <= predicted.min() <= predicted.max() < num_classes:
        raise ValueError(
            f"predicted must be classes of 0 to {num_classes - 1}, got {predicted.min()} to {predicted.max()}"
        )
    counted = (labels >= 0) & (labels < num_classes)
    pairs = labels[counted].long() * num_classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def intersection_over_union(confusion: Tensor) -> Tensor:
    """Of each class, float64; NaN for a class that is neither labelled nor predicted."""
    confusion = confusion.double()
    inside = confusion.diag()
    return inside / (confusion.sum(0) + confusion.sum(1) - inside)
