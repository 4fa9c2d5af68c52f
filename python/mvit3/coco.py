"""COCO's average precision, by faster-coco-eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NAMED = 10  # classes that a message names
STATISTICS = ("map", "map50", "map75", "map_small", "map_medium", "map_large")


class Found(NamedTuple):
    """What was found in an image: its place in the source; boxes (n, 4) as corners, fractions of the image, not
    clipped; scores (n,); labels (n,) from 1 on."""

    index: int
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


class Truth(NamedTuple):
    """What there is in it: its size (height, width); boxes (n, 4) as corners in pixels; labels (n,) from 1 on; crowd
    (n,), whether a box stands for many; area (n,) of the objects in pixels, by which they are small, medium or
    large."""

    index: int
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    area: np.ndarray


class Precision(NamedTuple):
    """`values`: of all classes, None where there is no box to find; `classes`: name, ap, ap50 and number of boxes of
    each; `remarks`: what a person should know."""

    values: dict[str, float | None]
    classes: list[dict[str, object]]
    remarks: tuple[str, ...]


def boxes_in_pixels(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """x, y, width and height in pixels of boxes (n, 4) given as corners, fractions of an image of `size` (height,
    width), to which they are clipped."""
    limits = np.array([size[1], size[0]] * 2, np.float64)
    corners = np.clip(boxes.astype(np.float64) * limits, 0, limits)
    return np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), 1)


def average_precision(found: Sequence[Found], truths: Sequence[Truth], names: Sequence[str]) -> Precision:
    """COCO's statistics of boxes; `names` are those of the classes from label 1 on."""
    from faster_coco_eval import COCO, COCOeval_faster

    images = [{"id": t.index + 1, "height": int(t.size[0]), "width": int(t.size[1])} for t in truths]
    categories = [{"id": label, "name": name} for label, name in enumerate(names, 1)]
    annotations: list[dict[str, object]] = []
    for t in truths:
        for box, label, crowd, area in zip(t.boxes, t.labels, t.crowd, t.area, strict=True):
            x1, y1, x2, y2 = map(float, box)
            annotations.append({
                "id": len(annotations) + 1,
                "image_id": t.index + 1,
                "category_id": int(label),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": float(area),
                "iscrowd": int(crowd),
            })  # fmt: skip
    sizes = {t.index: t.size for t in truths}
    results = [
        {"image_id": f.index + 1, "category_id": int(label), "bbox": box, "score": float(score)}
        for f in found
        for box, score, label in zip(boxes_in_pixels(f.boxes, sizes[f.index]).tolist(), f.scores, f.labels, strict=True)
    ]
    truth = COCO({"images": images, "categories": categories, "annotations": annotations, "info": {}})
    judged = COCOeval_faster(truth, truth.loadRes(results), iouType="bbox")
    judged.run()
    values = {key: _share(value) for key, value in zip(STATISTICS, judged.stats, strict=False)}
    boxes = np.bincount([a["category_id"] for a in annotations if not a["iscrowd"]], minlength=len(names) + 1)
    # thresholds, recalls, classes, sizes, numbers of detections: all sizes, at most 100
    precision = np.asarray(judged.eval["precision"])[:, :, :, 0, -1]
    classes = [
        {
            "name": name,
            "ap": _mean(precision[:, :, k]),
            "ap50": _mean(precision[0, :, k]),
            "boxes": int(boxes[k + 1]),
        }
        for k, name in enumerate(names)
    ]
    unseen = [str(c["name"]) for c in classes if not c["boxes"]]
    more = f" and {len(unseen) - NAMED} more" if len(unseen) > NAMED else ""
    text = f"without a box in the validation images, and left out of the mAP: {', '.join(unseen[:NAMED])}{more}"
    return Precision(values, classes, (text,) if unseen else ())


def _share(value: float) -> float | None:
    """A statistic; -1 stands for nothing to find."""
    return float(value) if value > -1 else None


def _mean(precision: np.ndarray) -> float | None:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None
