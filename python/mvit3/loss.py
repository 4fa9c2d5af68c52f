"""The loss, and the mixing of images that makes its targets."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy
from torch import Tensor

from .config import DistillConfig, LossConfig
from .distill import Teacher
from .options import UsageError


def class_weights(config: LossConfig, num_classes: int, labels: np.ndarray | None) -> Tensor | None:
    """The weight of each class; None where all weigh the same. Balanced ones are scaled so that their mean over the
    images is 1."""
    if config.class_weights:
        if len(config.class_weights) != num_classes:
            raise UsageError(
                f"loss.class_weights must be a number for each of the {num_classes} classes, got "
                f"{len(config.class_weights)}"
            )
        return torch.tensor(config.class_weights, dtype=torch.float32)
    if not config.class_balance:
        return None
    if labels is None:
        raise UsageError("loss.class_balance needs the labels of the training images")
    counts = torch.from_numpy(np.bincount(labels, minlength=num_classes)).double()
    weights = torch.where(counts > 0, counts.clamp_min(1) ** -config.class_balance, 0.0)
    return (weights * counts.sum() / (weights * counts).sum()).float()


class Criterion:
    """Mixes the images of a batch where the recipe does, makes targets of labels, and is the loss of both.

    Targets are labels (N,), or probabilities (N, classes) where images are mixed. With a teacher they are float (N, 1 +
    classes) or (N, 2 * classes), the teacher's logits behind: one tensor, which a recorded step can take. `labels`:
    those of all training images.
    """

    def __init__(
        self,
        config: LossConfig,
        num_classes: int,
        labels: np.ndarray | None = None,
        device: torch.device | str = "cpu",
        distill: DistillConfig | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.config, self.num_classes, self.distill, self.teacher = config, num_classes, distill, teacher
        weights = class_weights(config, num_classes, labels)
        self.weights = None if weights is None else weights.to(device)
        self.mixup = None
        if config.mixup_alpha or config.cutmix_alpha:
            self.mixup = Mixup(
                config.mixup_alpha,
                config.cutmix_alpha,
                prob=config.mix_probability,
                switch_prob=config.switch_probability,
                label_smoothing=config.label_smoothing,
                num_classes=num_classes,
            )
        # Mixed targets are smoothed already.
        self.smoothing = 0.0 if self.mixup else config.label_smoothing
        self._bce = BinaryCrossEntropy(
            self.smoothing, target_threshold=config.bce_target_thresh, weight=self.weights, sum_classes=config.bce_sum
        ).to(device)

    def begin_epoch(self, epoch: int) -> None:
        """Ends the mixing where its time is over; targets keep their shape."""
        if self.mixup is not None:
            self.mixup.mixup_enabled = not self.config.mixup_off_epoch or epoch < self.config.mixup_off_epoch

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """images and targets. timm mixes an even number; an odd one out stays."""
        targets = labels
        if self.mixup is not None:
            even = len(images) // 2 * 2
            _, targets = self.mixup(images[:even], labels[:even])  # in place
            if even < len(images):
                rest = mixup_target(labels[even:], self.num_classes, 1.0, self.config.label_smoothing)
                targets = torch.cat((targets, rest))
        if self.teacher is not None:
            own = targets[:, None].float() if targets.ndim == 1 else targets
            targets = torch.cat((own, self.teacher(images)), 1)
        return images, targets

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.float()
        if self.teacher is None:
            return self._of_labels(logits, targets)
        own, taught = targets[:, : -self.num_classes], targets[:, -self.num_classes :]
        weight = self.distill.weight
        return (1 - weight) * self._of_labels(
            logits, own if self.mixup else own[:, 0].long()
        ) + weight * self._of_teacher(logits, taught)

    def _of_labels(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.config.name == "bce":
            return self._bce(logits, targets)
        return F.cross_entropy(logits, targets, self.weights, label_smoothing=self.smoothing)

    def _of_teacher(self, logits: Tensor, taught: Tensor) -> Tensor:
        if self.distill.kind == "hard":
            return F.cross_entropy(logits, taught.argmax(1))
        t = self.distill.temperature
        return (
            t
            * t
            * F.kl_div((logits / t).log_softmax(1), (taught / t).log_softmax(1), reduction="batchmean", log_target=True)
        )
