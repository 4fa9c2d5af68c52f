"""Decoders give the same pixels and refuse the same files; scaled decoding stays near; the GPU's way does the same to
an image."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.make_images import draw
from mvit3.data import AugmentConfig, DataConfig, DecodeError
from mvit3.data import gpu as on_gpu
from mvit3.data.decode import Decoder, reduction
from mvit3.data.transforms import EvaluationTransform, TrainTransform
from mvit3.options import UsageError

FAST = ("simplejpeg", "cv2")
IMAGE = draw(1, 4, 251, 187, np.random.default_rng(0))


def encode(image=IMAGE, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


JPEG = encode(quality=90)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("reduce", [1, 2, 4, 8])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 20}], ids=str)
def test_same_pixels(name, reduce, options):
    pytest.importorskip(name)
    data = encode(**options)
    found, expected = (Decoder(decoder).decode(data, reduce) for decoder in (name, "pil"))
    assert expected.shape == (-(-187 // reduce), -(-251 // reduce), 3)
    assert np.array_equal(found, expected)
    assert Decoder(name).size(data) == (187, 251)
    if reduce == 1:
        assert np.array_equal(expected, np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("name", ("pil", *FAST))
def test_other_images(name):
    """Grey, CMYK and turned JPEGs, and other formats, come out as PIL reads them; where images are not to be turned, as
    they are stored."""
    if name != "pil":
        pytest.importorskip(name)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    decoder = Decoder(name, turn=False)
    for data in (
        encode(IMAGE.convert("L")),
        encode(IMAGE.convert("CMYK")),
        encode(exif=exif),
        encode(kind="PNG"),
        encode(IMAGE.convert("P"), "GIF"),
        encode(kind="WEBP"),
    ):
        assert np.array_equal(decoder.decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        assert decoder.size(data) == (187, 251)


@pytest.mark.parametrize("name", ("pil", *FAST))
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"no image" * 100, "cannot identify image file"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:-40], "truncated"),
        (JPEG[:20], "cannot identify image file"),
        (encode(kind="PNG")[:2000], "truncated"),
    ],
    ids=["empty", "text", "half", "nearly whole", "header", "half PNG"],
)
def test_same_refusals(name, data, message):
    if name != "pil":
        pytest.importorskip(name)
    with pytest.raises(DecodeError, match=message):
        Decoder(name).decode(data)


def test_a_decoder_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert Decoder("auto").name == "pil"
    with pytest.raises(
        UsageError,
        match=r"data.decoder simplejpeg: the package simplejpeg is not installed; mvit3_kernels\[fast\] brings it",
    ):
        Decoder("simplejpeg")


def test_reduction():
    """Never below the size that the crop will have."""
    assert [
        reduction((h, w), (100, 100))
        for h, w in ((99, 99), (199, 900), (200, 200), (401, 799), (800, 800), (9000, 100))
    ] == [
        1,
        1,
        2,
        4,
        8,
        1,
    ]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_scaled_decoding_stays_near(interpolation):
    """The documented bound: on average 2 levels of 255, from images with fine noise of 6 levels."""
    large = encode(draw(2, 4, 1200, 900, np.random.default_rng(1)), quality=90)
    exact, scaled = (
        DataConfig(resize=144, crop=128, interpolation=interpolation, scaled_decoding=on) for on in (False, True)
    )
    pixels = [EvaluationTransform(config).pixels(large).int() for config in (exact, scaled)]
    difference = (pixels[0] - pixels[1]).abs().float()
    assert 0 < difference.mean() < 2
    augment = AugmentConfig(crop_scale=(0.5, 1))
    for i in range(5):
        pixels = [TrainTransform(config, augment)(large, 128, (i,)).int() for config in (exact, scaled)]
        # the crop moves by up to half a pixel of the result
        assert 0 < (pixels[0] - pixels[1]).abs().float().mean() < 6


def test_what_goes_to_the_gpu():
    assert on_gpu.can_decode(JPEG) and on_gpu.can_decode(encode(IMAGE.convert("L")))
    others = (
        encode(progressive=True),
        encode(IMAGE.convert("CMYK")),
        JPEG[:-2],
        JPEG[:10],
        b"",
        encode(kind="PNG"),
        np.zeros((4, 4, 3), np.uint8),
    )
    assert not any(on_gpu.can_decode(data) for data in others)


def test_the_gpus_way_does_the_same():
    """The same steps on the CPU: crop, flip and everything after it depend on the key alone."""
    data = DataConfig(resize=72, crop=64, colors="bgr", interpolation="bicubic")
    transform = TrainTransform(data, AugmentConfig(color_jitter=0.4, erase=0.5))
    keys = [(3, 0, i) for i in range(8)]
    plans = [on_gpu.Plan(JPEG, *transform.geometry(187, 251, key), 64, key, ()) for key in keys]
    for pixels, key in zip(on_gpu.pixels(plans, transform, torch.device("cpu")), keys, strict=True):
        assert torch.equal(pixels, transform(JPEG, 64, key))
    broken = on_gpu.Plan(JPEG[:500], None, False, 64, (0,), ())
    found = on_gpu.pixels([plans[0], broken], transform, torch.device("cpu"))
    assert torch.equal(found[0], transform(JPEG, 64, keys[0])) and found[1] is None


def test_gpu_decoding_is_refused_without_a_gpu():
    with pytest.raises(
        UsageError,
        match=r"data.decoder nvjpeg needs a CUDA device, this run is on cpu; data.decoder auto decodes on the CPU",
    ):
        on_gpu.check(torch.device("cpu"), AugmentConfig())
    with pytest.raises(UsageError, match=r"augment.policy works on the CPU only"):
        on_gpu.check(torch.device("cuda"), AugmentConfig(policy="rand-m9"))
