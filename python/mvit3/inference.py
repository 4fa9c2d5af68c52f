"""Checkpoints in use: `mvit3 evaluate` and `mvit3 predict`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS

import mvit3_kernels
from mvit3_kernels.models.checkpoint import count_outputs

from . import checkpoint
from .backends import served
from .config import TrainConfig
from .data import DataConfig, DataError, DecodeError, evaluation_transform, validation
from .data.identity import difference, identity
from .distributed import World
from .evaluation import evaluate
from .network import build_model
from .options import UsageError
from .runtime import autocast, use_ops

PREDICT_BATCH = 32


@dataclass(frozen=True)
class Network:
    """A network of a checkpoint, in evaluation mode. `recorded`: the accuracy of these weights after the epoch whose end was saved."""

    model: nn.Module
    config: TrainConfig
    num_classes: int
    class_names: tuple[str, ...]  # empty where the checkpoint does not tell them
    weights: str  # "average", "trained", or of what a file of another origin holds
    recorded: float | None

    @staticmethod
    def open(path: Path, config: TrainConfig, weights: str, device: torch.device, num_classes: int = 1000) -> Network:
        """From a checkpoint; `num_classes` is that of one of another origin, where `model.num_classes` does not tell it.

        Raises:
            CheckpointError: it cannot be read, or does not fit the configuration's network.
        """
        content = checkpoint.read(path)
        if content is None:
            classes = config.model.num_classes or count_outputs(path) or num_classes
            model = _fresh(config, classes, device)
            report = mvit3_kernels.load_checkpoint(model, path, ema={"auto": None, "ema": True, "raw": False}[weights])
            return Network(model.eval(), config, classes, (), report.entry or "as in the file", None)
        if weights == "ema" and not content["ema_state_dict"]:
            raise UsageError(f"--weights ema: {path} holds no average, its training kept none")
        chosen = {"auto": checkpoint.better_weights(content), "ema": checkpoint.AVERAGE, "raw": checkpoint.TRAINED}[weights]
        average = chosen == checkpoint.AVERAGE
        model = _fresh(config, content["num_classes"], device)
        try:
            model.load_state_dict(content[checkpoint.ENTRIES[chosen]])
        except RuntimeError as error:
            raise checkpoint.CheckpointError(f"{path} does not fit {config.model.name}: {' '.join(str(error).split())[:300]}") from None
        progress = content["progress"]
        row = progress["history"][-1] if progress["history"] and not progress["batch"] else {}
        recorded = row.get("ema_accuracy" if average else "accuracy")
        classes, names = content["num_classes"], tuple(content["class_names"])
        return Network(model.eval(), config, classes, names, chosen, recorded)


def _fresh(config: TrainConfig, num_classes: int, device: torch.device) -> nn.Module:
    return build_model(replace(config, model=replace(config.model, pretrained="")), num_classes, device)


def evaluate_checkpoint(path: Path, config: TrainConfig, weights: str, world: World, say: Callable[[str], None]) -> dict[str, object]:
    """Accuracy on the validation images of a configuration, as plain values."""
    content = checkpoint.read(path)
    names = tuple(content["class_names"]) if content else ()
    if names == tuple(map(str, range(len(names)))):  # none, or the numbers that shards have
        names = imagenet_names(len(names) or config.model.num_classes or count_outputs(path), config.data) or names
    batches = validation(config, names, rank=world.rank, world_size=world.size, device=world.device)
    present, data = len(batches.source.class_names), config.data.root or config.data.source
    network = Network.open(path, config, weights, world.device, present)
    if not names and config.data.source != "shards" and present < network.num_classes:
        raise checkpoint.CheckpointError(
            f"{path} has {network.num_classes} classes and does not tell their names, {data} has {present} "
            f"({', '.join(batches.source.class_names[:3])}{', ...' if present > 3 else ''}), so which is which is not known: name the "
            "folders by ImageNet's synsets (n01440764) where these are the classes, or make one folder for each of the "
            f"{network.num_classes} classes, empty where there is no image"
        )
    if present > network.num_classes:
        raise checkpoint.CheckpointError(f"{path} has {network.num_classes} classes, the data in {data} has {present}")
    if world.first:
        batches.say = say
    found = evaluate(network.model, iter(batches), config.run, network.num_classes, world.device)
    if found.not_finite:
        raise checkpoint.CheckpointError(
            f"{path}: the network's output is not finite for {found.not_finite} of {found.total} images, so there is no accuracy to tell; "
            + ("its weights are spoilt" if config.run.amp == "none" else f"run.amp none computes without {config.run.amp}")
        )
    same = content is None or "data" not in content or not difference(content["data"]["val"], identity(batches.source))
    recorded = network.recorded if same else None
    if world.first:
        for text in (*batches.source.notes, *(f"unreadable: {name}: {reason}" for name, reason in batches.unreadable.items())):
            say(text)
    side = config.data.crop
    return {
        "checkpoint": str(path),
        "model": config.model.name,
        "weights": network.weights,
        "data": data,
        "ops": config.run.ops,
        "precision": config.run.amp,
        "backend": served(network.model, torch.zeros(2, 3, side, side, device=world.device), config.run, training=False),
        "accuracy": found.accuracy,
        "accuracy5": found.accuracy5,
        "correct": found.correct,
        "total": found.total,
        "val_loss": found.loss,
        "unreadable": batches.unreadable,
        "recorded_accuracy": recorded,
        "reproduced": None if recorded is None else found.accuracy == recorded,
    }


def imagenet_names(num_classes: int | None, data: DataConfig) -> tuple[str, ...]:
    """The synsets of ImageNet with so many classes, in the order of the outputs that are trained on it, where the folders of the validation
    images are named by them; else nothing."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    folder = Path(data.root) / data.val
    if subset is None or data.source != "folder" or not folder.is_dir():
        return ()
    synsets = tuple(ImageNetInfo(subset).label_names())
    found = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    return synsets if found and found <= set(synsets) else ()


def list_images(paths: list[Path]) -> list[Path]:
    """Files as given, folders by the images in them. DataError where there is nothing."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
            if not inside:
                raise DataError(f"{path} holds no image ({', '.join(IMG_EXTENSIONS)})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{path}: there is no such file")
    return found


@torch.inference_mode()
def predict(network: Network, paths: list[Path], top: int) -> list[dict[str, object]]:
    """For each image its most probable classes, or why it cannot be read."""
    if not top >= 1:
        raise UsageError(f"--top must be at least 1, got {top}")
    transform, run, found = evaluation_transform(network.config), network.config.run, []
    device = next(network.model.parameters()).device
    files = list_images(paths)
    for begin in range(0, len(files), PREDICT_BATCH):
        images, rows = [], []
        for path in files[begin : begin + PREDICT_BATCH]:
            rows.append({"image": str(path)})
            try:
                images.append(transform(path))
            except (DecodeError, OSError) as error:
                rows[-1]["error"] = f"cannot be read: {error}"
        found += rows
        if not images:
            continue
        batch = torch.stack(images).to(device)
        batch = batch.contiguous(memory_format=torch.channels_last) if run.channels_last else batch
        with use_ops(run.ops), autocast(run, device):
            probabilities = network.model(batch).float().softmax(1)
        values, classes = probabilities.topk(min(top, network.num_classes))
        readable = (row for row in rows if "error" not in row)
        for row, p, c in zip(readable, values.tolist(), classes.tolist(), strict=True):
            names = [network.class_names[i] if i < len(network.class_names) else str(i) for i in c]
            row["classes"] = [{"name": n, "index": i, "probability": v} for n, i, v in zip(names, c, p, strict=True)]
    return found
