"""A checkpoint in use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

import mvit3_kernels
from mvit3_kernels.models.checkpoint import count_outputs

from . import checkpoint
from .backends import served
from .config import TrainConfig
from .data import DataConfig, validation
from .data.identity import difference, identity
from .distributed import World
from .evaluation import evaluate
from .network import build_model, load_weights
from .options import UsageError
from .report import class_results
from .screen import Bar


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
        load_weights(model, content[checkpoint.ENTRIES[chosen]], str(path), config.model.name)
        progress = content["progress"]
        row = progress["history"][-1] if progress["history"] and not progress["batch"] else {}
        recorded = row.get("ema_accuracy" if average else "accuracy")
        classes, names = content["num_classes"], tuple(content["class_names"])
        return Network(model.eval(), config, classes, names, chosen, recorded)


def _fresh(config: TrainConfig, num_classes: int, device: torch.device) -> nn.Module:
    return build_model(replace(config, model=replace(config.model, pretrained="")), num_classes, device)


def evaluate_checkpoint(path: Path, config: TrainConfig, weights: str, world: World, bar: Bar) -> dict[str, object]:
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
    batches.say = bar.line
    for note in batches.source.notes:
        bar.line(note)
    if config.data.limit_val:
        bar.line(f"data.limit_val: the accuracy is that of {len(batches.source.labels)} images, spread over all; 0 takes all")
    watched = bar.over(batches, len(batches), "batches evaluated")
    found = evaluate(network.model, watched, config.run, network.num_classes, world.device)
    if found.not_finite:
        raise checkpoint.CheckpointError(
            f"{path}: the network's output is not finite for {found.not_finite} of {found.total} images, so there is no accuracy to tell; "
            + ("its weights are spoilt" if config.run.amp == "none" else f"run.amp none computes without {config.run.amp}")
        )
    same = content is None or "data" not in content or not difference(content["data"]["val"], identity(batches.source))
    recorded = network.recorded if same else None
    for name, reason in batches.unreadable.items():
        bar.line(f"unreadable: {name}: {reason}")
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
        "classes": class_results(found.class_correct, found.class_total, names or network.class_names or batches.source.class_names),
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
