"""Decoding and augmentation of training images on the GPU: nvJPEG through torchvision, then torchvision's transforms on tensors there.

Loading processes only read files and draw crops and flips, so the CPU's work per image is a file and a header.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from ..options import UsageError
from .config import AugmentConfig
from .transforms import Box, TrainTransform


@dataclass(frozen=True)
class Plan:
    """An encoded image and what will be done to it; `key` is what its randomness depends on, `sample` where it came from."""

    encoded: bytes
    box: Box | None
    flip: bool
    size: int
    key: tuple[int, ...]
    sample: tuple[int, ...]


def _baseline(encoded: bytes) -> bool:
    """Whether a JPEG is baseline or extended, in one or three components: walks its segments up to the frame header."""
    place = 2
    while place + 10 < len(encoded) and encoded[place] == 0xFF:
        marker, length = encoded[place + 1], int.from_bytes(encoded[place + 2 : place + 4], "big")
        if marker in (0xC0, 0xC1):
            return encoded[place + 9] in (1, 3)
        if 0xC2 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return False
        place += 2 + length
    return False


def can_decode(encoded: bytes | np.ndarray) -> bool:
    """Whether an image goes to the GPU: a complete baseline JPEG. What is cut off would come back half grey instead of as an error."""
    return isinstance(encoded, bytes) and encoded[:2] == b"\xff\xd8" and b"\xff\xd9" in encoded[-64:] and _baseline(encoded)


def check(device: torch.device, augment: AugmentConfig) -> None:
    """UsageError where images cannot be decoded on this device."""
    if device.type != "cuda":
        raise UsageError(f"data.decoder nvjpeg needs a CUDA device, this run is on {device}; data.decoder auto decodes on the CPU")
    if augment.policy:
        raise UsageError("augment.policy works on the CPU only; with data.decoder nvjpeg use augment.rand_augment")
    sample = io.BytesIO()
    Image.new("RGB", (16, 16)).save(sample, "JPEG")
    try:
        decode([sample.getvalue()], device)
    except RuntimeError as error:
        raise UsageError(f"data.decoder nvjpeg cannot run here: {error}") from None


def decode(encoded: list[bytes], device: torch.device) -> list[Tensor]:
    """(3, H, W) uint8 of each JPEG on the device, RGB. RuntimeError where one of them cannot be decoded."""
    return decode_jpeg([torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in encoded], ImageReadMode.RGB, device=device)


def pixels(plans: list[Plan], transform: TrainTransform, device: torch.device) -> list[Tensor | None]:
    """(3, size, size) uint8 of each plan on the device; None where the image cannot be decoded."""
    try:
        images: list[Tensor | None] = list(decode([plan.encoded for plan in plans], device))
    except RuntimeError:  # does not say which one
        images = []
        for plan in plans:
            try:
                images += decode([plan.encoded], device)
            except RuntimeError:
                images.append(None)
    return [
        None if image is None else transform.recolor(transform.place(image, plan.box, plan.flip, plan.size), plan.key)
        for image, plan in zip(images, plans, strict=True)
    ]
