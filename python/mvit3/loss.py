"""The loss, and the mixing of images that makes its targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from .config import LossConfig


class Criterion:
    """Mixes the images of a batch where the recipe does, makes targets of labels, and is the loss of both."""

    def __init__(self, config: LossConfig, num_classes: int) -> None:
        self.config, self.num_classes = config, num_classes
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

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """images and targets: labels (N,), or (N, classes) where images are mixed. timm mixes an even number; an odd one out stays."""
        if self.mixup is None:
            return images, labels
        even = len(images) // 2 * 2
        _, targets = self.mixup(images[:even], labels[:even])  # in place
        if even < len(images):
            rest = mixup_target(labels[even:], self.num_classes, 1.0, self.config.label_smoothing)
            targets = torch.cat((targets, rest))
        return images, targets

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        # Mixed targets are smoothed already.
        smoothing = 0.0 if self.mixup else self.config.label_smoothing
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)
