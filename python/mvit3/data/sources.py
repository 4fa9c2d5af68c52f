"""Where images come from: a folder per class, tar shards, or the embedded digits; all read by index.

Random access is what makes batches a function of (seed, epoch, batch) alone, on any number of processes, and lets a run go on at any batch
without decoding what came before. A stream of shards, as webdataset reads them, cannot do that, so shards are indexed once by their tar
headers and a shard that is not on this machine is fetched once through webdataset's openers.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..options import UsageError
from .config import DataConfig
from .digits import load_digits


class DataError(RuntimeError):
    """Images or labels that cannot be used; the message names them."""


class Source(Protocol):
    """Images in a fixed order."""

    labels: np.ndarray  # (N,) int64
    class_names: tuple[str, ...]
    notes: tuple[str, ...]  # what a person should know before the run

    def read(self, index: int) -> bytes | np.ndarray:
        """An encoded image, or (H, W, 3) uint8; OSError where it cannot be read."""

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

    def read(self, index: int) -> bytes | np.ndarray:
        return self.source.read(int(self.indices[index]))

    def image_name(self, index: int) -> str:
        return self.source.image_name(int(self.indices[index]))


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


@dataclass(frozen=True)
class Folder:
    """A folder with one folder per class. Paths are one array of bytes: a list of strings would be copied page by page into every
    loading process, because counting its references writes to it."""

    root: Path
    paths: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def read(self, index: int) -> bytes:
        return (self.root / os.fsdecode(self.paths[index])).read_bytes()

    def image_name(self, index: int) -> str:
        return str(self.root / os.fsdecode(self.paths[index]))


def _list_folder(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from None


def open_folder(root: Path, class_names: Sequence[str] = ()) -> Folder:
    """Images below root/<class>/, classes in the order of their names, or of `class_names` where these are given."""
    found = [entry.name for entry in _list_folder(root) if entry.is_dir()]
    if not found:
        raise DataError(f"{root} has no folders; it must hold one folder per class")
    names = tuple(class_names) or tuple(found)
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise DataError(
            f"{root}/{unknown[0]} is a class that training does not know ({len(unknown)} such folders, {len(names)} known classes)"
        )
    paths: list[bytes] = []
    labels: list[int] = []
    notes: list[str] = []
    for label, name in enumerate(names):
        if name not in found:
            notes.append(f"{root} has no folder for class {name!r}; no image of this class is seen there")
            continue
        before = len(paths)
        for folder, _, files in sorted(os.walk(root / name, followlinks=True)):
            for file in sorted(files):
                if file.lower().endswith(IMG_EXTENSIONS):
                    paths.append(os.fsencode(os.path.relpath(os.path.join(folder, file), root)))
        labels += [label] * (len(paths) - before)
        if len(paths) == before:
            notes.append(f"{root}/{name} holds no image")
    if not paths:
        raise DataError(f"{root} holds no image ({', '.join(IMG_EXTENSIONS)})")
    return Folder(root, np.array(paths), np.array(labels, np.int64), names, tuple(notes))


@dataclass(frozen=True)
class Shards:
    """Samples of tar files: an image and a .cls file with its label (an integer) under the same name, as webdataset writes them."""

    files: tuple[Path, ...]
    members: np.ndarray  # names of the images
    places: np.ndarray  # (N, 3) int64: file, offset and size in bytes
    labels: np.ndarray
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def read(self, index: int) -> bytes:
        file, offset, size = self.places[index]
        with open(self.files[file], "rb") as stream:
            stream.seek(offset)
            data = stream.read(size)
        if len(data) < size:
            raise OSError(f"{self.files[file]} is shorter than it was")
        return data

    def image_name(self, index: int) -> str:
        return f"{self.files[self.places[index, 0]]}:{os.fsdecode(self.members[index])}"


def _fetch(url: str, cache: str) -> Path:
    """A shard on this machine: itself where it is a path, else its copy in the cache, fetched once however many processes ask."""
    if "://" not in url and not url.startswith("pipe:"):
        return Path(url)
    import fcntl

    from webdataset import gopen

    if not cache:
        raise UsageError(f"data.cache must name a folder for shards that come from a URL, such as {url}")
    folder = Path(cache)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.tar"
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            part = target.with_suffix(".part")
            try:
                with gopen(url, "rb") as stream, open(part, "wb") as copy:
                    shutil.copyfileobj(stream, copy, 2**20)
            except Exception as error:  # a URL's opener raises what it likes
                part.unlink(missing_ok=True)
                raise DataError(f"{url} cannot be fetched: {error}") from error
            part.rename(target)
    return target


def _index(file: Path) -> tuple[list[tuple[str, int, int, int]], str]:
    """(name, offset, size, label) of each complete sample of a tar file, and what is wrong with the file."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    trouble, end = "", 0
    try:
        length = file.stat().st_size
        with tarfile.open(file, "r:") as tar:
            while (member := tar.next()) is not None:
                end = member.offset_data + -(-member.size // 512) * 512
                if member.offset_data + member.size > length:
                    break
                folder, name = os.path.split(member.name)
                name, _, kind = name.partition(".")
                key, kind = os.path.join(folder, name), f".{kind.lower()}"
                if kind == ".cls":
                    labels[key] = int(tar.extractfile(member).read())
                elif kind in IMG_EXTENSIONS:
                    images[key] = (member.name, member.offset_data, member.size)
    except ValueError:
        raise DataError(f"{file}: the label {member.name} is not an integer") from None
    except (OSError, tarfile.TarError) as error:
        if not end:
            raise DataError(f"{file} cannot be read as a tar file: {error}") from None
        trouble = f"is damaged ({error})"
    if not trouble and length < end + 512:  # a tar file ends with blocks of zeros
        trouble = "is cut off"
    return [(*place, labels[key]) for key, place in images.items() if key in labels], trouble


def open_shards(pattern: str, root: str, cache: str, num_classes: int) -> Shards:
    """The shards of a pattern such as train-{0000..0146}.tar; a shard that is cut off gives what it still holds, and a note."""
    from webdataset.shardlists import expand_urls

    names = [name if "://" in name or name.startswith("pipe:") else os.path.join(root, name) for name in expand_urls(pattern)]
    files = tuple(_fetch(name, cache) for name in names)
    members: list[bytes] = []
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    notes: list[str] = []
    for number, (name, file) in enumerate(zip(names, files, strict=True)):
        samples, trouble = _index(file)
        if trouble:
            notes.append(f"{name} {trouble}; {len(samples)} images before that are used")
        for member, offset, size, label in samples:
            members.append(os.fsencode(member))
            places.append((number, offset, size))
            labels.append(label)
    if not labels:
        raise DataError(f"{pattern} holds no sample, which is an image and a .cls file of the same name")
    num_classes = num_classes or max(labels) + 1
    if not 0 <= min(labels) <= max(labels) < num_classes:
        raise DataError(f"labels of {pattern} are {min(labels)} to {max(labels)}, there are {num_classes} classes")
    class_names = tuple(str(i) for i in range(num_classes))
    return Shards(files, np.array(members), np.array(places, np.int64), np.array(labels, np.int64), class_names, tuple(notes))


def limit(source: Source, count: int) -> Source:
    """`count` images of a source; 0, or as many as there are, takes all."""
    total = len(source.labels)
    return Subset(source, np.arange(count) * total // count) if 0 < count < total else source


def open_source(config: DataConfig, part: str, class_names: Sequence[str] = ()) -> Source:
    """The "train" or the "val" part of what a configuration names; `class_names`: the classes of training, which validation must share."""
    name = getattr(config, part)
    if config.source == "digits":
        split = getattr(load_digits(), part)
        images = split.images.permute(0, 2, 3, 1).mul(255).round().byte().numpy()
        source: Source = Arrays(images, split.labels.numpy(), tuple("0123456789"))
    elif not config.root and not (config.source == "shards" and name):
        raise UsageError(f"data.root must name the folder of the images for data.source {config.source}")
    elif config.source == "folder":
        source = open_folder(Path(config.root) / name, class_names)
    else:
        source = open_shards(name, config.root, config.cache, len(class_names) or config.num_classes)
    return limit(source, getattr(config, f"limit_{part}"))
