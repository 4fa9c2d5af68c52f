"""The learning rate of every step, a function of the step alone: nothing of it needs to be saved."""

from __future__ import annotations

import math

import torch
from timm.scheduler import create_scheduler_v2

from .config import OptimizerConfig, ScheduleConfig


def rate_factor(config: OptimizerConfig, effective_batch: int) -> float:
    """What the three learning rates of a recipe are multiplied by, for the images per step over all processes."""
    ratio = effective_batch / config.lr_batch
    return {"constant": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.lr_rule]


class Schedule:
    """Sets the learning rate of an optimiser as `ScheduleConfig` defines it; the cosine is timm's."""

    def __init__(self, config: ScheduleConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int, factor: float = 1.0) -> None:
        self.steps_per_epoch, self.by_epoch, self.warmup_lr = steps_per_epoch, config.update == "epoch", factor * config.warmup_lr
        self.warmup = config.warmup_iterations or round(config.warmup_epochs * steps_per_epoch)
        self.peaks = [group["lr"] for group in optimizer.param_groups]  # with the factor already in it
        begin = config.warmup_epochs if self.by_epoch else self.warmup
        self.begin = begin if config.cosine_after_warmup else 0
        length = config.epochs * (1 if self.by_epoch else steps_per_epoch)
        # A warm-up as long as the training leaves nothing to the cosine.
        self.cosine, _ = create_scheduler_v2(optimizer, "cosine", max(length - self.begin, 1), min_lr=factor * config.min_lr)

    def set(self, step: int) -> float:
        """Before step `step`, counted from 0; returns the learning rate of the first group."""
        if step < self.warmup:
            share = step / self.warmup
            self.cosine.update_groups([self.warmup_lr + share * (peak - self.warmup_lr) for peak in self.peaks])
        else:
            self.cosine.step((step // self.steps_per_epoch if self.by_epoch else step) - self.begin)
        return float(self.cosine.optimizer.param_groups[0]["lr"])
