"""What happens to an image and its masks or boxes on the way to a batch of dense prediction.

The order and the numbers are those of ml-cvnets and of the MobileViTv3 release, whose two halves differ
(`augment.style`): "v1" (MobileViTv1, MobileViTv3-S, XS, XXS) and "v2" (MobileViTv2, MobileViTv3-0.50 to 2.00). Labels
are never interpolated. What is random is drawn from generators seeded by (seed, epoch, position in the epoch). Images
are read as they are stored, for that is what masks and boxes are drawn on.
"""

from __future__ import annotations

import random as python_random

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..options import UsageError
from .config import AugmentConfig, DataConfig
from .decode import MAX_PIXELS, DecodeError, Decoder, Encoded
from .photometric import PhotometricDistort
from .ssd_crop import ssd_crop
from .targets import IGNORED, Annotations, Boxes, Indexed
from .transforms import Key, Resize, as_tensor, seeded, short_side

BLUR_RADIUS = 1.0  # largest one
CROP_TRIES = 10  # crops drawn until no class covers too much

# Options of a classifier's augmentation that have no meaning here, and the value that leaves them out.
_NONE = {"zoom": 0, "shift": 0, "rand_augment": 0, "policy": "", "erase": 0}
_SEGMENTATION_ONLY = {"rotate": 0, "short_side": (), "blur": 0}


def check_options(task: str, data: DataConfig, augment: AugmentConfig) -> None:
    """UsageError where an option has no meaning for dense prediction."""
    for key, none in {**_NONE, **(_SEGMENTATION_ONLY if task == "detection" else {})}.items():
        if getattr(augment, key) != none:
            raise UsageError(
                f"augment.{key} is not made for {task}, got {getattr(augment, key)!r}; leave it at {none!r}"
            )
    if data.decoder == "nvjpeg" or data.scaled_decoding:
        name = "decoder nvjpeg" if data.decoder == "nvjpeg" else "scaled_decoding"
        raise UsageError(f"data.{name} is made for classification, this network is for {task}")


def as_pil(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 as Pillow's."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


class _Pixels:
    """What both tasks do to pixels: decoding, resizing, colours."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self.decoder = Decoder(data.decoder, turn=False)
        self._resize = Resize(data)
        self._pillow = Image.Resampling[data.interpolation.upper()]

    def decode(self, encoded: Encoded) -> tv_tensors.Image:
        return tv_tensors.Image(as_tensor(self.decoder.decode(encoded)))

    def colors(self, image: Tensor) -> Tensor:
        """In the order of the network."""
        image = image.as_subclass(Tensor)
        return image.flip(0) if self.data.colors == "bgr" else image

    def masked(self, encoded: Encoded, mask: np.ndarray) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Image (3, H, W) and mask (1, H, W). DecodeError where they differ in size."""
        image = self.decode(encoded)
        if image.shape[1:] != mask.shape:
            sizes = (f"{height}x{width}" for height, width in (mask.shape, image.shape[1:]))
            raise DecodeError("the mask has {} pixels (height x width), the image {}".format(*sizes))
        return image, tv_tensors.Mask(torch.from_numpy(mask)[None])

    def resize(self, image: Tensor, height: int, width: int) -> Tensor:
        """(3, H, W) at another size. With `data.antialias` by Pillow, from which torch's is up to a dozen levels away
        where pixels differ much from their neighbours."""
        if not self.data.antialias or image.shape[1:] == (height, width):
            return self._resize(image, height, width)
        return tv_tensors.Image(as_tensor(np.array(as_pil(image).resize((width, height), self._pillow))))

    def resize_mask(self, mask: tv_tensors.Mask, height: int, width: int) -> tv_tensors.Mask:
        """The nearest pixel, which for OpenCV is the one at the upper left, for Pillow that under the centre."""
        if not self.data.antialias or mask.shape[1:] == (height, width):
            return F.resize(mask, [height, width], v2.InterpolationMode.NEAREST)
        resized = Image.fromarray(mask[0].numpy()).resize((width, height), Image.Resampling.NEAREST)
        return tv_tensors.Mask(torch.from_numpy(np.array(resized))[None])


def fraction(boxes: np.ndarray | Tensor, height: int, width: int) -> Tensor:
    """Corners in pixels (G, 4) as fractions of an image, float32."""
    return (torch.as_tensor(boxes, dtype=torch.float64) / torch.tensor([width, height] * 2)).float()


class DetectionTraining(_Pixels):
    """SSD's crop, photometric distortion, flip, then resizing to a square."""

    def __init__(self, data: DataConfig, augment: AugmentConfig) -> None:
        check_options("detection", data, augment)
        super().__init__(data)
        self.augment = augment
        self._distort = PhotometricDistort(augment.style) if augment.photometric else None
        self._jitter = _jitter(augment)

    def __call__(self, encoded: Encoded, truth: Annotations, size: int, key: Key) -> tuple[Tensor, Boxes]:
        """(3, size, size) uint8 and boxes. DecodeError."""
        image, truth = self.decode(encoded), truth.single()
        boxes, labels = truth.boxes, truth.labels
        with seeded((*key, 0)):
            if self.augment.crop:
                draw = python_random.Random(int(torch.randint(2**62, ())))
                box, boxes, kept = ssd_crop(boxes, *image.shape[1:], draw, self.augment.style)
                image, labels = F.crop(image, *box), labels[kept]
            if self._distort is not None:
                image = tv_tensors.Image(as_tensor(self._distort(image.permute(1, 2, 0).contiguous().numpy())))
            image = self._jitter(image)
            height, width = image.shape[1:]
            corners = tv_tensors.BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=(height, width))
            if torch.rand(()) < self.augment.flip:
                image, corners = F.horizontal_flip(image), F.horizontal_flip(corners)
        target = Boxes(fraction(corners.as_subclass(Tensor), height, width), torch.from_numpy(labels))
        return self.colors(self.resize(image, size, size)), target


class DetectionEvaluation(_Pixels):
    """The whole image at data.crop x data.crop."""

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)

    def __call__(self, encoded: Encoded, truth: Annotations, index: int) -> tuple[Tensor, Indexed]:
        image, truth = self.decode(encoded), truth.single()
        boxes = Boxes(fraction(truth.boxes, *image.shape[1:]), torch.from_numpy(truth.labels))
        return self.colors(self.resize(image, self.data.crop, self.data.crop)), Indexed(boxes, index)


def _jitter(augment: AugmentConfig) -> v2.Transform:
    share = augment.color_jitter
    return v2.ColorJitter(share, share, share) if share else v2.Identity()


def scaled_size(height: int, width: int, side: int, longest: int) -> tuple[int, int]:
    """Height and width after the shorter side became `side`; where `longest` is not 0, less of it where the longer side
    would exceed that, and both are rounded down, as published. DecodeError where that is no image to work with."""
    if longest:
        scale = min(side / min(height, width), longest / max(height, width))
        size = max(int(height * scale), 1), max(int(width * scale), 1)
    else:
        size = short_side(height, width, side)
    if size[0] * size[1] > MAX_PIXELS:
        raise DecodeError(f"{width}x{height} pixels would become {size[1]}x{size[0]}")
    return size


class SegmentationTraining(_Pixels):
    """A random size, a crop, flip, blur, photometric distortion and rotation."""

    def __init__(self, data: DataConfig, augment: AugmentConfig) -> None:
        check_options("segmentation", data, augment)
        super().__init__(data)
        self.augment = augment
        self._distort = PhotometricDistort(augment.style) if augment.photometric else None
        self._jitter = _jitter(augment)
        self._void_counts = data.source == "ade20k"  # whose void is label 0 while a crop is judged, as published

    def __call__(self, encoded: Encoded, truth: np.ndarray, size: int, key: Key) -> tuple[Tensor, Tensor]:
        """(3, size, size) uint8 and labels (size, size) int64. DecodeError."""
        image, mask = self.masked(encoded, truth)
        with seeded((*key, 0)):
            if not self.augment.crop:
                image, mask = self.resize(image, size, size), self.resize_mask(mask, size, size)
            else:
                image, mask = self._scaled(image, mask, size)
                image, mask = self._cropped(image, mask, size)
            if torch.rand(()) < self.augment.flip:
                image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
            image, mask = self._distorted(image, mask)
        return self.colors(image), mask.as_subclass(Tensor)[0].long()

    def _scaled(self, image: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """At a random size, and no side below `size`."""
        height, width = image.shape[1:]
        if self.augment.short_side:
            low, high = self.augment.short_side
            side = int(torch.randint(low, high + 1, ()))
            height, width = scaled_size(height, width, side, self.augment.long_side)
        if self.augment.style == "v1" and min(height, width) < size:
            height, width = scaled_size(height, width, size, 0)
        image, mask = self.resize(image, height, width), self.resize_mask(mask, height, width)
        lacking = [0, 0, max(0, size - width), max(0, size - height)]  # left, top, right, bottom
        return F.pad(image, lacking, 0), F.pad(mask, lacking, IGNORED)

    def _cropped(self, image: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
        for _ in range(CROP_TRIES if self.augment.max_class_share < 1 else 1):
            top, left = (int(torch.randint(side - size + 1, ())) for side in mask.shape[1:])
            part = F.crop(mask, top, left, size, size)
            counts = torch.bincount(part.flatten().int(), minlength=IGNORED + 1)
            counts = counts if self._void_counts else counts[:IGNORED]
            if counts.max() < self.augment.max_class_share * counts.sum():
                break
        return F.crop(image, top, left, size, size), part

    def _distorted(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Blurred, recoloured, rotated; by Pillow where the published pipeline is."""
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        if torch.rand(()) < self.augment.blur:
            radius = BLUR_RADIUS * float(torch.rand(()))
            pixels = np.array(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))
        if self._distort is not None:
            pixels = self._distort(pixels)
        image = self._jitter(as_tensor(pixels))
        if self.augment.rotate:
            angle = self.augment.rotate * (2 * float(torch.rand(())) - 1)
            turned = F.rotate(as_pil(image), angle, v2.InterpolationMode.BILINEAR)
            image = as_tensor(np.array(turned))
            turned = F.rotate(Image.fromarray(mask[0].numpy()), angle, v2.InterpolationMode.NEAREST, fill=IGNORED)
            mask = tv_tensors.Mask(torch.from_numpy(np.array(turned))[None])
        return image, mask


class SegmentationEvaluation(_Pixels):
    """The whole image at data.crop x data.crop, or with `data.keep_aspect` its shorter side at data.crop; labels at the
    same size or, with `data.native_labels`, as they are."""

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)

    def __call__(self, encoded: Encoded, truth: np.ndarray, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.masked(encoded, truth)
        size = self.data.crop, self.data.crop
        if self.data.keep_aspect:
            size = scaled_size(*mask.shape[1:], self.data.crop, 0)
        if not self.data.native_labels:
            mask = self.resize_mask(mask, *size)
        return self.colors(self.resize(image, *size)), mask.as_subclass(Tensor)[0].long()
