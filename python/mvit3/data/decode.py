"""From the bytes of an image to its pixels.

Every CPU decoder gives the same pixels (libjpeg-turbo's exact inverse transform and smooth upsampling), so the choice
among them changes the speed only. Each takes the JPEGs that it can; anything else, and whatever it refuses, goes to
PIL, which alone decides what is unreadable. So the same images are left out whichever decoder runs. An image that is
damaged but complete decodes, with wrong pixels, as PIL and libjpeg do it.

What becomes of pixels that are not 8-bit RGB:

- grey, palette and one-bit images and CMYK become RGB, as PIL's `convert("RGB")` does it;
- 16-bit pixels keep their upper byte; other integers and floats are read as 0 to 1 (floats only), 0 to 255, 0 to 65535
  or, where they leave all of these, from their least to their greatest value: the first range that holds the image. NaN
  is black;
- transparency is left out: the colour that lies under it is read, as timm and torchvision do;
- of several frames (GIF, TIFF, WebP) the first one is read;
- an image is turned as its EXIF tag says (`data.exif_orientation`), a TIFF in any case.

What of this is a choice is remarked (`Decoder.take_remarks`), and said once in the log. An image of more than
MAX_PIXELS counts as unreadable, by its header alone.

Scaled decoding is another matter: JPEG averages blocks of pixels on the way, and a crop is rounded to pixels of the
smaller image. What comes out differs from exact decoding by at most 2 of 255 levels on average for whole images, 6 for
random crops, which move by up to half a pixel of the result.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..options import UsageError

REDUCTIONS = (8, 4, 2)  # what JPEG can be scaled down by while it is decoded
MAX_PIXELS = 178_956_970  # where PIL takes an image for a decompression bomb
# PIL warns, among other things, between half of that and all of it; what is readable is decided here.
warnings.filterwarnings("ignore", module="PIL")


Encoded = bytes | np.ndarray | Image.Image  # of pixels: (H, W, 3) uint8


class DecodeError(ValueError):
    """Bytes that are no image, or only a part of one."""


@dataclass(frozen=True)
class JpegHeader:
    """What the segments before the pixels of a JPEG say. `tagged`: there is a segment that may hold an EXIF
    orientation."""

    height: int
    width: int
    components: int
    bits: int
    baseline: bool  # or extended sequential, both with Huffman codes
    tagged: bool
    rgb: bool  # three components that are not YCbCr


def jpeg_header(data: Encoded) -> JpegHeader | None:
    """The header of a JPEG, by a walk over its segments; None for anything else, or where it ends too soon."""
    if not isinstance(data, bytes) or data[:2] != b"\xff\xd8":
        return None
    place, tagged, rgb, size = 2, False, False, len(data)
    while place + 4 < size and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a filling byte
            place += 1
            continue
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        body = place + 4
        if marker == 0xE1:
            tagged = tagged or data[body : body + 4] == b"Exif" or b"Orientation" in data[body : place + 2 + length]
        elif marker == 0xEE:
            rgb = rgb or (data[body : body + 5] == b"Adobe" and length >= 14 and data[body + 11] == 0)
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if body + 6 > size:
                return None
            bits, components = data[body], data[body + 5]
            height, width = (int.from_bytes(data[body + i : body + i + 2], "big") for i in (1, 3))
            ids = bytes(data[body + 6 + 3 * i] for i in range(components) if body + 6 + 3 * i < size)
            return JpegHeader(
                height,
                width,
                components,
                bits,
                marker in (0xC0, 0xC1),
                tagged,
                components == 3 and (rgb or ids == b"RGB"),
            )
        place += 2 + length
    return None


def _check_size(height: int, width: int) -> None:
    if not height or not width:
        raise DecodeError(f"the image has no pixels, its header says {width}x{height}")
    if height * width > MAX_PIXELS:
        raise DecodeError(
            f"{width}x{height} pixels exceed the limit of {MAX_PIXELS} pixels, could be a decompression bomb"
        )


def _pil_open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise DecodeError("the file is empty" if not data else str(error).partition("<_io")[0].strip()) from None
    except MemoryError:
        raise
    except Exception as error:  # readers of rare formats raise anything
        raise DecodeError(str(error) or type(error).__name__) from None
    _check_size(image.height, image.width)
    return image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, that pixels still have to be turned by; PIL turns a TIFF by itself."""
    if image.format == "TIFF":
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged tag does not make an image unreadable
        return 1
    return found if found in range(2, 9) else 1


def orientation(data: bytes) -> int:
    """The EXIF orientation of an encoded image, 1 to 8; 1 too where it cannot be read."""
    try:
        return _orientation(_pil_open(data))
    except DecodeError:
        return 1


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, 3) as a viewer shows what is stored with this orientation."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _levels(values: np.ndarray, whole: bool, known: int = 0) -> tuple[np.ndarray, str]:
    """Values (H, W) of any range as uint8, and the range that was taken. `whole`: they are integers; `known`: their
    largest value."""
    values = np.nan_to_num(
        values.astype(np.float64), nan=0.0, posinf=np.finfo(np.float64).max, neginf=np.finfo(np.float64).min
    )
    low, high = float(values.min()), float(values.max())
    limits = [known] if known else [255, 65535] if whole else [1, 255, 65535]
    top = next((limit for limit in limits if low >= 0 and high <= limit), None)
    if top is not None:
        low, high, text = 0.0, float(top), f"0 to {top}"
    else:
        text = f"their own range, here {low:g} to {high:g}"
    scale = high - low
    if not 0 < scale < np.inf:
        return np.zeros(values.shape, np.uint8), text
    return np.rint((values - low) / scale * 255).astype(np.uint8), text


def _rgb(image: Image.Image) -> tuple[np.ndarray, list[str]]:
    """(H, W, 3) uint8 of an image that PIL has opened, and what is to be remarked."""
    remarks, kind = [], image.format or "image"
    if kind != "MPO" and getattr(image, "is_animated", False):
        remarks.append(f"of a {kind} with several frames the first one is read")
    mode = image.mode
    if mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        remarks.append("16-bit pixels are read as 0 to 65535")
    elif mode in ("I", "F"):
        short = mode == "I" and kind in ("PNG", "PPM")  # which have no more than 16 bits
        grey, text = _levels(np.asarray(image), mode == "I", 65535 if short else 0)
        what = "floating-point" if mode == "F" else "16-bit" if short else "integer"
        remarks.append(f"{what} pixels are read as {text}")
    else:
        if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            remarks.append(f"the transparency of a {kind} is left out, the colour under it is read")
            if mode in ("La", "RGBa"):
                image = image.convert({"La": "LA", "RGBa": "RGBA"}[mode])
            elif mode in ("P", "PA"):
                image = image.convert("RGBA")
        return np.array(image.convert("RGB")), remarks
    return np.repeat(grey[:, :, None], 3, 2), remarks


def from_pil(image: Image.Image, turn: bool = True) -> tuple[np.ndarray, list[str]]:
    """(H, W, 3) uint8 of a PIL image, and what is to be remarked. DecodeError."""
    try:
        orientation = _orientation(image) if turn else 1
        pixels, remarks = _rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # readers of rare formats raise anything
        raise DecodeError(str(error) or type(error).__name__) from None
    _check_size(*pixels.shape[:2])
    return _turned(pixels, orientation), remarks


def _simplejpeg(data: bytes, header: JpegHeader, reduce: int) -> np.ndarray | None:
    import simplejpeg

    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_height=header.height // reduce, min_width=header.width // reduce)
    except ValueError:
        return None


def _cv2(data: bytes, header: JpegHeader, reduce: int) -> np.ndarray | None:
    import cv2

    # As it is stored: images are turned in one place for all decoders.
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


_FAST: dict[str, Callable[[bytes, JpegHeader, int], np.ndarray | None]] = {"simplejpeg": _simplejpeg, "cv2": _cv2}


class Decoder:
    """Decodes images on the CPU by one of `pil`, `simplejpeg`, `cv2`, or `auto`: the first of simplejpeg, cv2, pil that
    is installed.

    `turn`: as the EXIF tag of an image says.
    """

    def __init__(self, name: str, turn: bool = True) -> None:
        installed = [fast for fast in _FAST if importlib.util.find_spec(fast)]
        if name == "auto":
            name = (*installed, "pil")[0]
        elif name != "pil" and name not in installed:
            raise UsageError(
                f"data.decoder {name}: the package {name} is not installed; mvit3_kernels[fast] brings it, auto does "
                "without"
            )
        if name != "pil":
            importlib.import_module(name)  # here, so that loading processes inherit it
        self.name, self.turn = name, turn
        self._remarks: list[str] = []

    def take_remarks(self) -> list[str]:
        """What a person should know of the images decoded since the last call, such as of 16-bit pixels."""
        taken, self._remarks = self._remarks, []
        return taken

    def size(self, image: Encoded) -> tuple[int, int]:
        """(height, width) of what `decode` gives, for bytes from the header alone. DecodeError."""
        if isinstance(image, np.ndarray):
            return image.shape[:2]
        if isinstance(image, Image.Image):
            return self._size(image)
        header = jpeg_header(image)
        if header is not None and not header.tagged:
            _check_size(header.height, header.width)
            return header.height, header.width
        return self._size(_pil_open(image))

    def _size(self, image: Image.Image) -> tuple[int, int]:
        size = image.height, image.width
        return size[::-1] if self.turn and _orientation(image) >= 5 else size

    def decode(self, image: Encoded, reduce: int = 1) -> np.ndarray:
        """(H, W, 3) uint8, RGB; sides of a JPEG divided by `reduce` (1, 2, 4, 8) and rounded up. DecodeError."""
        if isinstance(image, np.ndarray):
            return image
        if isinstance(image, Image.Image):
            return self._from_pil(image)
        header = jpeg_header(image)
        if header is not None:
            _check_size(header.height, header.width)
            # Each decoder has its own way from CMYK to RGB, and none but PIL's is taken.
            if self.name != "pil" and header.components in (1, 3) and header.bits == 8:
                pixels = _FAST[self.name](image, header, reduce)
                if pixels is not None:
                    return _turned(pixels, orientation(image) if self.turn and header.tagged else 1)
        opened = _pil_open(image)
        if reduce > 1:
            opened.draft("RGB", (opened.width // reduce, opened.height // reduce))
        return self._from_pil(opened)

    def _from_pil(self, image: Image.Image) -> np.ndarray:
        pixels, remarks = from_pil(image, self.turn)
        self._remarks += remarks
        return pixels


def reduction(crop: tuple[int, int], size: tuple[int, int]) -> int:
    """The strongest reduction after which a crop (height, width) is still at least as large as the size it will
    have."""
    return next((r for r in REDUCTIONS if crop[0] >= r * size[0] and crop[1] >= r * size[1]), 1)
