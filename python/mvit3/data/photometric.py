"""Photometric distortion of the two releases that dense prediction follows, on uint8 pixels.

"v2" is torchvision's, on a PIL image: Pillow's enhancers and its 8-bit HSV. "v1" is that of OpenCV's users, who change
contrast and brightness in floating point and go through HSV of 8 bits, hue in steps of two degrees, whether or not
anything is changed there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

PROBABILITY = 0.5  # of each change
CONTRAST, BRIGHTNESS, SATURATION, HUE = (0.5, 1.5), 0.2, (0.5, 1.5), 0.05


@dataclass(frozen=True)
class Distortion:
    """The changes of "v1", in their order; `late` is a contrast after the rest, `channels` their new order."""

    contrast: float = 1.0
    brightness: float = 0.0
    saturation: float = 1.0
    hue: float = 0.0
    late: float = 1.0
    channels: tuple[int, ...] = (0, 1, 2)

    @staticmethod
    def draw() -> Distortion:
        """From torch's generator."""

        def uniform(low: float, high: float, neutral: float) -> float:
            drawn, value = torch.rand(2).tolist()
            return low + (high - low) * value if drawn < PROBABILITY else neutral

        contrast = uniform(*CONTRAST, 1.0)
        brightness, saturation = uniform(-BRIGHTNESS, BRIGHTNESS, 0.0), uniform(*SATURATION, 1.0)
        hue = uniform(-HUE, HUE, 0.0)
        late = uniform(*CONTRAST, 1.0) if contrast == 1.0 else 1.0
        swapped = torch.rand(()) < PROBABILITY
        return Distortion(
            contrast, brightness, saturation, hue, late, tuple(torch.randperm(3).tolist()) if swapped else (0, 1, 2)
        )


# Rounded reciprocals, from which 8-bit HSV is computed in integers: of value for saturation, of chroma for hue.
_SHIFT = 12
_ROUND = 1 << (_SHIFT - 1)
_DIVISORS = np.maximum(np.arange(256), 1)
_SATURATION = np.where(np.arange(256), np.rint((255 << _SHIFT) / _DIVISORS), 0).astype(np.int32)
_HUE = np.where(np.arange(256), np.rint((180 << _SHIFT) / (6.0 * _DIVISORS)), 0).astype(np.int32)


def to_hsv(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB as hue of 0 to 179, saturation and value of 0 to 255, int32."""
    red, green, blue = (pixels[..., i].astype(np.int32) for i in range(3))
    value = pixels.max(-1).astype(np.int32)
    chroma = value - pixels.min(-1)
    sector = np.where(
        value == red, green - blue, np.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    )
    hue = (sector * _HUE[chroma] + _ROUND) >> _SHIFT
    saturation = (chroma * _SATURATION[value] + _ROUND) >> _SHIFT
    return np.stack((hue + 180 * (hue < 0), saturation, value), -1)


def from_hsv(hsv: np.ndarray) -> np.ndarray:
    """The inverse, to uint8, rounded down as OpenCV does; a hue beyond 179 wraps around."""
    hue = hsv[..., 0].astype(np.float32) * np.float32(6 / 180)
    saturation, value = (hsv[..., i].astype(np.float32) * np.float32(1 / 255) for i in (1, 2))
    sector = np.floor(hue)
    rest = hue - sector
    shades = np.stack(
        (value, value * (1 - saturation), value * (1 - saturation * rest), value * (1 - saturation * (1 - rest))), -1
    )
    # of red, green, blue in each of the six sectors, which shade
    chosen = np.array(((0, 3, 1), (2, 0, 1), (1, 0, 3), (1, 2, 0), (3, 1, 0), (0, 1, 2)))[sector.astype(np.int64) % 6]
    return (np.take_along_axis(shades, chosen, -1) * np.float32(255)).astype(np.uint8)


def _bytes(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 255).astype(np.uint8)


def distort_v1(pixels: np.ndarray, change: Distortion) -> np.ndarray:
    """(H, W, 3) uint8 RGB after a change."""
    values = pixels.astype(np.float32) * np.float32(change.contrast) + np.float32(255 * change.brightness)
    hsv = to_hsv(_bytes(values)).astype(np.float32)
    hsv[..., 1] *= np.float32(change.saturation)
    hsv[..., 0] += int(255 * change.hue)
    pixels = from_hsv(hsv.clip(0, 255).astype(np.uint8))
    return _bytes(pixels.astype(np.float32) * np.float32(change.late))[..., list(change.channels)]


class PhotometricDistort:
    """Pixels (H, W, 3) uint8 RGB with changed colours, drawn from torch's generator. `style`: "v1" or "v2"."""

    def __init__(self, style: str) -> None:
        self._v2 = v2.RandomPhotometricDistort(p=PROBABILITY) if style == "v2" else None

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        if self._v2 is None:
            return distort_v1(pixels, Distortion.draw())
        return np.array(self._v2(Image.fromarray(pixels)))
