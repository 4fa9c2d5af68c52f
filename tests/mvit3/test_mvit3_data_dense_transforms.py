"""Transforms of dense prediction: each against what the published pipelines made of the same pixels, then all."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mvit3.data.config import AugmentConfig, DataConfig
from mvit3.data.decode import DecodeError
from mvit3.data.dense import DetectionTraining, SegmentationEvaluation, SegmentationTraining, scaled_size
from mvit3.data.photometric import Distortion, PhotometricDistort, distort_v1, from_hsv, to_hsv
from mvit3.data.ssd_crop import ssd_crop
from mvit3.data.targets import Annotations
from mvit3.options import UsageError
from tests.golden import load

from .dense_data import V1, V2

IMAGE = np.random.default_rng(5).integers(0, 256, (24, 32, 3), np.uint8)
MASK = np.random.default_rng(6).integers(0, 21, (24, 32), np.uint8)
SQUARES = np.random.default_rng(8).integers(0, 256, (6, 8, 3), np.uint8).repeat(4, 0).repeat(4, 1)
CHANGES = {
    "none": Distortion(),
    "contrast1p3": Distortion(contrast=1.3),
    "brightness0p1": Distortion(brightness=0.1),
    "brightness_m0p2": Distortion(brightness=-0.2),
    "saturation1p4": Distortion(saturation=1.4),
    "saturation0p5": Distortion(saturation=0.5),
    "hue0p04": Distortion(hue=0.04),
    "hue_m0p04": Distortion(hue=-0.04),
    "contrast_late0p6": Distortion(late=0.6),
    "swap201": Distortion(channels=(1, 2, 0)),  # the recorded order is of BGR
}
PILLOW = {
    "brightness1p1": lambda x: F.adjust_brightness(x, 1.1),
    "contrast1p3": lambda x: F.adjust_contrast(x, 1.3),
    "saturation1p4": lambda x: F.adjust_saturation(x, 1.4),
    "hue0p04": lambda x: F.adjust_hue(x, 0.04),
    "hue_m0p04": lambda x: F.adjust_hue(x, -0.04),
    "contrast_late0p6": lambda x: F.adjust_contrast(x, 0.6),
}


def test_photometric_v1():
    golden = load("transforms_v1")
    assert {f"photo_S_{name}" for name in CHANGES} == {name for name in golden if name.startswith("photo_")}
    for name, change in CHANGES.items():
        found = distort_v1(SQUARES[..., ::-1], change)[..., ::-1]
        assert (found == golden[f"photo_S_{name}"]).all(), name


def test_hsv_there_and_back():
    """Every hue: pure colours come back, up to the steps of hue; a hue beyond the circle is one inside it."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    hsv = to_hsv(pixels)
    assert 0 <= hsv[..., 0].min() <= hsv[..., 0].max() < 180
    assert np.abs(from_hsv(hsv).astype(int) - pixels).max() <= 6
    turned = hsv + np.array([180, 0, 0])
    assert np.abs(from_hsv(turned).astype(int) - from_hsv(hsv)).max() <= 1


def test_photometric_v2():
    """torchvision's operations on Pillow's images are the recorded ones; the transform draws each half of the time."""
    golden = load("transforms_v2")
    for name, change in PILLOW.items():
        assert (np.array(change(Image.fromarray(SQUARES))) == golden[f"photo_S_{name}"]).all(), name
    torch.manual_seed(0)
    distort = PhotometricDistort("v2")
    same = np.mean([(distort(SQUARES) == SQUARES).all() for _ in range(300)])
    assert 0.005 < same < 0.09  # five changes, and one order of channels in six is the old one


@pytest.mark.parametrize("style", ["v1", "v2"])
def test_ssd_crop(style):
    golden = load(f"transforms_{style}")
    boxes, labels = golden["ssdcrop_in_boxes"].astype(np.float64), golden["ssdcrop_in_labels"]
    changed = 0
    for seed, height, width, start, count in golden["ssdcrop_seed_h_w_start_n"].tolist():
        (_, _, *size), found, kept = ssd_crop(boxes, 480, 640, random.Random(seed), style)
        assert (
            size == [height, width]
            and labels[kept].tolist() == golden["ssdcrop_labels"][start : start + count].tolist()
        )
        np.testing.assert_allclose(found, golden["ssdcrop_boxes"][start : start + count], atol=1e-4)
        changed += size != [480, 640]
    assert changed > 8
    assert ssd_crop(np.zeros((0, 4)), 48, 64, random.Random(0), style)[0] == (0, 0, 48, 64)
    for seed in range(9):  # an image of two pixels has no part
        assert ssd_crop(np.array([[0.0, 0, 2, 1]]), 1, 2, random.Random(seed), style)[0] == (0, 0, 1, 2)


@pytest.mark.parametrize(("style", "pixels", "levels"), [("v1", V1, 1), ("v2", V2, 0)])
def test_resizing(style, pixels, levels):
    golden = load(f"transforms_{style}")
    transform = SegmentationEvaluation(DataConfig(**pixels))
    image, mask = transform.masked(IMAGE, MASK)
    found = transform.resize(image, 20, 40).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - golden["resize_20x40_image"]).max() <= levels
    assert (transform.resize_mask(mask, 20, 40)[0].numpy() == golden["resize_20x40_mask"]).all()


def test_sizes():
    v1, v2 = load("transforms_v1"), load("transforms_v2")
    for *size, side, height, width in v1["random_resize_h_w_size_outh_outw"].tolist():
        assert scaled_size(*size, side, 0) == (height, width)
    for height, width, *want in v1["crop_resize_if_needed_h_w_outh_outw"].tolist():
        assert [*(scaled_size(height, width, 512, 0) if min(height, width) < 512 else (height, width))] == want
    for *size, side, height, width in v2["short_size_resize_h_w_side_outh_outw"].tolist():
        assert scaled_size(*size, side, 1024) == (height, width)
    assert all(min(scaled_size(h, 500, 512, 0)) == 512 for h in range(1, 1000) if h > 10)  # whatever is rounded
    assert scaled_size(2000, 1, 512, 1024) == (1024, 1)
    with pytest.raises(DecodeError, match="1x5000 pixels would become 512x2560000"):
        scaled_size(5000, 1, 512, 0)


def test_padding_rotation_blur():
    golden = load("transforms_v2")
    transform = SegmentationTraining(DataConfig(), AugmentConfig())
    image, mask = transform._scaled(*transform.masked(IMAGE, MASK), 40)
    assert (image.permute(1, 2, 0).numpy()[:, :36] == golden["pad_crop_40x36_image"]).all()
    assert (mask[0].numpy()[:, :36] == golden["pad_crop_40x36_mask"]).all()
    turned = F.rotate(Image.fromarray(IMAGE), 7.5, InterpolationMode.BILINEAR)
    assert (np.array(turned) == golden["rotate_7p5_image"]).all()
    turned = F.rotate(Image.fromarray(MASK), 7.5, InterpolationMode.NEAREST, fill=255)
    assert (np.array(turned) == golden["rotate_7p5_mask"]).all()
    blurred = Image.fromarray(IMAGE).filter(ImageFilter.GaussianBlur(0.4))
    assert (np.array(blurred) == golden["gaussian_blur_radius0p4_image"]).all()


def coordinates(height, width):
    """Pixels (H, W, 3) that tell where they are, and a mask that tells the same."""
    y, x = np.mgrid[:height, :width]
    return np.stack((x, y, 255 - x), -1).astype(np.uint8), (x // 32 + 8 * (y // 32)).astype(np.uint8)


def test_mask_follows_its_image():
    """Whatever is done to the image, a pixel's label is that of the place from which it came."""
    pixels, mask = coordinates(200, 250)
    augment = AugmentConfig(short_side=(150, 300), rotate=10, flip=0.5, color_jitter=0.0)
    transform = SegmentationTraining(DataConfig(), augment)
    flipped = set()
    for position in range(12):
        image, labels = transform(pixels, mask, 160, (0, 0, position))
        assert image.shape == (3, 160, 160) and labels.shape == (160, 160)
        x, y, other = (channel.long() for channel in image)
        known = (labels != 255) & (x + other > 250)  # but for edges that mix with the ground
        want = x // 32 + 8 * (y // 32)
        assert known.float().mean() > 0.5 and (labels == want)[known].float().mean() > 0.93
        flipped.add(bool(x[80, 40:120].diff().sum() < 0))
    assert flipped == {False, True}


@pytest.mark.parametrize("style", ["v1", "v2"])
def test_boxes_follow_their_image(style):
    """They are around the same pixels as before: each object has a channel of its own."""
    pixels, boxes = np.zeros((240, 300, 3), np.uint8), np.array([[30, 40, 130, 160], [180, 60, 270, 200]], np.float64)
    for channel, (left, top, right, bottom) in enumerate(boxes.astype(int)):
        pixels[top:bottom, left:right, channel] = 255
    truth = Annotations(boxes, np.array([1, 2]), np.zeros(2, bool), np.ones(2))
    transform = DetectionTraining(DataConfig(), AugmentConfig(style=style, flip=0.5))
    sizes = set()
    for position in range(16):
        image, found = transform(pixels, truth, 160, (0, 0, position))
        for box, label in zip(found.boxes * 160, found.labels.tolist(), strict=True):
            rows, columns = torch.where(image[label - 1] > 127)
            around = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (box - around).abs().max() <= 2, position
        sizes.add(tuple(found.boxes[0].tolist()))
    assert len(sizes) > 4


def test_crop_with_more_than_one_class():
    """A crop in which a class has too much is drawn anew; void counts as a class where it is one of the data set's."""
    mask = np.zeros((64, 256), np.uint8)
    mask[:, 240:] = 1
    pixels = np.zeros((64, 256, 3), np.uint8)

    def share(data, **augment):
        transform = SegmentationTraining(data, AugmentConfig(flip=0, **augment))
        return np.mean([bool((transform(pixels, mask, 64, (0, 0, i))[1] == 1).any()) for i in range(60)])

    assert share(DataConfig()) < 0.25 and share(DataConfig(), max_class_share=0.99) > 0.4
    mask[mask == 0] = 255
    assert share(DataConfig(source="ade20k"), max_class_share=0.99) > 0.4
    assert share(DataConfig(), max_class_share=0.99) < 0.25  # one class beside void has it all
    mask[:] = 255
    assert share(DataConfig(), max_class_share=0.99) == 0  # the last one is taken


def test_options_without_a_meaning():
    for changes in (dict(erase=0.25), dict(rand_augment=2), dict(policy="rand-m9"), dict(zoom=0.1)):
        with pytest.raises(UsageError, match=f"augment.{next(iter(changes))} is not made for segmentation"):
            SegmentationTraining(DataConfig(), AugmentConfig(**changes))
    with pytest.raises(UsageError, match=r"augment.rotate is not made for detection, got 10"):
        DetectionTraining(DataConfig(), AugmentConfig(rotate=10))
    with pytest.raises(UsageError, match=r"data.decoder nvjpeg is made for classification"):
        DetectionTraining(DataConfig(decoder="nvjpeg"), AugmentConfig())
    with pytest.raises(UsageError, match=r"data.keep_aspect needs data.eval_batch_size 1, got 100"):
        DataConfig(keep_aspect=True)
    with pytest.raises(
        UsageError, match=r"augment.short_side must be two numbers, the smaller one first, got \[9, 5\]"
    ):
        AugmentConfig(short_side=(9, 5))
