"""`mvit3 models`: what networks there are, and how large they are."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import mvit3_kernels

from . import recipes
from .names import BACKBONES, task_of
from .options import UsageError, nearest

SMALLEST = 32  # what the networks divide an image by


def describe(patterns: Sequence[str], size: int) -> list[dict[str, object]]:
    """Name, parameters, multiplications, input and recipes of the networks that match one of the patterns, of all
    classifiers where there is none.

    `macs` counts convolutions, linear layers and products of attention, for one image of size x size and as many
    classes as published (1000, 21 with the background of segmentation, 81 of detection); `flops` is twice that.

    Raises:
        UsageError: a name that no network has, a size below 32.
    """
    if size < SMALLEST:
        raise UsageError(f"--size must be at least {SMALLEST}, got {size}")
    every = mvit3_kernels.list_models("*")
    chosen = {name for pattern in patterns for name in fnmatch.filter(every, pattern)}
    chosen = chosen if patterns else set(mvit3_kernels.list_models())
    for pattern in patterns:
        if not fnmatch.filter(every, pattern):
            raise UsageError(f"there is no network {pattern!r}; the nearest is {nearest(pattern, every)!r}")
    known = {
        name: yaml.safe_load(recipes.path(name).read_text())
        for name in recipes.names()
        if name != "finetune" and not name.startswith("digits")
    }
    return [_describe(name, size, known) for name in sorted(chosen)]


def _describe(name: str, size: int, known: dict[str, dict[str, dict[str, object]]]) -> dict[str, object]:
    own = sorted(recipe for recipe, values in known.items() if values["model"]["name"] == name)
    with torch.device("meta"):
        model = mvit3_kernels.create_model(name).eval()
    with torch.no_grad(), mvit3_kernels.backend("reference"), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size, device="meta"))
    macs = counter.get_total_flops() // 2
    crop, colors = _input(name, own, known)
    return {
        "name": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": macs,
        "flops": 2 * macs,
        "input": f"3x{crop}x{crop} {colors.upper()}, 0 to 1",
        "recipes": own,
    }


def _input(name: str, own: Sequence[str], known: dict[str, dict[str, dict[str, object]]]) -> tuple[int, str]:
    """Side of the images of a network and the order of their colours: those of its recipe; without one those of its
    task and of its backbone, a fast variant's being those of the network that it is a variant of."""
    recipe = known.get(name) or (known[own[0]] if own and task_of(name) != "classification" else {})
    if "crop" in recipe.get("data", {}):
        return recipe["data"]["crop"], str(recipe["data"].get("colors", "rgb"))
    crop = {"classification": 256, "segmentation": 512, "detection": 320}[task_of(name)]
    backbone = name if name in BACKBONES else name.partition("_")[2]
    return crop, "bgr" if not backbone.split("_")[1].isdigit() else "rgb"
