"""Teachers of knowledge distillation: a checkpoint of mvit3, or a network of timm or of this project by its name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import mvit3_kernels

from . import checkpoint
from .config import DataConfig, RunConfig, TrainConfig
from .errors import Failure
from .options import UsageError, nearest
from .runtime import autocast


class Teacher:
    """Logits (N, classes) float32 of images as the student reads them: they are turned into what the teacher was
    trained on."""

    def __init__(
        self,
        model: nn.Module,
        student: DataConfig,
        colors: str,
        mean: Sequence[float],
        std: Sequence[float],
        run: RunConfig,
        device: torch.device,
    ) -> None:
        self.model, self.run, self.device = model.to(device).eval().requires_grad_(False), run, device
        self._flip = colors != student.colors
        # Of the student's channels, in its order: x * deviation + mean are pixels in [0, 1].
        own_mean, own_std = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (student.mean, student.std)
        )
        mean, std = (
            torch.tensor(tuple(values), dtype=torch.float32, device=device).view(3, 1, 1) for values in (mean, std)
        )
        if self._flip:
            mean, std = mean.flip(0), std.flip(0)
        self._scale, self._shift = own_std / std, (own_mean - mean) / std
        self._same = torch.equal(own_mean.float(), mean) and torch.equal(own_std.float(), std)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if not self._same:
            images = images * self._scale + self._shift
        if self._flip:
            images = images.flip(1)
        with autocast(self.run, self.device):
            return self.model(images).float()


def open_teacher(
    config: TrainConfig, num_classes: int, class_names: Sequence[str], device: torch.device
) -> Teacher | None:
    """The teacher of a configuration, None where it has none.

    Raises:
        UsageError: there is no such network, or it has other classes.
        Failure, CheckpointError: its weights cannot be had.
    """
    name, file = config.distill.teacher, config.distill.checkpoint
    if not name:
        return None
    if os.path.sep in name or name.endswith((".pt", ".pth", ".ckpt", ".bin", ".safetensors")) or Path(name).is_file():
        return _of_checkpoint(config, Path(name), num_classes, class_names, device)
    if name in mvit3_kernels.list_models():
        if not file:
            raise UsageError(f"distill.teacher {name} needs its weights in distill.checkpoint")
        model = mvit3_kernels.create_model(name, num_classes)
        mvit3_kernels.load_checkpoint(model, file)
        return Teacher(model, config.data, config.data.colors, config.data.mean, config.data.std, config.run, device)
    if name.partition(".")[0] not in timm.list_models():
        close = nearest(name, [*timm.list_models(), *mvit3_kernels.list_models()])
        raise UsageError(
            f"distill.teacher must be a checkpoint of mvit3 or a network of timm, got {name!r}; the nearest is "
            f"{close!r}"
        )
    try:
        if file:
            model = timm.create_model(name, num_classes=num_classes, checkpoint_path=file)
        else:
            model = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub, the network, the file: anything
        raise Failure(
            f"distill.teacher {name}: its weights cannot be had: {' '.join(str(error).split())[:300]}"
        ) from None
    if model.num_classes != num_classes:
        raise UsageError(
            f"distill.teacher {name} has {model.num_classes} classes, the data {num_classes}; distill.checkpoint "
            "names a file with weights "
            "for these"
        )
    found = model.pretrained_cfg
    return Teacher(model, config.data, "rgb", found["mean"], found["std"], config.run, device)


def _of_checkpoint(
    config: TrainConfig, path: Path, num_classes: int, class_names: Sequence[str], device: torch.device
) -> Teacher:
    from .inference import Network  # which needs this module by way of the loss

    content = checkpoint.load(path)
    own = TrainConfig.from_dict(content["config"])
    network = Network.open(path, own, "auto", device)
    if network.num_classes != num_classes:
        raise UsageError(f"distill.teacher {path} has {network.num_classes} classes, the data {num_classes}")
    if network.class_names and class_names and tuple(network.class_names) != tuple(class_names):
        different = next((a, b) for a, b in zip(network.class_names, class_names, strict=True) if a != b)
        raise UsageError(
            f"distill.teacher {path} has other classes than the data: its {different[0]!r} is {different[1]!r} there"
        )
    return Teacher(network.model, config.data, own.data.colors, own.data.mean, own.data.std, config.run, device)
