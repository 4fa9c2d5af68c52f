"""Tar shards, as webdataset writes them, read at random places.

A stream of shards cannot begin in the middle, so shards are indexed once by their tar headers. A shard that is not on
this machine is fetched once through webdataset's openers, one that is compressed is unpacked once.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..options import UsageError
from .errors import DataError
from .folders import HIDDEN, IMAGE_EXTENSIONS, Skipped, is_hidden


@dataclass(frozen=True)
class Shards:
    """Samples of tar files: an image and a .cls file with its label (an integer) under the same name, as webdataset
    writes them."""

    files: tuple[Path, ...]
    members: np.ndarray  # names of the images
    places: np.ndarray  # (N, 3) int64: file, offset and size in bytes
    labels: np.ndarray
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def read(self, index: int) -> bytes:
        file, offset, size = self.places[index]
        return read_place(self.files[file], offset, size)

    def image_name(self, index: int) -> str:
        return f"{self.files[self.places[index, 0]]}:{os.fsdecode(self.members[index])}"


def _fetch(url: str, cache: str) -> Path:
    """A shard on this machine: itself where it is a path, else its copy in the cache, fetched once however many
    processes ask."""
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
    """A shard that can be read at any place: itself, or where it is compressed what it holds, unpacked once; and what
    is wrong with it."""
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
                raise DataError(
                    f"{file} cannot be unpacked into {folder}: {error}; data.cache names another folder"
                ) from None
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


Place = tuple[str, int, int]  # name, offset and size in bytes of a member of a tar file


def members(file: Path, skipped: Skipped) -> tuple[dict[str, dict[str, Place]], str]:
    """The complete members of a tar file by the name of their sample and then by their ending, such as ".jpg"; and what
    is wrong with the file. DataError where it is no tar file."""
    found: dict[str, dict[str, Place]] = {}
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
                kinds = found.setdefault(os.path.join(folder, name), {})
                kinds.setdefault(f".{kind.lower()}", (member.name, member.offset_data, member.size))
    except (OSError, tarfile.TarError) as error:
        if not end:
            raise DataError(f"{file} cannot be read as a tar file: {error}") from None
        trouble = f"is damaged ({error})"
    if not trouble and length < end + 512:  # a tar file ends with blocks of zeros
        trouble = "is cut off"
    return found, trouble


def read_place(file: Path, offset: int, size: int) -> bytes:
    """The bytes of a member. OSError where the file has become shorter."""
    with open(file, "rb") as stream:
        stream.seek(offset)
        data = stream.read(size)
    if len(data) < size:
        raise OSError(f"{file} is shorter than it was")
    return data


def _index(file: Path, label_of: Callable[[str], int], skipped: Skipped) -> _Indexed:
    """The samples of a tar file, an image and its class."""
    found, trouble = members(file, skipped)
    samples: list[tuple[str, int, int, int]] = []
    for kinds in found.values():
        images = [place for kind, place in kinds.items() if kind in IMAGE_EXTENSIONS]
        for name, *_ in images[1:]:
            skipped.add("second images of a sample", f"{file.name}:{name}")
        if ".cls" in kinds:
            name, *place = kinds[".cls"]
            try:
                label = label_of(read_place(file, *place).decode().strip())
            except ValueError as error:
                reason = f": {error}" if "class" in str(error) else ""
                raise DataError(f"{file}: the label {name} is not an integer{reason}") from None
            samples += [(*place, label) for place in images[:1]]
        elif images:
            skipped.add("images without a .cls file", f"{file.name}:{images[0][0]}")
    return _Indexed(samples, trouble)


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


def shard_files(pattern: str, root: str, cache: str) -> Iterator[tuple[str, Path, str, list[str]]]:
    """Of each shard of a pattern its name, the file on this machine that can be read at any place, what is wrong with
    it and what is to be said."""
    for name in _shard_names(pattern, root):
        file, damage = _unpacked(_fetch(name, cache), cache)
        unpacked = file != Path(name) and "://" not in name and not name.startswith("pipe:")
        yield name, file, damage, [f"{name} is compressed and was unpacked to {file}"] if unpacked else []


def read_class_names(path: Path) -> tuple[str, ...]:
    """Class names in the order of their labels: a text file with a line for each, or JSON: a list, {name: label} or
    {label: name}."""
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
    folders = dict.fromkeys(
        [root, *(os.path.dirname(name) for name in names if "://" not in name and not name.startswith("pipe:"))]
    )
    return next(
        (
            path
            for folder in folders
            for name in ("classes.txt", "classes.json")
            if (path := Path(folder, name)).exists()
        ),
        None,
    )


def open_shards(
    pattern: str, root: str, cache: str, num_classes: int, class_map: str = "", known: Sequence[str] = ()
) -> Shards:
    """The shards of a pattern such as train-{0000..0146}.tar or train-*.tar.gz. A shard that is cut off gives what it
    still holds, and a note. `known`: the class names of training, to which labels are mapped by the names beside the
    shards."""
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
            f"{side} has a class {strange[0]!r} that training does not know ({len(strange)} such, {len(class_names)} "
            "known "
            "classes)"
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
    for number, (name, file, damage, said) in enumerate(shard_files(pattern, root, cache)):
        notes += said
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
        raise DataError(
            f"{pattern} holds no sample, which is an image and a .cls file of the same name"
            + "".join(f"; {n}" for n in notes)
        )
    num_classes = len(class_names) or num_classes or max(labels) + 1
    if not 0 <= min(labels) <= max(labels) < num_classes:
        where = f" in {side}" if side and not known else ""
        raise DataError(
            f"labels of {pattern} are {min(labels)} to {max(labels)}, there are {num_classes} classes{where}"
        )
    class_names = class_names or tuple(str(i) for i in range(num_classes))
    return Shards(
        tuple(files),
        np.array(members),
        np.array(places, np.int64),
        np.array(labels, np.int64),
        class_names,
        tuple(notes),
    )
