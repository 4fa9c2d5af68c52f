"""What a person sees of a run: progress, the table, the report."""

from __future__ import annotations

import html
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from . import checkpoint, logs
from .ema import INITIAL_SHARE
from .progress import Listener

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # imported for a plot only, it takes a second

    from .trainer import Trainer

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
}
BLUE, ORANGE = "#0072B2", "#E69F00"  # Okabe and Ito: told apart by everyone, and in print


def table(rows: list[list[str]]) -> str:
    """Rows of cells under a header row; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


class Bar:
    """A progress bar on stderr with lines above it; silent when `quiet`."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.bar = quiet, None

    def begin(self, total: int, done: int = 0) -> None:
        self.bar = tqdm(
            total=total,
            initial=done,
            disable=self.quiet,
            bar_format="{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}  {desc}",
            mininterval=0.2 if sys.stderr.isatty() else 10,
        )

    def line(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text, file=sys.stderr)

    def update(self, text: str) -> None:
        if self.bar is not None:
            self.bar.set_description_str(text, refresh=False)
            self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Reporter(Listener):
    """Shows a run as it goes, and keeps its records: history.csv, TensorBoard events."""

    def __init__(self, quiet: bool) -> None:
        self.bar, self.board, self.loss, self.rate, self.lr = Bar(quiet), None, float("nan"), 0.0, 0.0

    def begin(self, trainer: Trainer) -> None:
        config, world = trainer.config, trainer.world
        parts = f"{config.data.batch_size} images x {world.size} process{'es' if world.size > 1 else ''} x {config.run.accumulate} batches"
        rule = config.optimizer.lr_rule
        rule = "" if rule == "constant" else f" ({config.optimizer.lr:g} for {config.optimizer.lr_batch}, {rule})"
        self.say(f"{parts} = {trainer.effective_batch} images per step; learning rate {trainer.factor * config.optimizer.lr:g}{rule}")
        if config.run.tensorboard:
            self.board = logs.TensorBoard(trainer.folder / "tensorboard", trainer.progress.step)
        self.bar.begin(trainer.total_steps, trainer.progress.step)

    def say(self, text: str) -> None:
        self.bar.line(text)

    def on_step(self, trainer: Trainer, images: int, seconds: float) -> None:
        p = trainer.progress
        self.rate = images / seconds if not self.rate else 0.9 * self.rate + 0.1 * images / seconds
        self.bar.update(
            f"epoch {p.epoch + 1}/{trainer.config.schedule.epochs}  {rate(self.rate)} img/s  lr {self.lr:.1e}  loss {self.loss:.3f}  "
            f"waiting for data {p.wait_seconds / p.seconds:.0%}"
        )

    def on_loss(self, trainer: Trainer, loss: float, lr: float) -> None:
        self.loss, self.lr = loss, lr
        if self.board:
            self.board.add(trainer.progress.step, loss=loss, lr=lr)

    def on_epoch(self, trainer: Trainer) -> None:
        row = trainer.progress.history[-1]
        logs.write_csv(trainer.folder / "history.csv", trainer.progress.history)
        if self.board:
            self.board.add(row["step"], **{key: value for key, value in row.items() if key not in ("epoch", "step", "lr", "weights")})
        parts = [f"epoch {row['epoch']:3}/{trainer.config.schedule.epochs}", f"loss {number(row['train_loss'], 3)}"]
        if row["accuracy"] is not None:
            parts.append(f"accuracy {percent(row['accuracy'])}" + (f" (average {percent(row['ema_accuracy'])})" if trainer.ema else ""))
        if trainer.ema and (row["ema_initial_share"] or 0) > INITIAL_SHARE:
            parts.append(f"{percent(row['ema_initial_share'])} of the average are initial weights")
        if row["images_per_second"]:
            parts.append(f"{rate(row['images_per_second'])} img/s, {row['data_wait']:.0%} waiting for data")
        if row["skipped_steps"]:
            parts.append(f"{row['skipped_steps']} steps skipped")
        if row["unreadable_images"]:
            parts.append(f"{row['unreadable_images']} images unreadable")
        self.say("  ".join(parts))

    def close(self) -> None:
        self.bar.close()
        if self.board:
            self.board.close()


def summary(trainer: Trainer, backend: str, finished: bool, seconds: float) -> dict[str, object]:
    """The result as plain values, for report.json and --json."""
    config, p = trainer.config, trainer.progress
    last = p.history[-1] if p.history else {}
    best = trainer.folder / checkpoint.BEST
    return {
        "model": config.model.name,
        "data": config.data.root or config.data.source,
        "num_classes": trainer.num_classes,
        "train_images": trainer.loaders.images_per_epoch,
        "epochs": p.epoch,
        "steps": p.step,
        "finished": finished,
        "resumes": config.run.resume == "auto",
        "batch_size": config.data.batch_size,
        "effective_batch": trainer.effective_batch,
        "processes": trainer.world.size,
        "seed": config.run.seed,
        "device": torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else trainer.device.type,
        "threads": torch.get_num_threads(),
        "precision": config.run.amp,
        "ops": config.run.ops,
        "backend": backend,
        "seconds": seconds,
        "accuracy": last.get("ema_accuracy" if p.weights == checkpoint.AVERAGE else "accuracy"),
        "weights": p.weights or None,
        "ema_initial_share": last.get("ema_initial_share"),
        "best_accuracy": p.best if p.best_epoch else None,
        "best_weights": p.best_weights or None,
        "best_epoch": p.best_epoch or None,
        "skipped_steps": p.skipped,
        "unreadable": trainer.loaders.train.unreadable | trainer.loaders.val.unreadable,
        "checkpoint": str(trainer.folder / checkpoint.LAST),
        "best_checkpoint": str(best) if p.best_epoch and best.exists() else None,
        "report": str(trainer.folder / "report.html"),
        "history": p.history,
    }


def _rows(result: dict[str, object]) -> list[list[str]]:
    last = result["history"][-1]
    rows = [["weights", "accuracy", "top 5", "val loss"]]
    for name, prefix in (("trained", ""), ("average", "ema_")):
        if last[f"{prefix}accuracy"] is not None:
            values = (last[f"{prefix}{key}"] for key in ("accuracy", "accuracy5", "val_loss"))
            accuracy, accuracy5, loss = values
            used = " (used)" if name == result["weights"] else ""
            rows.append([name + used, percent(accuracy), percent(accuracy5), number(loss)])
    return rows


def _facts(result: dict[str, object]) -> list[str]:
    last = result["history"][-1] if result["history"] else {}
    steps = f"{result['epochs']} epochs, {result['steps']} steps of {result['effective_batch']} images, seed {result['seed']}"
    machine = f"{result['device']}, {result['processes']} x {result['threads']} CPU threads, precision {result['precision']}"
    facts = [
        f"{result['model']} on {result['data']}: {result['train_images']} training images, {steps}",
        f"{machine}, {result['seconds']:.0f} s in all",
        f"{result['ops']} ops served by {result['backend']}",
    ]
    if last.get("images_per_second"):
        facts.append(
            f"{rate(last['images_per_second'])} images per second, {last['data_wait']:.1%} of the time waiting for data (last epoch)"
        )
    if result["best_epoch"]:
        facts.append(
            f"best accuracy {percent(result['best_accuracy'])} after epoch {result['best_epoch']}, {result['best_weights']} weights"
        )
    if (result["ema_initial_share"] or 0) > INITIAL_SHARE:
        facts.append(f"{percent(result['ema_initial_share'])} of the averaged weights are still the initial ones")
    if result["skipped_steps"]:
        facts.append(f"{result['skipped_steps']} steps skipped, whose gradient was not finite")
    facts += [f"unreadable: {name}: {reason}" for name, reason in result["unreadable"].items()]
    return facts


def summary_text(result: dict[str, object]) -> str:
    """The result as a table and a few lines."""
    lines = _facts(result)
    if result["history"]:
        lines[2:2] = ["", table(_rows(result)), ""]
    if not result["finished"]:
        again = "the same command" if result["resumes"] else "the same command with --run.resume auto"
        lines.append(f"stopped before the end; {again} goes on from here")
    lines += ["", f"checkpoint  {result['checkpoint']}"]
    if result["best_checkpoint"]:
        lines.append(f"best        {result['best_checkpoint']}")
    if result["history"]:
        lines.append(f"report      {result['report']}")
    return "\n".join(lines)


def _curves(history: list[dict[str, object]]) -> Figure:
    """Loss, accuracy, learning rate and speed by the epoch."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    (loss, accuracy), (lr, speed) = axes

    def draw(axis, key: str, label: str, color: str, style: str = "-") -> None:
        points = [(row["epoch"], row[key]) for row in history if row[key] is not None]
        if points:
            axis.plot(*zip(*points, strict=True), style, color=color, label=label, marker="o" if len(points) < 3 else "")

    draw(loss, "train_loss", "training, as the recipe mixes and smooths it", ORANGE)
    draw(loss, "val_loss", "validation", BLUE)
    draw(loss, "ema_val_loss", "validation, average", BLUE, "--")
    draw(accuracy, "accuracy", "trained", BLUE)
    draw(accuracy, "ema_accuracy", "average", BLUE, "--")
    draw(lr, "lr", "", ORANGE)
    draw(speed, "images_per_second", "", BLUE)
    loss.set_title("cross-entropy")
    accuracy.set_title("validation accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    lr.set_title("learning rate at the end of the epoch")
    speed.set_title("images per second")
    speed.set_ylim(bottom=0)
    for axis in axes.flat:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (loss, accuracy):
        axis.legend(frameon=False)
    return figure


def _confusion(counts: list[list[int]], names: list[str]) -> Figure:
    """True classes by row, predicted ones by column."""
    from matplotlib import pyplot as plt

    size = max(4.0, 0.42 * len(names))
    figure, axis = plt.subplots(figsize=(size, size), layout="constrained")
    shares = torch.tensor(counts, dtype=torch.float64)
    shares /= shares.sum(1, keepdim=True).clamp_min(1)
    axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.grid(visible=False)
    axis.set(xlabel="predicted", ylabel="true", xticks=range(len(names)), yticks=range(len(names)))
    axis.set_xticklabels(names, rotation=90)
    axis.set_yticklabels(names)
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            if count:
                axis.text(j, i, str(count), ha="center", va="center", fontsize=8, color="white" if shares[i, j] > 0.5 else "black")
    return figure


def _svg(draw, *arguments) -> str:
    """A figure as SVG that can stand inside HTML."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE | {"svg.fonttype": "none"}):
        figure = draw(*arguments)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _html_table(rows: list[list[str]]) -> str:
    lines = ("".join(f"<{'td' if i else 'th'}>{html.escape(cell)}</{'td' if i else 'th'}>" for cell in row) for i, row in enumerate(rows))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def write_html(path: Path, result: dict[str, object], confusion: list[list[int]] | None, class_names: list[str]) -> None:
    """The report of a run: one file that needs no other."""
    keys = [key for key in result["history"][0] if any(row[key] is not None for row in result["history"])]
    epochs = [[key.replace("_", " ") for key in keys]]
    for row in result["history"]:
        epochs.append(["" if row[k] is None else f"{row[k]:.5g}" if isinstance(row[k], float) else str(row[k]) for k in keys])
    parts = [
        f"<h1>{html.escape(str(result['model']))} on {html.escape(str(result['data']))}</h1>",
        *(f"<p>{html.escape(fact)}</p>" for fact in _facts(result)),
        _html_table(_rows(result)),
        _svg(_curves, result["history"]),
    ]
    if confusion:
        parts += ["<h2>Which class is taken for which, last epoch</h2>", _svg(_confusion, confusion, class_names)]
    parts += ["<h2>Epochs</h2>", _html_table(epochs)]
    style = (
        "body{font:15px sans-serif;margin:2em auto;max-width:1100px;padding:0 1em;color:#222}td,th{padding:.25em .7em;text-align:right;"
        "border-bottom:1px solid #ddd}table{border-collapse:collapse;margin:1em 0}svg{max-width:100%;height:auto}"
    )
    head = f'<meta charset="utf-8"><title>{html.escape(result["model"])}</title><style>{style}</style>'
    logs.write(path, f'<!doctype html><html lang="en">{head}{"".join(parts)}</html>\n')
