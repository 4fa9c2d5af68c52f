"""Overlays: which pixel has which colour, and what is written where."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mvit3 import overlay
from mvit3.overlay import OPACITY, colors, detection_overlay, label_image, palette, segmentation_overlay

NAMES = ["background", "cat", "dog", "a\nb"]


@pytest.fixture
def texts(monkeypatch):
    """What is written into pictures, with where its left edge and its middle are."""
    written, draw = {}, ImageDraw.ImageDraw.text

    def text(self, xy, text, *more, **options):
        written[text] = xy
        return draw(self, xy, text, *more, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return written


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_colours_differ():
    """Those of 21 classes by five times what can just be told apart, which is 0.02 in OKLab."""
    assert len(set(colors())) == 255
    lab = overlay._oklab(np.array(colors()[:21]))
    assert np.allclose(overlay._oklab(np.array([[255, 255, 255], [0, 0, 0]])), [[1, 0, 0], [0, 0, 0]], atol=1e-3)
    assert min(np.linalg.norm(a - b) for i, a in enumerate(lab) for b in lab[:i]) > 0.1
    assert palette(True)[:2] == [(0, 0, 0), colors()[0]] and palette(False)[:1] == [colors()[0]]
    assert len(palette(True)) == len(palette(False)) == 256


def test_masks_and_legend(texts):
    """A mask is a blend, what is background or has no label stays, and the legend has the classes that are present."""
    pixels, labels = noise(30, 500), np.zeros((30, 500), np.uint8)
    labels[:, 100:300], labels[:5, 300:400], labels[10:, 400:] = 2, 3, 255
    picture = segmentation_overlay(pixels, labels, NAMES)
    assert picture.width == 500 and picture.height > 50
    shown = np.asarray(picture)[:30].astype(int)
    for label in (2, 3):
        inside = labels == label
        expected = (1 - OPACITY) * pixels[inside] + OPACITY * np.array(palette(True)[label])
        assert np.abs(shown[inside] - expected).max() <= 1
    kept = np.isin(labels, (0, 255))
    assert np.array_equal(shown[kept], pixels[kept])
    assert list(texts) == ["background 43.3%", "dog 40.0%", "a\\nb 3.3%"]
    legend = {color for _, color in picture.crop((0, 30, *picture.size)).getcolors(1 << 16)}
    assert {palette(True)[2], palette(True)[3]} < legend and palette(True)[1] not in legend
    few = np.zeros((50, 50), np.uint8)
    few[0, :2] = 2
    segmentation_overlay(noise(50, 50), few, NAMES)
    assert "dog <0.1%" in texts and "background 99.9%" in texts
    everything = segmentation_overlay(pixels, np.zeros_like(labels), ["wall", "cat"])
    assert np.abs(np.asarray(everything)[:30] - (1 - OPACITY) * pixels - OPACITY * np.array(colors()[0])).max() <= 1


def test_legend_breaks_its_lines(texts):
    """Nothing is cut off, however narrow the image and however long a name."""
    labels = np.arange(12, dtype=np.uint8).repeat(50)[None]
    names = [f"class number {i}" for i in range(11)] + ["x" * 120]
    picture = segmentation_overlay(np.zeros((1, 600, 3), np.uint8), labels, names)
    font = overlay._font(13)
    assert len(texts) == 12 and len({y for _, y in texts.values()}) > 3
    assert all(x + font.getlength(text) < picture.width and y < picture.height for text, (x, y) in texts.items())


def test_label_image_has_the_labels(tmp_path):
    labels = np.array([[0, 1, 2], [3, 255, 0]], np.uint8)
    label_image(labels, NAMES).save(tmp_path / "x.png")
    read = Image.open(tmp_path / "x.png")
    assert read.mode == "P" and np.array_equal(np.asarray(read), labels)
    rgb = np.asarray(read.convert("RGB"))
    assert tuple(rgb[0, 0]) == (0, 0, 0) and tuple(rgb[1, 1]) == (255, 255, 255) and tuple(rgb[0, 2]) == colors()[1]


@pytest.mark.parametrize("level", [0, 127, 255])
def test_boxes_can_be_read_on_any_ground(texts, level):
    """The line has the class's colour between black edges, the caption a ground in it; the inside stays."""
    pixels = np.full((500, 700, 3), level, np.uint8)
    boxes = [[100, 200, 400, 450], [650, 2, 700, 60], [0, 0, 700, 500]]
    picture = detection_overlay(pixels, boxes, [2, 1, 3], [0.9, 0.806, 0.3], ["cat", "dog", "cow"])
    shown = np.asarray(picture)
    assert picture.size == (700, 500)
    for x, y in ((100, 300), (399, 300), (250, 449), (250, 200)):
        assert tuple(shown[y, x]) == colors()[1], (x, y)
    row = [tuple(p) for p in shown[300, 90:112].tolist()]
    line = [i for i, p in enumerate(row) if p == colors()[1]]
    assert len(line) == 3 and row[line[0] - 1] == row[line[-1] + 1] == (0, 0, 0)
    assert (shown[260:440, 110:390] == level).all()
    assert set(texts) == {"dog 90%", "cat 81%", "cow 30%"}
    font = overlay._font(overlay._text_size(picture))
    for text, (x, y) in texts.items():  # none is cut off
        assert x >= 0 and x + font.getlength(text) <= 700 and font.size / 2 <= y <= 500 - font.size / 2, text
        label = {"dog": 2, "cat": 1, "cow": 3}[text[:3]]
        assert tuple(shown[y, x - 2]) == colors()[label - 1], text
    assert texts["dog 90%"][1] < 200  # above its box


def test_lines_and_text_grow_with_the_image():
    def line(side):
        pixels = np.zeros((side, side, 3), np.uint8)
        shown = np.asarray(detection_overlay(pixels, [[side // 4, side // 4, side, side]], [1], [1.0], ["a"]))
        return int((shown[3 * side // 4, : side // 2] == colors()[0]).all(-1).sum())

    assert line(500) == 2 and line(2000) == 8


def test_small_images_are_enlarged_and_large_ones_reduced():
    labels = np.array([[1, 0, 2]], np.uint8)
    picture = segmentation_overlay(np.zeros((1, 3, 3), np.uint8), labels, NAMES)
    assert picture.width == 480
    blended = [round(OPACITY * value) for value in palette(True)[2]]
    assert np.abs(np.subtract(picture.getpixel((470, 80)), blended)).max() <= 1
    assert picture.getpixel((240, 80)) == (0, 0, 0)
    picture = detection_overlay(np.zeros((10, 4096, 3), np.uint8), [[2048, 0, 4096, 10]], [1], [0.5], ["a"])
    assert picture.size == (2048, 5) and colors()[0] in {color for _, color in picture.getcolors()}
    assert detection_overlay(noise(20, 480), [], [], [], []).size == (480, 20)
