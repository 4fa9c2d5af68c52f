"""A folder with one folder per class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..screen import count
from .errors import DataError

IMAGE_EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
# What systems and programs put beside images: hidden names, and these.
JUNK = frozenset(
    (
        "__MACOSX",
        "@eaDir",
        "lost+found",
        "$RECYCLE.BIN",
        "System Volume Information",
        "Thumbs.db",
        "desktop.ini",
        "__pycache__",
    )
)

ABSENT = 5  # classes without a folder that are named one by one


@dataclass(frozen=True)
class Folder:
    """A folder with one folder per class. Paths are one array of bytes: a list of strings would be copied page by page
    into every loading process, because counting its references writes to it."""

    root: Path
    paths: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def read(self, index: int) -> bytes:
        return (self.root / os.fsdecode(self.paths[index])).read_bytes()

    def image_name(self, index: int) -> str:
        return str(self.root / os.fsdecode(self.paths[index]))


def is_hidden(name: str) -> bool:
    """Whether a name is one that a person did not mean as an image or a class: `.ipynb_checkpoints`, `._photo.jpg`,
    `__MACOSX`."""
    return name.startswith(".") or name in JUNK


def _list_folder(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from None


def _identity(folder: Path) -> tuple[int, int]:
    """Device and number of a folder, the same under each of its names."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from None
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


@dataclass
class Skipped:
    """What is left out of a folder or of shards: for each reason how many, and the first of them."""

    counts: Counter = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, name)

    def notes(self, where: object) -> list[str]:
        """A line for each reason, such as "data/train: hidden names are left out: 2, the first is cat/._a.jpg"."""
        return [
            f"{where}: {reason} are left out: {number}, the first is {self.first[reason]}"
            for reason, number in self.counts.items()
        ]


HIDDEN = "hidden names"
LOOP = "links to folders that are already taken"
OTHER_KIND = "files of other kinds"


def walk_images(
    root: Path, skipped: Skipped, seen: set[tuple[int, int]] | None = None, base: Path | None = None
) -> Iterator[Path]:
    """Images below a folder, in the order of their names; links are followed, a folder is taken once.

    `seen`: device and number of folders that are not to be taken (again); `base`: what names in `skipped` are relative
    to.
    """
    seen, base = set() if seen is None else seen, base or root
    seen.add(_identity(root))
    for entry in _list_folder(root):
        path = root / entry.name
        name = os.path.relpath(path, base)
        if is_hidden(entry.name):
            skipped.add(HIDDEN, name)
        elif _is_folder(entry):
            if _identity(path) in seen:
                skipped.add(LOOP, name)
            else:
                yield from walk_images(path, skipped, seen, base)
        elif entry.name.lower().endswith(IMAGE_EXTENSIONS) and entry.is_file():  # opening a pipe would wait for ever
            yield path
        else:
            skipped.add(OTHER_KIND, name)


def open_folder(root: Path, class_names: Sequence[str] = ()) -> Folder:
    """Images below root/<class>/, classes in the order of their names, or of `class_names` where these are given.

    Left out, counted and said: hidden names, files of other kinds or beside the classes, links back to a folder
    that is already taken.
    """
    skipped, found, seen = Skipped(), [], set()
    entries = _list_folder(root)
    above = {_identity(folder) for folder in (root, *root.absolute().parents)}
    for entry in entries:
        if is_hidden(entry.name):
            skipped.add(HIDDEN, entry.name)
        elif _is_folder(entry):
            place = _identity(root / entry.name)
            if place in seen or place in above:
                skipped.add(LOOP, entry.name)
            else:
                seen.add(place)
                found.append(entry.name)
        else:
            skipped.add("files beside the folders of the classes", entry.name)
    if not found:
        raise DataError(
            f"{root} has no folders; it must hold one folder per class" + "".join(f"; {n}" for n in skipped.notes(root))
        )
    names = tuple(class_names) or tuple(found)
    unknown = sorted(set(found) - set(names))
    if unknown:
        some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise DataError(
            f"{root}/{unknown[0]} is a class that training does not know ({count(len(unknown), 'such folder')}, "
            f"{len(names)} "
            f"known classes: {some}); rename the folder to the class that it shows, or take it away"
        )
    paths: list[bytes] = []
    labels: list[int] = []
    notes: list[str] = []
    seen |= above
    present = set(found)
    absent = [name for name in names if name not in present]
    if len(absent) > ABSENT:
        notes.append(f"{root} has no folder for {len(absent)} of {len(names)} classes; no image of these is seen there")
    else:
        notes += [f"{root} has no folder for class {name!r}; no image of this class is seen there" for name in absent]
    for label, name in enumerate(names):
        if name not in present:
            continue
        before = len(paths)
        paths += [os.fsencode(os.path.relpath(path, root)) for path in walk_images(root / name, skipped, seen, root)]
        labels += [label] * (len(paths) - before)
        if len(paths) == before:
            notes.append(f"{root}/{name} holds no image")
    if not paths:
        raise DataError(
            f"{root} holds no image ({', '.join(IMAGE_EXTENSIONS)})" + "".join(f"; {n}" for n in skipped.notes(root))
        )
    return Folder(root, np.array(paths), np.array(labels, np.int64), names, (*notes, *skipped.notes(root)))
