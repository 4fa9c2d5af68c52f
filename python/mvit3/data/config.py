"""What the data side can be told. Each recipe states all of it; the defaults are an ImageFolder at 256x256 with crops
and flips."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from ..options import Option, Section, UsageError, nearest

DENSE_SOURCES = {"voc": "segmentation", "ade20k": "segmentation", "masks": "segmentation", "coco": "detection"}
SOURCES = ("digits", "folder", "shards", "torchvision", "huggingface", *DENSE_SOURCES)
DECODERS = ("auto", "pil", "simplejpeg", "cv2", "nvjpeg")
INTERPOLATIONS = ("bilinear", "bicubic")


# What timm's policies are made of: a kind, then parts in any order. timm itself leaves out a part that it does not
# know.
_NUMBER = r"\d+(?:\.\d+)?"
_MIX = {"m": r"\d+", "w": r"\d+", "d": r"\d+", "a": _NUMBER, "b": "[01]", "mstd": _NUMBER}
_RAND = {"m": r"\d+", "n": r"\d+", "p": _NUMBER, "mstd": _NUMBER, "mmax": r"\d+", "inc": "[01]", "t": "weights|3aw?"}
POLICIES = {
    "rand": _RAND,
    "augmix": _MIX,
    **{name: {"mstd": _NUMBER} for name in ("original", "originalr", "v0", "v0r", "3a")},
}


def _check_policy(text: str) -> None:
    """UsageError where a policy is none of timm's, or has a part that timm would pass over."""
    kind, *parts = text.split("-")
    if kind not in POLICIES:
        raise UsageError(
            f"augment.policy must be one of timm's, which begin with {', '.join(POLICIES)}, such as "
            f"rand-m9-mstd0.5-inc1; got {text!r}, "
            f"the nearest beginning is {nearest(kind, POLICIES)!r}"
        )
    for part in parts:
        if not any(re.fullmatch(f"{name}(?:{value})", part) for name, value in POLICIES[kind].items()):
            raise UsageError(
                f"augment.policy {text!r}: {part!r} is no part of a policy {kind!r}; its parts are "
                f"{', '.join(POLICIES[kind])}, each with "
                "its value behind it, such as mstd0.5"
            )


def _check_range(name: str, values: tuple[float, ...]) -> None:
    if len(values) != 2 or values[0] > values[1]:
        raise UsageError(
            f"{name} must be two numbers, the smaller one first, got {list(values)}; write them as [0.5,1]"
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Where images come from, how they are decoded, what the network sees of them."""

    source: Annotated[
        str,
        Option(
            "where images come from: a folder has one folder per class, shards are tar files; voc, ade20k and masks "
            "are for segmentation, coco for detection, digits and shards for all",
            SOURCES,
        ),
    ] = "folder"
    name: Annotated[
        str, Option("data set of torchvision (CIFAR10) or Hugging Face (cifar10, a folder of save_to_disk)")
    ] = ""
    root: Annotated[str, Option("folder that holds the training and the validation part")] = ""
    train: Annotated[
        str,
        Option(
            "training part: a folder in root, shards like train-{0000..0146}.tar or train-*.tar (paths or URLs), a "
            "split, or for voc a list of names: of ImageSets/Segmentation, or a file"
        ),
    ] = "train"
    val: Annotated[str, Option("validation part, likewise")] = "val"
    download: Annotated[bool, Option("fetch a data set of torchvision that is not in root")] = False
    cache: Annotated[
        str, Option("folder for shards that come from a URL or are compressed; each is fetched or unpacked once")
    ] = ""
    num_classes: Annotated[
        int, Option("classes of shards and of masks that no file names; 0: one more than the largest label", minimum=0)
    ] = 0
    class_map: Annotated[
        str,
        Option(
            "file with the class names of shards or masks: a line each, or JSON; empty: classes.txt or classes.json "
            "beside them, if any"
        ),
    ] = ""
    masks: Annotated[
        str,
        Option(
            "segmentation: folder of the label images in root, {part} being the last part of data.train or data.val; "
            "empty: where the layout has them"
        ),
    ] = ""
    annotations: Annotated[str, Option("coco: file of the boxes in root, {part} likewise")] = (
        "annotations/instances_{part}.json"
    )
    limit_train: Annotated[int, Option("use only so many training images; 0: all", minimum=0)] = 0
    limit_val: Annotated[int, Option("use only so many validation images; 0: all", minimum=0)] = 0
    batch_size: Annotated[int, Option("images per step and process, at the base size", minimum=1)] = 32
    eval_batch_size: Annotated[int, Option("images per batch of the validation", minimum=1)] = 100
    resize: Annotated[int, Option("validation: shorter side after resizing, pixels", minimum=1)] = 288
    crop: Annotated[int, Option("validation: side of the centre crop, pixels", minimum=1)] = 256
    native_labels: Annotated[
        bool, Option("segmentation, validation: labels stay at the size of their image, on which then is counted")
    ] = False
    keep_aspect: Annotated[
        bool,
        Option(
            "segmentation, validation: images keep their aspect, the shorter side is crop; off: they become squares. "
            "Needs eval_batch_size 1"
        ),
    ] = False
    interpolation: Annotated[str, Option("of every resizing, in training and in validation", INTERPOLATIONS)] = (
        "bilinear"
    )
    antialias: Annotated[bool, Option("filter before shrinking, as PIL does and OpenCV does not")] = True
    exif_orientation: Annotated[
        bool, Option("turn images as their EXIF tag says, as cameras mean it; PIL alone does not")
    ] = True
    colors: Annotated[str, Option("order of the colour channels that the network reads", ("rgb", "bgr"))] = "rgb"
    mean: Annotated[
        tuple[float, ...], Option("subtracted from pixels in [0, 1], in the order of colors", minimum=0, below=1)
    ] = (0, 0, 0)
    std: Annotated[tuple[float, ...], Option("divides them after that", minimum=1e-3, below=1e3)] = (1, 1, 1)
    decoder: Annotated[
        str, Option("of JPEG; auto: the fastest of those on the CPU, all exact; nvjpeg decodes on the GPU", DECODERS)
    ] = "auto"
    scaled_decoding: Annotated[
        bool, Option("decode large JPEGs at a half, a quarter, an eighth: faster, not exact")
    ] = False
    workers: Annotated[
        int, Option("loading processes per training process; 0: none; -1: one per core and process", minimum=-1)
    ] = -1
    prefetch: Annotated[int, Option("batches that each loading process keeps ready", minimum=1)] = 2
    max_corrupt: Annotated[
        float, Option("share of images that may be unreadable before the run stops", minimum=0, below=1)
    ] = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_aspect and self.eval_batch_size != 1:
            raise UsageError(f"data.keep_aspect needs data.eval_batch_size 1, got {self.eval_batch_size}")
        if self.crop > self.resize:
            raise UsageError(f"data.crop must be at most data.resize, {self.resize}, got {self.crop}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise UsageError(
                    f"data.{name} must be three numbers, got {list(getattr(self, name))}; write them as [0.5,0.5,0.5]"
                )


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Section):
    """What training does to an image, in this order; mixup and cutmix follow per batch and belong to the loss.

    Dense prediction has an order of its own, that of its publications. Detection: SSD's crop, photometric distortion,
    flip, a square of the size of the batch. Segmentation: the shorter side drawn, a crop of the size of the batch,
    flip, blur, photometric distortion, rotation.
    """

    crop: Annotated[
        bool,
        Option(
            "random crop, resized to the size of the batch; off: resize and centre crop as in validation; detection: "
            "SSD's crop; segmentation: a crop of the size of the batch"
        ),
    ] = True
    style: Annotated[
        str,
        Option(
            "dense prediction: v1, details as published for MobileViTv1 and MobileViTv3-S, XS, XXS (OpenCV's colours, "
            "small images enlarged), or v2, for MobileViTv2 and MobileViTv3-0.5 to 2.0 (Pillow's, small images padded)",
            ("v1", "v2"),
        ),
    ] = "v2"
    photometric: Annotated[
        bool, Option("dense prediction: brightness, contrast, saturation, hue and order of channels change")
    ] = False
    short_side: Annotated[
        tuple[int, ...],
        Option(
            "segmentation: shorter side before the crop, drawn from the first to the second; none: as it is", minimum=1
        ),
    ] = ()
    long_side: Annotated[
        int, Option("segmentation: longest side before the crop, the shorter one follows; 0: any", minimum=0)
    ] = 0
    max_class_share: Annotated[
        float,
        Option(
            "segmentation: a crop in which a class has this share or more is drawn anew, up to 10 times; 1: any crop",
            minimum=0.01,
            below=1.001,
        ),
    ] = 1.0
    blur: Annotated[
        float, Option("segmentation: probability of a Gaussian blur of up to one pixel", minimum=0, below=1.001)
    ] = 0.0
    crop_scale: Annotated[
        tuple[float, ...], Option("share of the image that the crop covers", minimum=0.001, below=1.001)
    ] = (0.08, 1.0)
    crop_ratio: Annotated[tuple[float, ...], Option("width of the crop over its height", minimum=0.01, below=100)] = (
        3 / 4,
        4 / 3,
    )
    flip: Annotated[float, Option("probability of a horizontal flip", minimum=0, below=1.001)] = 0.5
    rotate: Annotated[float, Option("turn by up to so many degrees", minimum=0, below=180)] = 0.0
    zoom: Annotated[float, Option("scale by up to this share", minimum=0, below=1)] = 0.0
    shift: Annotated[float, Option("move by up to this share of a side", minimum=0, below=1)] = 0.0
    color_jitter: Annotated[
        float, Option("brightness, contrast and saturation change by up to this share", minimum=0, below=1)
    ] = 0.0
    rand_augment: Annotated[int, Option("operations of RandAugment per image; 0: none", minimum=0, below=15)] = 0
    rand_augment_magnitude: Annotated[int, Option("their strength, of 0 to 30", minimum=0, below=31)] = 9
    policy: Annotated[str, Option("or a policy of timm, such as rand-m9-mstd0.5-inc1; empty: none")] = ""
    erase: Annotated[float, Option("probability that a rectangle is erased", minimum=0, below=1.001)] = 0.0
    erase_scale: Annotated[tuple[float, ...], Option("share of the image that it covers", minimum=0.001, below=1)] = (
        0.02,
        0.33,
    )
    erase_ratio: Annotated[tuple[float, ...], Option("its height over its width", minimum=0.01, below=100)] = (0.3, 3.3)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("crop_scale", "crop_ratio", "erase_scale", "erase_ratio"):
            _check_range(f"augment.{name}", getattr(self, name))
        if self.short_side:
            _check_range("augment.short_side", self.short_side)
        if self.policy:
            _check_policy(self.policy)
        if self.policy and self.rand_augment:
            raise UsageError("augment.policy and augment.rand_augment exclude each other")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(Section):
    """Which images form a batch, and at which size."""

    size: Annotated[
        int, Option("side of training images, pixels; the base size where there are several", minimum=1)
    ] = 256
    sizes: Annotated[
        tuple[int, ...], Option("sides of multi-scale training, one drawn per batch; none: always size", minimum=1)
    ] = ()
    shrink: Annotated[
        bool, Option("batches above the base size hold fewer images, below it always more; off: never fewer")
    ] = True
    aug_repeats: Annotated[
        int,
        Option(
            "repeated augmentation: an epoch takes each of its images so many times; an epoch stays as long", minimum=1
        ),
    ] = 1
