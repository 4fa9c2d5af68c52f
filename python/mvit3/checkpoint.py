"""Checkpoints: written whole or not at all, read as tensors and plain values only."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import torch
from torch import nn

import mvit3_kernels

FORMAT = {"state_dict": dict, "model": str, "num_classes": int, "config": dict, "epoch": int, "accuracy": float}


class CheckpointError(RuntimeError):
    """A file that is missing, damaged or no checkpoint of this application."""


def save(path: Path, content: dict[str, object]) -> None:
    """Writes a checkpoint to a file of its own, forces it to disk and only then gives it its name: `path` always holds a whole one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name itself reaches the disk with its folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path: Path) -> dict[str, object]:
    """The content of a checkpoint, on the CPU.

    Raises:
        CheckpointError: with the reason.
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
        raise CheckpointError(f"{path} is truncated, or no checkpoint: {str(error).splitlines()[0]}") from error
    wrong = [key for key, kind in FORMAT.items() if not isinstance(content, dict) or not isinstance(content.get(key), kind)]
    if wrong:
        raise CheckpointError(f"{path} is no checkpoint of mvit3 train: {', '.join(wrong)} missing or of another type")
    return content


def build_model(path: Path, content: dict[str, object]) -> nn.Module:
    """The network of a loaded checkpoint."""
    try:
        model = mvit3_kernels.create_model(content["model"], content["num_classes"])
        model.load_state_dict(content["state_dict"])
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit: {error}") from error
    return model.to(memory_format=torch.channels_last)
