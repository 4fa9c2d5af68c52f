"""Tar shards for dense prediction: beside each image a label image or a list of boxes of the same name."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .coco import Boxed, Objects, read_object
from .config import DataConfig
from .decode import DecodeError, Decoder
from .errors import DataError
from .folders import IMAGE_EXTENSIONS, Skipped
from .masks import counted, named_classes, read_labels, tolerate, unseen
from .shards import Place, members, read_class_names, read_place, shard_files, side_file

# Endings of a label image; a plain .png is one where the sample has another image.
MASKS = (".mask.png", ".seg.png", ".png")


@dataclass(frozen=True)
class Samples:
    """Samples of tar files. `places` and `beside` (N, 3) int64: file, offset and size in bytes of the image and of what
    lies beside it."""

    files: tuple[Path, ...]
    names: np.ndarray
    places: np.ndarray
    beside: np.ndarray

    def _bytes(self, place: np.ndarray) -> bytes:
        file, offset, size = place
        return read_place(self.files[file], offset, size)

    def read(self, index: int) -> bytes:
        return self._bytes(self.places[index])

    def other(self, index: int) -> bytes:
        return self._bytes(self.beside[index])

    def image_name(self, index: int) -> str:
        return f"{self.files[self.places[index, 0]]}:{os.fsdecode(self.names[index])}"


@dataclass(frozen=True)
class MaskShards:
    """Images and label images."""

    samples: Samples
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> np.ndarray:
        return np.zeros(len(self.samples.names), np.int64)

    def read(self, index: int) -> bytes:
        return self.samples.read(index)

    def image_name(self, index: int) -> str:
        return self.samples.image_name(index)

    def mask(self, index: int) -> bytes:
        return self.samples.other(index)

    def truth(self, index: int) -> np.ndarray:
        return read_labels(self.mask(index), len(self.class_names))


@dataclass(frozen=True)
class BoxShards(Boxed):
    """Images and boxes; an image's id is its index, a category's its label."""

    samples: Samples
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def categories(self) -> dict[int, int]:
        return {label: label for label in range(1, len(self.class_names) + 1)}

    def read(self, index: int) -> bytes:
        return self.samples.read(index)

    def image_name(self, index: int) -> str:
        return self.samples.image_name(index)

    def image_id(self, index: int) -> int:
        return index


def _sample(kinds: dict[str, Place], task: str) -> tuple[Place | None, Place | None]:
    """The image and what lies beside it."""
    images = {kind: place for kind, place in kinds.items() if kind in IMAGE_EXTENSIONS}
    if task == "detection":
        return next(iter(images.values()), None), kinds.get(".json")
    wanted = next((kind for kind in MASKS if kind in kinds and (kind not in images or len(images) > 1)), None)
    image = next((place for kind, place in images.items() if kind != wanted), None)
    return image, kinds[wanted] if wanted else None


def _samples(config: DataConfig, pattern: str, task: str) -> tuple[Samples, list[str]]:
    """All samples of the shards, and notes."""
    names, places, beside, files, notes, skipped = [], [], [], [], [], Skipped()
    lacking = "images without a label image (.png)" if task == "segmentation" else "images without boxes (.json)"
    orphaned = "label images without an image" if task == "segmentation" else "boxes (.json) without an image"
    for number, (shard, file, damage, said) in enumerate(shard_files(pattern, config.root, config.cache)):
        files.append(file)
        found, trouble = members(file, skipped)
        before = len(names)
        for kinds in found.values():
            image, other = _sample(kinds, task)
            if image is not None and other is not None:
                names.append(os.fsencode(image[0]))
                places.append((number, *image[1:]))
                beside.append((number, *other[1:]))
            elif image is not None:
                skipped.add(lacking, f"{file.name}:{image[0]}")
            elif other is not None:
                skipped.add(orphaned, f"{file.name}:{other[0]}")
        notes += said
        if trouble := damage or trouble:
            notes.append(f"{shard} {trouble}; {len(names) - before} images before that are used")
    notes += skipped.notes(pattern)
    if not names:
        what = "a label image (.png)" if task == "segmentation" else "a .json file of boxes"
        raise DataError(
            f"{pattern} holds no sample, which is an image and {what} of the same name"
            + "".join(f"; {n}" for n in notes)
        )
    return Samples(tuple(files), np.array(names), np.array(places, np.int64), np.array(beside, np.int64)), notes


def _named(config: DataConfig, samples: Samples, class_names: Sequence[str]) -> tuple[str, ...]:
    """Class names of training, of a file beside the shards, or numbers."""
    side = side_file(config.class_map, config.root, [str(file) for file in samples.files])
    return tuple(class_names) or (read_class_names(side) if side else named_classes(config))


def open_mask_shards(config: DataConfig, part: str, class_names: Sequence[str]) -> MaskShards:
    """Samples of an image and a label image: 7.jpg and 7.png, or 7.mask.png or 7.seg.png beside any image."""
    samples, notes = _samples(config, getattr(config, part), "segmentation")
    names = _named(config, samples, class_names) or counted(samples.other, len(samples.names))
    return MaskShards(samples, names, tuple(notes))


def open_box_shards(config: DataConfig, part: str, class_names: Sequence[str]) -> BoxShards:
    """Samples of an image and a .json file: a list of COCO's annotations, or a mapping with such a list as
    "annotations"; category_id counts classes from 1 on."""
    samples, notes = _samples(config, getattr(config, part), "detection")
    decoder, problems, kept = Decoder("pil", turn=False), [], []
    sizes, objects, empty, clipped = [], [], Skipped(), Skipped()
    for index in range(len(samples.names)):
        name = samples.image_name(index)
        try:
            size = decoder.size(samples.read(index))
            content = json.loads(samples.other(index))
            entries = content["annotations"] if isinstance(content, dict) else content
            read = [(read_object(entry, *size), int(entry["category_id"])) for entry in entries]
        except (DataError, DecodeError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{name}: {error if isinstance(error, ValueError | OSError | DataError) else repr(error)}")
            continue
        for found, _ in read:
            if found is None:
                empty.add("boxes without an area inside their image", name)
            elif found[3]:
                clipped.add("boxes outside", name)
        kept.append(index)
        sizes.append(size)
        objects.append([(found[0], label, *found[1:3]) for found, label in read if found is not None])
    pattern = getattr(config, part)
    notes += tolerate(problems, len(samples.names), f"samples of {pattern} cannot be read", config.max_corrupt)
    notes += empty.notes(pattern)
    if clipped.counts:
        (number,), (first,) = clipped.counts.values(), clipped.first.values()
        notes.append(f"{pattern}: boxes that leave their image are clipped: {number}, the first is in {first}")
    if part == "train":
        some = [i for i, found in enumerate(objects) if found]
        if len(some) < len(objects):
            notes.append(f"{pattern}: images without boxes are not trained on: {len(objects) - len(some)}")
        kept, sizes, objects = ([values[i] for i in some] for values in (kept, sizes, objects))
    together = Objects.of_images(objects)
    labels = together.all.labels
    if together.all.crowd.all():  # none, or crowds alone, which are no targets
        raise DataError(f"{pattern} has no box that can be used" + "".join(f"; {note}" for note in notes))
    names = _named(config, samples, class_names) or tuple(map(str, range(1, labels.max() + 1)))
    if labels.min() < 1 or labels.max() > len(names):
        raise DataError(f"categories of {pattern} are {labels.min()} to {labels.max()}, there are {len(names)} classes")
    if part == "train":
        notes += unseen(pattern, "box", names, together.all.single().labels, 1)
    taken = Samples(samples.files, *(values[kept] for values in (samples.names, samples.places, samples.beside)))
    return BoxShards(np.array(sizes, np.int64), together, taken, names, tuple(notes))
