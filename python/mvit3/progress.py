"""Where a run is, and whom it tells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from .trainer import Trainer

T = TypeVar("T")


@dataclass
class Progress:
    """Where a run is. `batch`: batches of this epoch that are done; `history`: a row for each epoch that was
    evaluated."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    weights: str = ""  # TRAINED or AVERAGE: the better ones of the last evaluation, by which the run is judged
    best: float = -1.0
    best_epoch: int = 0
    best_weights: str = ""
    skipped: int = 0
    unreadable: int = 0
    loss_sum: float = 0.0  # of the epoch so far, over its `steps` steps that counted
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    history: list[dict[str, object]] = field(default_factory=list)
    confusion: list[list[int]] | None = None
    class_correct: list[int] = field(default_factory=list)  # of the last evaluation, of the weights that it judged by
    class_total: list[int] = field(default_factory=list)
    classes: list[dict[str, object]] = field(default_factory=list)  # the same of dense prediction, with its scores
    samples: dict[str, list[dict[str, object]]] = field(default_factory=dict)  # as gallery.py makes them
    starts: int = 1
    total_seconds: float = 0.0  # of all starts, evaluation and saving included


class Listener:
    """What a run tells, in the first process only: this one listens to nothing."""

    def say(self, text: str) -> None:
        """A line that a person should read."""

    def on_step(self, trainer: Trainer, images: int, seconds: float) -> None:
        """After each step: its images over all processes, and its time, waiting for data included."""

    def on_loss(self, trainer: Trainer, loss: float, lr: float) -> None:
        """Every `run.log_steps` steps: mean loss of the steps since the last time, and the learning rate."""

    def evaluating(self, trainer: Trainer, batches: Iterable[T], total: int) -> Iterator[T]:
        """The `total` batches of an evaluation, as they are taken."""
        return iter(batches)

    def on_epoch(self, trainer: Trainer) -> None:
        """After each epoch, when its row is in the history and its checkpoint on disk."""
