"""The parts of a task, and the loop of its evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ..config import RunConfig, TrainConfig
from ..data import Loaders
from ..distributed import World
from ..errors import Stopped
from ..network import evaluation_mode
from ..runtime import autocast, use_ops
from ..scores import Scores


@dataclass(frozen=True)
class Evaluation:
    """What the evaluation of a network found.

    Attributes:
        values: by their keys in the history; None where there is none.
        rank: of two evaluations the better one has the larger.
        total: images; not_finite: those with an output that is NaN or infinite.
        kept: what a run's progress keeps of it, by the names of its fields.
        remarks: what a person should know about it.
    """

    values: dict[str, float | int | None]
    rank: tuple[float, ...]
    total: int
    not_finite: int = 0
    kept: dict[str, object] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


class Criterion(Protocol):
    """Makes targets of a batch, and is the loss of a network's outputs against them."""

    mixup: object  # what draws from numpy's generator, or None

    def begin_epoch(self, epoch: int) -> None: ...

    def mix(self, images: Tensor, labels: object) -> tuple[Tensor, Tensor]:
        """Images and targets, one tensor, which a recorded step can take."""

    def __call__(self, outputs: object, targets: Tensor) -> Tensor: ...


class Meter(ABC):
    """Takes up an evaluation, batch by batch."""

    @abstractmethod
    def update(self, model: nn.Module, images: Tensor, *labels: object) -> None:
        """A batch of an evaluation loader."""

    @abstractmethod
    def result(self) -> Evaluation:
        """Of the batches of all processes."""


class Task(ABC):
    """What networks of a kind are trained for."""

    scores: Scores
    background = 0  # outputs beside the classes that the data names
    lost = "left out"  # what becomes of images without finite outputs in an evaluation
    stride: int | None  # side of the largest image whose last normalised map is one pixel; None: that of each is

    def check(self, config: TrainConfig, loaders: Loaders) -> None:
        """UsageError where the data cannot be learnt."""
        return

    def recorded(self, loaders: Loaders) -> dict[str, object]:
        """What a checkpoint keeps of the data, beside the names of the classes."""
        return {}

    @abstractmethod
    def criterion(
        self, config: TrainConfig, model: nn.Module, loaders: Loaders, num_classes: int, device: torch.device
    ) -> Criterion:
        """The loss of a run."""

    def network(self, model: nn.Module) -> nn.Module:
        """What is called in training: its outputs are what the criterion reads."""
        return model

    @abstractmethod
    def meter(
        self, config: TrainConfig, num_classes: int, names: Sequence[str], source: object, world: World, gallery: bool
    ) -> Meter:
        """An evaluation that begins.

        Args:
            names: of the classes of the data; source: the images of the validation.
            gallery: collect images for the report.
        """

    @abstractmethod
    def classes(self, progress: object, names: Sequence[str]) -> list[dict[str, object]]:
        """The scores of each class in the last evaluation of a run, as plain values."""


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterator[tuple],
    config: RunConfig,
    meter: Meter,
    device: torch.device,
    stopped: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Evaluates a network on the batches of all processes; Stopped as soon as `stopped` says so."""
    evaluation_mode(model)
    with use_ops(config.ops), autocast(config, device):
        for images, *labels in batches:
            if stopped():
                raise Stopped
            meter.update(model, images if config.channels_last else images.contiguous(), *labels)
    return meter.result()
