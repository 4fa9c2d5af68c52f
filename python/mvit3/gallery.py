"""Small pictures of validation images for the report: of a classifier those that it is surest of and those that it is
most wrong about, of dense prediction those with the best, the median and the worst score."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from .data.config import DataConfig

SHOWN = 6  # of either kind
SIDE = 96  # pixels at most


def picture(image: Tensor, data: DataConfig, side: int) -> Tensor:
    """(h, w, 3) uint8 in RGB with sides of at most `side` pixels, from what the network reads, (3, H, W)."""
    mean, std = (torch.tensor(values, device=image.device).view(3, 1, 1) for values in (data.mean, data.std))
    image = (image.float() * std + mean).clamp(0, 1)
    image = image.flip(0) if data.colors == "bgr" else image
    largest = max(image.shape[1:])
    if largest > side:
        size = [max(1, round(length * side / largest)) for length in image.shape[1:]]
        image = F.interpolate(image[None], size=size, mode="area")[0]
    return image.mul(255).round().byte().permute(1, 2, 0).contiguous().cpu()


class Gallery:
    """Collects the images with the least and with the largest cross-entropy, batch by batch."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self.best: list[dict[str, object]] = []
        self.worst: list[dict[str, object]] = []

    def add(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """images (N, 3, H, W) as the network reads them, labels (N,), finite logits (N, classes)."""
        losses = F.cross_entropy(logits, labels, reduction="none")
        order = losses.argsort()
        ends = torch.cat((order[:SHOWN], order[-SHOWN:])).unique()
        probabilities, guesses = logits[ends].softmax(1).max(1)
        rows = zip(
            *(values.tolist() for values in (ends, losses[ends], labels[ends], guesses, probabilities)), strict=True
        )
        for index, loss, label, guess, probability in rows:
            sample = {"loss": loss, "label": label, "guess": guess, "probability": probability, "index": index}
            self.best.append(sample)
            self.worst.append(dict(sample))
        self.best = sorted(self.best, key=lambda sample: sample["loss"])[:SHOWN]
        self.worst = sorted(self.worst, key=lambda sample: -sample["loss"])[:SHOWN]
        for sample in (*self.best, *self.worst):
            if "pixels" not in sample:
                sample["pixels"] = picture(images[sample.pop("index")], self.data, SIDE)

    def samples(self) -> dict[str, list[dict[str, object]]]:
        """Plain values and tensors: `label` and `guess` are classes, `probability` that of the guess."""
        return {"best": self.best, "worst": self.worst}


class Ranking:
    """Of images that come with a score each, the best, the worst, and those about the median.

    Which images these last are is known at the end only: of all images every n-th is kept for them, n doubling as
    images come, and of these the ones that are nearest to the median.
    """

    SIDE = 256  # of a picture, pixels at most
    EACH = 4
    CANDIDATES = 32  # for the median, at most

    def __init__(self) -> None:
        self.scores: list[float] = []
        self._step = 1
        self._best: list[tuple[int, dict[str, object]]] = []
        self._worst: list[tuple[int, dict[str, object]]] = []
        self._spread: list[tuple[int, dict[str, object]]] = []

    def add(self, score: float, make: Callable[[], dict[str, object]]) -> None:
        """An image; `make` makes a sample of it, where it is wanted."""
        number, sample = len(self.scores), None
        self.scores.append(score)
        for group, key in ((self._best, lambda s: -s), (self._worst, lambda s: s)):
            if len(group) < 2 * self.EACH or key(score) < key(group[-1][1]["score"]):
                sample = sample or {"score": score, **make()}
                group.append((number, sample))
                group.sort(key=lambda entry, key=key: (key(entry[1]["score"]), entry[0]))
                del group[2 * self.EACH :]  # twice as many, for where all are alike
        if number % self._step == 0:
            self._spread.append((number, sample or {"score": score, **make()}))
        if len(self._spread) > self.CANDIDATES:
            self._step *= 2
            self._spread = [entry for entry in self._spread if entry[0] % self._step == 0]

    def samples(self) -> dict[str, list[dict[str, object]]]:
        """Plain values and tensors. An image stands in one of the lists, the worst ones in the first of them that can
        hold it."""
        taken: set[int] = set()
        found = {}
        middle = median(self.scores) if self.scores else 0.0
        about = sorted(self._spread, key=lambda entry: (abs(entry[1]["score"] - middle), entry[0]))
        for kind, entries in (("worst", self._worst), ("best", self._best), ("median", about)):
            own = [entry for entry in entries if entry[0] not in taken][: self.EACH]
            taken |= {number for number, _ in own}
            found[kind] = [sample for _, sample in own]
        return {kind: found[kind] for kind in ("best", "median", "worst")}
