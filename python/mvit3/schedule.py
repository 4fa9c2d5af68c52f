"""The learning rate of every step, a function of the step alone: nothing of it needs to be saved."""

from __future__ import annotations

import math

import torch
from timm.scheduler import create_scheduler_v2

from .config import OptimizerConfig, ScheduleConfig

SHORT_WARMUP = 0.1  # share of the training that a warm-up which is too long is shortened to


def rate_factor(config: OptimizerConfig, effective_batch: int) -> float:
    """What the three learning rates of a recipe are multiplied by, for the images per step over all processes."""
    ratio = effective_batch / config.lr_batch
    return {"constant": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.lr_rule]


class Schedule:
    """Sets the learning rate of an optimiser as `ScheduleConfig` defines it; the decay is timm's.

    `note`: what a person should know of it, empty where there is nothing.
    """

    def __init__(
        self, config: ScheduleConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int, factor: float = 1.0
    ) -> None:
        self.steps_per_epoch, self.by_epoch, self.warmup_lr = (
            steps_per_epoch,
            config.update == "epoch",
            factor * config.warmup_lr,
        )
        self.warmup, total = (
            config.warmup_iterations or round(config.warmup_epochs * steps_per_epoch),
            config.epochs * steps_per_epoch,
        )
        self.peaks = [group["lr"] for group in optimizer.param_groups]  # with the factor already in it
        begin_epoch = config.warmup_epochs
        self.note = ""
        if self.warmup >= total:
            said = f"the warm-up of {self.warmup} steps is as long as the training of {total} or longer"
            if config.shorten_warmup:
                self.warmup = max(1, round(SHORT_WARMUP * total))
                begin_epoch = self.warmup / steps_per_epoch
                self.note = f"{said}: shortened to {self.warmup}, as schedule.shorten_warmup asks"
            else:
                end = self.warmup_lr + (total - 1) / self.warmup * (self.peaks[0] - self.warmup_lr)
                self.note = (
                    f"{said}: the learning rate only rises, to {end:.2g} of {self.peaks[0]:.2g}; set "
                    "schedule.warmup_iterations or "
                    "schedule.warmup_epochs, or --schedule.shorten_warmup true"
                )
        begin = begin_epoch if self.by_epoch else self.warmup
        self.begin = begin if config.cosine_after_warmup else 0
        unit = 1 if self.by_epoch else steps_per_epoch
        # A warm-up as long as the training leaves nothing to the decay.
        self.decay, _ = create_scheduler_v2(
            optimizer,
            config.name,
            max(config.epochs * unit - self.begin, 1),
            decay_epochs=config.decay_epochs * unit,
            # timm takes them one unit early
            decay_milestones=[epoch * unit + 1 for epoch in sorted(config.decay_milestones)],
            decay_rate=config.power if config.name == "poly" else config.decay_rate,
            min_lr=factor * config.min_lr,
        )

    def set(self, step: int) -> float:
        """Before step `step`, counted from 0; returns the learning rate of parameters without a scale of their own."""
        if step < self.warmup:
            share = step / self.warmup
            self.decay.update_groups([self.warmup_lr + share * (peak - self.warmup_lr) for peak in self.peaks])
        else:
            self.decay.step((step // self.steps_per_epoch if self.by_epoch else step) - self.begin)
        return self.rate

    @property
    def rate(self) -> float:
        """The learning rate of parameters without a scale of their own."""
        group = self.decay.optimizer.param_groups[0]
        return float(group["lr"]) / group.get("lr_scale", 1.0)
