"""What a run shows while it goes, and the records that it keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from . import logs
from .ema import INITIAL_SHARE
from .progress import Listener
from .screen import Bar, count, number, percent, rate

if TYPE_CHECKING:
    from .trainer import Trainer

T = TypeVar("T")
NO_SCALARS = ("epoch", "step", "lr", "weights")  # of a row of the history


class Reporter(Listener):
    """Shows a run as it goes, and keeps its records: history.csv, events of TensorBoard, a run of Weights & Biases."""

    def __init__(self, quiet: bool) -> None:
        self.bar, self.boards, self.rate = Bar(quiet), [], 0.0

    def begin(self, trainer: Trainer) -> None:
        config, world = trainer.config, trainer.world
        processes = count(world.size, "process")
        parts = f"{config.data.batch_size} images x {processes} x {config.run.accumulate} batches"
        rule = config.optimizer.lr_rule
        rule = "" if rule == "constant" else f" ({config.optimizer.lr:g} for {config.optimizer.lr_batch}, {rule})"
        self.say(
            f"{parts} = {trainer.effective_batch} images per step; learning rate "
            f"{trainer.factor * config.optimizer.lr:g}{rule}"
        )
        if config.run.tensorboard:
            self.boards.append(logs.TensorBoard(trainer.folder / "tensorboard", trainer.progress.step))
        if config.run.wandb:
            self.boards.append(
                logs.WeightsAndBiases(config.run.wandb, trainer.folder, config.to_dict(), trainer.progress.step)
            )
        self.bar.begin(trainer.total_steps, trainer.progress.step)

    def say(self, text: str) -> None:
        self.bar.line(text)

    def on_step(self, trainer: Trainer, images: int, seconds: float) -> None:
        p = trainer.progress
        self.rate = images / seconds if not self.rate else 0.9 * self.rate + 0.1 * images / seconds
        parts = [f"epoch {p.epoch + 1}/{trainer.config.schedule.epochs}"]
        if p.steps:  # the mean over this epoch's steps, whichever start of the run made them
            parts.append(f"loss {p.loss_sum / p.steps:.3f}")
        parts += [f"{rate(self.rate)} img/s", f"lr {trainer.optimizer.param_groups[0]['lr']:.1e}"]
        self.bar.update("  ".join([*parts, f"waiting for data {percent(p.wait_seconds / p.seconds)}"]))

    def on_loss(self, trainer: Trainer, loss: float, lr: float) -> None:
        for board in self.boards:
            board.add(trainer.progress.step, loss=loss, lr=lr)

    def evaluating(self, trainer: Trainer, batches: Iterable[T], total: int) -> Iterator[T]:
        p = trainer.progress
        for done, batch in enumerate(batches):
            self.bar.update(
                f"epoch {p.epoch + 1}/{trainer.config.schedule.epochs}  evaluating, batch {done + 1} of {total}", 0
            )
            yield batch

    def on_epoch(self, trainer: Trainer) -> None:
        row, epochs = trainer.progress.history[-1], str(trainer.config.schedule.epochs)
        logs.write_csv(trainer.folder / "history.csv", trainer.progress.history)
        for board in self.boards:
            board.add(row["step"], **{key: value for key, value in row.items() if key not in NO_SCALARS})
        # Columns of one width, so that the lines of a run are a table.
        parts = [f"epoch {row['epoch']:{len(epochs)}}/{epochs}", f"loss {number(row['train_loss'], 3):>7}"]
        scores = trainer.task.scores
        if row["total"] is not None:
            parts.append(f"{scores.name} {percent(row[scores.best]):>7}")
            if trainer.ema:
                parts.append(f"average {percent(row[f'ema_{scores.best}']):>7}")
        if row["images_per_second"]:
            parts.append(f"{rate(row['images_per_second']):>6} img/s  waiting for data {percent(row['data_wait']):>6}")
        if trainer.ema and (row["ema_initial_share"] or 0) > INITIAL_SHARE:
            parts.append(f"{percent(row['ema_initial_share'])} of the average are initial weights")
        if row["skipped_steps"]:
            parts.append(f"{row['skipped_steps']} steps skipped")
        if row["unreadable_images"]:
            parts.append(f"{row['unreadable_images']} images unreadable")
        self.say("  ".join(parts))

    def close(self) -> None:
        self.bar.close()
        for board in self.boards:
            board.close()
