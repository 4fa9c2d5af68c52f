"""Decoding and augmentation of training images on the GPU: nvJPEG through torchvision, then torchvision's transforms on
tensors there.

Loading processes only read files and draw crops and flips, so the CPU's work per image is a file and a header.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from ..options import UsageError
from .config import AugmentConfig
from .decode import MAX_PIXELS, Encoded, jpeg_header, orientation
from .transforms import Box, TrainTransform


@dataclass(frozen=True)
class Plan:
    """An encoded image and what will be done to it; `key` is what its randomness depends on, `sample` where it came
    from."""

    encoded: bytes
    box: Box | None
    flip: bool
    size: int
    key: tuple[int, ...]
    sample: tuple[int, ...]


def can_decode(encoded: Encoded, turn: bool = True) -> bool:
    """Whether an image goes to the GPU: a complete baseline JPEG of a size that is allowed, grey or YCbCr. What is cut
    off would come back half grey instead of as an error. What has to be turned (`turn`: by its EXIF tag) is turned on
    the CPU."""
    header = jpeg_header(encoded)
    return (
        header is not None
        and header.baseline
        and header.bits == 8
        and header.components in (1, 3)
        and not header.rgb
        and not (turn and header.tagged and orientation(encoded) != 1)
        and 0 < header.height * header.width <= MAX_PIXELS
        and b"\xff\xd9" in encoded[-64:]
    )


def check(device: torch.device, augment: AugmentConfig) -> None:
    """UsageError where images cannot be decoded on this device."""
    if device.type != "cuda":
        raise UsageError(
            f"data.decoder nvjpeg needs a CUDA device, this run is on {device}; data.decoder auto decodes on the CPU"
        )
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
    return decode_jpeg(
        [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in encoded], ImageReadMode.RGB, device=device
    )


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
