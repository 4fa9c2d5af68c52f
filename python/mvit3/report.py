"""The result of a run: as plain values, as text, and as a page that stands alone."""

from __future__ import annotations

import base64
import html
import io
import platform
import re
import warnings
from collections.abc import Callable
from datetime import datetime
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

import mvit3_kernels

from . import checkpoint, logs, report_dense
from .ema import INITIAL_SHARE
from .names import task_of
from .progress import Progress
from .scores import SCORES, Scores, class_rows, lowest, scores_of
from .screen import count, duration, number, percent, rate, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # imported for a plot only, it takes a second
    from matplotlib.figure import Figure

    from .trainer import Trainer

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
}
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#777777"  # Okabe and Ito: told apart by everyone, and in print
WRITTEN = 12  # classes up to which a confusion matrix has its counts written in, and a width that a telephone shows
CLASSES_IN_A_TABLE = 25
LOWEST = 10  # classes that are shown where there are more than a table holds
NAMED = 5  # unreadable images that are named
CONFUSIONS = 10  # of the most frequent ones, in a table
SCORES_SHOWN = 3  # by the epoch; history.csv has all
NUMBER = re.compile(r"[\d.e+-]+%?")  # which is not broken into lines
VERSIONS = ("torch", "torchvision", "timm", "numpy", "pillow")


def class_results(correct: list[int], total: list[int], names: list[str] | tuple[str, ...]) -> list[dict[str, object]]:
    """Name, images, hits and accuracy (None without images) of each class."""
    return [
        {
            "name": names[i] if i < len(names) else str(i),
            "images": n,
            "correct": hits,
            "accuracy": hits / n if n else None,
        }
        for i, (hits, n) in enumerate(zip(correct, total, strict=True))
    ]


def versions() -> dict[str, str]:
    """Of what a run computes with."""
    found = {"mvit3_kernels": mvit3_kernels.__version__, "python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def summary(trainer: Trainer, backend: str, finished: bool, complete: bool, command: str) -> dict[str, object]:
    """The result as plain values, for report.json and --json. `complete`: it was already, nothing was trained."""
    config, p = trainer.config, trainer.progress
    last, scores = p.history[-1] if p.history else {}, trainer.task.scores
    best = trainer.folder / checkpoint.BEST
    told = (scores.best,) if scores.best == "accuracy" else tuple(scores.heads)
    prefix = "ema_" if p.weights == checkpoint.AVERAGE else ""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "versions": versions(),
        "model": config.model.name,
        "data": config.data.root or config.data.source,
        "num_classes": trainer.num_classes,
        "train_images": trainer.loaders.images_per_epoch,
        "epochs": p.epoch,
        "steps": p.step,
        "epochs_planned": config.schedule.epochs,
        "finished": finished,
        "already_complete": complete,
        "starts": p.starts - complete,
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
        "seconds": p.total_seconds if complete else trainer.spent(),
        **{key: last.get(f"{prefix}{key}") for key in told},
        "weights": p.weights or None,
        "ema_initial_share": last.get("ema_initial_share"),
        f"best_{scores.best}": p.best if p.best_epoch else None,
        "best_weights": p.best_weights or None,
        "best_epoch": p.best_epoch or None,
        "classes": trainer.task.classes(p, trainer.loaders.class_names),
        "skipped_steps": p.skipped,
        "unreadable": trainer.loaders.train.unreadable | trainer.loaders.val.unreadable,
        "checkpoint": str(trainer.folder / checkpoint.LAST),
        "best_checkpoint": str(best) if p.best_epoch and best.exists() else None,
        "report": str(trainer.folder / "report.html"),
        "history": p.history,
        "config": config.to_dict(),
    }


def headline(result: dict[str, object]) -> str:
    """Accuracy, of which weights, and whether the run is at its end."""
    state = (
        "finished"
        if result["finished"]
        else f"stopped after {result['epochs']} of {count(result['epochs_planned'], 'epoch')}"
    )
    if result["already_complete"]:
        state = "already complete, nothing was trained"
    scores = scores_of(result["model"])
    if result[scores.best] is None:
        return f"not evaluated yet, {state}"
    return f"{percent(result[scores.best])} {scores.name}, {result['weights']} weights, {state}"


def _rows(result: dict[str, object]) -> list[list[str]]:
    last, scores = result["history"][-1], scores_of(result["model"])
    rows = [["weights", *scores.heads.values(), "val loss"]]
    for name, prefix in (("trained", ""), ("average", "ema_")):
        if last[f"{prefix}{scores.best}"] is not None:
            used = " (used)" if name == result["weights"] else ""
            values = [percent(last[f"{prefix}{key}"]) for key in scores.heads]
            rows.append([name + used, *values, number(last[f"{prefix}val_loss"])])
    return rows


def _facts(result: dict[str, object]) -> list[str]:
    last = result["history"][-1] if result["history"] else {}
    done = f"{count(result['epochs'], 'epoch')}, {count(result['steps'], 'step')}"
    steps = f"{done} of {result['effective_batch']} images, seed {result['seed']}"
    machine = (
        f"{result['device']}, {result['processes']} x {result['threads']} CPU threads, precision {result['precision']}"
    )
    facts = [
        f"{result['model']} on {result['data']}: {result['train_images']} training images, {steps}",
        f"{machine}, {duration(result['seconds'])} in all"
        + (f" over {result['starts']} starts" if result["starts"] > 1 else ""),
        f"{result['ops']} ops served by {result['backend']}",
    ]
    if last.get("images_per_second"):
        facts.append(
            f"{rate(last['images_per_second'])} images per second, {percent(last['data_wait'])} of the time waiting "
            "for data (last epoch)"
        )
    if result["best_epoch"]:
        scores = scores_of(result["model"])
        facts.append(
            f"best {scores.name} {percent(result[f'best_{scores.best}'])} after epoch {result['best_epoch']}, "
            f"{result['best_weights']} weights"
        )
    if (result["ema_initial_share"] or 0) > INITIAL_SHARE:
        facts.append(f"{percent(result['ema_initial_share'])} of the averaged weights are still the initial ones")
    if result["skipped_steps"]:
        facts.append(f"{result['skipped_steps']} steps skipped, whose gradient was not finite")
    facts += [f"unreadable: {name}: {reason}" for name, reason in islice(result["unreadable"].items(), NAMED)]
    if len(result["unreadable"]) > NAMED:
        facts.append(f"unreadable: {len(result['unreadable']) - NAMED} more, which report.json names")
    return facts


def summary_text(result: dict[str, object]) -> str:
    """The result as a table and a few lines."""
    lines = _facts(result)
    if result["history"]:
        lines[2:2] = ["", table(_rows(result)), ""]
    lines.insert(0, headline(result))
    if not result["finished"]:
        again = "the same command" if result["resumes"] else "the same command with --run.resume auto"
        lines.append(f"stopped before the end; {again} goes on from here")
    lines += ["", f"checkpoint  {result['checkpoint']}"]
    if result["best_checkpoint"]:
        lines.append(f"best        {result['best_checkpoint']}")
    if result["history"]:
        lines.append(f"report      {result['report']}")
    return "\n".join(lines)


def _chart(history: list[dict[str, object]], kind: str, scores: Scores = SCORES["classification"]) -> Figure:
    """One of loss, score, learning rate and speed by the epoch, as wide as a telephone shows it."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, axis = plt.subplots(figsize=(4.8, 3.3), layout="constrained")

    def draw(key: str, label: str, color: str, style: str = "-") -> None:
        points = [(row["epoch"], row[key]) for row in history if row[key] is not None]
        if points:
            axis.plot(
                *zip(*points, strict=True), style, color=color, label=label, marker="o" if len(points) < 3 else ""
            )

    if kind == "loss":
        draw("train_loss", "training", ORANGE)
        draw("val_loss", "validation", BLUE)
        draw("ema_val_loss", "validation, average", BLUE, "--")
        axis.set_ylabel("loss" if scores.best == "map" else "cross-entropy")
    elif kind == scores.name:
        draw(scores.best, "trained weights", BLUE)
        draw(f"ema_{scores.best}", "average", BLUE, "--")
        if scores.best != "accuracy":
            for (key, head), color in zip(list(scores.heads.items())[1:SCORES_SHOWN], (ORANGE, GREY), strict=False):
                draw(key, head, color)
        axis.set_ylabel(f"validation {scores.name}")
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    elif kind == "learning rate":
        draw("lr", "", ORANGE)
        axis.set_ylabel("learning rate, end of epoch")
    else:
        draw("images_per_second", "", BLUE)
        axis.set_ylabel("images per second")
        axis.set_ylim(bottom=0)
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axis)
    return figure


def _legend(figure: Figure, axis: Axes) -> None:
    """Above the axes, where no curve is."""
    handles, labels = axis.get_legend_handles_labels()
    if any(labels):
        figure.legend(
            handles,
            labels,
            loc="outside upper left",
            ncols=len(labels),
            frameon=False,
            handlelength=1.5,
            columnspacing=1,
        )


def _confusion(counts: list[list[int]], names: list[str]) -> Figure:
    """True classes by row, predicted ones by column; counts are written where there is room."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    written = len(names) <= WRITTEN
    size = 4.8 if written else 0.19 * len(names) + 2
    figure, axis = plt.subplots(figsize=(size, size if written else 0.85 * size), layout="constrained")
    shares = torch.tensor(counts, dtype=torch.float64)
    shares /= shares.sum(1, keepdim=True).clamp_min(1)
    image = axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.grid(visible=False)
    axis.set(xlabel="predicted class", ylabel="true class", xticks=range(len(names)), yticks=range(len(names)))
    short = [name if len(name) <= 14 else f"{name[:13]}\N{HORIZONTAL ELLIPSIS}" for name in names]
    small = {} if written else {"fontsize": 8}
    axis.set_xticklabels(short, rotation=90, **small)
    axis.set_yticklabels(short, **small)
    if not written:
        figure.colorbar(image, ax=axis, label="share of the true class", format=PercentFormatter(1), shrink=0.6)
        return figure
    for i, row in enumerate(counts):
        for j, n in enumerate(row):
            if n:
                axis.text(
                    j, i, str(n), ha="center", va="center", fontsize=8, color="white" if shares[i, j] > 0.5 else "black"
                )
    return figure


def _svg(draw, *arguments: object, label: str) -> str:
    """A figure as SVG that can stand inside HTML beside others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # Names of classes are text, not formulas between dollar signs, and the browser has the characters that they need.
    options = {"svg.fonttype": "none", "svg.hashsalt": label, "text.parse_math": False}
    with plt.rc_context(STYLE | options), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = draw(*arguments)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    # figure_1 and so on are in each of them
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def _html_table(rows: list[list[str]], secondary: tuple[int, ...] = (), bars: int | None = None) -> str:
    """`secondary`: columns that a narrow screen leaves out; `bars`: the column whose shares are drawn too."""

    def cell(text: str, row: int, column: int) -> str:
        tag, kind = ("th", ' scope="col"') if row == 0 else ("td", "")
        share = column == bars and row > 0 and text.endswith("%")
        classes = ["more"] * (column in secondary) + ["number"] * bool(NUMBER.fullmatch(text)) + ["bar"] * share
        kind += f' class="{" ".join(classes)}"' if classes else ""
        kind += f' style="--share:{text}"' if share else ""
        return f"<{tag}{kind}>{html.escape(text)}</{tag}>"

    lines = ("".join(cell(text, i, j) for j, text in enumerate(row)) for i, row in enumerate(rows))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _columns(scores: Scores) -> dict[str, tuple[str, Callable[[object], str], bool]]:
    """Columns of the history: head, how a value is written, whether a narrow screen shows it."""
    own = {}
    for key, head in list(scores.heads.items())[:SCORES_SHOWN]:
        first = key == scores.best
        own[key] = (head, percent, first)
        own[f"ema_{key}"] = ("average" if first else f"{head}, average", percent, first)
    return {
        "epoch": ("epoch", str, True),
        "train_loss": ("loss", number, True),
        **own,
        "val_loss": ("val loss", number, False),
        "ema_val_loss": ("val loss, average", number, False),
        "lr": ("learning rate", lambda value: f"{value:.2e}", False),
        "images_per_second": ("images/s", rate, False),
        "data_wait": ("waiting for data", percent, False),
        "skipped_steps": ("skipped", str, False),
        "unreadable_images": ("unreadable", str, False),
    }


def _epochs(history: list[dict[str, object]], scores: Scores) -> str:
    columns = _columns(scores)
    keys = [key for key in columns if any(row.get(key) not in (None, 0) for row in history)]
    rows = [[columns[key][0] for key in keys]]
    rows += [["" if row.get(key) is None else columns[key][1](row[key]) for key in keys] for row in history]
    return _html_table(rows, tuple(i for i, key in enumerate(keys) if not columns[key][2]))


def _classes(classes: list[dict[str, object]], scores: Scores) -> str:
    """All of them, folded up behind the ten lowest where they are many."""
    starts = range(0, len(classes), CLASSES_IN_A_TABLE)
    tables = [class_rows(classes[i : i + CLASSES_IN_A_TABLE], scores) for i in starts]
    bars = 1 + list(scores.classes).index(scores.of_class)
    every = f'<div class="tables">{"".join(_html_table(rows, bars=bars) for rows in tables)}</div>'
    if len(tables) == 1:
        return every
    few = lowest(classes, scores, LOWEST)
    fold = f"<details><summary>All {len(classes)} classes</summary>{every}</details>"
    return f"<p>The {len(few)} lowest of {len(classes)}:</p>{_html_table(class_rows(few, scores), bars=bars)}{fold}"


def _confusions(counts: list[list[int]], names: list[str], counted: str = "images") -> list[list[str]]:
    """The pairs of classes that are taken for each other most often."""
    pairs = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j]
    rows = [
        [names[i], names[j], str(n), percent(n / sum(counts[i]))]
        for n, i, j in sorted(pairs, reverse=True)[:CONFUSIONS]
    ]
    return [["true class", "predicted", counted, "of the class"], *rows] if rows else []


def _picture(sample: dict[str, object], names: list[str]) -> str:
    """A validation image with what it is and what the network takes it for."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(sample["pixels"].numpy()).save(file, "PNG")
    source = base64.b64encode(file.getvalue()).decode()
    true, guess = names[sample["label"]], names[sample["guess"]]
    right = sample["label"] == sample["guess"]
    said = f"{guess} {percent(sample['probability'])}"
    text = f"<b>{html.escape(said)}</b><br>" + ("right" if right else f"is {html.escape(true)}")
    alt = html.escape(f"{true}, predicted {guess}")
    return f'<figure class="{"right" if right else "wrong"}"><img alt="{alt}" src="data:image/png;base64,{source}">' + (
        f"<figcaption>{text}</figcaption></figure>"
    )


PAGE = """
*{box-sizing:border-box}
body{font:16px/1.45 system-ui,sans-serif;margin:0 auto;max-width:1200px;padding:1rem;color:#222;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:.2em 0}
h2{font-size:1.15rem;margin:1.8em 0 .5em}
p{margin:.3em 0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:1rem}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(104px,1fr));gap:.75rem}
.wide{overflow-x:auto}
.tables{display:flex;flex-wrap:wrap;gap:0 2rem;align-items:flex-start}
svg{display:block;max-width:100%;height:auto}
.wide svg{max-width:none}
svg text{font-family:system-ui,sans-serif!important}
table{border-collapse:collapse;margin:.5em 0;font-size:.9rem;font-variant-numeric:tabular-nums}
td,th{padding:.25em .6em;text-align:right;border-bottom:1px solid #ddd;vertical-align:bottom}
th{overflow-wrap:normal}
.number{white-space:nowrap}
.bar{background:linear-gradient(90deg,#cfe3f1 var(--share),transparent 0);min-width:8rem}
td:first-child,th:first-child{text-align:left;padding-left:0}
figure{margin:0;font-size:.85rem}
figure img{width:96px;max-width:100%;border-bottom:4px solid #0072B2;image-rendering:auto}
figure.wrong img{border-bottom-color:#D55E00}
pre{white-space:pre-wrap;background:#f5f5f5;padding:.75rem;font-size:.85rem}
@media(max-width:700px){.more{display:none}td,th{padding:.25em .35em}}
"""


def write_html(path: Path, result: dict[str, object], progress: Progress) -> None:
    """The report of a run: one file that needs no other."""
    names = [str(c["name"]) for c in result["classes"]] or [str(i) for i in range(result["num_classes"])]
    scores = scores_of(result["model"])
    title = f"{result['model']} on {result['data']}"
    parts = [
        f"<p>{html.escape(title)}</p>",
        f"<h1>{html.escape(headline(result))}</h1>",
        f'<p><time datetime="{result["date"]}">{result["date"].replace("T", " ")}</time></p>',
        f"<pre>{html.escape(result['command'])}</pre>",
        *(f"<p>{html.escape(fact)}</p>" for fact in _facts(result)),
        _html_table(_rows(result), tuple(range(3, len(scores.heads) + 1))),
        '<div class="charts">',
        *(
            _svg(_chart, result["history"], kind, scores, label=kind)
            for kind in ("loss", scores.name, "learning rate", "speed")
        ),
        "</div>",
    ]
    dense = task_of(result["model"]) != "classification"
    if dense:
        parts += report_dense.pictures(progress.samples, names, task_of(result["model"]))
    for kind, text in () if dense else (("best", "Surest and right"), ("worst", "Most wrong")):
        samples = [s for s in progress.samples.get(kind, []) if kind == "worst" or s["label"] == s["guess"]]
        if samples:
            parts += [f"<h2>{text}</h2>", '<div class="gallery">', *(_picture(s, names) for s in samples), "</div>"]
    if result["classes"]:
        head = scores.classes[scores.of_class]
        parts += [f"<h2>{head[0].upper()}{head[1:]} by class</h2>", _classes(result["classes"], scores)]
    if progress.confusion and dense:
        if rows := _confusions(progress.confusion, names, "pixels"):
            parts += ["<h2>Which class is taken for which</h2>", _html_table(rows)]
    elif progress.confusion:
        wide = "wide" if len(names) > WRITTEN else "charts"
        parts += ["<h2>Which class is taken for which</h2>", f'<div class="{wide}">']
        parts += [_svg(_confusion, progress.confusion, names, label="confusion matrix")]
        if rows := _confusions(progress.confusion, names):
            parts += [f"<div>{_html_table(rows)}</div>"]
        parts += ["</div>"]
    configuration = yaml.safe_dump(result["config"], sort_keys=False)
    parts += [
        "<h2>Epochs</h2>",
        _epochs(result["history"], scores),
        "<h2>Versions</h2>",
        f"<p>{html.escape(', '.join(f'{name} {version}' for name, version in result['versions'].items()))}</p>",
        f"<details><summary>Configuration</summary><pre>{html.escape(configuration)}</pre></details>",
    ]
    style = PAGE + report_dense.STYLE if dense else PAGE
    head = (
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}: {html.escape(headline(result))}</title><style>{style}</style></head>"
    )
    logs.write(path, f'<!doctype html><html lang="en">{head}<body>{"".join(parts)}</body></html>\n')
