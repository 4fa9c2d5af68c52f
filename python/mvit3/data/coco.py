"""Images with boxes, as COCO's files of instances have them."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .config import DataConfig
from .decode import DecodeError, Decoder
from .errors import DataError
from .folders import Skipped
from .masks import tolerate, unseen
from .sampler import spread
from .targets import Annotations

LOOKED_AT = 500  # images of a part whose size is compared with that of the file, spread evenly
OUTSIDE = 0.01  # pixels by which a box may leave the image before that is said

EMPTY = "boxes without an area inside their image"
CLIPPED = "boxes that leave their image"


@dataclass(frozen=True)
class Objects:
    """Objects of many images, one after the other: boxes (T, 4), labels, crowd and area (T,); those of image i are from
    `starts[i]` to `starts[i + 1]`."""

    all: Annotations
    starts: np.ndarray

    def of(self, index: int) -> Annotations:
        part = slice(self.starts[index], self.starts[index + 1])
        return Annotations(*(values[part] for values in self.all))

    @staticmethod
    def of_images(images: Sequence[Sequence[tuple]]) -> Objects:
        """From (box, label, crowd, area) of the objects of each image."""
        rows = [row for objects in images for row in objects]
        boxes, labels, crowd, area = zip(*rows, strict=True) if rows else ((), (), (), ())
        everything = Annotations(
            np.array(boxes, np.float64).reshape(-1, 4),
            np.array(labels, np.int64),
            np.array(crowd, bool),
            np.array(area, np.float64),
        )
        return Objects(everything, np.cumsum([0, *map(len, images)]))


@dataclass(frozen=True)
class Boxed:
    """What sources of images with boxes have in common. `sizes` (N, 2), height and width."""

    sizes: np.ndarray
    objects: Objects

    @property
    def labels(self) -> np.ndarray:
        return np.diff(self.objects.starts)

    def truth(self, index: int) -> Annotations:
        return self.objects.of(index)

    annotations = truth

    def size(self, index: int) -> tuple[int, int]:
        height, width = self.sizes[index]
        return int(height), int(width)


@dataclass(frozen=True)
class Coco(Boxed):
    """Images of a folder, by a file of instances. `names`: of the files, an array of bytes; `ids` (N,) int64;
    `categories`: from labels, which count from 1 on, to the file's ids."""

    root: Path
    names: np.ndarray
    ids: np.ndarray
    class_names: tuple[str, ...]
    categories: Mapping[int, int]
    notes: tuple[str, ...] = ()

    def read(self, index: int) -> bytes:
        return (self.root / os.fsdecode(self.names[index])).read_bytes()

    def image_name(self, index: int) -> str:
        return str(self.root / os.fsdecode(self.names[index]))

    def image_id(self, index: int) -> int:
        return int(self.ids[index])


def _number(value: object) -> float:
    """TypeError or ValueError where there is none."""
    if isinstance(value, bool):
        raise TypeError(value)
    return float(value)


def read_object(entry: Mapping[str, object], height: int, width: int) -> tuple[list[float], bool, float, bool] | None:
    """Corners clipped to the image, whether it is a crowd, the area, and whether it was clipped; None without an area.
    DataError where there is no box."""
    try:
        x, y, w, h = map(_number, entry["bbox"])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"it has no bbox [x, y, width, height], but {entry.get('bbox')!r}") from None
    area = w * h if entry.get("area") is None else entry["area"]
    try:
        area = _number(area)
    except (TypeError, ValueError):
        raise DataError(f"its area must be a number of pixels, got {area!r}") from None
    if not all(map(math.isfinite, (x, y, w, h))):
        return None
    whole = x, y, x + w, y + h
    box = [min(max(value, 0.0), float(side)) for value, side in zip(whole, (width, height) * 2, strict=True)]
    if w <= 0 or h <= 0 or box[0] >= box[2] or box[1] >= box[3]:
        return None
    clipped = max(abs(a - b) for a, b in zip(whole, box, strict=True)) > OUTSIDE
    return box, bool(entry.get("iscrowd", 0)), area, clipped


def _load(file: Path) -> dict[str, list[dict]]:
    """The file's lists of images, annotations and categories. DataError where it is not of that kind."""
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}; data.annotations names another file") from None
    except ValueError as error:
        raise DataError(f"{file} is damaged, it is no JSON: {error}") from None
    lists = ("images", "annotations", "categories")
    for name in lists:
        found = content.get(name) if isinstance(content, dict) else None
        if not isinstance(found, list):
            raise DataError(f"{file} is no file of COCO instances: it lacks the list {name!r} of {', '.join(lists)}")
        for place, entry in enumerate(found):
            if not isinstance(entry, dict):
                raise DataError(f"{file}: entry {place} of {name!r} must be an object, got {entry!r}")
        if not found and name != "annotations":
            raise DataError(f"{file} names no {name}")
    return content


def _labels(file: Path, categories: list[dict], class_names: Sequence[str]) -> tuple[tuple[str, ...], dict[int, int]]:
    """Class names, and the label of each id of a category: ids in their order, or names in that of training."""
    try:
        names = {int(entry["id"]): str(entry.get("name", entry["id"])) for entry in categories}
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{file} has a category without an id") from None
    if len(set(names.values())) < len(categories):
        (name, _), *_ = Counter(str(entry.get("name", entry["id"])) for entry in categories).most_common(1)
        raise DataError(f"{file} names category {name!r} twice")
    known = tuple(class_names) or tuple(names[i] for i in sorted(names))
    strange = [name for name in names.values() if name not in known]
    if strange:
        raise DataError(
            f"{file} has a category {strange[0]!r} that training does not know ({len(strange)} such, {len(known)} "
            "known)"
        )
    return known, {i: known.index(name) + 1 for i, name in names.items()}


def _images(file: Path, images: list[dict]) -> dict[int, tuple[str, int, int]]:
    """Name, height and width of the file of each image, by id."""
    found: dict[int, tuple[str, int, int]] = {}
    for entry in images:
        try:
            number, place = int(entry["id"]), (str(entry["file_name"]), int(entry["height"]), int(entry["width"]))
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{file} has an image without id, file_name, height and width: {entry}") from None
        if Path(place[0]).is_absolute() or ".." in Path(place[0]).parts:
            raise DataError(f"{file}: file_name must be a path below the folder of the images, got {place[0]!r}")
        if min(place[1:]) < 1:
            raise DataError(f"{file}: image {place[0]} has no pixels, {place[2]}x{place[1]}")
        if number in found:
            raise DataError(f"{file} names two images {number}: {found[number][0]} and {place[0]}")
        found[number] = place
    return found


def _objects(
    content: dict[str, list[dict]], file: Path, images: dict[int, tuple[str, int, int]], label_of: dict[int, int]
) -> tuple[dict[int, list[tuple]], list[str]]:
    """Objects of each image that the file annotates, by id, also where none is left; and notes of what is left out."""
    skipped, clipped, first = Skipped(), 0, ""
    found: dict[int, list[tuple]] = {}
    for entry in content["annotations"]:
        name = f"annotation {entry.get('id', '?')}"
        if entry.get("image_id") not in images:
            skipped.add("annotations of images that it does not name", name)
            continue
        image, height, width = images[entry["image_id"]]
        objects = found.setdefault(entry["image_id"], [])
        if entry.get("category_id") not in label_of:
            skipped.add("annotations of categories that it does not name", f"{name} of {image}")
            continue
        try:
            read = read_object(entry, height, width)
        except DataError as error:
            raise DataError(f"{file}, {name} of {image}: {error}") from None
        if read is None:
            skipped.add(EMPTY, f"{name} of {image}")
            continue
        box, crowd, area, outside = read
        if outside:
            clipped, first = clipped + 1, first or f"{name} of {image}"
        objects.append((box, label_of[entry["category_id"]], crowd, area))
    notes = skipped.notes(file)
    if clipped:
        notes.append(f"{file}: {CLIPPED} are clipped: {clipped}, the first is {first}")
    return found, notes


def open_coco(config: DataConfig, part: str, class_names: Sequence[str]) -> Coco:
    """The images of a folder and their boxes. Training leaves out images without annotations, as published."""
    name = getattr(config, part)
    file = Path(config.root, config.annotations.format(part=Path(name).name))
    root = next((path for path in (Path(config.root, name), Path(config.root, "images", name)) if path.is_dir()), None)
    if root is None:
        raise DataError(f"there is no folder {Path(config.root, name)} with images; data.{part} names it")
    content = _load(file)
    known, label_of = _labels(file, content["categories"], class_names)
    images = _images(file, content["images"])
    objects, notes = _objects(content, file, images, label_of)
    wanted = [i for i in images if i in objects] if part == "train" else list(images)
    if len(wanted) < len(images):
        notes.append(f"{file}: images without annotations are not trained on: {len(images) - len(wanted)}")
    if all(crowd for found in objects.values() for _, _, crowd, _ in found):  # crowds are no targets
        raise DataError(f"{file} has no box that can be used" + "".join(f"; {note}" for note in notes))
    missing = [images[i][0] for i in wanted if not (root / images[i][0]).is_file()]
    notes += tolerate(missing, len(wanted), f"images of {file} are not in {root}", config.max_corrupt)
    absent = set(missing)
    wanted = [i for i in wanted if images[i][0] not in absent]
    source = Coco(
        np.array([images[i][1:] for i in wanted], np.int64),
        Objects.of_images([objects.get(i, ()) for i in wanted]),
        root,
        np.array([os.fsencode(images[i][0]) for i in wanted]),
        np.array(wanted, np.int64),
        known,
        {label: i for i, label in label_of.items()},
    )
    if part == "train":
        notes += unseen(file, "box", known, source.objects.all.single().labels, 1)
    return replace(source, notes=(*notes, *_check_sizes(source, file, config.max_corrupt)))


def _check_sizes(source: Coco, file: Path, allowed: float) -> list[str]:
    """Compares sizes of images with those that the file tells; what cannot be read is told when it is met."""
    decoder, problems = Decoder("pil", turn=False), []
    some = spread(len(source.ids), LOOKED_AT)
    for index in some:
        try:
            height, width = decoder.size(source.read(index))
        except (DecodeError, OSError):
            continue
        if (height, width) != source.size(index):
            says = "{1}x{0}".format(*source.size(index))
            problems.append(f"{source.image_name(index)}, {width}x{height} and not {says}")
    what = f"images that were looked at have another size than {file} says"
    return tolerate(problems, len(some), what, allowed, "their boxes may lie elsewhere")
