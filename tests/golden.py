"""The recipe behind the golden values, and their names here."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / "data" / "golden"

_SIZES = {"small": "s", "x_small": "xs", "xx_small": "xxs"}
# Published name -> ours.
MODELS = {
    **{f"mobilevitv1_{size}": f"mobilevit_{short}" for size, short in _SIZES.items()},
    **{f"mobilevitv2_{width / 100:.2f}": f"mobilevitv2_{width:03d}" for width in (50, 75, 100, 125, 150, 175, 200)},
    **{f"mobilevitv3_{width / 100:.2f}": f"mobilevitv3_{width:03d}" for width in (50, 75, 100, 200)},
    **{
        f"mobilevitv3_{size}_v3{fast}": f"mobilevitv3_{short}{fast}"
        for size, short in _SIZES.items()
        for fast in ("", "_fast")
    },
}

# Networks of dense prediction: published name -> ours, and the options that differ from create_model's.
DENSE = {
    "deeplabv3_mobilevitv3_small_v3": ("deeplabv3_mobilevitv3_s", {}),
    "deeplabv3_mobilevitv3_1.00": ("deeplabv3_mobilevitv3_100", {}),
    "pspnet_mobilevitv3_1.00": ("pspnet_mobilevitv3_100", {}),
    "ssd_mobilevitv3_small_v3": ("ssdlite_mobilevitv3_s", {}),
    "ssd_mobilevitv3_1.00": ("ssdlite_mobilevitv3_100", {}),
    "deeplabv3_ade20k_mobilevitv3_0.50": ("deeplabv3_mobilevitv3_050", {"num_classes": 150, "output_stride": 8}),
}


def state_dicts() -> dict[str, list]:
    """Per network or block: [name, shape] of each entry of its state dict, in order."""
    with gzip.open(DATA / "state_dicts.json.gz") as file:
        return json.load(file)


def load(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(DATA / f"{name}.npz"))


def stored(prefix: str = "") -> list[str]:
    return sorted(p.stem for p in DATA.glob(f"{prefix}*.npz"))


def fill(module: nn.Module) -> nn.Module:
    """Gives every entry of the state dict its value by the recipe: normal numbers seeded by the entry's name."""
    state = module.state_dict()
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        shape = tuple(tensor.shape)
        z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if name.endswith("running_mean"):
            value = 0.1 * z
        elif name.endswith("running_var"):
            value = np.exp(0.1 * z)
        elif name.endswith("weight"):
            value = z * np.sqrt(2) / np.sqrt(np.prod(shape[1:])) if len(shape) >= 2 else 1 + 0.1 * z
        else:
            value = (0.1 if state[name.removesuffix("bias") + "weight"].ndim == 1 else 0.02) * z
        state[name] = torch.from_numpy(np.asarray(value, np.float32))
    module.load_state_dict(state)
    return module


def image(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def relative(got: Tensor, want: np.ndarray) -> float:
    """Largest difference, relative to the largest wanted value."""
    want = torch.from_numpy(np.asarray(want))
    return ((got.detach().double().cpu() - want).abs().max() / want.abs().max()).item()


def summary(x: Tensor) -> Tensor:
    """Mean, population deviation and L2 norm, as recorded."""
    return torch.stack((x.mean(), x.std(correction=0), x.norm()))
