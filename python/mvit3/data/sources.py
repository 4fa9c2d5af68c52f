"""Where images come from: a folder per class, tar shards, the embedded digits, a data set of torchvision or Hugging
Face; all read by index.

Random access is what makes batches a function of (seed, epoch, batch) alone, on any number of processes, and lets a run
go on at any batch without decoding what came before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ..options import UsageError
from .config import DENSE_SOURCES, DataConfig
from .decode import Encoded
from .digits import load_digits
from .errors import DataError
from .folders import open_folder
from .sampler import spread
from .shards import open_shards
from .targets import Annotations


class Source(Protocol):
    """Images in a fixed order. One for dense prediction has `truth(index)` too: labels of pixels (H, W) uint8, IGNORED
    where there is none, or `Annotations`; one for detection, what scores ask for: `annotations(index)`, `size(index)`
    (height, width), `image_id(index)` and `categories`, from labels to ids of categories in the data set's file."""

    labels: np.ndarray  # (N,) int64
    class_names: tuple[str, ...]
    notes: tuple[str, ...]  # what a person should know before the run

    def read(self, index: int) -> Encoded:
        """An encoded image, a PIL image, or (H, W, 3) uint8; OSError where it cannot be read."""

    def image_name(self, index: int) -> str:
        """How a message names the image."""


@dataclass(frozen=True)
class Subset:
    """Images of a source, spread evenly over it, so that every class keeps its share."""

    source: Source
    indices: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        return self.source.labels[self.indices]

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def notes(self) -> tuple[str, ...]:
        return self.source.notes

    def read(self, index: int) -> Encoded:
        return self.source.read(int(self.indices[index]))

    def image_name(self, index: int) -> str:
        return self.source.image_name(int(self.indices[index]))


@dataclass(frozen=True)
class DenseSubset(Subset):
    """One with masks or boxes; all but `truth` is of boxes alone."""

    def truth(self, index: int) -> np.ndarray | Annotations:
        return self.source.truth(int(self.indices[index]))

    @property
    def categories(self) -> Mapping[int, int]:
        return self.source.categories

    def annotations(self, index: int) -> Annotations:
        return self.source.annotations(int(self.indices[index]))

    def size(self, index: int) -> tuple[int, int]:
        return self.source.size(int(self.indices[index]))

    def image_id(self, index: int) -> int:
        return self.source.image_id(int(self.indices[index]))


@dataclass(frozen=True)
class Arrays:
    """Images in memory, (N, H, W, 3) uint8."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def image_name(self, index: int) -> str:
        return f"image {index}"


def limit(source: Source, count: int) -> Source:
    """`count` images of a source; 0, or as many as there are, takes all."""
    total = len(source.labels)
    kind = DenseSubset if hasattr(source, "truth") else Subset
    return kind(source, np.array(spread(total, count))) if 0 < count < total else source


def open_source(config: DataConfig, part: str, class_names: Sequence[str] = (), task: str = "classification") -> Source:
    """The "train" or the "val" part of what a configuration names; `class_names`: the classes of training, which
    validation must share."""
    if task != "classification":
        from .dense_sources import open_dense

        return limit(open_dense(config, part, class_names, task), getattr(config, f"limit_{part}"))
    name = getattr(config, part)
    if config.source == "digits":
        split = getattr(load_digits(), part)
        images = split.images.permute(0, 2, 3, 1).mul(255).round().byte().numpy()
        source: Source = Arrays(images, split.labels.numpy(), tuple("0123456789"))
    elif config.source in ("torchvision", "huggingface"):
        from .builtin import open_huggingface, open_torchvision

        source = (open_torchvision if config.source == "torchvision" else open_huggingface)(config, part)
        if class_names and tuple(class_names) != source.class_names:
            raise DataError(
                f"the classes of validation, {len(source.class_names)} from {source.class_names[0]!r} on, are not "
                "those of training, "
                f"{len(class_names)} from {class_names[0]!r} on"
            )
    elif not config.root and not (config.source == "shards" and name):
        raise UsageError(f"data.root must name the folder of the images for data.source {config.source}")
    elif config.source == "folder":
        source = open_folder(Path(config.root) / name, class_names)
    elif config.source in DENSE_SOURCES:
        raise UsageError(
            f"data.source {config.source} has no class for each image; it needs a network for dense prediction"
        )
    else:
        source = open_shards(name, config.root, config.cache, config.num_classes, config.class_map, class_names)
    return limit(source, getattr(config, f"limit_{part}"))
