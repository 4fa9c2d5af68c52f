"""What the commands do. The command line is read in cli.py, without the libraries that this needs."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import torch

import mvit3_kernels

from . import checkpoint
from .backends import served
from .config import TrainConfig, check_output
from .data import DataError, DecodeError, loaders
from .demo import demo
from .distributed import World, is_peer_lost, world
from .errors import Failure
from .inference import Network, evaluate_checkpoint
from .listing import describe
from .lock import alone
from .logs import write
from .prediction import find_images, with_names, writer_for
from .prediction import predict as predict_images
from .report import class_csv, class_rows, summary, summary_text, write_html
from .reporter import Reporter
from .runtime import is_out_of_memory, prepare
from .screen import Bar, count, number, percent, table
from .session import start
from .signals import INTERRUPTED
from .trainer import Trainer

EXPECTED = (checkpoint.CheckpointError, mvit3_kernels.CheckpointError, DataError, DecodeError)


def run(name: str, config: TrainConfig, args: argparse.Namespace) -> int:
    """Runs a command; its exit status, or Failure where it cannot do what it was told."""
    try:
        return COMMANDS[name](config, args) or 0
    except EXPECTED as error:
        raise Failure(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if is_peer_lost(error):
            raise Failure("another process of this run has ended; its message says why") from error
        if not is_out_of_memory(error):
            raise
        kind = "data.batch_size (run.accumulate makes up for it)" if name in ("train", "finetune", "demo") else "data.eval_batch_size"
        lines = str(error).strip().splitlines() or ["no more memory is to be had"]
        detail = lines[-1] if lines[0].startswith("Caught ") else lines[0]  # the former is of a loading process, with its traceback
        raise Failure(f"out of memory: {detail}; a smaller {kind}, smaller images or run.amp bf16 need less") from error


def train(config: TrainConfig, args: argparse.Namespace) -> int:
    check_output(config.run.output)
    with ExitStack() as held:
        here = held.enter_context(world(prepare(config.run)))
        reporter = Reporter(args.quiet or not here.first)
        if config.data.source != "digits":  # which are at hand
            reporter.say(f"looking for images in {config.data.root or config.data.name or config.data.train}")
        images = loaders(config, rank=here.rank, world_size=here.size, seed=config.run.seed, device=here.device)
        for note in images.notes:
            reporter.say(note)
        reporter.say(
            f"{len(images.train.source.labels)} training and {len(images.val.source.labels)} validation images of "
            f"{count(images.num_classes, 'class')}; building {config.model.name}"
        )
        held.enter_context(alone(Path(config.run.output), here))
        trainer = start(config, images, here, reporter)
        before = trainer.progress.step, trainer.progress.epoch
        backend = _backend(trainer) if here.first else ""
        try:
            if here.first:
                reporter.begin(trainer)
            finished = trainer.fit()
        finally:
            reporter.close()
        if here.first:
            complete = finished and (trainer.progress.step, trainer.progress.epoch) == before
            _conclude(trainer, summary(trainer, backend, finished, complete, args.command), args.json)
        return INTERRUPTED if trainer.signals.number == signal.SIGINT else 0


def finetune(config: TrainConfig, args: argparse.Namespace) -> int:
    if not config.model.pretrained and not args.quiet:
        print("no --checkpoint is given: the network starts from fresh weights", file=sys.stderr)
    return train(config, args)


def models(config: TrainConfig, args: argparse.Namespace) -> None:
    found = describe(args.names, args.size)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    rows = [["network", "parameters", "GMACs", "input", "recipes"]]
    for model in found:
        recipes = ", ".join(model["recipes"])
        rows.append([model["name"], f"{model['parameters'] / 1e6:.2f} M", f"{model['macs'] / 1e9:.2f}", model["input"], recipes])
    print(table(rows))
    if not args.quiet:
        print(f"\nGMACs: 10^9 multiplications with addition of one {args.size}x{args.size} image, which papers call FLOPs; 1000 classes.")


def _backend(trainer: Trainer) -> str:
    run, side = trainer.config.run, trainer.config.sampler.size
    return served(trainer.model, torch.zeros(2, 3, side, side, device=trainer.device), run)


def _conclude(trainer: Trainer, result: dict[str, object], as_json: bool) -> None:
    page = trainer.folder / "report.html"
    if result["history"] and not (result["already_complete"] and page.exists()):  # else the report of the training is kept
        write(trainer.folder / "report.json", json.dumps(result, indent=1) + "\n")
        write_html(page, result, trainer.progress)
    print(json.dumps(result, indent=1) if as_json else summary_text(result))


def evaluate(config: TrainConfig, args: argparse.Namespace) -> None:
    with world(prepare(config.run)) as here:
        bar = Bar(args.quiet or not here.first)
        result = evaluate_checkpoint(Path(args.checkpoint), config, args.weights, here, bar)
    if not here.first:
        return
    if args.json:
        print(json.dumps(result, indent=1))
        return
    if args.csv:
        print(class_csv(result), end="")
        return
    recorded = result["recorded_accuracy"]
    cells = [result["checkpoint"], result["weights"], percent(result["accuracy"]), percent(result["accuracy5"])]
    cells += [f"{result['correct']}/{result['total']}", number(result["val_loss"]), percent(recorded)]
    print(table([["checkpoint", "weights", "accuracy", "top 5", "correct", "val loss", "recorded"], cells]))
    if args.per_class:
        print("", table(class_rows(result["classes"])), "", sep="\n")
    if not args.quiet:
        skipped = f", {count(len(result['unreadable']), 'image')} skipped as unreadable" if result["unreadable"] else ""
        print(
            f"{result['weights']} weights of {result['checkpoint']}, {result['model']}, on {count(result['total'], 'validation image')} "
            f"of {result['data']}{skipped}"
        )
        print(f"{result['ops']} ops served by {result['backend']}")
        worst = sorted((c for c in result["classes"] if c["images"]), key=lambda c: c["accuracy"])[:3]
        if not args.per_class and len(result["classes"]) > 1:
            named = ", ".join(f"{c['name']} at {percent(c['accuracy'])}" for c in worst)
            print(f"lowest by class: {named} (--per_class shows all)")
        if recorded is not None:
            print("The recorded accuracy is reproduced." if result["reproduced"] else "This is NOT the recorded accuracy.")


def predict(config: TrainConfig, args: argparse.Namespace) -> None:
    network = with_names(Network.open(Path(args.checkpoint), config, args.weights, prepare(config.run)))
    bar = Bar(args.quiet)
    images = find_images([Path(name) for name in args.images], bar.line)
    writer = writer_for("json" if args.json else "csv" if args.csv else "text", bar.result, images, network.class_names)
    failed, named = 0, []
    bar.begin(len(images))
    writer.begin()
    try:
        for image, row in zip(images, predict_images(network, images, args.top, bar.line), strict=True):
            writer.add(row)
            if "error" in row:
                failed += 1
                named += [f"{image.path}: {row['error']}"] if image.named else []
            bar.update(image.path.name)
    finally:
        writer.end()
        bar.close()
    told = f"{failed} of {count(len(images), 'image')} could not be read"
    if named or failed == len(images):
        raise Failure(": ".join([told, *named[:1]]) + (", and more" if len(named) > 1 else ""))
    if failed and not args.quiet:
        print(told, file=sys.stderr)


def compare(config: TrainConfig, args: argparse.Namespace) -> None:
    check_output(config.run.output)
    with alone(Path(config.run.output), World(torch.device("cpu"))):
        demo(config, args.quiet, args.json)


COMMANDS = {"train": train, "finetune": finetune, "models": models, "evaluate": evaluate, "predict": predict, "demo": compare}
