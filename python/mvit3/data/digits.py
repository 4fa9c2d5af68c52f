"""Data sets that fit in memory, and batches of them.

Images live as one channels_last tensor on the device of the run: a batch is an index, and its augmentation a few tensor operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, shown at 64x64 in three equal channels, so that the network keeps its stem.

    One fifth of each class is the validation part; both parts are shuffled.
    """
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    large = F.interpolate(small, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False).clamp(0, 1)
    images = large.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    labels = torch.from_numpy(digits.target).long()
    parts = model_selection.train_test_split(range(len(labels)), test_size=0.2, stratify=digits.target, random_state=SPLIT_SEED)
    return Dataset("digits", 10, *(Split(images[part], labels[part]) for part in parts))


DATASETS = {"digits": load_digits}


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 12 degrees, scaled by up to 15 % and shifted by up to 10 % of its side; no flips, these are digits."""
    # Drawn on the CPU, so that a seed means the same on every device.
    turn, scale, dx, dy = torch.rand(4, len(images), generator=generator).mul(2).sub(1).to(images.device)
    turn, scale = turn * math.radians(12), 1 + 0.15 * scale
    cos, sin = turn.cos() * scale, turn.sin() * scale
    theta = torch.stack((cos, -sin, 0.2 * dx, sin, cos, 0.2 * dy), 1).view(-1, 2, 3)  # 0.2: a side is 2 long in the grid's units
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).contiguous(memory_format=torch.channels_last)


def train_batches(split: Split, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled and augmented batches of one epoch, all of the same size; the seed decides everything."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(split), generator=generator)
    for start in range(0, len(split) - batch_size + 1, batch_size):
        index = order[start : start + batch_size].to(split.images.device)
        yield augment(split.images[index], generator), split.labels[index]
