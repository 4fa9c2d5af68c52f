"""A checkpoint in use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import mvit3_kernels

from . import checkpoint
from .backends import served
from .config import TrainConfig
from .data import validation
from .distributed import World
from .evaluation import evaluate
from .network import build_model
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
            classes = config.model.num_classes or num_classes
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


def evaluate_checkpoint(path: Path, config: TrainConfig, weights: str, world: World, bar: Bar) -> dict[str, object]:
    """Accuracy on the validation images of a configuration, as plain values."""
    names = (checkpoint.read(path) or {}).get("class_names", ())
    batches = validation(config, names, rank=world.rank, world_size=world.size, device=world.device)
    present, data = len(batches.source.class_names), config.data.root or config.data.source
    network = Network.open(path, config, weights, world.device, present)
    if present > network.num_classes:
        raise checkpoint.CheckpointError(f"{path} has {network.num_classes} classes, the data in {data} has {present}")
    batches.say = bar.line
    for note in batches.source.notes:
        bar.line(note)
    watched = bar.over(batches, len(batches), "batches evaluated")
    found = evaluate(network.model, watched, config.run, network.num_classes, world.device)
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
        "classes": class_results(found.class_correct, found.class_total, network.class_names or batches.source.class_names),
        "unreadable": batches.unreadable,
        "recorded_accuracy": network.recorded,
        "reproduced": None if network.recorded is None else found.accuracy == network.recorded,
    }
