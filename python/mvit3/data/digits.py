"""The embedded digits: a data set that fits in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

SPLIT_SEED = 0  # the split is part of the data set's definition, not of a run
IMAGE_SIZE = 64


@dataclass(frozen=True)
class Split:
    """Images (N, 3, H, W) in [0, 1], channels_last float32, and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, count: int) -> Split:
        """The first `count` images; 0 takes all."""
        return Split(self.images[:count], self.labels[:count]) if count else self

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    name: str
    num_classes: int
    train: Split
    val: Split

    def to(self, device: torch.device) -> Dataset:
        return replace(self, train=self.train.to(device), val=self.val.to(device))


def load_digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, shown at 64x64 in three equal channels, so that the network
    keeps its stem.

    One fifth of each class is the validation part; both parts are shuffled.
    """
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    large = F.interpolate(small, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False).clamp(0, 1)
    images = large.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    labels = torch.from_numpy(digits.target).long()
    parts = model_selection.train_test_split(
        range(len(labels)), test_size=0.2, stratify=digits.target, random_state=SPLIT_SEED
    )
    return Dataset("digits", 10, *(Split(images[part], labels[part]) for part in parts))
