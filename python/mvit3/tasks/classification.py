"""One label for each image: accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from ..config import TrainConfig
from ..data import Loaders
from ..distill import open_teacher
from ..distributed import World
from ..errors import TrainingError
from ..gallery import Gallery
from ..loss import Criterion
from ..options import UsageError
from ..progress import Progress
from ..report import class_results
from ..scores import SCORES
from .base import Evaluation, Meter, Task

CONFUSION = 50  # classes up to which a confusion matrix is made


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


class Accuracy(Meter):
    """Hits at first guess and within the first five, mean cross-entropy, (true, predicted) counts.

    Images with a logit that is NaN or infinite are misses, and neither the loss nor the counts have them.
    """

    def __init__(self, num_classes: int, device: torch.device, gallery: Gallery | None = None) -> None:
        settings = {"num_classes": num_classes, "validate_args": False}
        self.accuracies = MetricCollection({
            "top1": MulticlassAccuracy(average="micro", **settings),
            "top5": MulticlassAccuracy(average="micro", top_k=min(5, num_classes), **settings),
        }).to(device)  # fmt: skip
        self.loss, self.images = MeanMetric().to(device), SumMetric().to(device)
        self.not_finite, self.counts = SumMetric().to(device), ClassCounts(num_classes).to(device)
        self.confusion = MulticlassConfusionMatrix(**settings).to(device) if num_classes <= CONFUSION else None
        self.gallery = gallery

    def update(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """images (N, 3, H, W), labels (N,)."""
        logits = model(images).float()
        self.images.update(len(labels))
        finite = logits.isfinite().all(1)
        self.not_finite.update((~finite).sum())
        self.counts.update(labels, labels[finite & (logits.argmax(1) == labels)])
        if not finite.all():  # the largest of them would be a NaN, and that a guess
            images, logits, labels = images[finite], logits[finite], labels[finite]
            if not len(labels):
                return
        self.accuracies.update(logits, labels)
        self.loss.update(F.cross_entropy(logits, labels, reduction="none"))
        if self.confusion is not None:
            self.confusion.update(logits, labels)
        if self.gallery is not None:
            self.gallery.add(images, labels, logits)

    def result(self) -> Evaluation:
        # over all processes, as all that follows
        total, failed = (round(float(count.compute())) for count in (self.images, self.not_finite))
        if not total:
            raise TrainingError("there is no validation image that can be read")
        found, judged = self.accuracies.compute(), total - failed
        correct, correct5 = (round(float(found[key]) * judged) for key in ("top1", "top5"))
        loss = float(self.loss.compute()) if judged else None
        confusion = None if self.confusion is None else self.confusion.compute().tolist()
        class_correct, class_total = self.counts.compute()
        return Evaluation(
            {"accuracy": correct / total, "accuracy5": correct5 / total, "val_loss": loss, "correct": correct},
            (correct, -loss if judged else 0.0),
            total,
            failed,
            {
                "confusion": confusion,
                "samples": self.gallery.samples() if self.gallery else {},
                "class_correct": class_correct,
                "class_total": class_total,
            },
        )


class Classification(Task):
    """An image has one label."""

    scores = SCORES["classification"]
    lost = "counted as misses"
    stride = 32  # of the last map of every classifier of the family

    def check(self, config: TrainConfig, loaders: Loaders) -> None:
        if (config.model.num_classes or loaders.num_classes) < 2:
            raise UsageError(
                f"a classifier needs two classes, {config.data.root or config.data.source} has one, "
                f"{loaders.class_names[0]!r}; data.root "
                "must hold the folders of data.train and data.val, and each of these one folder per class"
            )

    def criterion(
        self, config: TrainConfig, model: nn.Module, loaders: Loaders, num_classes: int, device: torch.device
    ) -> Criterion:
        teacher = open_teacher(config, num_classes, loaders.class_names, device)
        return Criterion(config.loss, num_classes, loaders.train.source.labels, device, config.distill, teacher)

    def meter(
        self, config: TrainConfig, num_classes: int, names: Sequence[str], source: object, world: World, gallery: bool
    ) -> Accuracy:
        return Accuracy(num_classes, world.device, Gallery(config.data) if gallery else None)

    def classes(self, progress: Progress, names: Sequence[str]) -> list[dict[str, object]]:
        return class_results(progress.class_correct, progress.class_total, names)
