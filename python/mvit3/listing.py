"""`mvit3 models`: what networks there are, and how large they are."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import mvit3_kernels

from . import recipes
from .options import UsageError, nearest

SMALLEST = 32  # what the networks divide an image by


def describe(patterns: Sequence[str], size: int) -> list[dict[str, object]]:
    """Name, parameters, multiplications, input and recipes of the networks that match one of the patterns, of all where there is none.

    `macs` counts convolutions, linear layers and products of attention, for one image of size x size and 1000 classes; `flops` is twice
    that.

    Raises:
        UsageError: a name that no network has, a size below 32.
    """
    if size < SMALLEST:
        raise UsageError(f"--size must be at least {SMALLEST}, got {size}")
    every = mvit3_kernels.list_models()
    chosen = {name for pattern in patterns for name in fnmatch.filter(every, pattern)} if patterns else set(every)
    for pattern in patterns:
        if not fnmatch.filter(every, pattern):
            raise UsageError(f"there is no network {pattern!r}; the nearest is {nearest(pattern, every)!r}")
    known = {name: yaml.safe_load(recipes.path(name).read_text()) for name in recipes.names() if name not in ("digits", "finetune")}
    return [
        _describe(name, size, {recipe: values for recipe, values in known.items() if values["model"]["name"] == name})
        for name in sorted(chosen)
    ]


def _describe(name: str, size: int, own: dict[str, dict[str, dict[str, object]]]) -> dict[str, object]:
    with torch.device("meta"):
        model = mvit3_kernels.create_model(name).eval()
    with torch.no_grad(), mvit3_kernels.backend("reference"), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size, device="meta"))
    macs = counter.get_total_flops() // 2
    data = own[name]["data"] if name in own else {"crop": 256, "colors": "rgb"}
    family = name.split("_")[0]
    if name not in own and family == "mobilevitv3" and not name.split("_")[1].isdigit():
        data = {"crop": 256, "colors": "bgr"}  # as the network that it is the fast variant of
    return {
        "name": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": macs,
        "flops": 2 * macs,
        "input": f"3x{data['crop']}x{data['crop']} {str(data['colors']).upper()}, 0 to 1",
        "recipes": sorted(own),
    }
