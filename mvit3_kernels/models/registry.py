"""The networks, by name."""

from __future__ import annotations

import fnmatch
from typing import Any

from . import mobilevit, mobilevitv2, mobilevitv3

ARCHITECTURES = {**mobilevit.ARCHITECTURES, **mobilevitv2.ARCHITECTURES, **mobilevitv3.ARCHITECTURES}
# What stands in front of the backbone's name in the networks of a task; classification has no such word.
HEADS = {"classification": (), "segmentation": ("deeplabv3", "pspnet"), "detection": ("ssdlite",)}


def list_models(pattern: str = "", task: str | None = None) -> list[str]:
    """The names that `create_model` knows, sorted.

    Args:
        pattern: a shell pattern ("mobilevitv3*", "deeplabv3_*"): the names that match it.
        task: "classification", "segmentation" or "detection". None: the classifiers without a pattern, else of all
            tasks the names that match.

    Raises:
        ValueError: an unknown task.
    """
    if task is not None and task not in HEADS:
        raise ValueError(f"task must be one of {', '.join(HEADS)} or None, got {task!r}")
    tasks = [task] if task else list(HEADS) if pattern else ["classification"]
    heads = [head for task in tasks for head in HEADS[task]]
    names = [f"{head}_{backbone}" for head in heads for backbone in ARCHITECTURES]
    if "classification" in tasks:
        names += ARCHITECTURES
    return sorted(fnmatch.filter(names, pattern) if pattern else names)


def split_name(name: str) -> tuple[str | None, str]:
    """The head in a network's name, None for a classifier, and its backbone."""
    head, _, backbone = name.partition("_")
    return (head, backbone) if any(head in heads for heads in HEADS.values()) else (None, name)


def preprocessing(name: str) -> dict[str, Any]:
    """How the published recipe of a classifier evaluates images, by timm's names: the shorter side becomes 288 pixels,
    of which the middle 256 are read; values from 0 to 1, not normalised. MobileViTv1 and MobileViTv3-XXS, XS, S read
    blue, green, red."""
    architecture = ARCHITECTURES[name]
    colors = "BGR" if architecture.v1_style else "RGB"
    return {
        "input_size": (3, 256, 256),
        "pool_size": (8, 8),
        "crop_pct": 0.888,
        "interpolation": "bilinear" if architecture.v1_style else "bicubic",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "conv_1.block.conv",
        "classifier": "classifier.fc" if architecture.v1_style else "classifier.1",
        "notes": (f"the published weights read the colours in the order {colors}",),
    }
