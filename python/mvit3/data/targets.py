"""What a network of each task learns from an image, and how the targets of images become those of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = 255  # label of pixels that take part in nothing


class Boxes(NamedTuple):
    """boxes (N, G, 4) float32, corners as fractions of the image; labels (N, G) int64, from 1 on. Where an image has
    fewer boxes than G, which is at least 1, there are boxes of zeros with label 0. Of one image without N."""

    boxes: Tensor
    labels: Tensor


class Annotations(NamedTuple):
    """What a data set says of the objects of one image: boxes (G, 4) float64, corners in pixels; labels (G,) int64,
    from 1 on; crowd (G,) bool, boxes around many objects, which take part in evaluation only; area (G,) float64, in
    pixels."""

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    area: np.ndarray

    def single(self) -> Annotations:
        """Without crowds."""
        return Annotations(*(part[~self.crowd] for part in self))


class Indexed(NamedTuple):
    """Boxes, and the index of each image in its source (N,) int64."""

    boxes: Boxes
    indices: Tensor


Target = int | Tensor | Boxes | Indexed  # of one image: a class, labels (H, W) int64, boxes


def collate(targets: Sequence[Target]) -> Tensor | list[Tensor] | Boxes | Indexed:
    """Targets of images, all of one kind, as those of a batch; labels of different sizes stay a list."""
    if not targets or isinstance(targets[0], int):
        return torch.tensor(targets, dtype=torch.int64)
    if isinstance(targets[0], Indexed):
        return Indexed(collate([t.boxes for t in targets]), torch.tensor([t.indices for t in targets]))
    if isinstance(targets[0], Boxes):
        none = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
        # one image more, of one box, makes G at least 1
        boxes, labels = (
            pad_sequence([*parts, empty], batch_first=True)[:-1]
            for parts, empty in zip(zip(*targets, strict=True), none, strict=True)
        )
        return Boxes(boxes, labels)
    same = len({target.shape for target in targets}) == 1
    return torch.stack(list(targets)) if same else list(targets)


def to_device(targets: object, device: torch.device) -> object:
    """A batch's targets on a device."""
    if isinstance(targets, Tensor):
        return targets.to(device, non_blocking=True)
    parts = [to_device(part, device) for part in targets]
    return type(targets)(*parts) if hasattr(targets, "_fields") else parts


def tensors(batch: object) -> Iterator[Tensor]:
    """All tensors of a batch."""
    if isinstance(batch, Tensor):
        yield batch
    else:
        for part in batch:
            yield from tensors(part)
