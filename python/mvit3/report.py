"""What a person sees: progress, the table, the curves."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from .engine import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # imported for a plot only, it takes a second

COLORS = {"reference": "#E69F00", "fused": "#0072B2"}  # Okabe and Ito: told apart by everyone, and in print


class Progress:
    """A progress bar over all runs on stderr, with a line for each epoch; silent when `quiet`."""

    def __init__(self, runs: list[Run], quiet: bool) -> None:
        self.quiet, self.epochs = quiet, runs[0].config.epochs
        self.bar = tqdm(
            total=sum(run.total_steps for run in runs),
            disable=quiet,
            bar_format="{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}  {desc}",
            mininterval=0.2 if sys.stderr.isatty() else 10,
        )

    def on_step(self, run: Run) -> None:
        if self.quiet:
            return
        history = run.history
        speed = run.config.batch_size / median(history.seconds[-10:])
        where = f"epoch {run.epochs + 1}/{self.epochs} {run.ops:9}"
        what = f"{speed:4.0f} img/s  lr {history.lrs[-1]:.1e}  loss {history.losses[-1]:.3f}"
        self.bar.set_description_str(f"{where}  {what}", refresh=False)
        self.bar.update()

    def on_epoch(self, runs: list[Run]) -> None:
        if self.quiet:
            return
        parts = [f"{run.ops}: loss {run.epoch_loss():.3f}, accuracy {run.history.evaluations[-1].accuracy:7.2%}" for run in runs]
        self.bar.write(f"epoch {runs[0].epochs:2}/{self.epochs}  " + "   ".join(parts), file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


def table(rows: list[list[str]]) -> str:
    """Rows of cells under a header row; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def summary(runs: list[Run], backends: dict[str, str], seconds: float, output: Path) -> dict[str, object]:
    """The result as plain values, for report.json and --json."""
    config = runs[0].config
    result = {
        "model": config.model,
        "data": config.data,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "train_images": len(runs[0].data.train),
        "device": runs[0].data.train.images.device.type,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "curves": str(output / "curves.png"),
        "runs": {},
    }
    for run in runs:
        last = run.history.evaluations[-1]
        result["runs"][run.ops] = {
            "backend": backends[run.ops],
            "accuracy": last.accuracy,
            "correct": last.correct,
            "total": last.total,
            "val_loss": last.loss,
            "train_loss": run.epoch_loss(),
            "images_per_second": run.images_per_second,
            "step_seconds": median(run.history.seconds),
            "checkpoint": str(output / f"{run.ops}.pt"),
            "losses": run.history.losses,
            "accuracies": [e.accuracy for e in run.history.evaluations],
        }
    if len(runs) == 2:
        result["speed_ratio"] = runs[1].images_per_second / runs[0].images_per_second
    return result


def summary_text(result: dict[str, object]) -> str:
    """The result as a table and a few lines."""
    rows = [["ops", "val accuracy", "correct", "val loss", "train loss", "img/s", "ms/step"]]
    for ops, run in result["runs"].items():
        rows.append([
            ops, f"{run['accuracy']:.2%}", f"{run['correct']}/{run['total']}", f"{run['val_loss']:.4f}", f"{run['train_loss']:.4f}",
            f"{run['images_per_second']:.0f}", f"{1000 * run['step_seconds']:.1f}",
        ])  # fmt: skip
    lines = [
        f"{result['model']} on {result['data']}: {result['train_images']} training images, {result['epochs']} epochs "
        f"of batch {result['batch_size']}, seed {result['seed']}; {result['device']}, {result['threads']} CPU threads, "
        f"{result['seconds']:.0f} s in all",
        "",
        table(rows),
        "",
        *(f"{ops} ops served by {run['backend']}" for ops, run in result["runs"].items()),
    ]
    if "speed_ratio" in result:
        lines.append(
            f"fused / reference = {result['speed_ratio']:.2f} in images per second (median step; the runs took turns by the epoch)"
        )
    lines += ["", f"curves      {result['curves']}"]
    lines += [f"checkpoint  {run['checkpoint']}" for run in result["runs"].values()]
    return "\n".join(lines)


def _zoom(axis: Axes, runs: list[Run]) -> list[Axes]:
    """An inset with the second half of the epochs, where accuracies differ by less than a line's width; none for a short run."""
    first = runs[0].epochs // 2 + 1
    late = [e.accuracy for run in runs for e in run.history.evaluations[first - 1 :]]
    if len(late) < 8 * len(runs):
        return []
    margin = max(0.002, 0.15 * (max(late) - min(late)))
    inset = axis.inset_axes((0.36, 0.3, 0.61, 0.44), xlim=(first, runs[0].epochs + 0.2), ylim=(min(late) - margin, max(late) + margin))
    inset.set_title("second half, enlarged", fontsize=9)
    inset.tick_params(labelsize=8)
    return [inset]


def plot(runs: list[Run], path: Path) -> None:
    """Training loss, validation accuracy and speed of the runs as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.25,
    }
    with plt.rc_context(style):
        figure, (loss, accuracy, speed) = plt.subplots(1, 3, figsize=(13, 4.2), width_ratios=(3, 3, 2), layout="constrained")
        config = runs[0].config
        figure.suptitle(f"{config.model} on {config.data}, seed {config.seed}", fontsize=12, fontweight="bold")
        zoom = _zoom(accuracy, runs)
        for run in runs:
            # The runs often coincide: the fused one is drawn thin and dashed over a broad reference, so that both remain visible.
            color = COLORS[run.ops]
            look = {"color": color, "lw": 4, "alpha": 0.55} if run.ops == "reference" else {"color": color, "lw": 1.6, "ls": (0, (4, 2))}
            look["marker"] = "o" if run.epochs < 3 else ""  # a line needs two points
            per_epoch, epochs = run.steps_per_epoch, range(1, run.epochs + 1)
            loss.plot([(i + 1) / per_epoch for i in range(len(run.history.losses))], run.history.losses, color=color, alpha=0.25, lw=0.8)
            loss.plot([e - 0.5 for e in epochs], [run.epoch_loss(e - 1) for e in epochs], label=run.ops, **look)
            accuracies = [e.accuracy for e in run.history.evaluations]
            for axis in (accuracy, *zoom):
                axis.plot(epochs, accuracies, label=f"{run.ops}: {accuracies[-1]:.2%}", **look)
        highest = max(max(run.history.losses) for run in runs)
        loss.set(title="training loss", xlabel="epoch", ylabel="cross-entropy, smoothed labels")
        loss.set(xlim=(0, 1.02 * config.epochs), ylim=(0, 1.05 * highest))
        accuracy.set(title="validation accuracy", xlabel="epoch", xlim=(0, 1.02 * config.epochs), ylim=(0, 1.03))
        for axis in (loss, accuracy, *zoom):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], nbins=8 if axis in (loss, accuracy) else 4))
        for axis in (accuracy, *zoom):
            axis.yaxis.set_major_formatter(PercentFormatter(1))
        loss.legend(frameon=False)
        accuracy.legend(frameon=False, loc="lower right")
        bars = speed.bar([run.ops for run in runs], [run.images_per_second for run in runs], 0.6, color=[COLORS[run.ops] for run in runs])
        speed.bar_label(bars, fmt="%.0f", padding=2)
        speed.set(title="training speed", ylabel="images per second, median step")
        speed.margins(x=0.3, y=0.12)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        speed.grid(axis="x", visible=False)
        figure.savefig(path, dpi=130)
        plt.close(figure)
