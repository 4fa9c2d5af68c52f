"""What the commands do. The command line is read in cli.py, without the libraries that this needs."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch

import mvit3_kernels

from . import checkpoint
from .backends import served
from .config import TrainConfig, check_output
from .data import DataError, DecodeError, loaders
from .demo import demo
from .distributed import World, world
from .errors import Failure
from .inference import Network, evaluate_checkpoint
from .inference import predict as predict_images
from .listing import describe
from .lock import alone
from .logs import write
from .report import Reporter, percent, summary, summary_text, table, write_html
from .runtime import is_out_of_memory, prepare
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
        if not is_out_of_memory(error):
            raise
        kind = "data.batch_size (run.accumulate makes up for it)" if name in ("train", "finetune", "demo") else "data.eval_batch_size"
        lines = str(error).strip().splitlines() or ["no more memory is to be had"]
        detail = lines[-1] if lines[0].startswith("Caught ") else lines[0]  # the former is of a loading process, with its traceback
        raise Failure(f"out of memory: {detail}; a smaller {kind}, smaller images or run.amp bf16 need less") from error


def train(config: TrainConfig, args: argparse.Namespace) -> int:
    check_output(config.run.output)
    began = time.perf_counter()
    with ExitStack() as held:
        here = held.enter_context(world(prepare(config.run)))
        images = loaders(config, rank=here.rank, world_size=here.size, seed=config.run.seed, device=here.device)
        reporter = Reporter(args.quiet or not here.first)
        for note in images.notes:
            reporter.say(note)
        held.enter_context(alone(Path(config.run.output), here))
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
    found = predict_images(network, [Path(name) for name in args.images], args.top)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        rows = [["image", "", "class", "probability"]]
        for image in found:
            if "error" in image:
                rows.append([image["image"], "", image["error"], ""])
            for place, guess in enumerate(image.get("classes", ()), 1):
                rows.append([image["image"] if place == 1 else "", str(place), guess["name"], percent(guess["probability"])])
        print(table(rows))
    if all("error" in image for image in found):
        raise DataError("no image could be read")


def compare(config: TrainConfig, args: argparse.Namespace) -> None:
    check_output(config.run.output)
    with alone(Path(config.run.output), World(torch.device("cpu"))):
        demo(config, args.quiet, args.json)


COMMANDS = {"train": train, "finetune": finetune, "models": models, "evaluate": evaluate, "predict": predict, "demo": compare}
