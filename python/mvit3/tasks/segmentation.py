"""A class for each pixel: mIoU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from mvit3_kernels import ops
from mvit3_kernels.models import SegmentationNetwork
from mvit3_kernels.tasks import confusion_matrix, intersection_over_union, segmentation_loss

from ..config import LossConfig, TrainConfig
from ..data import Loaders
from ..data.config import DataConfig
from ..data.targets import IGNORED
from ..distributed import World
from ..errors import TrainingError
from ..gallery import Ranking, picture
from ..loss import class_weights
from ..options import UsageError
from ..progress import Progress
from ..scores import SCORES
from .base import Evaluation, Meter, Task

CONFUSION = 50  # classes up to which a confusion matrix is kept
NAMED = 10  # classes that a message names


class SmallLogits(nn.Module):
    """A segmentation network that stops before up-sampling: `SegmentationNetwork.small_logits` as a module, which data
    parallelism, torch.compile and a recorded step call. It has no state of its own."""

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.network = network

    @property
    def encoder(self) -> nn.Module:
        return self.network.encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.network.small_logits(images)


class PixelCriterion:
    """Cross-entropy over the pixels, of the auxiliary head too where there is one; 0 for a batch without a labelled
    pixel, of which there is no mean."""

    mixup = None

    def __init__(self, config: LossConfig, model: SegmentationNetwork, device: torch.device) -> None:
        self.config, self.align_corners = config, model.align_corners
        weights = class_weights(config, model.num_classes, None)
        self.weights = None if weights is None else weights.to(device)

    def begin_epoch(self, epoch: int) -> None:
        pass

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images, labels

    def __call__(self, logits: tuple[Tensor, Tensor | None], labels: Tensor) -> Tensor:
        main, auxiliary = logits
        loss = segmentation_loss(
            (main.float(), None if auxiliary is None else auxiliary.float()),
            labels,
            ignore_index=IGNORED,
            align_corners=self.align_corners,
            auxiliary_weight=self.config.auxiliary_weight,
            weight=self.weights,
            label_smoothing=self.config.label_smoothing,
        )
        return torch.where((labels != IGNORED).any(), loss, 0.0)


class Counts(Metric):
    """Sums over the batches of all processes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("loss", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("images", "not_finite"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, confusion: Tensor, loss: Tensor) -> None:
        """Pixels by label and prediction, and their mean loss, which is NaN for no pixel."""
        self.confusion += confusion
        pixels = confusion.sum()
        self.loss += torch.where(pixels > 0, loss, 0).double() * pixels

    def compute(self) -> tuple[Tensor, float, int, int]:
        return self.confusion.cpu(), float(self.loss), int(self.images), int(self.not_finite)


class PixelMeter(Meter):
    """Pixels by label and prediction, and the mean cross-entropy of the main head.

    With `data.native_labels` labels have the size of the image as it was: as in the released evaluation, what the
    network sees is then brought down to multiples of its output stride, and its prediction to the size of the labels.
    Images with an output that is not finite are left out.
    """

    def __init__(self, num_classes: int, names: Sequence[str], data: DataConfig, device: torch.device, gallery: bool):
        self.names, self.data = names, data
        self.counts = Counts(num_classes).to(device)
        self.ranking = Ranking() if gallery else None

    def update(self, model: SegmentationNetwork, images: Tensor, labels: Tensor | list[Tensor]) -> None:
        """images (N, 3, H, W); labels (N, H, W), or a list of (H, W)."""
        self.counts.images += len(images)
        native = self.data.native_labels  # these of one size may come as one tensor
        small = model.small_logits(whole_strides(images, model) if native else images)[0].float()
        finite = small.isfinite().flatten(1).all(1)
        if not finite.all():
            self.counts.not_finite += (~finite).sum()
            kept = finite.nonzero().flatten().tolist()
            images, small = images[kept], small[kept]
            labels = [labels[i] for i in kept] if isinstance(labels, list) else labels[kept]
        if native:
            for i, own in enumerate(labels):
                self._add(model, images[i : i + 1], small[i : i + 1], own[None].to(small.device))
        elif len(small):
            self._add(model, images, small, labels)

    def _add(self, model: SegmentationNetwork, images: Tensor, small: Tensor, labels: Tensor) -> None:
        found, confusion = predicted(model, small, labels)
        logits = small.permute(0, 2, 3, 1)
        loss = ops.upsample_cross_entropy(logits, labels, model.align_corners, IGNORED, None, 0.0)
        self.counts.update(confusion, loss)
        if self.ranking is not None:
            for image, guess, truth in zip(images, found, labels, strict=True):
                counted = confusion_matrix(guess, truth, len(confusion))
                score = float(intersection_over_union(counted).nanmean().nan_to_num(1.0))  # 1 without any label
                self.ranking.add(score, lambda i=image, g=guess, t=truth: self._sample(i, g, t))

    def _sample(self, image: Tensor, guess: Tensor, truth: Tensor) -> dict[str, object]:
        pixels = picture(image, self.data, Ranking.SIDE)
        size = tuple(pixels.shape[:2])
        # IGNORED is the largest that there can be
        maps = (F.interpolate(one[None, None].clamp(0, IGNORED).float(), size)[0, 0].byte() for one in (truth, guess))
        return {"pixels": pixels, **dict(zip(("truth", "guess"), (one.cpu() for one in maps), strict=True))}

    def result(self) -> Evaluation:
        confusion, loss, total, failed = self.counts.compute()
        pixels = int(confusion.sum())
        if not total:
            raise TrainingError("there is no validation image that can be read")
        if not pixels and not failed:
            raise TrainingError("no pixel of the validation images has a label that counts")
        scores = intersection_over_union(confusion)
        values = {
            "miou": float(scores.nanmean()) if pixels else None,
            "pixel_accuracy": int(confusion.diag().sum()) / pixels if pixels else None,
            "val_loss": loss / pixels if pixels else None,
        }
        seen, iou = confusion.sum(1).tolist(), scores.tolist()
        names = [self.names[i] if i < len(self.names) else str(i) for i in range(len(seen))]
        classes = [
            {"name": name, "iou": None if score != score else score, "pixels": count}
            for name, score, count in zip(names, iou, seen, strict=True)
        ]
        return Evaluation(
            values,
            (values["miou"] or 0.0, -(values["val_loss"] or 0.0)),
            total,
            failed,
            {
                "confusion": confusion.tolist() if len(seen) <= CONFUSION else None,
                "classes": classes,
                "samples": self.ranking.samples() if self.ranking else {},
            },
            remarks(classes),
        )


def whole_strides(images: Tensor, model: SegmentationNetwork) -> Tensor:
    """Images brought down to whole multiples of the output stride, as released."""
    size = [max(side // model.output_stride, 1) * model.output_stride for side in images.shape[2:]]
    if size == list(images.shape[2:]):
        return images
    found = F.interpolate(images, size, mode="bilinear", align_corners=model.align_corners)
    return found.contiguous(memory_format=torch.channels_last)


def predicted(model: SegmentationNetwork, small: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The class of each pixel at the size of the labels (N, H, W), as `SegmentationNetwork.label_map` finds it, and the
    confusion matrix."""
    size = tuple(labels.shape[1:])
    if model.align_corners or size == tuple(side * model.output_stride for side in small.shape[2:]):
        return ops.upsample_argmax(small.permute(0, 2, 3, 1), size, model.align_corners, labels)  # counted in one pass
    found = model.labels(small, size)
    return found, confusion_matrix(found, labels, small.shape[1])


def remarks(classes: Sequence[dict[str, object]]) -> tuple[str, ...]:
    """What is to be known about classes without a labelled pixel."""
    found = []
    for text, names in (
        ("never seen in the validation images, and left out of the mIoU", [c for c in classes if c["iou"] is None]),
        (
            "predicted, but never seen in the validation images, which counts as an IoU of 0",
            [c for c in classes if c["iou"] is not None and not c["pixels"]],
        ),
    ):
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            found.append(f"{text}: {', '.join(str(c['name']) for c in names[:NAMED])}{more}")
    return tuple(found)


class Segmentation(Task):
    """An image has a label map."""

    scores = SCORES["segmentation"]
    stride = None  # the pyramids of both heads normalise the mean over the map

    def check(self, config: TrainConfig, loaders: Loaders) -> None:
        if (config.model.num_classes or loaders.num_classes) < 2:
            raise UsageError(
                f"segmentation needs two classes, {config.data.root or config.data.source} has one, "
                f"{loaders.class_names[0]!r}"
            )

    def criterion(
        self, config: TrainConfig, model: SegmentationNetwork, loaders: Loaders, num_classes: int, device: torch.device
    ) -> PixelCriterion:
        return PixelCriterion(config.loss, model, device)

    def network(self, model: SegmentationNetwork) -> SmallLogits:
        return SmallLogits(model)

    def meter(
        self, config: TrainConfig, num_classes: int, names: Sequence[str], source: object, world: World, gallery: bool
    ) -> PixelMeter:
        return PixelMeter(num_classes, names, config.data, world.device, gallery)

    def classes(self, progress: Progress, names: Sequence[str]) -> list[dict[str, object]]:
        return progress.classes
