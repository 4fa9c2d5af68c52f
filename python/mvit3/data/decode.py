"""From the bytes of an image to its pixels.

Every CPU decoder gives the same pixels (libjpeg-turbo's exact inverse transform and smooth upsampling; a CMYK JPEG read by OpenCV may
differ by one level), so the choice among them changes the speed only. Each takes the JPEGs that it can; anything else, and whatever it
refuses, goes to PIL, which alone decides what is unreadable. So the same images are left out whichever decoder runs. An image that is
damaged but complete decodes, with wrong pixels, as PIL and libjpeg do it.

Scaled decoding is another matter: JPEG averages blocks of pixels on the way, and a crop is rounded to pixels of the smaller image. What
comes out differs from exact decoding by at most 2 of 255 levels on average for whole images, 6 for random crops, which move by up to half a
pixel of the result.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..options import UsageError

REDUCTIONS = (8, 4, 2)  # what JPEG can be scaled down by while it is decoded


class DecodeError(ValueError):
    """Bytes that are no image, or only a part of one."""


def _pil_open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError("the file is empty" if not data else str(error).partition("<_io")[0].strip()) from None


def _pil(data: bytes, reduce: int) -> np.ndarray:
    image = _pil_open(data)
    try:
        if reduce > 1:
            image.draft("RGB", (image.width // reduce, image.height // reduce))
        return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DecodeError(str(error)) from None


def _simplejpeg(data: bytes, reduce: int) -> np.ndarray | None:
    import simplejpeg

    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        if colors in ("CMYK", "YCCK"):
            return None
        return simplejpeg.decode_jpeg(data, "RGB", min_height=height // reduce, min_width=width // reduce)
    except ValueError:
        return None


def _cv2(data: bytes, reduce: int) -> np.ndarray | None:
    import cv2

    # An image is as it is stored, for every decoder: OpenCV alone would turn it by its EXIF tag.
    flag = (
        cv2.IMREAD_IGNORE_ORIENTATION
        | {
            1: cv2.IMREAD_COLOR,
            2: cv2.IMREAD_REDUCED_COLOR_2,
            4: cv2.IMREAD_REDUCED_COLOR_4,
            8: cv2.IMREAD_REDUCED_COLOR_8,
        }[reduce]
    )
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error:
        return None
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


_FAST: dict[str, Callable[[bytes, int], np.ndarray | None]] = {"simplejpeg": _simplejpeg, "cv2": _cv2}


class Decoder:
    """Decodes images on the CPU by one of `pil`, `simplejpeg`, `cv2`, or `auto`: the first of simplejpeg, cv2, pil that is installed."""

    def __init__(self, name: str) -> None:
        installed = [fast for fast in _FAST if importlib.util.find_spec(fast)]
        if name == "auto":
            name = (*installed, "pil")[0]
        elif name != "pil" and name not in installed:
            raise UsageError(f"data.decoder {name}: the package {name} is not installed; mvit3_kernels[fast] brings it, auto does without")
        if name != "pil":
            importlib.import_module(name)  # here, so that loading processes inherit it
        self.name = name

    def size(self, image: bytes | np.ndarray) -> tuple[int, int]:
        """(height, width), for bytes from the header alone. DecodeError."""
        if isinstance(image, np.ndarray):
            return image.shape[:2]
        if self.name == "simplejpeg" and image[:2] == b"\xff\xd8":
            import simplejpeg

            try:
                return simplejpeg.decode_jpeg_header(image)[:2]
            except ValueError:
                pass
        opened = _pil_open(image)
        return opened.height, opened.width

    def decode(self, image: bytes | np.ndarray, reduce: int = 1) -> np.ndarray:
        """(H, W, 3) uint8, RGB; sides of a JPEG divided by `reduce` (1, 2, 4, 8) and rounded up. DecodeError."""
        if isinstance(image, np.ndarray):
            return image
        if self.name != "pil" and image[:2] == b"\xff\xd8":
            pixels = _FAST[self.name](image, reduce)
            if pixels is not None:
                return pixels
        return _pil(image, reduce)


def reduction(crop: tuple[int, int], size: tuple[int, int]) -> int:
    """The strongest reduction after which a crop (height, width) is still at least as large as the size it will have."""
    return next((r for r in REDUCTIONS if crop[0] >= r * size[0] and crop[1] >= r * size[1]), 1)
