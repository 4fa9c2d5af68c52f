"""What happens to an image between its bytes and the batch.

Pixels stay uint8, (H, W, 3) in memory, seen by torch as a channels_last tensor, which it resizes several times faster
than PIL does, to within one level of PIL's result. What is random about a sample is drawn from a generator seeded by
(seed, epoch, position in the epoch).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..options import UsageError
from .config import AugmentConfig, DataConfig
from .decode import Decoder, Encoded, from_pil, reduction

MAX_RATIO = 8  # of the sides of an image that is resized as a whole

Box = tuple[int, int, int, int]  # top, left, height, width
Key = tuple[int, ...]  # what the randomness of a sample depends on


@contextmanager
def seeded(key: Key, *, legacy: bool = False) -> Iterator[None]:
    """Inside it torch's generator on the CPU is seeded by `key`, with `legacy` those of Python and numpy too, from
    which timm draws; they are put back after."""
    words = np.random.SeedSequence(key).generate_state(4)
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
    if legacy:  # takes ten times as long as the rest
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        random.seed(int(words[2]))
        np.random.seed(words[3])  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(before)
        if legacy:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def as_tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) seen as (3, H, W)."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def short_side(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after the shorter side became `size`; the longer one is rounded down."""
    return (size, int(size * width / height)) if height <= width else (int(size * height / width), size)


def centre(height: int, width: int, size: int) -> Box:
    """The square of side `size` in the middle, towards the upper left by half a pixel where it cannot be."""
    return (height - size) // 2, (width - size) // 2, size, size


class Resize:
    """Crops and resizes images of any device to (3, size, size)."""

    def __init__(self, data: DataConfig) -> None:
        self.mode = v2.InterpolationMode(data.interpolation)
        self.antialias = data.antialias

    def __call__(self, image: Tensor, height: int, width: int) -> Tensor:
        if image.shape[-2:] == (height, width):
            return image
        return F.resize(image, [height, width], self.mode, antialias=self.antialias)

    def crop(self, image: Tensor, box: Box, size: int) -> Tensor:
        """The part in the box at (size, size)."""
        top, left, height, width = box
        return self(image[:, top : top + height, left : left + width], size, size)

    def shorter(self, image: Tensor, resize: int, size: int) -> Tensor:
        """The centre of the image, after its shorter side became `resize` pixels. An image of more than MAX_RATIO times
        its shorter side loses its ends before: they are not in the centre, and a line of pixels would become
        terabytes."""
        height, width = image.shape[-2:]
        longest = MAX_RATIO * min(height, width)
        if max(height, width) > longest:
            top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
            image = image[:, top : top + longest, left : left + longest]
        image = self(image, *short_side(*image.shape[-2:], resize))
        top, left, height, width = centre(*image.shape[-2:], size)
        return image[:, top : top + height, left : left + width]


@lru_cache
def _policy(text: str, size: int, fill: tuple[int, ...]):
    from timm.data import auto_augment

    parameters = {"translate_const": int(size * 0.45), "img_mean": fill}
    try:
        if text.startswith("rand"):
            return auto_augment.rand_augment_transform(text, parameters)
        if text.startswith("augmix"):
            return auto_augment.augment_and_mix_transform(text, parameters)
        return auto_augment.auto_augment_transform(text, parameters)
    except (AssertionError, KeyError, ValueError) as error:
        raise UsageError(
            f"augment.policy {text!r} is none that timm knows, such as rand-m9-mstd0.5-inc1 or augmix-m3: {error}"
        ) from None


class TrainTransform:
    """The augmentation of a configuration. It has two stages, each with a seed of its own, because the second one may
    run on a GPU: where to crop and whether to flip, then everything that looks at pixels of the final size."""

    def __init__(self, data: DataConfig, augment: AugmentConfig) -> None:
        self.data, self.augment = data, augment
        self.decoder = Decoder("auto" if data.decoder == "nvjpeg" else data.decoder, data.exif_orientation)
        self.resize = Resize(data)
        self._bgr = data.colors == "bgr"
        # An erased part is zero for the network: it gets the pixel, in RGB and to the nearest level, that normalising
        # makes zero.
        mean = data.mean[::-1] if self._bgr else data.mean
        self._erased = [round(255 * value) for value in mean]
        self._crop = v2.RandomResizedCrop(1, augment.crop_scale, augment.crop_ratio) if augment.crop else None
        self._stages: list[v2.Transform] = []
        if augment.rotate or augment.zoom or augment.shift:
            self._stages.append(
                v2.RandomAffine(
                    augment.rotate,
                    (augment.shift, augment.shift),
                    (1 - augment.zoom, 1 + augment.zoom),
                    interpolation=v2.InterpolationMode.BILINEAR,
                )
            )
        if augment.color_jitter:
            self._stages.append(v2.ColorJitter(augment.color_jitter, augment.color_jitter, augment.color_jitter))
        self._rand_augment = (
            v2.RandAugment(
                augment.rand_augment, augment.rand_augment_magnitude, interpolation=v2.InterpolationMode.BILINEAR
            )
            if augment.rand_augment
            else None
        )
        if augment.policy:
            _policy(augment.policy, data.crop, tuple(self._erased))  # refused now, not in a loading process
        self._erase = (
            v2.RandomErasing(augment.erase, augment.erase_scale, augment.erase_ratio, self._erased)
            if augment.erase
            else None
        )

    def geometry(self, height: int, width: int, key: Key) -> tuple[Box | None, bool]:
        """Crop box of an image of this size (None: the centre) and whether it is flipped."""
        with seeded((*key, 0)):
            box = None
            if self._crop is not None:
                drawn = self._crop.make_params([torch.empty(1).expand(3, height, width)])  # looks at the shape only
                box = drawn["top"], drawn["left"], drawn["height"], drawn["width"]
            return box, bool(torch.rand(()) < self.augment.flip)

    def _before_crop(self, size: int) -> int:
        """The shorter side that an image gets before its centre is cut out, as in validation."""
        return round(size * self.data.resize / self.data.crop)

    def place(self, image: Tensor, box: Box | None, flip: bool, size: int) -> Tensor:
        """(3, H, W) uint8 cropped, resized to `size` and flipped."""
        if box is None:
            image = self.resize.shorter(image, self._before_crop(size), size)
        else:
            image = self.resize.crop(image, box, size)
        return image.flip(-1) if flip else image

    def recolor(self, image: Tensor, key: Key) -> Tensor:
        """Everything after cropping and flipping, in the channel order of the network."""
        with seeded((*key, 1), legacy=bool(self.augment.policy)):
            for stage in self._stages:
                image = stage(image)
            if self._rand_augment is not None or self.augment.policy:
                image = self._augment(image)
            if self._erase is not None:
                image = self._erase(image)
        return image.flip(0) if self._bgr else image

    def _augment(self, image: Tensor) -> Tensor:
        """RandAugment; on the CPU by PIL, whose rotations and shears of uint8 are several times faster than torch's."""
        policy = self._rand_augment or _policy(self.augment.policy, image.shape[-1], tuple(self._erased))
        if image.device.type != "cpu":
            return policy(image)
        return as_tensor(np.array(policy(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))))

    def __call__(self, encoded: Encoded, size: int, key: Key) -> Tensor:
        """(3, size, size) uint8, channels_last, from the bytes of an image or from pixels (H, W, 3). DecodeError."""
        height, width = self.decoder.size(encoded)
        box, flip = self.geometry(height, width, key)
        reduce = 1
        if self.data.scaled_decoding:
            reduce = (
                reduction(box[2:], (size, size)) if box else reduction((height, width), (self._before_crop(size),) * 2)
            )
        image = as_tensor(self.decoder.decode(encoded, reduce))
        if reduce > 1 and box:
            box = _scaled(box, reduce, *image.shape[1:])
        return self.recolor(self.place(image, box, flip, size), key)


def _scaled(box: Box, reduce: int, height: int, width: int) -> Box:
    """A box in an image that was decoded at 1 / reduce, to the nearest pixel."""
    top, left = round(box[0] / reduce), round(box[1] / reduce)
    return top, left, min(round(box[2] / reduce), height - top), min(round(box[3] / reduce), width - left)


class EvaluationTransform:
    """What validation and prediction do: shorter side to `data.resize`, centre crop of `data.crop`, colours in the
    network's order.

    Calling it with a path, the bytes of an image, a PIL image or pixels (H, W, 3) uint8 gives what the network reads:
    (3, crop, crop) float32, normalised. DecodeError where that is no image, OSError where it cannot be read, ValueError
    for pixels of another shape or dtype.
    """

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self.decoder = Decoder("auto" if data.decoder == "nvjpeg" else data.decoder, data.exif_orientation)
        self.resize = Resize(data)

    def pixels(self, encoded: Encoded) -> Tensor:
        """(3, crop, crop) uint8, channels_last. DecodeError."""
        reduce = 1
        if self.data.scaled_decoding:
            size = self.decoder.size(encoded)
            reduce = reduction(size, short_side(*size, self.data.resize))
        image = self.resize.shorter(as_tensor(self.decoder.decode(encoded, reduce)), self.data.resize, self.data.crop)
        return image.flip(0) if self.data.colors == "bgr" else image

    def __call__(self, image: str | Path | bytes | Image.Image | np.ndarray) -> Tensor:
        if isinstance(image, (str, Path)):
            image = Path(image).read_bytes()
        elif isinstance(image, Image.Image):
            image, _ = from_pil(image, self.data.exif_orientation)
        elif isinstance(image, np.ndarray) and (
            image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size
        ):
            raise ValueError(f"image must be pixels (H, W, 3) of dtype uint8, got {image.shape} of {image.dtype}")
        return normalise(self.pixels(image)[None], self.data)[0]


def normalise(images: Tensor, data: DataConfig) -> Tensor:
    """uint8 (N, 3, H, W) as the network reads them: float32 in [0, 1], less the mean, over the deviation."""
    images = images.float().div_(255)
    if any(data.mean) or any(value != 1 for value in data.std):
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (data.mean, data.std))
        images = images.sub_(mean).div_(std)
    return images


def evaluation_transform(config) -> EvaluationTransform:
    """The preprocessing that a recipe evaluates with; `config` has the section `data`."""
    return EvaluationTransform(config.data)
