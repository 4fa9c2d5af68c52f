"""Batches brought to the GPU are those of the CPU; decoded there, nearly so."""

import pytest
import torch

from benchmarks import make_images
from mvit3.config import TrainConfig
from mvit3.data import AugmentConfig, DataConfig, SamplerConfig, loaders


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    make_images.make(root, 100, 5, 250, 180)
    return root


def batches(root, device, decoder="auto", **augment):
    config = TrainConfig(
        data=DataConfig(root=str(root), batch_size=16, resize=72, crop=64, workers=2, decoder=decoder, colors="bgr"),
        augment=AugmentConfig(**augment),
        sampler=SamplerConfig(size=64, sizes=(48, 64)),
    )
    found = loaders(config, seed=1, device=device)
    return [*found.train.epoch(0), *found.val]


def test_same_batches_on_the_gpu(images):
    """Brought ahead on a stream of their own, while the present batch is in use."""
    found, expected = (batches(images, device, rand_augment=2, erase=0.25) for device in ("cuda", "cpu"))
    assert len(found) == len(expected)
    for (pixels, labels), (true_pixels, true_labels) in zip(found, expected, strict=True):
        assert pixels.is_cuda and pixels.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(pixels.cpu(), true_pixels, rtol=0, atol=1e-6)
        assert torch.equal(labels.cpu(), true_labels)


def test_decoding_on_the_gpu(images):
    """nvJPEG's inverse transform and upsampling round differently: 2 of 255 levels on average; labels, crops and flips
    are the same."""
    found, expected = (batches(images, "cuda", decoder) for decoder in ("nvjpeg", "auto"))
    for (pixels, labels), (true_pixels, true_labels) in zip(found, expected, strict=True):
        assert (pixels - true_pixels).abs().mean() < 2 / 255
        assert torch.equal(labels, true_labels)


def test_augmenting_on_the_gpu(images):
    for pixels, _ in batches(images, "cuda", "nvjpeg", rand_augment=2, color_jitter=0.4, erase=0.5, rotate=10):
        assert pixels.is_cuda and pixels.min() >= 0 and pixels.max() <= 1
