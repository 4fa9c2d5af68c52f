"""Images that are not 8-bit RGB: read as documented, the same by every decoder, said once; what cannot be read is
refused before it costs memory."""

import io
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from benchmarks.make_images import draw
from mvit3.config import RunConfig
from mvit3.data import AugmentConfig, DataConfig, DecodeError, EvaluationTransform, SamplerConfig, loaders
from mvit3.data import gpu as on_gpu
from mvit3.data.decode import MAX_PIXELS, Decoder
from mvit3.data.transforms import TrainTransform

DECODERS = ("pil", "simplejpeg", "cv2")
IMAGE = draw(1, 4, 61, 47, np.random.default_rng(0))
GREY = np.asarray(IMAGE.convert("L"))
SMALL = DataConfig(resize=32, crop=32)


@pytest.fixture(params=DECODERS)
def decoder(request):
    if request.param != "pil":
        pytest.importorskip(request.param)
    return Decoder(request.param)


def encode(image=IMAGE, kind="JPEG", **options):
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, pixels=b"", depth=8, color=0):
    """A PNG with this header, whatever its pixels are."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def remark(decoder):
    (only,) = decoder.take_remarks()
    assert decoder.take_remarks() == []
    return only


def same(found, grey):
    assert found.dtype == np.uint8 and found.shape == (*grey.shape, 3)
    return all(np.array_equal(found[..., channel], grey) for channel in range(3))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits(decoder, kind):
    """0 to 65535, in grey; the same picture as in eight bits, not white."""
    deep = (GREY.astype(np.uint16) << 8) | 128
    assert same(decoder.decode(encode(deep, kind)), GREY)
    assert remark(decoder) == "16-bit pixels are read as 0 to 65535"
    assert decoder.decode(encode(np.array([[0, 255, 300]], np.uint16), kind)).max() == 1  # a dark picture stays dark
    pixels = EvaluationTransform(SMALL).pixels(encode(deep, kind)).float()
    assert (pixels - EvaluationTransform(SMALL).pixels(encode(GREY, "PNG")).float()).abs().max() <= 1


def test_sixteen_bits_of_big_endian_tiff(decoder):
    deep = (GREY.astype(np.uint16) << 8).astype(">u2")
    height, width = deep.shape
    tags = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8 + 2 + 12 * 9 + 4),
        (277, 3, 1),
    ]
    tags += [(278, 4, height), (279, 4, deep.nbytes)]
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 1) + (struct.pack(">I", v) if kind == 4 else struct.pack(">HH", v, 0))
        for tag, kind, v in tags
    )
    data = b"MM\0*" + struct.pack(">IH", 8, len(tags)) + entries + struct.pack(">I", 0) + deep.tobytes()
    assert same(decoder.decode(data), GREY)


@pytest.mark.parametrize("top", [1, 255, 65535])
def test_floats(decoder, top):
    """The first of 0 to 1, 0 to 255, 0 to 65535 that holds them."""
    values = GREY.astype(np.float32) / 255 * top
    values.flat[0] = top
    expected = GREY.copy()
    expected.flat[0] = 255
    assert same(decoder.decode(encode(values, "TIFF")), expected)
    assert remark(decoder) == f"floating-point pixels are read as 0 to {top}"


def test_floats_of_any_range(decoder):
    """From the least to the greatest value; NaN is what 0 is; infinities do not fail."""
    values = np.linspace(-2, 6, 256, dtype=np.float32).reshape(16, 16)
    assert same(decoder.decode(encode(values, "TIFF")), np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert remark(decoder) == "floating-point pixels are read as their own range, here -2 to 6"
    assert decoder.decode(encode(np.array([[0, np.nan, 1]], np.float32), "TIFF"))[0, :, 0].tolist() == [0, 0, 255]
    decoder.decode(encode(np.array([[0, np.inf, -np.inf]], np.float32), "TIFF"))
    assert same(decoder.decode(encode(np.full((3, 3), 7e8, np.float32), "TIFF")), np.zeros((3, 3), np.uint8))


def test_integers(decoder):
    wide = (GREY.astype(np.int32)) * 257
    assert same(decoder.decode(encode(wide, "TIFF")), GREY) and "integer pixels are read as 0 to 65535" in remark(
        decoder
    )
    assert same(decoder.decode(encode(GREY.astype(np.int32), "TIFF")), GREY) and "0 to 255" in remark(decoder)
    decoder.decode(encode(np.array([[0, 1 << 20]], np.int32), "TIFF"))
    assert "their own range, here 0 to 1.04858e+06" in remark(decoder)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_other_modes(decoder, mode):
    """As PIL's convert("RGB"); nothing is remarked."""
    image = IMAGE.convert(mode)
    for kind in {"1": ("PNG", "TIFF"), "P": ("PNG", "GIF"), "CMYK": ("JPEG", "TIFF"), "YCbCr": ("JPEG", "TIFF")}.get(
        mode, ("PNG", "WEBP")
    ):
        data = encode(image, kind)
        assert np.array_equal(decoder.decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        assert decoder.take_remarks() == []


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency(decoder, mode, recwarn):
    """The colour that lies under it, and it is said; no warning of PIL."""
    if mode == "P":
        data = encode(IMAGE.convert("P"), "PNG", transparency=bytes(range(256)))
        expected = np.asarray(IMAGE.convert("P").convert("RGB"))
    else:
        image = IMAGE.convert(mode)
        image.putalpha(Image.fromarray(GREY))
        data, expected = encode(image, "PNG"), np.asarray(IMAGE.convert(mode[:-1]).convert("RGB"))
    assert np.array_equal(decoder.decode(data), expected)
    assert remark(decoder) == "the transparency of a PNG is left out, the colour under it is read"
    assert not recwarn.list


def test_several_frames(decoder):
    """The first one of a GIF, a TIFF, a WebP."""
    for kind, options in (("GIF", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        data = encode(
            Image.new("RGB", (8, 8), "red"),
            kind,
            save_all=True,
            append_images=[Image.new("RGB", (8, 8), "blue")],
            **options,
        )
        assert decoder.decode(data)[0, 0].tolist() == [255, 0, 0]
        assert remark(decoder) == f"of a {kind} with several frames the first one is read"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(decoder, orientation):
    """All eight, in JPEG, PNG, WebP and TIFF, whole and reduced: size and pixels as a viewer shows them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        data = encode(kind=kind, exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        assert np.array_equal(decoder.decode(data), expected) and decoder.size(data) == expected.shape[:2]
    data = encode(exif=exif)
    assert on_gpu.can_decode(data) == (orientation == 1) and on_gpu.can_decode(data, turn=False)
    plain = Decoder(decoder.name, turn=False)
    assert np.array_equal(plain.decode(data), decoder.decode(encode())) and plain.size(data) == (47, 61)
    assert decoder.decode(data, 2).shape[:2] == tuple(-(-side // 2) for side in decoder.size(data))


def test_orientation_reaches_the_network():
    """In training, in validation and for a PIL image; data.exif_orientation false leaves an image as it is stored."""
    exif = Image.Exif()
    exif[0x0112] = 8
    data, upright = encode(exif=exif), encode(ImageOps.exif_transpose(Image.open(io.BytesIO(encode(exif=exif)))), "PNG")
    still = AugmentConfig(flip=0.0)
    for turn, shown in ((True, upright), (False, encode(Image.open(io.BytesIO(data)), "PNG"))):
        config = DataConfig(resize=32, crop=32, exif_orientation=turn)
        evaluate, train = EvaluationTransform(config), TrainTransform(config, still)
        assert torch.equal(evaluate.pixels(data), evaluate.pixels(shown))
        assert torch.equal(train(data, 32, (0,)), train(shown, 32, (0,)))
        assert torch.equal(evaluate(Image.open(io.BytesIO(data))), evaluate(shown))


def test_damaged_tags_do_not_make_an_image_unreadable(decoder):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(exif=exif)
    place = data.index(b"Exif")
    for length in (6, 10, 20):
        assert decoder.decode(data[: place + length] + b"\xff" * 12 + data[place + length + 12 :]).shape in (
            (47, 61, 3),
            (61, 47, 3),
        )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(0, 5), "identify|no pixels"),
        (b"P6\n0 5\n255\n", "identify|no pixels"),
        (png(20000, 20000), "exceed"),
        (
            b"\xff\xd8\xff\xc0\0\x11\x08"
            + struct.pack(">HH", 65500, 65500)
            + b"\3\1\x22\0\2\x11\1\3\x11\1"
            + bytes(99),
            "exceed",
        ),
        (
            b"\xff\xd8\xff\xc0\0\x11\x08" + struct.pack(">HH", 0, 65500) + b"\3\1\x22\0\2\x11\1\3\x11\1" + bytes(99),
            "no pixels",
        ),
        (png(64, 64, bytes(100)), "truncated|broken|not enough"),
        (encode(kind="GIF")[:1500], "truncated"),
        (encode(kind="TIFF")[:300], "."),
        (encode(kind="WEBP")[:300], "."),
        (encode(kind="BMP")[:300], "truncated"),
        (b"GIF89a" + bytes(3), "."),
    ],
    ids=[
        "zero PNG",
        "zero PPM",
        "huge PNG",
        "huge JPEG",
        "zero JPEG",
        "short PNG",
        "GIF",
        "TIFF",
        "WebP",
        "BMP",
        "header",
    ],
)
def test_refused(decoder, data, message):
    """Without pixels, with too many, cut off: DecodeError, and nothing else."""
    with pytest.raises(DecodeError, match=message):
        decoder.decode(data)
    assert not on_gpu.can_decode(data)


def test_random_damage_is_decoded_or_refused(decoder):
    """Whatever a file holds, no other error comes out, and what comes out is pixels."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        encode(kind="JPEG", exif=exif),
        encode(kind="PNG"),
        encode(IMAGE.convert("P"), "GIF"),
        encode(kind="TIFF"),
        encode(kind="WEBP"),
    ]
    kinds += [encode(kind="BMP"), encode(kind="PPM"), encode(GREY.astype(np.float32), "TIFF")]
    decoded = 0
    for data in kinds:
        for _ in range(25):
            broken = bytearray(data)
            for place in rng.integers(0, min(len(data), rng.choice([40, 400, len(data)])), 3):
                broken[place] = rng.integers(0, 256)
            try:
                decoder.size(bytes(broken))
                pixels = decoder.decode(bytes(broken))
            except DecodeError:
                continue
            decoded += 1
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert decoded > 50


def test_a_line_of_pixels_is_cut_before_it_is_resized():
    """In a process that may take 1 GB more: a 65000x1 PNG of 142 bytes would want 16."""
    images = [png(w, h, bytes((w + 1) * h)) for w, h in ((65000, 1), (1, 65000), (100000, 3), (1, 1))]
    assert all(len(data) < 1000 for data in images)
    code = f"""
import resource, torch
torch.set_num_threads(1)
from mvit3.data import AugmentConfig, DataConfig, EvaluationTransform
from mvit3.data.transforms import TrainTransform
config = DataConfig()
transforms = [TrainTransform(config, AugmentConfig(crop=crop)) for crop in (True, False)]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 10**9, used + 10**9))
for data in {images!r}:
    assert EvaluationTransform(config).pixels(data).shape == (3, 256, 256)
    for transform in transforms:
        assert transform(data, 256, (0,)).shape == (3, 256, 256)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_cut_leaves_the_centre():
    """Eight times as wide as high is resized as a whole; what is wider has the same centre."""
    wide = np.tile(np.asarray(IMAGE), (1, 9, 1))[:, : 47 * 8]
    wider = np.pad(wide, ((0, 0), (40, 40), (0, 0)))
    evaluate = EvaluationTransform(SMALL)
    assert torch.equal(evaluate.pixels(wider), evaluate.pixels(wide))


def test_pixels_of_another_kind_are_refused():
    for image in (
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match="image must be pixels \\(H, W, 3\\) of dtype uint8, got"):
            EvaluationTransform(SMALL)(image)
    deep = Image.fromarray((GREY.astype(np.uint16) << 8) | 128)
    assert torch.equal(EvaluationTransform(SMALL)(deep), EvaluationTransform(SMALL)(encode(GREY, "PNG")))


@pytest.mark.parametrize("workers", [0, 1])
def test_remarks_are_said_once(tmp_path, workers):
    """Of 12 images, from a loading process too; the batches are those of eight-bit images."""
    deep = (GREY.astype(np.uint16) << 8) | 7
    for folder, image in (("deep", deep), ("plain", GREY)):
        for part in ("train", "val"):
            for label in ("a", "b"):
                (tmp_path / folder / part / label).mkdir(parents=True)
                for i in range(6):
                    (tmp_path / folder / part / label / f"{i}.png").write_bytes(encode(image, "PNG"))

    def run(folder):
        settings = SimpleNamespace(
            data=DataConfig(root=str(tmp_path / folder), batch_size=4, resize=32, crop=32, workers=workers),
            augment=AugmentConfig(),
            sampler=SamplerConfig(size=32),
        )
        found, said = loaders(settings), []
        for loader in (found.train, found.val):
            loader.say = said.append
        return [x for epoch in (0, 1) for x, _ in found.train.epoch(epoch)] + [x for x, _ in found.val], said

    (batches, said), (expected, nothing) = run("deep"), run("plain")
    assert all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True)) and nothing == []
    assert [text.partition(": ")[2] for text in said] == ["16-bit pixels are read as 0 to 65535; this is said once"] * 2
    assert f"{tmp_path}/deep/train/" in said[0] and f"{tmp_path}/deep/val/a/0.png" in said[1]


def test_limit_is_that_of_pil():
    assert 2 * Image.MAX_IMAGE_PIXELS <= MAX_PIXELS <= 2 * Image.MAX_IMAGE_PIXELS + 1


def test_predict_says_what_it_reads_by_choice(tmp_path):
    """Once for each kind; folders hold the images that training would see."""
    from mvit3.prediction import find_images, predict

    (tmp_path / "__MACOSX").mkdir()
    for name, data in (
        ("a.png", encode(GREY.astype(np.uint16) << 8, "PNG")),
        ("b.gif", encode(kind="GIF")),
        ("._c.png", b""),
        ("d.txt", b""),
    ):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "e.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "up").symlink_to(tmp_path)
    said = []
    images = find_images([tmp_path], said.append)
    assert [image.path.name for image in images] == ["a.png", "b.gif", "e.png"]
    assert sorted(text.removeprefix(f"{tmp_path}: ").partition(" are left")[0] for text in said) == [
        "files of other kinds", "hidden names", "links to folders that are already taken"
    ]  # fmt: skip
    said.clear()
    network = SimpleNamespace(
        model=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2)),
        config=SimpleNamespace(data=SMALL, run=RunConfig()),
        num_classes=2,
        class_names=("cat", "dog"),
    )
    rows = list(predict(network, images, 1, said.append))
    assert len(rows) == 3 and all("classes" in row for row in rows)
    assert said == [f"{tmp_path}/a.png: 16-bit pixels are read as 0 to 65535; this is said once"]
