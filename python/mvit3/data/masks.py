"""Images with label images beside them: PASCAL VOC's folders, those of ADE20K, and plain ones."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image

from ..screen import count
from .config import DataConfig
from .decode import DecodeError, Decoder
from .errors import DataError
from .folders import Skipped, walk_images
from .sampler import spread
from .shards import read_class_names
from .targets import IGNORED

LOOKED_AT = 2000  # masks of a part that are read before the work begins, spread evenly
THREADS = 4  # which read them
LOSSY = ("JPEG", "MPO")  # formats whose pixels are not the labels that were written
NAMED = 10  # classes that a note names one by one

BACKGROUND = "background"
_VOC_OBJECTS = """aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person
pottedplant sheep sofa train tvmonitor"""
VOC_CLASSES = (BACKGROUND, *_VOC_OBJECTS.split())
ADE20K_CLASSES = 150
ADE20K_NAMES = "objectInfo150.txt"
USUAL = {"train": "training", "val": "validation"}  # what ADE20K calls the parts


def read_labels(data: bytes, num_classes: int, zero_is_void: bool = False) -> np.ndarray:
    """Labels (H, W) uint8 of an encoded label image of one channel: a palette's indices or grey levels. 255 is IGNORED;
    with `zero_is_void` 0 is too, and classes count from 1 on. DecodeError for any other image, and where a label is no
    class."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode, kind = image.mode, image.format
            labels = np.array(image)
    except MemoryError:
        raise
    except Exception as error:  # readers of rare formats raise anything
        raise DecodeError(f"the mask is no image: {str(error).partition('<_io')[0].strip()}") from None
    if kind in LOSSY:
        raise DecodeError(f"masks must be PNG or another lossless format, this one is {kind}")
    if mode not in ("P", "L", "1", "I;16", "I") or labels.ndim != 2:
        raise DecodeError(f"a mask has one channel, palette or grey, this one is {mode}")
    first = int(zero_is_void)  # label of the first class
    strange = (labels != IGNORED) & ((labels < 0) | (labels >= num_classes + first))
    if strange.any():
        raise DecodeError(f"the mask has label {labels[strange][0]}, which is none of {num_classes} classes")
    labels = labels.astype(np.uint8)
    # 0 becomes 255
    return np.where(labels == IGNORED, IGNORED, labels - 1).astype(np.uint8) if zero_is_void else labels


@dataclass(frozen=True)
class Masks:
    """Images and label images below a folder; names are arrays of bytes, as in `Folder`."""

    root: Path
    images: np.ndarray
    masks: np.ndarray
    class_names: tuple[str, ...]
    zero_is_void: bool = False
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> np.ndarray:
        return np.zeros(len(self.images), np.int64)

    def read(self, index: int) -> bytes:
        return (self.root / os.fsdecode(self.images[index])).read_bytes()

    def image_name(self, index: int) -> str:
        return str(self.root / os.fsdecode(self.images[index]))

    def mask(self, index: int) -> bytes:
        return (self.root / os.fsdecode(self.masks[index])).read_bytes()

    def truth(self, index: int) -> np.ndarray:
        return read_labels(self.mask(index), len(self.class_names), self.zero_is_void)


def tolerate(
    problems: Sequence[str], total: int, what: str, allowed: float, then: str = "they are left out"
) -> list[str]:
    """A note about problems; DataError where they are more than the share `data.max_corrupt` of all."""
    if not problems:
        return []
    text = f"{len(problems)} of {total} {what}, the first is {problems[0]}"
    if len(problems) > allowed * total:
        raise DataError(f"{text}; data.max_corrupt allows {allowed:.2%}")
    return [f"{text}; {then}"]


def unseen(where: object, what: str, names: Sequence[str], labels: Iterable[int], first: int = 0) -> list[str]:
    """A note that names the classes of which there is nothing; `first`: label of the first class."""
    there = set(labels)
    absent = [name for label, name in enumerate(names, first) if label not in there]
    if not absent:
        return []
    shown = ", ".join(absent[:NAMED]) + (f" and {len(absent) - NAMED} more" if len(absent) > NAMED else "")
    return [f"{where}: classes without a {what} to learn from: {len(absent)} of {len(names)}, {shown}"]


def check_masks(source: Masks, part: str, allowed: float) -> list[str]:
    """Reads up to LOOKED_AT masks, and the headers of their images: a note about those that cannot be used, which are
    left out as they are met, and in training about classes without a pixel. DataError where too many cannot be used, or
    none has a label."""
    some = spread(len(source.labels), LOOKED_AT)
    decoder = Decoder("pil", turn=False)
    pixels = np.zeros(IGNORED + 1, np.int64)  # with each label
    lock = Lock()

    def problem(index: int) -> str:
        try:
            labels, size = source.truth(index), decoder.size(source.read(index))
        except (DecodeError, OSError) as error:
            return f"{source.image_name(index)}: {error}"
        if labels.shape == size:
            counts = np.bincount(labels.ravel(), minlength=IGNORED + 1)
            with lock:
                pixels[:] += counts
            return ""
        shapes = " and ".join(f"{width}x{height}" for height, width in (labels.shape, size))
        return f"{source.image_name(index)}: mask and image differ in size, {shapes}"

    with ThreadPoolExecutor(THREADS) as pool:
        found = [text for text in pool.map(problem, some) if text]
    notes = tolerate(found, len(some), "images that were looked at cannot be used with their masks", allowed)
    seen = pixels[:IGNORED].nonzero()[0].tolist()
    where = f"{count(len(some), 'mask')} of data.{part}"
    where += " that were looked at" if len(some) < len(source.labels) else ""
    if not seen:
        raise DataError(f"none of {where} has a pixel with a label")
    return notes + (unseen(where, "pixel", source.class_names, seen) if part == "train" else [])


def _pairs(
    root: Path, names: Iterable[tuple[str, Sequence[str]]], allowed: float, what: str
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images and the first mask that there is for each, of names and possible names, relative to `root`; and a note
    about those that are missing."""
    images: list[bytes] = []
    masks: list[bytes] = []
    problems: list[str] = []
    for image, choices in names:
        mask = next((name for name in choices if (root / name).is_file()), None)
        if mask is None or not (root / image).is_file():
            problems.append(str(root / (image if mask is not None else choices[0])))
        else:
            images.append(os.fsencode(image))
            masks.append(os.fsencode(mask))
    total = len(images) + len(problems)
    if not total:
        raise DataError(f"{what} names no image")
    return np.array(images), np.array(masks), tolerate(problems, total, f"files of {what} are missing", allowed)


def _below(root: Path, *folders: str, needs: str) -> Path:
    """The folder with the data: root, or one of these below it."""
    found = next((path for path in (root, *(root / name for name in folders)) if (path / needs).is_dir()), None)
    if found is None:
        raise DataError(
            f"{root} has no folder {needs}, nor has {' or '.join(folders)} below it"
            if folders
            else f"{root} has no folder {needs}"
        )
    return found


def open_voc(config: DataConfig, part: str) -> Masks:
    """VOCdevkit/VOC2012, or a folder above it. data.train and data.val name lists of ImageSets/Segmentation, or files;
    a line is a name, or image and mask relative to the folder. The masks of the augmented list (trainaug) are in
    SegmentationClassAug, others in SegmentationClass, unless `data.masks` says so."""
    root, name = _below(Path(config.root), "VOC2012", "VOCdevkit/VOC2012", needs="JPEGImages"), getattr(config, part)
    usual = root / "ImageSets/Segmentation"
    tried = [usual / f"{name}.txt", root / name, Path(config.root, name), Path(name)]
    file = next((path for path in tried if path.is_file()), None)
    if file is None:
        there = ", ".join(sorted(path.stem for path in usual.glob("*.txt"))) or "none"
        raise DataError(f"data.{part}: there is no list {tried[0]}; the lists are {there}")
    masks = config.masks.format(part=Path(name).stem) or (
        "SegmentationClassAug" if "aug" in Path(name).stem else "SegmentationClass"
    )

    def of_line(line: str) -> tuple[str, list[str]]:
        first, *second = (word.lstrip("/") for word in line.split())
        if second:
            return first, second[:1]
        return f"JPEGImages/{first}.jpg", [f"{masks}/{first}.png", f"SegmentationClass/{first}.png"]

    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as a list of names: {error}") from None
    images, found, notes = _pairs(root, map(of_line, lines), config.max_corrupt, str(file))
    return Masks(root, images, found, VOC_CLASSES, notes=tuple(notes))


def _folders(config: DataConfig, root: Path, name: str, masks: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images of images/<name>, or <name>, and masks of the same names."""
    folder = next((path for path in (root / "images" / name, root / name) if path.is_dir()), None)
    if folder is None:
        raise DataError(f"there is no folder {root / 'images' / name} with images, nor {root / name}")
    beside = root / (config.masks or masks).format(part=Path(name).name)
    if not beside.is_dir():
        raise DataError(f"there is no folder {beside} with the masks of {folder}; data.masks names another one")
    skipped, ignored = Skipped(), Skipped()
    by_stem = {path.relative_to(beside).with_suffix(""): path for path in walk_images(beside, ignored)}

    def of_image(path: Path) -> tuple[str, list[str]]:
        stem = path.relative_to(folder).with_suffix("")
        mask = by_stem.get(stem, (beside / stem).with_suffix(".png"))
        return os.path.relpath(path, root), [os.path.relpath(mask, root)]

    paths = list(walk_images(folder, skipped))
    images, found, notes = _pairs(root, map(of_image, paths), config.max_corrupt, str(folder))
    orphans = by_stem.keys() - {path.relative_to(folder).with_suffix("") for path in paths}
    for stem in sorted(orphans):
        skipped.add("masks without an image", str(by_stem[stem]))
    return images, found, [*notes, *skipped.notes(folder)]


def _ade20k_names(root: Path) -> tuple[str, ...]:
    """The first name of each class, of the file that lies with the images; numbers where it does not."""
    try:
        rows = [line.split("\t") for line in (root / ADE20K_NAMES).read_text().splitlines()[1:] if line.strip()]
        names = tuple(row[-1].split(",")[0].strip() for row in rows)
    except (OSError, UnicodeDecodeError):
        names = ()
    return names if len(names) == ADE20K_CLASSES else tuple(str(i) for i in range(1, ADE20K_CLASSES + 1))


def open_ade20k(config: DataConfig, part: str) -> Masks:
    """ADEChallengeData2016, or the folder above it: images/training and annotations/training, validation likewise.
    Label 0 is void, 1 to 150 are classes."""
    root, name = _below(Path(config.root), "ADEChallengeData2016", needs="images"), getattr(config, part)
    name = USUAL[part] if name == part and not (root / "images" / name).is_dir() else name
    images, masks, notes = _folders(config, root, name, "annotations/{part}")
    return Masks(root, images, masks, _ade20k_names(root), True, tuple(notes))


def open_masks(config: DataConfig, part: str, class_names: Sequence[str]) -> Masks:
    """Images of images/<part>, or <part>, and masks of the same names in masks/<part>. Class names are those of
    training, of `data.class_map`, or of classes.txt or classes.json in data.root; else there are `data.num_classes`, or
    one more than the largest label."""
    root = Path(config.root)
    images, masks, notes = _folders(config, root, getattr(config, part), "masks/{part}")
    names = tuple(class_names) or named_classes(config)
    source = Masks(root, images, masks, names, notes=tuple(notes))
    return source if names else Masks(root, images, masks, counted(source.mask, len(images)), notes=source.notes)


def named_classes(config: DataConfig) -> tuple[str, ...]:
    """Class names that a file or `data.num_classes` tells, else none."""
    files = [Path(config.root, config.class_map), Path(config.class_map)] if config.class_map else []
    files += [Path(config.root, name) for name in ("classes.txt", "classes.json")]
    side = next((file for file in files if file.is_file()), None)
    if config.class_map and side not in files[:2]:
        raise DataError(f"data.class_map: there is no file {files[0]}")
    return read_class_names(side) if side else tuple(map(str, range(config.num_classes)))


def counted(mask: Callable[[int], bytes], total: int) -> tuple[str, ...]:
    """Numbers as class names, up to the largest label of all masks. DataError where none has a label above 0."""

    def largest(index: int) -> tuple[int, str]:
        try:
            labels = read_labels(mask(index), IGNORED)
        except (DecodeError, OSError) as error:  # where others can be read `check_masks` tells of it
            return -1, f": {error}"
        return int(np.where(labels == IGNORED, -1, labels.astype(np.int16)).max()), ""

    with ThreadPoolExecutor(THREADS) as pool:
        found, trouble = max(pool.map(largest, range(total)), default=(-1, ""))
    if found < 0:
        raise DataError(f"none of {count(total, 'mask')} has a label{trouble}")
    if not found:
        raise DataError(f"{count(total, 'mask')} have no label but 0; a segmentation needs two classes")
    return tuple(map(str, range(found + 1)))
