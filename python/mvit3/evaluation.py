"""Accuracy of a network on validation images, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from .config import RunConfig
from .errors import Stopped, TrainingError
from .gallery import Gallery
from .runtime import autocast, use_ops

CONFUSION = 50  # classes up to which a confusion matrix is made


@dataclass(frozen=True)
class Evaluation:
    """`correct` hits of `total` images at first guess, and within the first five; mean cross-entropy; (true, predicted) counts.

    `not_finite` images have a logit that is NaN or infinite: they are misses, and neither the loss nor the counts have them.
    """

    correct: int
    correct5: int
    total: int
    loss: float | None
    confusion: list[list[int]] | None = None
    not_finite: int = 0
    class_correct: list[int] = field(default_factory=list)  # by class: hits at first guess
    class_total: list[int] = field(default_factory=list)  # by class: images
    samples: dict[str, list[dict[str, object]]] = field(default_factory=dict)  # as gallery.py makes them, of this process's images

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def accuracy5(self) -> float:
        return self.correct5 / self.total


class ClassCounts(Metric):
    """Hits at first guess, and images, of each class."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        for name in ("correct", "total"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, labels: Tensor, hits: Tensor) -> None:
        """Labels of images, and of those that are hits."""
        self.total += labels.bincount(minlength=self.num_classes)
        self.correct += hits.bincount(minlength=self.num_classes)

    def compute(self) -> tuple[list[int], list[int]]:
        return self.correct.tolist(), self.total.tolist()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    config: RunConfig,
    num_classes: int,
    device: torch.device,
    stopped: Callable[[], bool] = lambda: False,
    gallery: Gallery | None = None,
) -> Evaluation:
    """Evaluates a network on the batches of all processes; Stopped as soon as `stopped` says so."""
    model.eval()
    settings = {"num_classes": num_classes, "validate_args": False}
    metrics = MetricCollection({
        "top1": MulticlassAccuracy(average="micro", **settings),
        "top5": MulticlassAccuracy(average="micro", top_k=min(5, num_classes), **settings),
    }).to(device)  # fmt: skip
    loss, images_seen, not_finite = MeanMetric().to(device), SumMetric().to(device), SumMetric().to(device)
    counts = ClassCounts(num_classes).to(device)
    confusion = MulticlassConfusionMatrix(**settings).to(device) if num_classes <= CONFUSION else None
    with use_ops(config.ops), autocast(config, device):
        for images, labels in batches:
            if stopped():
                raise Stopped
            logits = model(images if config.channels_last else images.contiguous()).float()
            images_seen.update(len(labels))
            finite = logits.isfinite().all(1)
            not_finite.update((~finite).sum())
            counts.update(labels, labels[finite & (logits.argmax(1) == labels)])
            if not finite.all():  # the largest of them would be a NaN, and that a guess
                images, logits, labels = images[finite], logits[finite], labels[finite]
                if not len(labels):
                    continue
            metrics.update(logits, labels)
            loss.update(F.cross_entropy(logits, labels, reduction="none"))
            if confusion is not None:
                confusion.update(logits, labels)
            if gallery is not None:
                gallery.add(images, labels, logits)
    total, failed = (round(float(count.compute())) for count in (images_seen, not_finite))  # over all processes, as all that follows
    if not total:
        raise TrainingError("there is no validation image that can be read")
    found, judged = metrics.compute(), total - failed
    return Evaluation(
        round(float(found["top1"]) * judged),
        round(float(found["top5"]) * judged),
        total,
        float(loss.compute()) if judged else None,
        None if confusion is None else confusion.compute().tolist(),
        failed,
        *counts.compute(),
        gallery.samples() if gallery else {},
    )
