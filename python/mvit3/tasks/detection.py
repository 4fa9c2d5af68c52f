"""Boxes with classes: COCO's mAP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from mvit3_kernels.models import SSDNetwork
from mvit3_kernels.tasks import Detections, Targets, assign, detections, ssd_loss

from ..coco import Found, Precision, Truth, average_precision
from ..config import DetectionConfig, TrainConfig
from ..data import Loaders
from ..data.config import DataConfig
from ..distributed import World
from ..errors import TrainingError
from ..gallery import Ranking, picture
from ..progress import Progress
from ..scores import SCORES
from .base import Evaluation, Meter, Task

SHOWN_SCORE = 0.3  # from which on a box counts for the score of an image in the report, and is shown
OVERLAP = 0.5  # with a true box, from which on it is found


class Anchors:
    """The anchors of a network by the size of its images, each made once."""

    def __init__(self, model: SSDNetwork) -> None:
        self._model, self._known = model, {}

    def __call__(self, images: Tensor) -> Tensor:
        size = tuple(images.shape[2:])
        if size not in self._known:
            self._known[size] = self._model.anchors(size, images.device)
        return self._known[size]


class BoxCriterion:
    """SSD's loss. Targets (N, anchors, 5) float32 are the class of each anchor, 0 for the background, and its
    offsets."""

    mixup = None

    def __init__(self, model: SSDNetwork, label_smoothing: float) -> None:
        self.anchors, self.label_smoothing = Anchors(model), label_smoothing

    def begin_epoch(self, epoch: int) -> None:
        pass

    @torch.no_grad()
    def mix(self, images: Tensor, boxes: NamedTuple) -> tuple[Tensor, Tensor]:
        targets = assign(boxes.boxes, boxes.labels, self.anchors(images))
        return images, torch.cat((targets.labels[..., None], targets.offsets), -1)

    def __call__(self, outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        scores, offsets = outputs
        wanted = Targets(targets[..., 0].long(), targets[..., 1:])
        return ssd_loss(scores.float(), offsets.float(), wanted, label_smoothing=self.label_smoothing)


class BoxMeter(Meter):
    """The boxes that a network finds in the images of all processes, against those that there are.

    Images with an output that is not finite are left out.
    """

    def __init__(
        self,
        names: Sequence[str],
        source: object,
        detection: DetectionConfig,
        data: DataConfig,
        world: World,
        gallery: bool,
    ) -> None:
        self.names, self.source, self.limits, self.data, self.world = names, source, detection.limits(), data, world
        self.found: list[Found] = []
        self.loss, self.positives, self.images, self.not_finite = 0.0, 0, 0, 0
        self.anchors: Anchors | None = None
        self.ranking = Ranking() if gallery else None

    def update(self, model: SSDNetwork, images: Tensor, boxes: NamedTuple, indices: Tensor) -> None:
        """images (N, 3, H, W); boxes (N, G, 4) and labels (N, G); indices (N,) into the source."""
        self.anchors = self.anchors or Anchors(model)
        anchors = self.anchors(images)
        scores, offsets = (output.float() for output in model(images))
        self.images += len(images)
        finite = (scores.isfinite().all(-1) & offsets.isfinite().all(-1)).all(1)
        if not finite.all():
            self.not_finite += int((~finite).sum())
            kept = finite.nonzero().flatten()
            images, scores, offsets, indices = (
                images[kept],
                scores[kept],
                offsets[kept],
                indices[kept.to(indices.device)],
            )
            boxes = type(boxes)(*(one[kept] for one in boxes))
        if not len(images):
            return
        targets = assign(boxes.boxes, boxes.labels, anchors)
        positives = int((targets.labels > 0).sum())
        self.loss += float(ssd_loss(scores, offsets, targets)) * positives
        self.positives += positives
        for i, (index, one) in enumerate(
            zip(indices.tolist(), detections(scores, offsets, anchors, **self.limits), strict=True)
        ):
            self.found.append(Found(index, *(tensor.cpu().numpy() for tensor in one)))
            if self.ranking is not None:
                present = boxes.labels[i] > 0
                truth = {"boxes": boxes.boxes[i][present], "labels": boxes.labels[i][present]}
                self._rank(images[i], truth, one)

    def _rank(self, image: Tensor, truth: dict[str, Tensor], one: Detections) -> None:
        shown = one.scores > SHOWN_SCORE
        guess = {key: getattr(one, key)[shown] for key in ("boxes", "scores", "labels")}
        self.ranking.add(
            f1(truth, guess),
            lambda: {
                "pixels": picture(image, self.data, Ranking.SIDE),
                "truth": {key: value.cpu() for key, value in truth.items()},
                "guess": {key: value.cpu() for key, value in guess.items()},
            },
        )

    def result(self) -> Evaluation:
        parts = self.world.gather((self.found, self.loss, self.positives, self.images, self.not_finite))
        found = sorted((one for part in parts for one in part[0]), key=lambda one: one.index)
        loss, positives, total, failed = (sum(part[i] for part in parts) for i in range(1, 5))
        if not total:
            raise TrainingError("there is no validation image that can be read")
        result = self.world.from_first(self._judge(found) if self.world.first else None)
        values = {**result.values, "val_loss": loss / positives if positives else None}
        return Evaluation(
            values,
            (values["map"] or 0.0, -(values["val_loss"] or 0.0)),
            total,
            failed,
            {"classes": result.classes, "samples": self.ranking.samples() if self.ranking else {}},
            result.remarks,
        )

    def _judge(self, found: list[Found]) -> Precision:
        truths = [
            Truth(one.index, self.source.size(one.index), *map(np.asarray, self.source.annotations(one.index)))
            for one in found
        ]
        return average_precision(found, truths, self.names)


def f1(truth: dict[str, Tensor], guess: dict[str, Tensor]) -> float:
    """2 * found / (boxes that there are + boxes that are guessed), each guess, by falling score, finding the box of its
    class that it overlaps most and that is not found yet; 1 where there are neither."""
    count = len(truth["labels"]) + len(guess["labels"])
    if not count:
        return 1.0
    overlap = box_iou(guess["boxes"].float(), truth["boxes"].float())
    overlap = overlap.where(guess["labels"][:, None] == truth["labels"], -1).cpu()
    hits = 0
    for row in guess["scores"].argsort(descending=True, stable=True).tolist() if overlap.numel() else ():
        best = int(overlap[row].argmax())
        if overlap[row, best] >= OVERLAP:
            hits += 1
            overlap[:, best] = -1
    return 2 * hits / count


class Detection(Task):
    """An image has boxes; output 0 of a network is the background."""

    scores = SCORES["detection"]
    background = 1
    stride = 256  # of the last map with a norm

    def recorded(self, loaders: Loaders) -> dict[str, object]:
        """The ids that the classes have in the files of the data set."""
        categories = loaders.train.source.categories
        return {"categories": [int(categories[label]) for label in sorted(categories)]}

    def criterion(
        self, config: TrainConfig, model: SSDNetwork, loaders: Loaders, num_classes: int, device: torch.device
    ) -> BoxCriterion:
        return BoxCriterion(model, config.loss.label_smoothing)

    def meter(
        self, config: TrainConfig, num_classes: int, names: Sequence[str], source: object, world: World, gallery: bool
    ) -> BoxMeter:
        return BoxMeter(names, source, config.detection, config.data, world, gallery)

    def classes(self, progress: Progress, names: Sequence[str]) -> list[dict[str, object]]:
        return progress.classes
