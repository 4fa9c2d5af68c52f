"""A checkpoint in use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import mvit3_kernels
from mvit3_kernels.inference import bfloat16_why_not
from mvit3_kernels.models.checkpoint import count_outputs

from . import checkpoint
from .config import RunConfig, TrainConfig
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


def products(dtype: str, run: RunConfig, device: torch.device) -> torch.dtype | str | None:
    """What a program on `device` multiplies, as `fuse` takes it: of `--dtype`. None where there is no program: on a
    GPU, with reference ops, under autocast.

    Raises:
        UsageError: `dtype` is given, and there is no program or this CPU has no such products.
    """
    if device.type == "cpu" and run.ops == "fused" and precision(run, device) is None:
        if dtype == "bfloat16" and (reason := bfloat16_why_not()) is not None:
            raise UsageError(f"--dtype {reason}; auto takes float32 here")
        return dtype if dtype == "auto" else {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if dtype != "auto":
        raise UsageError(
            f"--dtype {dtype} is of a network's program, which there is on a CPU with --run.ops fused and --run.amp "
            f"none; got {device}, {run.ops}, {run.amp}"
        )
    return None


@torch.inference_mode()
def serve(network: Network, dtype: torch.dtype | str, say: Callable[[str], None]) -> None:
    """Makes a network that only predicts one program of the inference engine, its products of `dtype`; `say` is told
    what it became."""
    model, side = network.model, network.config.data.crop
    mvit3_kernels.fuse(model, dtype=dtype)
    found = [row for row in mvit3_kernels.explain(model, torch.zeros(1, 3, side, side)) if row.kind == "network"]
    reasons = [row.reason for row in found if row.ran == "ordinary path"]
    multiplies = "bfloat16" if any(row.ran == "fused, bfloat16" for row in found) else "float32"
    say(f"the network runs op by op: {reasons[0]}" if reasons else f"the network runs as one program, in {multiplies}")


def _fresh(config: TrainConfig, num_classes: int, device: torch.device) -> nn.Module:
    return build_model(replace(config, model=replace(config.model, pretrained="")), num_classes, device)
