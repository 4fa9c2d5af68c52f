"""The training loop and the evaluation; thin, so that the time of a step is the time of the network."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F
from torch import nn

import mvit3_kernels

from .config import DemoConfig, UsageError
from .data import Dataset, Split, train_batches

EVAL_BATCH = 128  # fixed: the same batches, so the same numbers, wherever a checkpoint is evaluated
FINAL_LR = 0.01  # where the cosine ends, as a share of its peak


class TrainingError(RuntimeError):
    """Training cannot go on."""


def usable_cores() -> int:
    """Physical cores that this process may run on; two hyper-threads of a core share its vector units and count once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    try:
        cores = {Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in cpus}
    except OSError:
        cores = cpus
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        limit = math.ceil(int(quota) / int(period)) if quota != "max" else len(cores)
    except (OSError, ValueError):
        limit = len(cores)
    return max(1, min(len(cores), limit))


def prepare(device: str, threads: int) -> torch.device:
    """Sets the number of CPU threads and resolves the device."""
    torch.set_num_threads(threads or usable_cores())
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def use_ops(ops: str) -> AbstractContextManager:
    """Inside it every op is plain PyTorch ("reference"), or the best kernel that can take the call ("fused")."""
    return mvit3_kernels.backend("reference") if ops == "reference" else nullcontext()


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Of step 0 to total - 1: rises linearly over `warmup` steps to `peak`, then falls along half a cosine to FINAL_LR * peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, total - 1 - warmup)
    return peak * (FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * share)) / 2)


def build_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW in one fused call; norms and biases do not decay."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=True)


@dataclass(frozen=True)
class Evaluation:
    correct: int
    total: int
    loss: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split, ops: str) -> Evaluation:
    """Top-1 hits and mean cross-entropy on a split."""
    model.eval()
    correct, loss = 0, 0.0
    with use_ops(ops):
        for images, labels in zip(split.images.split(EVAL_BATCH), split.labels.split(EVAL_BATCH), strict=True):
            logits = model(images).float()
            correct += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return Evaluation(correct, len(split), loss / len(split))


@dataclass
class History:
    """What a run has done: loss, learning rate and seconds of each step, the evaluation after each epoch."""

    losses: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)


class Run:
    """One network in training. Two runs of the same configuration see the same initial weights, batches, augmentation and dropout."""

    def __init__(self, ops: str, config: DemoConfig, data: Dataset) -> None:
        self.ops, self.config, self.data, self.history = ops, replace(config, ops=ops), data, History()
        torch.manual_seed(config.seed)
        model = mvit3_kernels.create_model(config.model, data.num_classes, drop_rate=config.drop_rate, proj_drop_rate=config.proj_drop_rate)
        self.model = model.to(data.train.images.device, memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.model, config.weight_decay)
        self.steps_per_epoch = len(data.train) // config.batch_size
        self.total_steps = config.epochs * self.steps_per_epoch
        self.warmup_steps = min(round(config.warmup_epochs * self.steps_per_epoch), self.total_steps - 1)

    @property
    def images_per_second(self) -> float:
        """Of the median step, from drawing the batch to the updated weights."""
        return self.config.batch_size / median(self.history.seconds)

    @property
    def epochs(self) -> int:
        """Epochs done."""
        return len(self.history.evaluations)

    def epoch_loss(self, epoch: int = -1) -> float:
        """Mean training loss of an epoch."""
        steps, first = self.steps_per_epoch, epoch % self.epochs * self.steps_per_epoch
        return mean(self.history.losses[first : first + steps])

    def train_epoch(self, on_step: Callable[[Run], None] = lambda run: None) -> None:
        """One pass over the training images, then an evaluation."""
        # Seeded by the epoch alone, so that the runs may take turns and share torch's generator (dropout draws from it).
        seed = self.config.seed * 1_000_003 + self.epochs
        torch.manual_seed(seed)
        self.model.train()
        with use_ops(self.ops):
            started = time.perf_counter()
            for images, labels in train_batches(self.data.train, self.config.batch_size, seed):
                self._step(images, labels)
                self.history.seconds.append(time.perf_counter() - started)
                on_step(self)
                started = time.perf_counter()
        self.history.evaluations.append(evaluate(self.model, self.data.val, self.ops))

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        step, config = len(self.history.losses), self.config
        lr = learning_rate(step, self.total_steps, self.warmup_steps, config.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = F.cross_entropy(self.model(images), labels, label_smoothing=config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        value = loss.item()  # waits until a GPU has finished the step, so that the time of a step is its own
        if not math.isfinite(value):
            raise TrainingError(f"the loss of the {self.ops} run is {value} at step {step + 1} of {self.total_steps}; try a lower --lr")
        self.history.losses.append(value)
        self.history.lrs.append(lr)

    def checkpoint(self) -> dict[str, object]:
        """The run as it stands, as a checkpoint."""
        return {
            "state_dict": self.model.state_dict(),
            "model": self.config.model,
            "num_classes": self.data.num_classes,
            "config": {**asdict(self.config), "output": str(self.config.output)},
            "epoch": self.epochs,
            "accuracy": self.history.evaluations[-1].accuracy,
        }


def start(config: DemoConfig, data: Dataset) -> list[Run]:
    """The runs of a configuration, before their first step."""
    if config.limit_train > len(data.train):
        raise UsageError(f"--limit-train must be at most the number of training images, {len(data.train)}, got {config.limit_train}")
    data = replace(data, train=data.train.take(config.limit_train))
    if config.batch_size > len(data.train):
        raise UsageError(f"--batch-size must be at most the number of training images, {len(data.train)}, got {config.batch_size}")
    return [Run(ops, config, data) for ops in config.runs]


def train(runs: list[Run], on_step: Callable[[Run], None], on_epoch: Callable[[list[Run]], None]) -> None:
    """Trains the runs side by side. They take turns by the epoch, and in going first, so that the machine's noise hits both alike."""
    for epoch in range(runs[0].config.epochs):
        for run in runs if epoch % 2 == 0 else reversed(runs):
            run.train_epoch(on_step)
        on_epoch(runs)
