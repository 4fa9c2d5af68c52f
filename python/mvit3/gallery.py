"""Small pictures of the validation images that a network is surest of, and of those that it is most wrong about."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .data.config import DataConfig

SHOWN = 6  # of either kind
SIDE = 96  # pixels at most


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
        rows = zip(*(values.tolist() for values in (ends, losses[ends], labels[ends], guesses, probabilities)), strict=True)
        for index, loss, label, guess, probability in rows:
            sample = {"loss": loss, "label": label, "guess": guess, "probability": probability, "index": index}
            self.best.append(sample)
            self.worst.append(dict(sample))
        self.best = sorted(self.best, key=lambda sample: sample["loss"])[:SHOWN]
        self.worst = sorted(self.worst, key=lambda sample: -sample["loss"])[:SHOWN]
        for sample in (*self.best, *self.worst):
            if "pixels" not in sample:
                sample["pixels"] = self._picture(images[sample.pop("index")])

    def _picture(self, image: Tensor) -> Tensor:
        """(h, w, 3) uint8 in RGB, from what the network reads."""
        mean, std = (torch.tensor(values, device=image.device).view(3, 1, 1) for values in (self.data.mean, self.data.std))
        image = (image.float() * std + mean).clamp(0, 1)
        image = image.flip(0) if self.data.colors == "bgr" else image
        if max(image.shape[1:]) > SIDE:
            image = F.interpolate(image[None], size=(SIDE, SIDE), mode="area")[0]
        return image.mul(255).round().byte().permute(1, 2, 0).contiguous().cpu()

    def samples(self) -> dict[str, list[dict[str, object]]]:
        """Plain values and tensors: `label` and `guess` are classes, `probability` that of the guess."""
        return {"best": self.best, "worst": self.worst}
