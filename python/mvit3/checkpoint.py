"""Checkpoints: written whole or not at all, read as tensors and plain values only.

A folder holds `last.pt`, the one before it (`previous.pt`), `best.pt`, and `epoch_NNNN.pt` where every so many epochs
are kept. They are links to the same files where they coincide, so that each state is written once.
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
FORMAT = {
    "state_dict": dict,
    "ema_state_dict": dict,
    "config": dict,
    "num_classes": int,
    "class_names": list,
    "progress": dict,
}


TRAINED, AVERAGE = "trained", "average"  # weights
ENTRIES = {TRAINED: "state_dict", AVERAGE: "ema_state_dict"}


class CheckpointError(RuntimeError):
    """A file that is missing, damaged or no checkpoint of this application."""


class Foreign(CheckpointError):
    """A file that is none of `mvit3 train`, or too damaged to tell."""


def _sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link(source: Path, target: Path) -> None:
    """Gives a file a second name, at once; a copy where the file system has no links."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def save(folder: Path, content: dict[str, object], also: Sequence[str] = ()) -> Path:
    """Writes `last.pt`: to a file of its own, which is forced to disk and only then gets its names, those in `also`
    first.

    OSError where it cannot be written; the checkpoints that were there are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.tmp"):  # of a run that was killed while it wrote
        left.unlink(missing_ok=True)
    last, temporary = folder / LAST, folder / f".{LAST}.{os.getpid()}.tmp"
    try:
        _write(temporary, content)
        for name in also:
            link(temporary, folder / name)
        if last.exists():
            link(last, folder / PREVIOUS)
        os.replace(temporary, last)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(folder)
    return last


def best_of(epoch: int) -> str:
    """The name of the checkpoint of an epoch that is among the best ones."""
    return f"best_{epoch:04}.pt"


def keep_best(folder: Path, epochs: Sequence[int]) -> None:
    """Removes those of the best epochs that are no longer among them."""
    names = {best_of(epoch) for epoch in epochs}
    for path in folder.glob("best_*.pt"):
        if re.fullmatch(r"best_\d{4,}\.pt", path.name) and path.name not in names:
            path.unlink(missing_ok=True)


class _Sink:
    """A file that remembers why it could not be written: torch.save reports a failed write without the reason."""

    def __init__(self, file) -> None:
        self.file, self.error = file, None

    def write(self, data) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write(path: Path, content: dict[str, object]) -> None:
    with open(path, "wb") as file:
        sink = _Sink(file)
        try:
            torch.save(content, sink)
            file.flush()
        except RuntimeError as error:
            raise sink.error or error from None
        if sink.error:
            raise sink.error
        os.fsync(file.fileno())


def load(path: Path) -> dict[str, object]:
    """The content of a checkpoint, on the CPU.

    Raises:
        CheckpointError: with the reason; Foreign where it may be a checkpoint of another origin.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare checksums
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # the unpickler has no common error type
        reason = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
        raise Foreign(f"{path} is truncated, or no checkpoint{reason}") from error
    wrong = [
        key for key, kind in FORMAT.items() if not isinstance(content, dict) or not isinstance(content.get(key), kind)
    ]
    if wrong:
        raise Foreign(f"{path} is no checkpoint of mvit3 train: {', '.join(wrong)} missing or of another type")
    return content


def read(path: Path) -> dict[str, object] | None:
    """The content of a checkpoint of this application; None for one of another origin."""
    try:
        return load(path)
    except Foreign:
        return None


def better_weights(content: dict[str, object]) -> str:
    """Which weights of a checkpoint are used: the better ones of its last evaluation, which the file names."""
    if not content["ema_state_dict"]:
        return TRAINED
    if named := content.get("weights"):
        return named
    rows = [row for row in content["progress"]["history"] if row["accuracy"] is not None]  # of a file that does not
    return TRAINED if rows and rows[-1]["accuracy"] > rows[-1]["ema_accuracy"] else AVERAGE


def latest(folder: Path, say: Callable[[str], None]) -> dict[str, object] | None:
    """The newest whole checkpoint of a folder, or None where there is none; what is damaged is passed to `say`.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    errors = []
    for name in (LAST, PREVIOUS):
        if not (folder / name).exists():
            continue
        try:
            content = load(folder / name)
        except CheckpointError as error:
            errors.append(str(error))
            continue
        for error in errors:
            say(f"{error}; going on with {folder / name}")
        return content
    if errors:
        raise CheckpointError("; ".join([*errors, "no whole checkpoint is left; --run.resume never starts anew"]))
    return None
