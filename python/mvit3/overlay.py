"""Pictures of what a network finds in an image: masks in the colours of their classes with a legend, boxes with class
and score."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .screen import plain

SHORTEST, LONGEST = 480, 2048  # pixels of the longer side of a picture
OPACITY = 0.55  # of a mask
VOID = 255  # the label of pixels without one
COLORS = 255  # as many as there are labels
BLACK, WHITE = (0, 0, 0), (255, 255, 255)

Color = tuple[int, int, int]


# From linear sRGB to the responses of the eye's cones, and from their cube roots to OKLab (Ottosson 2020).
TO_CONES = (
    (0.41222147, 0.53633254, 0.05144599),
    (0.21190350, 0.68069955, 0.10739696),
    (0.08830246, 0.28171884, 0.62997870),
)
TO_LAB = (
    (0.21045426, 0.79361779, -0.00407205),
    (1.97799850, -2.42859221, 0.45059371),
    (0.02590404, 0.78277177, -0.80867577),
)


def _oklab(colors: np.ndarray) -> np.ndarray:
    """Colours (n, 3) of 0 to 255 in sRGB as lightness and two hues, where equal distances look alike."""
    values = colors / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ np.transpose(TO_CONES)) @ np.transpose(TO_LAB)


@lru_cache
def colors() -> tuple[Color, ...]:
    """Fixed colours, each the one that differs most from those before it, neither grey nor nearly black or white
    (Glasbey et al. 2007)."""
    levels = np.linspace(0, 255, 16)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lab = _oklab(grid)
    shown = (lab[:, 0] > 0.5) & (lab[:, 0] < 0.88) & (np.hypot(lab[:, 1], lab[:, 2]) > 0.08)
    grid, lab = grid[shown], lab[shown] * (1, 1.5, 1.5)  # hue tells more than lightness
    chosen = [int(np.abs(grid - (238, 68, 68)).sum(1).argmin())]
    nearest = np.full(len(grid), np.inf)
    while len(chosen) < COLORS:
        nearest = np.minimum(nearest, ((lab - lab[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(nearest.argmax()))
    return tuple(tuple(color) for color in grid[chosen].astype(int).tolist())


def has_background(names: Sequence[str]) -> bool:
    """Whether class 0 of a segmentation is what belongs to no class; it is not painted."""
    return bool(names) and names[0].lower() in ("background", "_background_", "__background__")


def palette(background: bool) -> list[Color]:
    """The colour of each label of 0 to 255; black for a background, white for pixels without a label."""
    return [BLACK, *colors()[:-1], WHITE] if background else [*colors(), WHITE]


def label_image(labels: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Labels (H, W) uint8 as an image of mode P: its pixels are the labels, its palette their colours."""
    image = Image.fromarray(labels)
    image.putpalette(bytes(np.array(palette(has_background(names)), np.uint8)))
    return image


def paint(picture: Image.Image, labels: np.ndarray, names: Sequence[str]) -> Image.Image:
    """The picture with the masks of labels (H, W) uint8 of its size; background and void stay as they are."""
    mask = (labels != VOID) & ((labels > 0) | (not has_background(names)))
    blended = Image.blend(picture, label_image(labels, names).convert("RGB"), OPACITY)
    return Image.composite(blended, picture, Image.fromarray(mask))


def _fit(pixels: np.ndarray) -> tuple[Image.Image, float]:
    """An image (H, W, 3) uint8 as a picture in which text can be read, and its scale: large ones are reduced, small
    ones enlarged by a whole number."""
    height, width = pixels.shape[:2]
    longer, image = max(height, width), Image.fromarray(pixels)
    if longer > LONGEST:
        scale = LONGEST / longer
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return image.resize(size, Image.Resampling.BOX), scale
    factor = max(1, SHORTEST // longer)
    return image.resize((width * factor, height * factor), Image.Resampling.NEAREST), float(factor)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic and more."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _text_size(picture: Image.Image) -> int:
    return max(13, round(max(picture.size) / 45))


def _readable(color: Color) -> Color:
    """Black or white, whichever stands out more."""
    return BLACK if 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 110 else WHITE


def shares(labels: np.ndarray) -> dict[int, int]:
    """Pixels of each label in (H, W) uint8, the largest first; those without a label are not counted."""
    counts = Image.fromarray(labels).histogram()[:VOID]
    return {label: counts[label] for label in sorted(range(VOID), key=lambda i: (-counts[i], i)) if counts[label]}


def segmentation_overlay(pixels: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Image.Image:
    """The image (H, W, 3) uint8 under half-transparent masks of its labels (H, W) uint8, and below it a legend of the
    classes that are present, the largest first."""
    picture, _ = _fit(pixels)
    shown = np.asarray(Image.fromarray(labels).resize(picture.size, Image.Resampling.NEAREST))
    hues = palette(has_background(names))
    entries = [
        (None if hues[label] == BLACK else hues[label], f"{plain(name_of(names, label))} {_share(n / labels.size)}")
        for label, n in shares(labels).items()
    ]
    return _with_legend(paint(picture, shown, names), entries)


def _share(value: float) -> str:
    return f"{value:.1%}" if value >= 0.001 else "<0.1%"


def name_of(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else str(label)


def _with_legend(picture: Image.Image, entries: Sequence[tuple[Color | None, str]]) -> Image.Image:
    """The picture above a legend: a patch and a text each, in as many rows as its width asks for. A patch without a
    colour is empty."""
    size = _text_size(picture)
    font, gap, row = _font(size), size // 2, round(1.6 * size)
    widths = [size + gap + round(font.getlength(text)) for _, text in entries]
    width = max([picture.width, *(w + 2 * gap for w in widths)])
    places, x, y = [], gap, gap // 2
    for w in widths:
        if x > gap and x + w + gap > width:
            x, y = gap, y + row
        places.append((x, y))
        x += w + 2 * gap
    canvas = Image.new("RGB", (width, picture.height + y + row + gap // 2), WHITE)
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for (color, text), (x, y) in zip(entries, places, strict=True):
        y += picture.height
        patch = (x, y + (row - size) // 2, x + size - 1, y + (row - size) // 2 + size - 1)
        draw.rectangle(patch, fill=color or WHITE, outline=BLACK)
        draw.text((x + size + gap, y + row // 2), text, BLACK, font, anchor="lm")
    return canvas


def box_color(label: int) -> Color:
    """Of a class of boxes, from 1 on."""
    return colors()[(label - 1) % COLORS]


def draw_boxes(
    picture: Image.Image, boxes: np.ndarray, labels: Sequence[int], captions: Sequence[str] = ()
) -> Image.Image:
    """The picture with boxes (n, 4), corners in its pixels, in the colours of their labels (from 1 on), best first,
    each with its caption. Lines have black edges and captions a ground of their own, so both can be read on anything.
    """
    picture = picture.copy()
    draw, width = ImageDraw.Draw(picture), max(2, round(max(picture.size) / 250))
    edge = max(1, width // 3)
    corners = np.rint(boxes).astype(int).tolist()
    hues = list(map(box_color, labels))
    for (x1, y1, x2, y2), color in reversed(list(zip(corners, hues, strict=True))):  # the best on top
        x2, y2 = max(x1, x2 - 1), max(y1, y2 - 1)
        draw.rectangle((x1 - edge, y1 - edge, x2 + edge, y2 + edge), outline=BLACK, width=width + 2 * edge)
        draw.rectangle((x1, y1, x2, y2), outline=color, width=width)
    if captions:
        font, pad = _font(_text_size(picture)), 2 + width // 2
        for (x1, y1, *_), color, text in reversed(list(zip(corners, hues, captions, strict=True))):
            _, _, wide, _ = draw.textbbox((0, 0), text, font)
            wide, high = round(wide) + 2 * pad, font.size + 2 * pad
            x = max(0, min(x1 - edge, picture.width - wide))
            y = y1 - edge - high if y1 - edge >= high else max(0, min(y1, picture.height - high))
            draw.rectangle((x, y, x + wide - 1, y + high - 1), fill=color, outline=BLACK)
            draw.text((x + pad, y + high // 2), text, _readable(color), font, anchor="lm")
    return picture


def detection_overlay(
    pixels: np.ndarray, boxes: np.ndarray, labels: Sequence[int], scores: Sequence[float], names: Sequence[str]
) -> Image.Image:
    """The image (H, W, 3) uint8 with boxes (n, 4), corners in its pixels, best first; labels count `names` from 1."""
    picture, scale = _fit(pixels)
    captions = [f"{plain(name_of(names, label - 1))} {score:.0%}" for label, score in zip(labels, scores, strict=True)]
    return draw_boxes(picture, np.asarray(boxes, np.float64).reshape(-1, 4) * scale, labels, captions)
