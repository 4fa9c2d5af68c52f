"""Embedded scenes for dense prediction: scikit-learn's handwritten digits as stickers on textured ground.

A sticker is opaque: the digit's ink on paper of the shape of the ink, thickened and without holes, so that an object is
a solid region. Scene i of a part depends on the part and on i alone; train and validation scenes show different digits.
Scenes are drawn when they are first asked for and then kept, some milliseconds and 150 kB each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from .digits import Split, load_digits

SIZE = 192  # side of a scene, pixels
VISIBLE = 0.8  # least share of a sticker that is not covered by later ones
OVERLAP = 0.12  # largest intersection over union of two boxes of a scene
TRIES = 60  # places tried for one digit
TURN, SHEAR, STRETCH = 0.2, 0.2, 0.15  # largest, of a bent digit: radians, tangent, logarithm of width against height
INK = 0.4  # darkness from which a pixel of a digit is ink
THICKEN, CLOSE = 3.0, 4.0  # pixels of the 32x32 digit: how far paper reaches around ink; gaps up to twice this close
SEED = 20220930  # the scenes are part of the data set's definition, not of a run

DIGITS = tuple("0123456789")


class Layout(NamedTuple):
    """Digits of a scene, at least (but for those without a place) and at most; range of a sticker's longer side,
    pixels; scenes of each part; whether a digit to learn from is bent."""

    objects: tuple[int, int]
    sides: tuple[int, int]
    scenes: dict[str, int]
    bent: bool


# Many small objects are many boxes to learn from; the border of a large one is a small part of its mask. There are few
# large ones, so each of those to learn from is written a little differently.
LAYOUTS = {
    "detection": Layout((6, 12), (26, 50), {"train": 1200, "val": 200}, False),
    "segmentation": Layout((3, 5), (60, 104), {"train": 2400, "val": 200}, True),
}


class Scene(NamedTuple):
    """`pixels` (S, S, 3) uint8; `mask` (S, S) uint8, 0 ground, else digit + 1; `boxes` (G, 4) float64, corners of
    what is visible, in pixels; `labels` (G,) int64, digit + 1; `area` (G,) float64, visible pixels."""

    pixels: np.ndarray
    mask: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    area: np.ndarray


class Sticker(NamedTuple):
    """`ink` and `shape`, (H, W) uint8 images of 0 to 255."""

    ink: Image.Image
    shape: Image.Image


class Scenes:
    """The scenes of a part, "train" or "val", by index, as they are made for a task."""

    def __init__(self, part: str, task: str) -> None:
        self.part, self.layout, self.digits = part, LAYOUTS[task], getattr(load_digits(), part)
        self.bent = self.layout.bent and part == "train"
        self._kept: dict[int, Scene] = {}

    def __len__(self) -> int:
        return self.layout.scenes[self.part]

    def __getitem__(self, index: int) -> Scene:
        if index not in self._kept:
            seed = np.random.default_rng((SEED, ("train", "val").index(self.part), index))
            self._kept[index] = draw(seed, self.digits, self.layout, self.bent)
        return self._kept[index]


@cache
def load_scenes(part: str, task: str) -> Scenes:
    """The scenes of a part, one object per process, so that what is drawn is drawn once."""
    return Scenes(part, task)


def _bend(random: np.random.Generator) -> np.ndarray:
    """A linear map (2, 2) of rows and columns: a turn, a shear and a stretch."""
    turn, shear, stretch = random.uniform(-1, 1, 3) * (TURN, SHEAR, STRETCH)
    cos, sin = np.cos(turn), np.sin(turn)
    return np.array(((cos, -sin), (sin, cos))) @ ((1, 0), (shear, 1)) * np.exp((-stretch / 2, stretch / 2))


def _sticker(digits: Split, index: int, bend: np.ndarray | None = None) -> Sticker:
    """The sticker of a digit, at 32x32, bent by a linear map (2, 2)."""
    from scipy import ndimage

    reach = int(THICKEN + CLOSE) + 2
    grey = np.pad(digits.images[index, 0].numpy().reshape(32, 2, 32, 2).mean((1, 3)), reach)
    if bend is not None:
        middle = (np.array(grey.shape) - 1) / 2
        grey = ndimage.affine_transform(grey, bend, middle - bend @ middle, order=1)
    thick = ndimage.distance_transform_edt(grey < INK) <= THICKEN + CLOSE
    shape = ndimage.binary_fill_holes(ndimage.distance_transform_edt(thick) > CLOSE)
    rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
    inside = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return Sticker(*(Image.fromarray((part[inside] * 255).round().astype(np.uint8)) for part in (grey, shape)))


def _ground(random: np.random.Generator) -> np.ndarray:
    """(SIZE, SIZE, 3) float32 of 0 to 255: a soft pattern of a random scale, and grain."""
    cells = int(random.integers(6, 25))
    coarse = random.uniform(70, 180, 3) + random.uniform(-60, 60, (cells, cells, 3))
    soft = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    grain = random.standard_normal((SIZE, SIZE), np.float32) * np.float32(random.uniform(2, 12))
    return np.asarray(soft, np.float32) + grain[..., None]


def _visible_box(shape: np.ndarray) -> np.ndarray:
    """Corners (4,) around what is true in (H, W)."""
    rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
    return np.array((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), np.float64)


def _apart(boxes: np.ndarray) -> bool:
    """Whether no two of the boxes (G, 4) overlap more than OVERLAP."""
    low, high = np.maximum(boxes[:, None, :2], boxes[None, :, :2]), np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clip(0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    union = areas[:, None] + areas[None] - shared
    return bool((shared <= OVERLAP * union)[~np.eye(len(boxes), dtype=bool)].all())


def _place(
    random: np.random.Generator, owner: np.ndarray, shape: np.ndarray, whole: Sequence[int]
) -> tuple[np.ndarray, slice, slice] | None:
    """`owner` (S, S), which digit + 1 a pixel shows, with one digit more, and where it lies; None where no place was
    found that leaves enough of the others to be seen. `whole`: pixels of the digits, the new one last."""
    height, width = shape.shape
    seen = np.bincount(owner.ravel(), minlength=len(whole) + 1)[1:]
    seen[-1] = whole[-1]
    for _ in range(TRIES):
        y, x = int(random.integers(SIZE - height + 1)), int(random.integers(SIZE - width + 1))
        place = slice(y, y + height), slice(x, x + width)
        covered = np.bincount(owner[place][shape], minlength=len(whole) + 1)[1:]
        if (seen - covered >= VISIBLE * np.array(whole)).all():
            trial = owner.copy()
            trial[place][shape] = len(whole)
            if _apart(np.stack([_visible_box(trial == i + 1) for i in range(len(whole))])):
                return trial, *place
    return None


def draw(random: np.random.Generator, digits: Split, layout: Layout, bent: bool) -> Scene:
    """One scene; a digit for which there is no place is left out."""
    canvas, owner = _ground(random), np.zeros((SIZE, SIZE), np.uint8)
    labels: list[int] = []
    whole: list[int] = []
    for _ in range(int(random.integers(layout.objects[0], layout.objects[1] + 1))):
        index = int(random.integers(len(digits)))
        sticker = _sticker(digits, index, _bend(random) if bent else None)
        side = np.exp(random.uniform(*np.log(layout.sides)))
        width, height = (max(8, round(n * side / max(sticker.shape.size))) for n in sticker.shape.size)
        shape = np.asarray(sticker.shape.resize((width, height), Image.Resampling.BILINEAR)) > 127
        ink = np.asarray(sticker.ink.resize((width, height), Image.Resampling.BILINEAR), np.float32)[..., None] / 255
        paper, pen = random.uniform(190, 255, 3), random.uniform(0, 90, 3)
        found = _place(random, owner, shape, [*whole, int(shape.sum())])
        if found is None:
            continue
        owner, *place = found
        canvas[tuple(place)][shape] = (paper + ink * (pen - paper))[shape]
        labels.append(int(digits.labels[index]) + 1)
        whole.append(int(shape.sum()))
    numbers = np.array(labels, np.int64)
    mask = np.concatenate(([0], numbers)).astype(np.uint8)[owner]
    boxes = np.stack([_visible_box(owner == i + 1) for i in range(len(labels))])
    area = np.bincount(owner.ravel(), minlength=len(labels) + 1)[1:].astype(np.float64)
    return Scene(canvas.clip(0, 255).round().astype(np.uint8), mask, boxes, numbers, area)
