"""Augmentation, evaluation and batches against what was published, worked out here: distributions, ranges, other
libraries' pixels."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from benchmarks.make_images import draw
from mvit3.data import AugmentConfig, DataConfig, SamplerConfig, evaluation_transform
from mvit3.data.sampler import BatchSampler, batch_sizes
from mvit3.data.transforms import TrainTransform, normalise, seeded
from mvit3.options import UsageError

IMAGE = np.array(draw(1, 4, 160, 120, np.random.default_rng(0)))
NOTHING = dict(crop=False, flip=0.0)
SMALL = DataConfig(resize=64, crop=64)


def distance_from_uniform(values, low, high):
    """Kolmogorov and Smirnov's: the largest distance between the two distribution functions."""
    shares = (np.sort(values) - low) / (high - low)
    steps = np.arange(len(shares) + 1) / len(shares)
    return max(np.abs(shares - steps[:-1]).max(), np.abs(shares - steps[1:]).max())


def test_random_crops():
    """Area uniform, logarithm of the ratio uniform, place uniform (Szegedy et al. 2015), flipped half of the time."""
    count, limit = 1000, 1.63 / math.sqrt(1000)  # what one in a hundred passes
    transform = TrainTransform(SMALL, AugmentConfig(crop_scale=(0.08, 0.5), crop_ratio=(3 / 4, 4 / 3)))
    # a square holds every such crop: none is drawn again
    drawn = [transform.geometry(1000, 1000, (0, 0, i)) for i in range(count)]
    top, left, height, width = np.array([box for box, _ in drawn]).T
    assert distance_from_uniform(height * width / 1e6, 0.08, 0.5) < limit
    assert distance_from_uniform(np.log(width / height), math.log(3 / 4), math.log(4 / 3)) < limit
    for place, side in ((top, height), (left, width)):
        assert distance_from_uniform(place / (1000 - side), 0, 1) < limit
    assert abs(np.mean([flip for _, flip in drawn]) - 0.5) < 0.05
    # A long image holds no such crop: the largest one of a valid ratio, in the middle.
    wide = TrainTransform(SMALL, AugmentConfig(crop_scale=(0.9, 1)))
    assert wide.geometry(100, 1000, (0,))[0] == (0, 433, 100, 133)


def test_rand_augment(monkeypatch):
    """Two of fourteen operations, each as likely, at strength 9 of 0 to 30 (Cubuk et al. 2019 on the ranges of
    AutoAugment)."""
    drawn = []
    monkeypatch.setattr(
        v2.RandAugment,
        "_apply_image_or_video_transform",
        lambda self, image, name, value, **rest: drawn.append((name, value)) or image,
    )
    transform = TrainTransform(SMALL, AugmentConfig(**NOTHING, rand_augment=2, rand_augment_magnitude=9))
    for i in range(700):
        transform(IMAGE, 64, (0, 0, i))
    strength = 9 / 30
    ranges = {
        "Identity": 0, "ShearX": 0.3, "ShearY": 0.3, "TranslateX": 150 / 331 * 64, "TranslateY": 150 / 331 * 64,
        "Rotate": 30,
        "Brightness": 0.9, "Color": 0.9, "Contrast": 0.9, "Sharpness": 0.9, "AutoContrast": 0, "Equalize": 0,
    }  # fmt: skip
    expected = {name: {strength * high, -strength * high} for name, high in ranges.items()}
    expected |= {
        "Posterize": {8 - round(strength * 4)},
        "Solarize": {1 - strength},
    }  # bits that stay; share of the range from which on it inverts
    for name, values in expected.items():
        assert sorted({round(value, 4) for found, value in drawn if found == name}) == sorted(
            {round(value, 4) for value in values}
        )
    counts = Counter(name for name, _ in drawn)
    assert sum(counts.values()) == 1400 and len(counts) == 14
    assert all(abs(count - 100) < 4 * math.sqrt(1400 / 14 * 13 / 14) for count in counts.values())


def test_rand_augment_changes_pixels_as_pil_does():
    """One operation each, on the image itself: the strongest rotation turns it, the strongest solarising inverts it."""
    transform = TrainTransform(SMALL, AugmentConfig(**NOTHING, rand_augment=1, rand_augment_magnitude=30))
    plain = TrainTransform(SMALL, AugmentConfig(**NOTHING))(IMAGE, 64, (0,)).permute(1, 2, 0).contiguous().numpy()
    found = {transform(IMAGE, 64, (0, 0, i)).permute(1, 2, 0).numpy().tobytes() for i in range(150)}
    image = Image.fromarray(plain)
    for expected in (
        image,
        image.rotate(30, Image.Resampling.BILINEAR),
        image.rotate(-30, Image.Resampling.BILINEAR),
        255 - plain,
    ):
        assert np.asarray(expected).tobytes() in found


def test_erasing():
    """A quarter of the images lose a rectangle of 2 to 33 % and a ratio of 0.3 to 3.3 (Zhong et al. 2017, torchvision's
    ranges)."""
    white = np.full((64, 64, 3), 255, np.uint8)
    transform = TrainTransform(SMALL, AugmentConfig(**NOTHING, erase=0.25))
    areas, ratios = [], []
    for i in range(800):
        gone = transform(white, 64, (0, 0, i))[0] == 0
        if gone.any():
            rows, columns = gone.any(1).sum().item(), gone.any(0).sum().item()
            assert gone.sum() == rows * columns
            areas.append(rows * columns / 64**2)
            ratios.append(rows / columns)
    assert abs(len(areas) - 200) < 4 * math.sqrt(800 * 0.25 * 0.75)
    assert (
        0.015 < min(areas) < 0.05 and 0.28 < max(areas) < 0.34 and 0.25 < min(ratios) < 0.4 and 2.6 < max(ratios) < 3.7
    )


@pytest.mark.parametrize("colors", ["rgb", "bgr"])
def test_what_is_erased_is_zero_for_the_network(colors):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    data = DataConfig(resize=64, crop=64, mean=mean, std=std, colors=colors)
    pixels = TrainTransform(data, AugmentConfig(**NOTHING, erase=1))(np.full((64, 64, 3), 255, np.uint8), 64, (1,))
    gone = pixels[0] < 255
    found = normalise(pixels[None], data)[0][:, gone]
    assert gone.any() and found.abs().max() < 0.5 / 255 / min(std) + 1e-6
    white = normalise(pixels[None], data)[0][:, ~gone][:, 0]
    torch.testing.assert_close(white, torch.tensor([(1 - m) / s for m, s in zip(mean, std, strict=True)]))


def test_color_jitter():
    """Brightness of a grey image, which contrast and saturation leave alone, is uniform on 0.6 to 1.4."""
    grey = np.full((64, 64, 3), 150, np.uint8)
    transform = TrainTransform(SMALL, AugmentConfig(**NOTHING, color_jitter=0.4))
    factors = np.array([transform(grey, 64, (i,)).float().mean().item() / 150 for i in range(300)])
    assert distance_from_uniform(factors, 0.6, 1.4) < 1.63 / math.sqrt(300) + 1 / 150


def test_turning_scaling_and_shifting():
    """Up to 12 degrees, 15 % and 10 % of a side; seen on a square of side 20 in the middle."""
    square = np.zeros((64, 64, 3), np.uint8)
    square[22:42, 22:42] = 255
    y, x = np.mgrid[:64, :64] - 31.5
    transform = TrainTransform(SMALL, AugmentConfig(**NOTHING, rotate=12, zoom=0.15, shift=0.1))
    moves, sizes = [], []
    for i in range(300):
        weight = transform(square, 64, (i,))[0].double().numpy() / 255
        sizes.append(math.sqrt(weight.sum()) / 20)
        moves += [(weight * axis).sum() / weight.sum() for axis in (x, y)]
    assert -6.6 < min(moves) < -5 and 5 < max(moves) < 6.6  # 6 whole pixels, and what resampling adds
    assert 0.84 < min(sizes) < 0.9 and 1.1 < max(sizes) < 1.16


@pytest.mark.parametrize("height", [96, 121, 250])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_as_pil_does(height, interpolation):
    """v2-style: the shorter side becomes 72, the longer one is rounded down, the centre of 64 is cut out; within one
    level."""
    image = Image.fromarray(IMAGE).resize((150, height))
    data = DataConfig(resize=72, crop=64, interpolation=interpolation)
    width, tall = (72 * 150 // height, 72) if height <= 150 else (72, 72 * height // 150)
    small = image.resize((width, tall), Image.Resampling[interpolation.upper()])
    left, top = (width - 64) // 2, (tall - 64) // 2
    expected = np.asarray(small.crop((left, top, left + 64, top + 64)), np.float32).transpose(2, 0, 1) / 255
    found = evaluation_transform(type("Config", (), {"data": data}))(image)
    assert found.shape == (3, 64, 64) and found.dtype == torch.float32
    assert np.abs(found.numpy() - expected).max() <= 1.01 / 255


def test_evaluation_as_opencv_does(tmp_path):
    """v1-style: BGR, linear interpolation without a filter; within one level of cv2.resize."""
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "image.png"
    Image.fromarray(IMAGE).save(path)
    small = cv2.resize(cv2.imread(str(path)), (96, 72), interpolation=cv2.INTER_LINEAR)
    expected = small[4:68, 16:80].astype(np.float32).transpose(2, 0, 1) / 255
    data = DataConfig(resize=72, crop=64, antialias=False, colors="bgr")
    transform = evaluation_transform(type("Config", (), {"data": data}))
    for image in (path, str(path), path.read_bytes(), Image.open(path), IMAGE):
        assert np.abs(transform(image).numpy() - expected).max() <= 1.01 / 255


def test_policy_of_timm():
    transform = TrainTransform(SMALL, AugmentConfig(**NOTHING, policy="rand-m9-mstd0.5-inc1"))
    images = [transform(IMAGE, 64, (i,)) for i in (0, 1, 0)]
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])
    with pytest.raises(
        UsageError, match=r"augment.policy must be one of timm's, .*got 'rnd-m9', the nearest beginning is 'rand'"
    ):
        TrainTransform(SMALL, AugmentConfig(policy="rnd-m9"))


def test_generators_are_put_back():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    with seeded((1, 2), legacy=True):
        first = random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002
    with seeded((1, 2), legacy=True):
        assert first == (random.random(), np.random.rand(), torch.rand(()).item())  # noqa: NPY002
    with seeded((2, 1), legacy=True):
        assert first != (random.random(), np.random.rand(), torch.rand(()).item())  # noqa: NPY002
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[2])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


MULTI = dict(size=256, sizes=(160, 192, 256, 288, 320))


def test_batch_sizes():
    """b_t = H W b / (H_t W_t) (MobileViT, section 3.2), rounded down to a multiple of 8; the release's are never fewer
    than at 256."""
    exact = {size: 1024 * 256**2 / size**2 for size in MULTI["sizes"]}
    assert batch_sizes(SamplerConfig(**MULTI), 1024, 1) == {size: int(count // 8) * 8 for size, count in exact.items()}
    for processes in (2, 4, 8):
        assert batch_sizes(SamplerConfig(**MULTI), 1024 // processes, processes) == batch_sizes(
            SamplerConfig(**MULTI), 1024, 1
        )
    released = batch_sizes(SamplerConfig(**MULTI, shrink=False), 32, 1)
    assert released == {160: 80, 192: 56, 256: 32, 288: 32, 320: 32}  # 81.9 and 56.9
    assert batch_sizes(SamplerConfig(size=256), 30, 3) == {256: 90}
    assert batch_sizes(SamplerConfig(**MULTI), 5, 3) == {
        size: max(int(15 * 256**2 / size**2) // 3 * 3, 3) for size in MULTI["sizes"]
    }
    assert batch_sizes(SamplerConfig(**MULTI), 1, 1)[320] == 1


def batches_of(world_size, batch_size, seed=0, epoch=0, start=0, count=9000, **options):
    """Whole batches, put together from those of the processes."""
    samplers = [
        BatchSampler(SamplerConfig(**options), batch_size, count, seed, rank, world_size) for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.epoch, sampler.start = epoch, start
    return [[sample for part in parts for sample in part] for parts in zip(*samplers, strict=True)], samplers[0]


def test_schedule():
    """An epoch visits an image at most once, leaves out less than a batch, draws each size as often, and is another one
    next time."""
    batches, sampler = batches_of(1, 32, **MULTI, shrink=True)
    sizes = batch_sizes(SamplerConfig(**MULTI), 32, 1)
    assert len(batches) == len(sampler) and sum(map(len, batches)) == sampler.images > 9000 - max(sizes.values())
    assert all(len({size for _, size, _, _ in batch}) == 1 and len(batch) == sizes[batch[0][1]] for batch in batches)
    assert len({index for batch in batches for index, *_ in batch}) == sampler.images
    assert [position for batch in batches for *_, position in batch] == list(range(sampler.images))
    counts = Counter(batch[0][1] for batch in batches)
    assert (
        all(abs(count - len(batches) / 5) < 4 * math.sqrt(len(batches) * 0.16) for count in counts.values())
        and len(counts) == 5
    )
    other, _ = batches_of(1, 32, epoch=1, **MULTI)
    assert [batch[0][1] for batch in other] != [batch[0][1] for batch in batches]
    assert [index for index, *_ in other[0]] != [index for index, *_ in batches[0]][: len(other[0])]


@pytest.mark.parametrize("options", [MULTI, dict(MULTI, shrink=False), dict(size=64)], ids=str)
def test_schedule_does_not_depend_on_processes(options):
    whole, _ = batches_of(1, 32, seed=5, epoch=3, **options)
    for processes in (2, 4):
        assert batches_of(processes, 32 // processes, seed=5, epoch=3, **options)[0] == whole
    assert batches_of(2, 16, seed=5, epoch=3, start=7, **options)[0] == whole[7:]
    assert batches_of(1, 32, seed=6, epoch=3, **options)[0][0] != whole[0]


def test_too_few_images_for_a_batch():
    with pytest.raises(
        UsageError,
        match=r"data.batch_size must be at most the number of training images, 30, got 16 on each of 2 processes",
    ):
        BatchSampler(SamplerConfig(), 16, 30, 0, 0, 2)
