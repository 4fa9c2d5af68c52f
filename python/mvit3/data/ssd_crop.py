"""The crop of SSD's training (Liu et al., arXiv 1512.02325, section 2.2), as the two releases have it. torchvision's
RandomIoUCrop differs from both in what it draws."""

from __future__ import annotations

import random as python_random

import numpy as np

LEAST_OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # 0: the image stays whole
TRIES = 40  # crops for one of them
SCALE, MAX_RATIO = (0.3, 1.0), 2.0  # of a crop's sides to the image's; of its sides to each other
LEAST_SIDE = 100  # pixels, "v2"


Corners = tuple[float, float, float, float]


def _overlap(crop: Corners, box: Corners) -> float:
    """Intersection over union. Of numbers, not of arrays: boxes are few, and dozens of crops are tried for an image."""
    width, height = min(crop[2], box[2]) - max(crop[0], box[0]), min(crop[3], box[3]) - max(crop[1], box[1])
    inside = max(width, 0) * max(height, 0)
    return inside / ((crop[2] - crop[0]) * (crop[3] - crop[1]) + (box[2] - box[0]) * (box[3] - box[1]) - inside)


def _rectangle(height: int, width: int, random: python_random.Random, style: str) -> Corners | None:
    """Corners of a crop in whole pixels; None where its shape is not allowed."""
    w, h = (random.uniform(SCALE[0] * side, SCALE[1] * side) for side in (width, height))
    if style == "v2":
        w, h = int(w), int(h)
    if min(w, h) < 1 or not 1 / MAX_RATIO <= h / w <= MAX_RATIO:
        return None
    left, top = random.uniform(0, width - w), random.uniform(0, height - h)
    if style == "v2":
        left, top = int(left), int(top)
    return int(left), int(top), int(left + w), int(top + h)


def ssd_crop(
    boxes: np.ndarray, height: int, width: int, random: python_random.Random, style: str
) -> tuple[tuple[int, int, int, int], np.ndarray, np.ndarray]:
    """A random part of an image that keeps objects.

    Args:
        boxes: (G, 4), corners in pixels.
        random: where random numbers come from.
        style: "v1" or "v2", which rounds earlier and makes no side shorter than LEAST_SIDE.

    Returns:
        The part as (top, left, height, width), the boxes that it keeps, clipped to it and in its coordinates, and which
        these are (G,) bool: those whose centre lies in it.
    """
    everything = (0, 0, height, width), boxes, np.ones(len(boxes), bool)
    if not len(boxes):
        return everything
    centers, corners = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes.tolist()
    while True:
        least = random.choice(LEAST_OVERLAPS)
        if least == 0:
            return everything
        for _ in range(TRIES):
            crop = _rectangle(height, width, random, style)
            if crop is None or max(_overlap(crop, box) for box in corners) < least:
                continue
            left, top, right, bottom = crop
            kept = ((centers > (left, top)) & (centers < (right, bottom))).all(1)
            if not kept.any() or (style == "v2" and min(right - left, bottom - top) < LEAST_SIDE):
                continue
            low, high = (left, top) * 2, (right, bottom) * 2
            return (top, left, bottom - top, right - left), boxes[kept].clip(low, high) - low, kept
