"""What the commands do. The command line is read in cli.py, without the libraries that this needs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import mvit3_kernels

from . import checkpoint
from .backends import served
from .config import TrainConfig, check_output
from .data import DataError, DecodeError, loaders
from .demo import demo
from .distributed import world
from .errors import Failure
from .inference import Network, evaluate_checkpoint
from .logs import write
from .prediction import CsvWriter, JsonWriter, TextWriter, find_images
from .prediction import predict as predict_images
from .report import Bar, Reporter, percent, summary, summary_text, table, write_html
from .runtime import prepare
from .session import start
from .trainer import Trainer

EXPECTED = (checkpoint.CheckpointError, mvit3_kernels.CheckpointError, DataError, DecodeError)


def run(name: str, config: TrainConfig, args: argparse.Namespace) -> None:
    """Runs a command; Failure where it cannot do what it was told."""
    try:
        {"train": train, "evaluate": evaluate, "predict": predict, "demo": compare}[name](config, args)
    except EXPECTED as error:
        raise Failure(str(error)) from error


def train(config: TrainConfig, args: argparse.Namespace) -> None:
    check_output(config.run.output)
    began = time.perf_counter()
    with world(prepare(config.run)) as here:
        images = loaders(config, rank=here.rank, world_size=here.size, seed=config.run.seed, device=here.device)
        reporter = Reporter(args.quiet or not here.first)
        for note in images.notes:
            reporter.say(note)
        trainer = start(config, images, here, reporter)
        backend = _backend(trainer) if here.first else ""
        try:
            if here.first:
                reporter.begin(trainer)
            finished = trainer.fit()
        finally:
            reporter.close()
        if here.first:
            _conclude(trainer, summary(trainer, backend, finished, time.perf_counter() - began), args.json)


def _backend(trainer: Trainer) -> str:
    run, side = trainer.config.run, trainer.config.sampler.size
    return served(trainer.model, torch.zeros(2, 3, side, side, device=trainer.device), run)


def _conclude(trainer: Trainer, result: dict[str, object], as_json: bool) -> None:
    if result["history"]:
        write(trainer.folder / "report.json", json.dumps(result, indent=1) + "\n")
        write_html(trainer.folder / "report.html", result, trainer.progress.confusion, list(trainer.loaders.class_names))
    print(json.dumps(result, indent=1) if as_json else summary_text(result))


def evaluate(config: TrainConfig, args: argparse.Namespace) -> None:
    with world(prepare(config.run)) as here:
        result = evaluate_checkpoint(Path(args.checkpoint), config, args.weights, here, lambda text: print(text, file=sys.stderr))
    if not here.first:
        return
    if args.json:
        print(json.dumps(result, indent=1))
        return
    recorded = result["recorded_accuracy"]
    cells = [result["checkpoint"], result["weights"], percent(result["accuracy"]), percent(result["accuracy5"])]
    cells += [f"{result['correct']}/{result['total']}", f"{result['val_loss']:.4f}", percent(recorded)]
    print(table([["checkpoint", "weights", "accuracy", "top 5", "correct", "val loss", "recorded"], cells]))
    if not args.quiet:
        print(f"{result['model']} on {result['data']}, {result['ops']} ops served by {result['backend']}")
        if recorded is not None:
            print("The recorded accuracy is reproduced." if result["reproduced"] else "This is NOT the recorded accuracy.")


def predict(config: TrainConfig, args: argparse.Namespace) -> None:
    network = Network.open(Path(args.checkpoint), config, args.weights, prepare(config.run))
    images, bar = find_images([Path(name) for name in args.images]), Bar(args.quiet, "images")
    writer = JsonWriter(bar.result) if args.json else CsvWriter(bar.result) if args.csv else TextWriter(bar.result, images, network.class_names)
    failed = named = 0
    bar.begin(len(images))
    writer.begin()
    try:
        for image, row in zip(images, predict_images(network, images, args.top), strict=True):
            writer.add(row)
            failed, named = failed + ("error" in row), named + ("error" in row and image.named)
            bar.update(str(image.path.name))
    finally:
        writer.end()
        bar.close()
    count = f"{failed} of {len(images)} images could not be read"
    if named or failed == len(images):
        raise Failure(count)
    if failed and not args.quiet:
        print(count, file=sys.stderr)


def compare(config: TrainConfig, args: argparse.Namespace) -> None:
    check_output(config.run.output)
    demo(config, args.quiet, args.json)
