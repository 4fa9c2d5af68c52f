"""The inputs behind the golden values of dense prediction."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mvit3_kernels.models.detection import anchors_of
from mvit3_kernels.tasks.detection import Targets, assign

from .. import golden

ANCHORS = anchors_of(320, 320)


def boxes(sets: list[str]) -> tuple[list[Tensor], list[Tensor]]:
    """Boxes and labels of images."""
    stored = golden.load("ssdmatch")
    return (
        [torch.from_numpy(stored[f"{name}_boxes_norm_f32"]).view(-1, 4) for name in sets],
        [torch.from_numpy(stored[f"{name}_labels"]).long() for name in sets],
    )


def ssd_targets(sets: list[str]) -> Targets:
    """Labels as `assign` gives them, offsets as stored in float64."""
    labels = assign(*boxes(sets), ANCHORS).labels
    offsets = torch.zeros(*labels.shape, 4, dtype=torch.float64)
    stored = golden.load("ssdmatch")
    for i, name in enumerate(sets):
        offsets[i, stored[f"{name}_pos_index"].astype(np.int64)] = torch.from_numpy(stored[f"{name}_targets_f64"])
    return Targets(labels, offsets)


def segmentation_labels(seed: int, classes: int, shape: tuple[int, int, int], ignore: int) -> Tensor:
    labels = np.random.default_rng(seed).integers(0, classes, shape)
    labels[np.random.default_rng(seed + 1).random(shape) < 0.15] = ignore
    return torch.from_numpy(labels)


def raw_outputs(case: str) -> tuple[Tensor, Tensor]:
    """Scores and offsets of one image, before decoding."""
    scores, offsets = np.zeros((1, 3232, 81)), np.zeros((1, 3232, 4))
    seeds, grounds, boosts = {"sparse": 201, "dense": 202, "none": 203}, {"sparse": 9, "dense": 4, "none": 20}, {}
    boosts = {"sparse": 10, "dense": 7}
    if case in seeds:
        r = np.random.default_rng(seeds[case])
        scores = r.standard_normal(scores.shape)
        scores[0, :, 0] += grounds[case]
        offsets = r.standard_normal(offsets.shape) * 0.7
        for _ in range(25 if case in boosts else 0):
            anchor, label = int(r.integers(0, 3226)), int(r.integers(1, 81))
            for i in range(6):
                scores[0, anchor + i, label] += boosts[case] - 0.5 * i
        return torch.from_numpy(scores), torch.from_numpy(offsets)
    scores[..., 0] = 12
    if case == "topk":
        scores[0, :, 7] = 11 - 0.003 * np.arange(3232)
    else:
        cells = [20 * y + x for y in (1, 5, 9, 13, 17) for x in (1, 5, 9, 13, 17)]
        for cell in cells:
            for c in range({"ties3": 3, "ties10": 10}[case]):
                scores[0, cell * 6, 3 + 2 * c] = 11
    return torch.from_numpy(scores), torch.from_numpy(offsets)
