"""What a command can be told: every option with its type, default, help text and bounds, in one place.

The command line is built from these classes (cli.py); a configuration is checked as soon as it exists, before any work.
"""

import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import torch

from mvit3_kernels import list_models

from .data import DATASETS
from .options import Option, UsageError, nearest, options


def _check_device(name: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        close = nearest(name, ("auto", "cpu", "cuda"))
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N; got {name!r}, the nearest is {close!r}")
    if name.startswith("cuda") and int(name[5:] or 0) >= torch.cuda.device_count():
        present = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise UsageError(f"--device {name} does not exist here; there is {present}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that all commands share."""

    device: Annotated[str, Option("where to run: cpu, cuda or cuda:N; auto takes a GPU where there is one")] = "auto"
    threads: Annotated[int, Option("CPU threads; 0: one for each physical core that this process may use", minimum=0)] = 0

    def __post_init__(self) -> None:
        for (flag, _, _, option), f in zip(options(type(self)), fields(self), strict=True):
            option.check(flag, getattr(self, f.name))
        _check_device(self.device)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Options):
    """Options of `mvit3 train`; the defaults are the demonstration on handwritten digits."""

    data: Annotated[str, Option("data set", tuple(DATASETS))] = "digits"
    model: Annotated[str, Option("network", list_models())] = "mobilevitv3_xxs"
    ops: Annotated[str, Option("fused ops, reference ops, or both from the same seed", ("fused", "reference", "both"))] = "both"
    epochs: Annotated[int, Option("passes over the training images", minimum=1)] = 20
    batch_size: Annotated[int, Option("images per step; a ragged last batch is left out", minimum=2)] = 64
    lr: Annotated[float, Option("peak of AdamW's learning rate: linear warm-up, then half a cosine", minimum=1e-7, below=1)] = 3e-3
    warmup_epochs: Annotated[float, Option("epochs of warm-up", minimum=0)] = 2.0
    weight_decay: Annotated[float, Option("decay of matrices and filters, not of norms and biases", minimum=0)] = 0.05
    label_smoothing: Annotated[float, Option("share of the target spread over all classes", minimum=0, below=1)] = 0.1
    drop_rate: Annotated[float, Option("dropout before the classifier; the short demo needs none", minimum=0, below=1)] = 0.0
    proj_drop_rate: Annotated[float, Option("dropout behind attention and feed-forward; the demo needs none", minimum=0, below=1)] = 0.0
    seed: Annotated[int, Option("of weights, batches, augmentation, dropout; the split is fixed", minimum=0, below=2**31)] = 0
    limit_train: Annotated[int, Option("use only so many training images; 0: all", minimum=0)] = 0
    output: Annotated[Path, Option("folder for checkpoints, curves.png and report.json")] = Path("runs/digits")

    def __post_init__(self) -> None:
        super().__post_init__()
        existing = self.output.absolute()
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise UsageError(f"--output {self.output}: {existing} is not a folder that can be written")

    @property
    def runs(self) -> tuple[str, ...]:
        return ("reference", "fused") if self.ops == "both" else (self.ops,)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Options):
    """Options of `mvit3 evaluate`."""

    checkpoint: Annotated[Path, Option("checkpoint that `mvit3 train` wrote")]
    data: Annotated[str, Option("data set, whose validation part is used", tuple(DATASETS))] = "digits"
    ops: Annotated[str, Option("trained: those of the checkpoint's training", ("trained", "fused", "reference"))] = "trained"
