"""The command line: `mvit3 train` and `mvit3 evaluate`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import NoReturn

from . import checkpoint
from .backends import served
from .config import DemoConfig, EvaluateConfig
from .data import DATASETS
from .engine import TrainingError, evaluate, prepare, start, train
from .options import UsageError, nearest, options
from .report import Progress, plot, summary, summary_text, table


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line that names the nearest valid option."""

    options: tuple[str, ...] = ()

    def add_argument(self, *args, **kwargs) -> argparse.Action:
        action = super().add_argument(*args, **kwargs)
        self.options += tuple(action.option_strings)
        return action

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def refuse(self, unknown: str) -> NoReturn:
        hint = f"; the nearest is {nearest(unknown.partition('=')[0], self.options)}" if unknown.startswith("-") else ""
        self.error(f"there is no option {unknown!r}{hint}")


def _add_options(parser: _Parser, config: type) -> None:
    for flag, kind, default, option in options(config):
        names = f"; one of {', '.join(option.choices)}" if option.choices else ""
        default_text = "" if default is MISSING else f" (default {default})"
        parser.add_argument(
            flag,
            type=kind,
            default=default,
            required=default is MISSING,
            metavar="NAME" if kind is str else kind.__name__.upper(),
            help=f"{option.help}{names}{default_text}",
        )


def _parser() -> _Parser:
    parser = _Parser(prog="mvit3", description="Train and evaluate networks of the MobileViT family with fused ops.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, config, run, text in (
        ("train", DemoConfig, _train, "train a network; by default on handwritten digits, with reference and with fused ops"),
        ("evaluate", EvaluateConfig, _evaluate, "accuracy of a checkpoint on the validation images"),
    ):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        _add_options(command, config)
        command.add_argument("--quiet", action="store_true", help="no progress, only the result")
        command.add_argument("--json", action="store_true", help="the result as JSON on stdout; progress stays on stderr")
        command.set_defaults(parser=command, config=config, run=run)
    return parser


def _train(config: DemoConfig, quiet: bool, as_json: bool) -> None:
    started = time.perf_counter()
    device = prepare(config.device, config.threads)
    data = DATASETS[config.data]().to(device)
    runs = start(config, data)
    config.output.mkdir(parents=True, exist_ok=True)
    backends = {run.ops: served(run.model, data.train.images[: config.batch_size], run.ops) for run in runs}
    progress = Progress(runs, quiet)

    def on_epoch(runs: list) -> None:
        progress.on_epoch(runs)
        for run in runs:
            checkpoint.save(config.output / f"{run.ops}.pt", run.checkpoint())

    try:
        train(runs, progress.on_step, on_epoch)
    finally:
        progress.close()
    plot(runs, config.output / "curves.png")
    result = summary(runs, backends, time.perf_counter() - started, config.output)
    text = json.dumps(result, indent=1)
    (config.output / "report.json").write_text(text + "\n")
    print(text if as_json else summary_text(result))


def _evaluate(config: EvaluateConfig, quiet: bool, as_json: bool) -> None:
    content = checkpoint.load(config.checkpoint)
    device = prepare(config.device, config.threads)
    data = DATASETS[config.data]().to(device)
    if content["num_classes"] != data.num_classes:
        raise checkpoint.CheckpointError(
            f"{config.checkpoint} has {content['num_classes']} classes, the data set {config.data} has {data.num_classes}"
        )
    model = checkpoint.build_model(config.checkpoint, content).to(device)
    ops = content["config"].get("ops", "fused") if config.ops == "trained" else config.ops
    found = evaluate(model, data.val, ops)
    result = {
        "checkpoint": str(config.checkpoint),
        "model": content["model"],
        "data": config.data,
        "ops": ops,
        "backend": served(model, data.val.images[:2], ops),
        "accuracy": found.accuracy,
        "correct": found.correct,
        "total": found.total,
        "val_loss": found.loss,
        "recorded_accuracy": content["accuracy"],
        "reproduced": found.accuracy == content["accuracy"],
    }
    if as_json:
        print(json.dumps(result, indent=1))
        return
    print(table([
        ["checkpoint", "ops", "val accuracy", "correct", "val loss", "recorded"],
        [result["checkpoint"], ops, f"{found.accuracy:.2%}", f"{found.correct}/{found.total}", f"{found.loss:.4f}",
         f"{content['accuracy']:.2%}"],
    ]))  # fmt: skip
    if not quiet:
        print(f"{result['model']}, epoch {content['epoch']}, {ops} ops served by {result['backend']}")
        print("The recorded accuracy is reproduced." if result["reproduced"] else "This is NOT the recorded accuracy.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0, 1 for a failure, 2 for a wrong option, 130 when interrupted."""
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        args.parser.refuse(unknown[0])
    try:
        config = args.config(**{f.name: getattr(args, f.name) for f in fields(args.config)})
        args.run(config, args.quiet, args.json)
    except UsageError as error:
        args.parser.error(str(error))
    except (checkpoint.CheckpointError, TrainingError, OSError) as error:
        print(f"{args.parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{args.parser.prog}: interrupted", file=sys.stderr)
        return 130
    return 0
