"""`mvit3 demo`: the same training with reference ops, with PyTorch's stock modules and with fused ops, side by side."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

import mvit3_kernels

from .backends import served
from .bench.plain import plain
from .checkpoint import LAST
from .config import TrainConfig
from .data import loaders
from .distributed import World
from .logs import write
from .progress import Listener
from .report import STYLE
from .runtime import prepare
from .screen import Bar, table
from .trainer import Trainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # imported for a plot only, it takes a second

# Okabe and Ito: told apart by everyone, and in print. Curves often coincide: each is drawn thinner over the one before.
LOOKS = {
    "reference": {"color": "#E69F00", "lw": 5, "alpha": 0.55},
    "stock": {"color": "#009E73", "lw": 2.6, "alpha": 0.75},
    "fused": {"color": "#0072B2", "lw": 1.6, "ls": (0, (4, 2))},
}


class StockTrainer(Trainer):
    """Trains the same parameters in PyTorch's own modules, put together as a user would without this library, so that
    checkpoints are those of the network; they are evaluated with reference ops."""

    def _wrap(self) -> None:
        super()._wrap()
        self.network = plain(self.model, copies=False)


def stock_config(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Of the stock run: in the memory layout in which a training step of it is faster here, the best of three in turns
    after one that does not count."""
    model, seconds = mvit3_kernels.create_model(config.model.name).to(device), {}
    images = torch.zeros(config.data.batch_size, 3, config.sampler.size, config.sampler.size, device=device)
    for turn in range(4):
        for layout in (torch.channels_last, torch.contiguous_format):
            network, x = plain(model).to(memory_format=layout), images.contiguous(memory_format=layout)
            started = time.perf_counter()
            network(x).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                seconds[layout] = min(seconds.get(layout, float("inf")), time.perf_counter() - started)
    faster = seconds[torch.channels_last] <= seconds[torch.contiguous_format]
    return replace(config, run=replace(config.run, ops="reference", channels_last=faster))


class Run(Listener):
    """One of the trainings: loss and seconds of each step, without waiting for data. All see the same weights and
    batches, and the same dropout but for the stock run, which has PyTorch's."""

    def __init__(self, ops: str, config: TrainConfig, world: World, bar: Bar) -> None:
        self.ops, self.bar, self.losses, self.seconds, self._waited = ops, bar, [], [], 0.0
        run = replace(config.run, output=str(Path(config.run.output) / ops), resume="never", log_steps=1)
        config = replace(config, run=run)
        stock, side = ops == "stock", config.sampler.size
        config = stock_config(config, world.device) if stock else replace(config, run=replace(run, ops=ops))
        images = loaders(config, seed=run.seed, device=world.device)
        self.trainer = (StockTrainer if stock else Trainer)(config, images, world, self)
        if stock:
            layout = "channels_last" if config.run.channels_last else "the default layout"
            self.backend = f"PyTorch's own modules in {layout}, which is faster here"
        else:
            self.backend = served(self.trainer.model, torch.zeros(2, 3, side, side, device=world.device), config)

    @property
    def history(self) -> list[dict[str, object]]:
        return self.trainer.progress.history

    @property
    def accuracies(self) -> list[float]:
        return [row["accuracy"] for row in self.history]

    @property
    def images_per_second(self) -> float:
        """Of the median step."""
        return self.trainer.effective_batch / median(self.seconds)

    def say(self, text: str) -> None:
        self.bar.line(f"{self.ops}: {text}")

    def on_loss(self, trainer: Trainer, loss: float, lr: float) -> None:
        self.losses.append(loss)
        self.lr = lr

    def on_step(self, trainer: Trainer, images: int, seconds: float) -> None:
        waited, self._waited = trainer.progress.wait_seconds - self._waited, trainer.progress.wait_seconds
        self.seconds.append(seconds - waited)
        speed = images / median(self.seconds[-10:])
        where = f"epoch {trainer.progress.epoch + 1}/{trainer.config.schedule.epochs} {self.ops:9}"
        self.bar.update(f"{where}  loss {self.losses[-1]:.3f}  {speed:4.0f} img/s  lr {self.lr:.1e}")

    def on_epoch(self, trainer: Trainer) -> None:
        self._waited = 0.0


def demo(config: TrainConfig, quiet: bool, as_json: bool) -> None:
    """Trains, and leaves checkpoints of all, curves.png and report.json in the output folder."""
    started, output = time.perf_counter(), Path(config.run.output)
    world, bar = World(prepare(config.run)), Bar(quiet)
    runs = [Run(ops, config, world, bar) for ops in LOOKS]
    bar.begin(sum(run.trainer.total_steps for run in runs))
    try:
        for epoch in range(config.schedule.epochs):
            # They take turns by the epoch, and in going first, so that the machine's noise hits all alike.
            first = epoch % len(runs)
            for run in runs[first:] + runs[:first]:
                run.trainer.train_epoch()
                run.trainer.evaluate_epoch()
            parts = [
                f"{run.ops}: loss {run.history[-1]['train_loss']:.3f}, accuracy {run.accuracies[-1]:7.2%}"
                for run in runs
            ]
            bar.line(f"epoch {epoch + 1:2}/{config.schedule.epochs}  " + "   ".join(parts))
    finally:
        bar.close()
    plot(runs, output / "curves.png")
    result = summary(runs, time.perf_counter() - started, output)
    text = json.dumps(result, indent=1)
    write(output / "report.json", text + "\n")
    print(text if as_json else summary_text(result))


def summary(runs: list[Run], seconds: float, output: Path) -> dict[str, object]:
    """The result as plain values, for report.json and --json."""
    trainer = runs[0].trainer
    config = trainer.config
    result = {
        "model": config.model.name,
        "data": config.data.source,
        "epochs": config.schedule.epochs,
        "batch_size": trainer.effective_batch,
        "seed": config.run.seed,
        "train_images": trainer.loaders.images_per_epoch,
        "device": trainer.device.type,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "curves": str(output / "curves.png"),
        "runs": {},
    }
    for run in runs:
        last = run.history[-1]
        result["runs"][run.ops] = {
            "backend": run.backend,
            "accuracy": last["accuracy"],
            "correct": last["correct"],
            "total": last["total"],
            "val_loss": last["val_loss"],
            "train_loss": last["train_loss"],
            "images_per_second": run.images_per_second,
            "step_seconds": median(run.seconds),
            "checkpoint": str(run.trainer.folder / LAST),
            "losses": run.losses,
            "accuracies": run.accuracies,
        }
    *others, fused = runs
    result["speed_ratio"] = {run.ops: fused.images_per_second / run.images_per_second for run in others}
    return result


def summary_text(result: dict[str, object]) -> str:
    """The result as a table and a few lines."""
    rows = [["ops", "val accuracy", "correct", "val loss", "train loss", "img/s", "ms/step"]]
    for ops, run in result["runs"].items():
        rows.append([
            ops, f"{run['accuracy']:.2%}", f"{run['correct']}/{run['total']}", f"{run['val_loss']:.4f}",
            f"{run['train_loss']:.4f}",
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
    ratios = ", ".join(f"fused / {ops} = {ratio:.2f}" for ops, ratio in result["speed_ratio"].items())
    lines.append(f"{ratios} in images per second (median step; the runs took turns by the epoch)")
    lines += ["", f"curves      {result['curves']}"]
    lines += [f"checkpoint  {run['checkpoint']}" for run in result["runs"].values()]
    return "\n".join(lines)


def _zoom(axis: Axes, runs: list[Run]) -> list[Axes]:
    """An inset with the second half of the epochs, where accuracies differ by less than a line's width; none for a
    short run."""
    first = len(runs[0].history) // 2 + 1
    late = [a for run in runs for a in run.accuracies[first - 1 :]]
    if len(late) < 8 * len(runs):
        return []
    margin = max(0.002, 0.15 * (max(late) - min(late)))
    inset = axis.inset_axes(
        (0.36, 0.3, 0.61, 0.44), xlim=(first, len(runs[0].history) + 0.2), ylim=(min(late) - margin, max(late) + margin)
    )
    inset.set_title("second half, enlarged", fontsize=9)
    inset.tick_params(labelsize=8)
    return [inset]


def plot(runs: list[Run], path: Path) -> None:
    """Training loss, validation accuracy and speed of the runs as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    with plt.rc_context(STYLE):
        figure, (loss, accuracy, speed) = plt.subplots(
            1, 3, figsize=(13, 4.2), width_ratios=(3, 3, 2), layout="constrained"
        )
        config = runs[0].trainer.config
        figure.suptitle(
            f"{config.model.name} on {config.data.source}, seed {config.run.seed}", fontsize=12, fontweight="bold"
        )
        zoom = _zoom(accuracy, runs)
        for run in runs:
            color, marker = LOOKS[run.ops]["color"], "o" if len(run.history) < 3 else ""  # a line needs two points
            look = {**LOOKS[run.ops], "marker": marker}
            per_epoch, epochs = run.trainer.steps_per_epoch, range(1, len(run.history) + 1)
            loss.plot(
                [(i + 1) / per_epoch for i in range(len(run.losses))], run.losses, color=color, alpha=0.25, lw=0.8
            )
            loss.plot([e - 0.5 for e in epochs], [row["train_loss"] for row in run.history], label=run.ops, **look)
            for axis in (accuracy, *zoom):
                axis.plot(epochs, run.accuracies, label=f"{run.ops}: {run.accuracies[-1]:.2%}", **look)
        highest = max(max(run.losses) for run in runs)
        loss.set(title="training loss", xlabel="epoch", ylabel="cross-entropy, smoothed labels")
        loss.set(xlim=(0, 1.02 * config.schedule.epochs), ylim=(0, 1.05 * highest))
        accuracy.set(
            title="validation accuracy", xlabel="epoch", xlim=(0, 1.02 * config.schedule.epochs), ylim=(0, 1.03)
        )
        for axis in (loss, accuracy, *zoom):
            axis.xaxis.set_major_locator(
                MaxNLocator(integer=True, steps=[1, 2, 5, 10], nbins=8 if axis in (loss, accuracy) else 4)
            )
        for axis in (accuracy, *zoom):
            axis.yaxis.set_major_formatter(PercentFormatter(1))
        loss.legend(frameon=False)
        accuracy.legend(frameon=False, loc="lower right")
        bars = speed.bar(
            [run.ops for run in runs],
            [run.images_per_second for run in runs],
            0.6,
            color=[LOOKS[run.ops]["color"] for run in runs],
        )
        speed.bar_label(bars, fmt="%.0f", padding=2)
        speed.set(title="training speed", ylabel="images per second, median step")
        speed.margins(x=0.3, y=0.12)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        speed.grid(axis="x", visible=False)
        figure.savefig(path, dpi=130)
        plt.close(figure)
