"""A checkpoint in use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import mvit3_kernels
from mvit3_kernels.models.checkpoint import count_outputs

from . import checkpoint
from .config import TrainConfig
from .network import build_model, load_weights
from .options import UsageError
from .runtime import precision
from .scores import scores_of


@dataclass(frozen=True)
class Network:
    """A network of a checkpoint, in evaluation mode. `recorded`: the score of these weights after the epoch whose end
    was saved."""

    model: nn.Module
    config: TrainConfig
    num_classes: int
    class_names: tuple[str, ...]  # empty where the checkpoint does not tell them
    weights: str  # "average", "trained", or of what a file of another origin holds
    recorded: float | None
    categories: tuple[int, ...] = ()  # of detection: the ids that the classes have in their data set

    @staticmethod
    def open(path: Path, config: TrainConfig, weights: str, device: torch.device, num_classes: int = 1000) -> Network:
        """From a checkpoint; `num_classes` is that of one of another origin, where `model.num_classes` does not tell
        it.

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
        chosen = {"auto": checkpoint.better_weights(content), "ema": checkpoint.AVERAGE, "raw": checkpoint.TRAINED}[
            weights
        ]
        average = chosen == checkpoint.AVERAGE
        model = _fresh(config, content["num_classes"], device)
        load_weights(model, content[checkpoint.ENTRIES[chosen]], str(path), config.model.name)
        progress = content["progress"]
        row = progress["history"][-1] if progress["history"] and not progress["batch"] else {}
        best = scores_of(config.model.name).best
        recorded = row.get(f"ema_{best}" if average else best)
        classes, names = content["num_classes"], tuple(content["class_names"])
        categories = tuple(content.get("categories", ()))
        return Network(model.eval(), config, classes, names, chosen, recorded, categories)


@torch.inference_mode()
def serve(network: Network, say: Callable[[str], None]) -> None:
    """Makes a network that only predicts one program of the inference engine, on a CPU where ops are fused and nothing
    is cast; `say` is told what it became."""
    run, model = network.config.run, network.model
    device = next(model.parameters()).device
    if device.type != "cpu" or run.ops != "fused" or precision(run, device) is not None:
        return
    mvit3_kernels.fuse(model)
    side = network.config.data.crop
    found = mvit3_kernels.explain(model, torch.zeros(1, 3, side, side))
    reasons = [row.reason for row in found if row.kind == "network" and row.ran == "ordinary path"]
    say(f"the network runs op by op: {reasons[0]}" if reasons else "the network runs as one program, in float32")


def _fresh(config: TrainConfig, num_classes: int, device: torch.device) -> nn.Module:
    return build_model(replace(config, model=replace(config.model, pretrained="")), num_classes, device)
