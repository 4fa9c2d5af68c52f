"""Images with masks or boxes, read by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..options import UsageError
from .coco import open_coco
from .config import DENSE_SOURCES, DataConfig
from .dense_shards import open_box_shards, open_mask_shards
from .errors import DataError
from .masks import BACKGROUND, check_masks, open_ade20k, open_masks, open_voc
from .scenes import DIGITS, Scenes, load_scenes
from .targets import Annotations

if TYPE_CHECKING:
    from .sources import Source


@dataclass(frozen=True)
class SceneSource:
    """The embedded scenes, with masks or with boxes."""

    scenes: Scenes
    task: str
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> np.ndarray:
        return np.zeros(len(self.scenes), np.int64)

    @property
    def class_names(self) -> tuple[str, ...]:
        return DIGITS if self.task == "detection" else (BACKGROUND, *DIGITS)

    @property
    def categories(self) -> dict[int, int]:
        return {label: label for label in range(1, len(DIGITS) + 1)}

    def read(self, index: int) -> np.ndarray:
        return self.scenes[index].pixels

    def image_name(self, index: int) -> str:
        return f"scene {index}"

    def truth(self, index: int) -> np.ndarray | Annotations:
        return self.annotations(index) if self.task == "detection" else self.scenes[index].mask

    def annotations(self, index: int) -> Annotations:
        _, _, boxes, labels, area = self.scenes[index]
        return Annotations(boxes, labels, np.zeros(len(labels), bool), area)

    def size(self, index: int) -> tuple[int, int]:
        return self.scenes[index].mask.shape

    def image_id(self, index: int) -> int:
        return index


def open_dense(config: DataConfig, part: str, class_names: Sequence[str], task: str) -> Source:
    """The "train" or the "val" part of what a configuration names, for "segmentation" or "detection"; `class_names` as
    in `open_source`.

    Raises:
        UsageError: the source has no images for the task, or no folder is named.
        DataError: files are missing or do not fit; of a few there is a note.
    """
    if config.source == "digits":
        return SceneSource(load_scenes(part, task), task)
    if config.source != "shards" and DENSE_SOURCES.get(config.source) != task:
        fitting = ", ".join(["digits", "shards", *(name for name, kind in DENSE_SOURCES.items() if kind == task)])
        raise UsageError(f"data.source must be one of {fitting} for {task}, got {config.source!r}")
    if not config.root and config.source != "shards":
        raise UsageError(f"data.root must name the folder of the images for data.source {config.source}")
    if task == "detection":
        opener = open_box_shards if config.source == "shards" else open_coco
        return opener(config, part, class_names)
    if config.source in ("shards", "masks"):
        source = (open_mask_shards if config.source == "shards" else open_masks)(config, part, class_names)
    else:
        source = (open_voc if config.source == "voc" else open_ade20k)(config, part)
        if class_names and len(class_names) != len(source.class_names):
            raise DataError(
                f"data.source {config.source} has {len(source.class_names)} classes, the network knows "
                f"{len(class_names)}"
            )
    return replace(source, notes=(*source.notes, *check_masks(source, part, config.max_corrupt)))
