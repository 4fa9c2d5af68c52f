"""Where images come from: a folder per class, tar shards, the embedded digits, a data set of torchvision or Hugging Face; all read by
index.

Random access is what makes batches a function of (seed, epoch, batch) alone, on any number of processes, and lets a run go on at any batch
without decoding what came before. A stream of shards, as webdataset reads them, cannot do that, so shards are indexed once by their tar
headers and a shard that is not on this machine is fetched once through webdataset's openers.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..options import UsageError
from .config import DataConfig
from .decode import Encoded
from .digits import load_digits

IMAGE_EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
# What systems and programs put beside images: hidden names, and these.
JUNK = frozenset(
    ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db", "desktop.ini", "__pycache__")
)

ABSENT = 5  # classes without a folder that are named one by one


class DataError(RuntimeError):
    """Images or labels that cannot be used; the message names them."""


class Source(Protocol):
    """Images in a fixed order."""

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


def is_hidden(name: str) -> bool:
    """Whether a name is one that a person did not mean as an image or a class: `.ipynb_checkpoints`, `._photo.jpg`, `__MACOSX`."""
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
        return [f"{where}: {reason} are left out: {number}, the first is {self.first[reason]}" for reason, number in self.counts.items()]


HIDDEN = "hidden names"
LOOP = "links to folders that are already taken"
NO_IMAGE = "files that are no images"


def walk_images(root: Path, skipped: Skipped, seen: set[tuple[int, int]] | None = None, base: Path | None = None) -> Iterator[Path]:
    """Images below a folder, in the order of their names; links are followed, a folder is taken once.

    `seen`: device and number of folders that are not to be taken (again); `base`: what names in `skipped` are relative to.
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
            skipped.add(NO_IMAGE, name)


def open_folder(root: Path, class_names: Sequence[str] = ()) -> Folder:
    """Images below root/<class>/, classes in the order of their names, or of `class_names` where these are given.

    Left out, counted and said: hidden names, files that are no images or lie beside the classes, links back to a folder that is already
    taken.
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
        raise DataError(f"{root} has no folders; it must hold one folder per class" + "".join(f"; {n}" for n in skipped.notes(root)))
    names = tuple(class_names) or tuple(found)
    unknown = sorted(set(found) - set(names))
    if unknown:
        some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise DataError(
            f"{root}/{unknown[0]} is a class that training does not know ({len(unknown)} such folders, {len(names)} known classes: "
            f"{some}); rename the folder to the class that it shows, or take it away"
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
        raise DataError(f"{root} holds no image ({', '.join(IMAGE_EXTENSIONS)})" + "".join(f"; {n}" for n in skipped.notes(root)))
    return Folder(root, np.array(paths), np.array(labels, np.int64), names, (*notes, *skipped.notes(root)))


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


_COMPRESSED = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open))


def _unpacked(file: Path, cache: str) -> tuple[Path, str]:
    """A shard that can be read at any place: itself, or where it is compressed what it holds, unpacked once; and what is wrong with it."""
    try:
        with open(file, "rb") as stream:
            start = stream.read(8)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    opener = next((opener for magic, opener in _COMPRESSED if start.startswith(magic)), None)
    if opener is None:
        return file, ""
    import fcntl

    folder = Path(cache or os.path.join(tempfile.gettempdir(), f"mvit3-shards-{os.getuid()}"))
    folder.mkdir(parents=True, exist_ok=True)
    status = file.stat()
    identity = f"{file.absolute()} {status.st_size} {status.st_mtime_ns}"
    target = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.tar"
    trouble = target.with_suffix(".trouble")
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            part = target.with_suffix(".part")
            try:
                with opener(file, "rb") as stream, open(part, "wb") as copy:
                    _copy(stream, copy, trouble)
            except OSError as error:
                part.unlink(missing_ok=True)
                raise DataError(f"{file} cannot be unpacked into {folder}: {error}; data.cache names another folder") from None
            part.rename(target)
    return target, trouble.read_text() if trouble.exists() else ""


def _copy(stream: io.BufferedIOBase, copy: BinaryIO, trouble: Path) -> None:
    """Unpacks as far as it goes; where that is not the end, `trouble` says why."""
    while True:
        try:
            piece = stream.read1(2**20)
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            trouble.write_text(f"is damaged ({error})")
            return
        if not piece:
            return
        copy.write(piece)


@dataclass(frozen=True)
class _Indexed:
    """(name, offset, size, label) of each complete sample of a tar file, and what is wrong with the file."""

    samples: list[tuple[str, int, int, int]]
    trouble: str


def _index(file: Path, label_of: Callable[[str], int], skipped: Skipped) -> _Indexed:
    """Reads the headers of a tar file, and its labels."""
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
                if not member.isfile():
                    continue
                folder, name = os.path.split(member.name)
                if any(is_hidden(part) for part in member.name.split("/") if part != "."):
                    skipped.add(HIDDEN, f"{file.name}:{member.name}")
                    continue
                name, _, kind = name.partition(".")
                key, kind = os.path.join(folder, name), f".{kind.lower()}"
                if kind == ".cls":
                    labels[key] = label_of(tar.extractfile(member).read().decode().strip())
                elif kind in IMAGE_EXTENSIONS:
                    if key in images:
                        skipped.add("second images of a sample", f"{file.name}:{member.name}")
                    else:
                        images[key] = (member.name, member.offset_data, member.size)
    except ValueError as error:
        raise DataError(f"{file}: the label {member.name} is not an integer" + (f": {error}" if "class" in str(error) else "")) from None
    except (OSError, tarfile.TarError) as error:
        if not end:
            raise DataError(f"{file} cannot be read as a tar file: {error}") from None
        trouble = f"is damaged ({error})"
    if not trouble and length < end + 512:  # a tar file ends with blocks of zeros
        trouble = "is cut off"
    for key in images.keys() - labels.keys():
        skipped.add("images without a .cls file", f"{file.name}:{images[key][0]}")
    return _Indexed([(*place, labels[key]) for key, place in images.items() if key in labels], trouble)


def _shard_names(pattern: str, root: str) -> list[str]:
    """Paths and URLs of a pattern with braces, or with the wildcards of a shell for files on this machine."""
    from webdataset.shardlists import expand_urls

    names = []
    for name in expand_urls(pattern):
        if "://" in name or name.startswith("pipe:"):
            names.append(name)
        elif any(c in name for c in "*?[") and not os.path.exists(os.path.join(root, name)):
            found = sorted(glob.glob(name if os.path.isabs(name) else os.path.join(glob.escape(root), name)))
            if not found:
                raise DataError(f"no file matches {os.path.join(root, name)}")
            names += found
        else:
            names.append(os.path.join(root, name))
    return names


def read_class_names(path: Path) -> tuple[str, ...]:
    """Class names in the order of their labels: a text file with a line for each, or JSON: a list, {name: label} or {label: name}."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() != ".json":
            return tuple(line.strip() for line in text.splitlines() if line.strip())
        values = json.loads(text)
        if isinstance(values, dict):
            if all(isinstance(label, int) for label in values.values()):
                values = {label: name for name, label in values.items()}
            named = {int(label): name[0] if isinstance(name, list) else name for label, name in values.items()}
            values = [named[label] for label in range(len(named))]
        if not isinstance(values, list):
            raise ValueError("it holds neither a list nor a mapping")
        return tuple(map(str, values))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, IndexError) as error:
        reason = f": {error}" if isinstance(error, ValueError) else ""  # the others are numbers that are missing
        raise DataError(f"{path} does not name classes, a line each or as JSON with labels from 0 on{reason}") from None


def side_file(class_map: str, root: str, names: Sequence[str]) -> Path | None:
    """The file that names the classes of shards: what data.class_map says, else one that lies beside them."""
    if class_map:
        beside = Path(root, class_map)
        return beside if beside.exists() else Path(class_map)
    folders = dict.fromkeys([root, *(os.path.dirname(name) for name in names if "://" not in name and not name.startswith("pipe:"))])
    return next((path for folder in folders for name in ("classes.txt", "classes.json") if (path := Path(folder, name)).exists()), None)


def open_shards(pattern: str, root: str, cache: str, num_classes: int, class_map: str = "", known: Sequence[str] = ()) -> Shards:
    """The shards of a pattern such as train-{0000..0146}.tar or train-*.tar.gz. A shard that is cut off gives what it still holds, and a
    note. `known`: the class names of training, to which labels are mapped by the names beside the shards."""
    names = _shard_names(pattern, root)
    notes: list[str] = []
    side = side_file(class_map, root, names)
    own = read_class_names(side) if side else ()
    class_names = tuple(known) or own
    number_of = {name: label for label, name in enumerate(class_names)}
    # Labels are numbers of the names beside the shards, which may come in another order than those of training.
    named = own and not all(name.isdecimal() for name in class_names)
    if named and (strange := [name for name in own if name not in number_of]):
        raise DataError(
            f"{side} has a class {strange[0]!r} that training does not know ({len(strange)} such, {len(class_names)} known classes)"
        )

    def label_of(text: str) -> int:
        if re.fullmatch(r"[+-]?\d+", text):
            label = int(text)
            return number_of[own[label]] if named and 0 <= label < len(own) else label
        if named and text in own:
            return number_of[text]
        raise ValueError(f"{text!r} is no class of {side}" if side else "")

    members: list[bytes] = []
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    skipped, files = Skipped(), []
    for number, name in enumerate(names):
        file, damage = _unpacked(_fetch(name, cache), cache)
        if file != Path(name) and "://" not in name and not name.startswith("pipe:"):
            notes.append(f"{name} is compressed and was unpacked to {file}")
        files.append(file)
        indexed = _index(file, label_of, skipped)
        if trouble := damage or indexed.trouble:
            notes.append(f"{name} {trouble}; {len(indexed.samples)} images before that are used")
        for member, offset, size, label in indexed.samples:
            members.append(os.fsencode(member))
            places.append((number, offset, size))
            labels.append(label)
    notes += skipped.notes(pattern)
    if not labels:
        raise DataError(f"{pattern} holds no sample, which is an image and a .cls file of the same name" + "".join(f"; {n}" for n in notes))
    num_classes = len(class_names) or num_classes or max(labels) + 1
    if not 0 <= min(labels) <= max(labels) < num_classes:
        where = f" in {side}" if side and not known else ""
        raise DataError(f"labels of {pattern} are {min(labels)} to {max(labels)}, there are {num_classes} classes{where}")
    class_names = class_names or tuple(str(i) for i in range(num_classes))
    return Shards(tuple(files), np.array(members), np.array(places, np.int64), np.array(labels, np.int64), class_names, tuple(notes))


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
    elif config.source in ("torchvision", "huggingface"):
        from .builtin import open_huggingface, open_torchvision

        source = (open_torchvision if config.source == "torchvision" else open_huggingface)(config, part)
        if class_names and tuple(class_names) != source.class_names:
            raise DataError(
                f"the classes of validation, {len(source.class_names)} from {source.class_names[0]!r} on, are not those of training, "
                f"{len(class_names)} from {class_names[0]!r} on"
            )
    elif not config.root and not (config.source == "shards" and name):
        raise UsageError(f"data.root must name the folder of the images for data.source {config.source}")
    elif config.source == "folder":
        source = open_folder(Path(config.root) / name, class_names)
    else:
        source = open_shards(name, config.root, config.cache, config.num_classes, config.class_map, class_names)
    return limit(source, getattr(config, f"limit_{part}"))
