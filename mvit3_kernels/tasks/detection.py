"""SSD: which anchor learns which box, the loss, and boxes from a network's outputs. Vectorised over the batch, without
a loop over images and without waiting for the device, but for the last step, whose result has any length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..models.detection import decode, encode

# Added to the union in the overlap of an anchor and a box, as published. Areas are fractions of the image.
OVERLAP_EPS = 1e-5


class Targets(NamedTuple):
    """labels (B, N) int64, 0 where an anchor is background; offsets (B, N, 4) of the box that each anchor learns, 0
    where it is background."""

    labels: Tensor
    offsets: Tensor


class Detections(NamedTuple):
    """boxes (n, 4) as corners, fractions of the image, not clipped; scores (n,); labels (n,) int64 from 1 on."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def corners(anchors: Tensor) -> Tensor:
    """Anchors (N, 4) as corners."""
    return torch.cat((anchors[:, :2] - anchors[:, 2:] / 2, anchors[:, :2] + anchors[:, 2:] / 2), 1)


def overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union (..., G, N) of boxes (..., G, 4) and (N, 4), both as corners."""
    low = torch.maximum(boxes[..., :, None, :2], others[:, :2])
    high = torch.minimum(boxes[..., :, None, 2:], others[:, 2:])
    inside = (high - low).clamp(min=0).prod(-1)
    areas = [(b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1) for b in (boxes, others)]
    return inside / (areas[0][..., None] + areas[1] - inside + OVERLAP_EPS)


def assign(
    boxes: Tensor | Sequence[Tensor], labels: Tensor | Sequence[Tensor], anchors: Tensor, threshold: float = 0.5
) -> Targets:
    """What each anchor learns.

    Boxes without area and labels below 1 are left out. An anchor takes the box that it overlaps most, where that is at
    least `threshold`. Then each box, in order, claims the anchor that overlaps it most, whatever the overlap; a later
    box wins over an earlier one.

    Args:
        boxes: of each image (G, 4), corners as fractions of the image; G may be 0. Or one tensor (B, G, 4).
        labels: of each image (G,), from 1 on. Or one tensor (B, G), with 0 where there is no box.
        anchors: (N, 4), centre form (`SSDNetwork.anchors`).

    Source: Liu et al., arXiv 1512.02325; the order of claims as ml-cvnets has it.
    """
    if not isinstance(boxes, Tensor):
        boxes = pad_sequence([b.to(anchors.dtype).view(-1, 4) for b in boxes], batch_first=True)
    if not isinstance(labels, Tensor):
        labels = pad_sequence(list(labels), batch_first=True)
    given, classes = boxes.to(anchors.dtype), labels.long()
    if given.shape[1] == 0:
        empty = classes.new_zeros(len(given), len(anchors))
        return Targets(empty, anchors.new_zeros(*empty.shape, 4))
    present = (classes > 0) & (given[..., 2:] > given[..., :2]).all(-1)
    overlap = overlaps(given, corners(anchors)).masked_fill(~present[..., None], -1)
    best, box = overlap.max(1)  # of each anchor
    # Of several boxes that claim an anchor the last one has it: the largest index.
    claims = torch.arange(given.shape[1], device=given.device).expand_as(classes).masked_fill(~present, -1)
    claimed = claims.new_full(box.shape, -1).scatter_reduce(1, overlap.argmax(2), claims, "amax")
    box = torch.where(claimed >= 0, claimed, box)
    positive = (claimed >= 0) | (best >= threshold)
    found = classes.gather(1, box).masked_fill(~positive, 0)
    mine = given.gather(1, box[..., None].expand(-1, -1, 4))
    # The logarithm of a background's box may not be finite, and never takes part.
    mine = torch.where(positive[..., None], mine, corners(anchors))
    return Targets(found, encode(mine, anchors).masked_fill(~positive[..., None], 0))


def ssd_loss(
    scores: Tensor, offsets: Tensor, targets: Targets, negatives: int = 3, label_smoothing: float = 0.0
) -> Tensor:
    """(cross-entropy + smooth-L1) / number of positive anchors of the batch.

    Cross-entropy is summed over the positive anchors and, of each image, the `negatives` times as many background
    anchors that the network takes least for background; smooth-L1 over the positive ones. 0 for a batch without boxes.

    Args:
        scores: (B, N, classes) before softmax; offsets: (B, N, 4), a network's outputs.
        targets: of `assign`.

    Source: Liu et al., arXiv 1512.02325, section 2.2.
    """
    labels = targets.labels
    positive = labels > 0
    count = positive.sum(1, keepdim=True)
    with torch.no_grad():
        doubt = -F.log_softmax(scores.float() if scores.dtype != torch.float64 else scores, -1)[..., 0]
        order = doubt.masked_fill(positive, -torch.inf).argsort(1, descending=True)
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, place)
        chosen = positive | (rank < negatives * count)
    classification = F.cross_entropy(
        scores.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    # of any anchor that is not chosen nothing flows back, whatever its value
    classification = torch.where(chosen.flatten(), classification, 0).sum()
    difference = F.smooth_l1_loss(offsets, targets.offsets.to(offsets.dtype), reduction="none")
    localisation = torch.where(positive[..., None], difference, 0).sum()
    return (classification + localisation) / count.sum().clamp(min=1)


def detections(
    scores: Tensor,
    offsets: Tensor,
    anchors: Tensor,
    *,
    score_threshold: float = 0.01,
    iou_threshold: float = 0.5,
    candidates: int | None = 400,
    per_class: int | None = None,
    per_image: int | None = 200,
) -> list[Detections]:
    """Boxes of each image: per class those above the score threshold, the best `candidates`, non-maximum suppression.

    The defaults are MobileViTv2's and MobileViTv3-w's. The release's for MobileViTv1 and MobileViTv3-XXS/XS/S are
    `score_threshold=0.05, candidates=None, per_class=200, per_image=None`; its documentation advises a threshold of
    0.01 for COCO.

    Args:
        scores, offsets: a network's outputs (B, N, classes) and (B, N, 4).
        anchors: (N, 4) of `SSDNetwork.anchors`.
        candidates: the best boxes of each class before suppression; per_class: after it; per_image: of all classes.
            None: all.

    Returns:
        Of each image the boxes by falling score; without `per_image` by class, then by falling score.
    """
    # 16 bits would put boxes on a grid and scores into a few steps
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    boxes = decode(offsets.detach().to(dtype), anchors.to(dtype))
    return choose(
        scores.detach().softmax(-1, dtype=dtype),
        boxes,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        candidates=candidates,
        per_class=per_class,
        per_image=per_image,
    )


def choose(
    probabilities: Tensor,
    boxes: Tensor,
    *,
    score_threshold: float = 0.01,
    iou_threshold: float = 0.5,
    candidates: int | None = 400,
    per_class: int | None = None,
    per_image: int | None = 200,
) -> list[Detections]:
    """`detections` of what `SSDNetwork.predict` returns: probabilities (B, N, classes) and boxes (B, N, 4)."""
    from torchvision.ops import nms

    found = []
    for image_boxes, image in zip(boxes, probabilities, strict=True):
        parts = []
        for label in torch.nonzero((image[:, 1:] > score_threshold).any(0)).flatten().tolist():
            score = image[:, label + 1]
            order = torch.nonzero(score > score_threshold).flatten()
            if candidates is not None and len(order) > candidates:
                order = order[score[order].topk(candidates).indices]
            order = order[nms(image_boxes[order], score[order], iou_threshold)][:per_class]
            parts.append(Detections(image_boxes[order], score[order], torch.full_like(order, label + 1)))
        if not parts:
            parts = [Detections(image_boxes[:0], image[:0, 0], torch.empty(0, dtype=torch.int64, device=image.device))]
        one = Detections(*(torch.cat(group) for group in zip(*parts, strict=True)))
        if per_image is not None:
            best = one.scores.argsort(descending=True, stable=True)[:per_image]
            one = Detections(*(t[best] for t in one))
        found.append(one)
    return found
