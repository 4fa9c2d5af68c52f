"""Whether a run that goes on sees the images that it began with."""

from __future__ import annotations

import hashlib

import numpy as np

from .decode import DecodeError
from .sampler import spread
from .sources import Source

SAMPLES = 32  # images whose content is compared, spread evenly; all would take as long as an epoch


def _digest(data: bytes | np.ndarray) -> str:
    return hashlib.sha256(data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()).hexdigest()[:16]


def _content(source: Source, index: int) -> str | None:
    """Of an image, with its mask or boxes; None where it cannot be read."""
    try:
        image = _digest(source.read(index))
        if not hasattr(source, "truth"):
            return image
        truth = source.truth(index)
    except (OSError, DecodeError):
        return None
    parts = truth if isinstance(truth, tuple) else (truth,)
    return _digest("".join([image, *map(_digest, parts)]).encode())


def identity(source: Source) -> dict[str, object]:
    """What tells a source from others, as plain values: number of images, their labels, the content of some
    with their masks or boxes. Where it lies is no part of it, so that a folder may be moved."""
    labels = np.asarray(source.labels, np.int64)
    samples = [_content(source, index) for index in spread(len(labels), SAMPLES)]
    return {"images": len(labels), "labels": _digest(labels), "samples": samples}


def difference(then: dict[str, object], now: dict[str, object]) -> str:
    """How two identities differ, in words; empty where they do not. An image that could not be read is equal to any."""
    if then["images"] != now["images"]:
        return f"{then['images']} images were there, {now['images']} are"
    if then["labels"] != now["labels"]:
        return "images have other classes"
    changed = sum(None not in pair and pair[0] != pair[1] for pair in zip(then["samples"], now["samples"], strict=True))
    return f"{changed} of {len(now['samples'])} images that were compared are others" if changed else ""
