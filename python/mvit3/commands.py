"""What the commands do. The command line is read in cli.py, without the libraries that this needs."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

import mvit3_kernels

from . import checkpoint, prediction_dense
from .backends import served
from .bench import command as benchmark
from .config import TrainConfig, check_output
from .data import DataError, DecodeError, loaders
from .demo import demo
from .distributed import World, is_peer_lost, world
from .errors import Failure
from .evaluation import evaluate_checkpoint
from .export import exported
from .inference import Network, products, serve
from .listing import describe
from .lock import alone
from .logs import write
from .names import task_of
from .options import UsageError
from .parser import COMMANDS as SETTINGS
from .prediction import find_images, with_names, writer_for
from .prediction import predict as predict_images
from .report import summary, summary_text, write_html
from .reporter import Reporter
from .runtime import is_out_of_memory, prepare
from .scores import class_csv, class_rows, lowest, scores_of
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
        if SETTINGS[name].sections:
            trains = name in ("train", "finetune", "demo")
            batch = "data.batch_size (run.accumulate makes up for it)" if trains else "data.eval_batch_size"
            advice = f"{batch}, smaller images or run.amp bf16 need less"
        else:
            advice = "--batch or --size needs less" if name == "bench" else "--size needs less"
        lines = str(error).strip().splitlines() or ["no more memory is to be had"]
        # the former is of a loading process, with its traceback
        detail = lines[-1] if lines[0].startswith("Caught ") else lines[0]
        raise Failure(f"out of memory: {detail}; a smaller {advice}") from error


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
            f"{count(len(images.class_names), 'class')}; building {config.model.name}"
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


def export(config: TrainConfig, args: argparse.Namespace) -> None:
    bar = Bar(args.quiet)
    result = exported(Path(args.checkpoint), config, args, bar.line)
    if args.json:
        print(json.dumps(result, indent=1))
        return
    lines = {
        "file": result["file"],
        "network": f"{result['network']}, {result['weights']} weights",
        "images": f"{result['input']}; sizes: {result['sizes']}",
        "outputs": ", ".join(result["outputs"]),
        "checked": f"batches of 1 to 3 differ by {result['difference']:.1e} of the largest output",
    }
    print("\n".join(f"{name:8} {text}" for name, text in lines.items()))


def models(config: TrainConfig, args: argparse.Namespace) -> None:
    found = describe(args.names, args.size)
    dense = any(task_of(model["name"]) != "classification" for model in found)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    rows = [["network", "parameters", "GMACs", "input", "recipes"]]
    for model in found:
        recipes = ", ".join(model["recipes"])
        rows.append(
            [model["name"], f"{model['parameters'] / 1e6:.2f} M", f"{model['macs'] / 1e9:.2f}", model["input"], recipes]
        )
    print(table(rows))
    if not args.quiet:
        print(
            f"\nGMACs: 10^9 multiplications with addition of one {args.size}x{args.size} image, which papers call "
            f"FLOPs; {'as many classes as published' if dense else '1000 classes'}."
        )


def bench(config: TrainConfig, args: argparse.Namespace) -> int:
    """1 where a result is wrong."""
    work = benchmark.work_of(args)
    prepare(replace(config.run, threads=args.threads, device="cpu"))
    facts, rows = benchmark.bench(args, work, Bar(args.quiet))
    print(benchmark.document(benchmark.OP, rows, facts) if args.json else benchmark.text(facts, rows))
    return int(any(row["result"] == "WRONG" for row in rows))


def _backend(trainer: Trainer) -> str:
    side = trainer.config.sampler.size
    return served(
        trainer.task.network(trainer.model), torch.zeros(2, 3, side, side, device=trainer.device), trainer.config
    )


def _conclude(trainer: Trainer, result: dict[str, object], as_json: bool) -> None:
    page = trainer.folder / "report.html"
    # else the report of the training is kept
    if result["history"] and not (result["already_complete"] and page.exists()):
        write(trainer.folder / "report.json", json.dumps(result, indent=1) + "\n")
        write_html(page, result, trainer.progress)
    print(json.dumps(result, indent=1) if as_json else summary_text(result))


def evaluate(config: TrainConfig, args: argparse.Namespace) -> None:
    with world(prepare(config.run)) as here:
        bar = Bar(args.quiet or not here.first)
        result = evaluate_checkpoint(Path(args.checkpoint), config, args.weights, here, bar)
    if not here.first:
        return
    scores = scores_of(config.model.name)
    if args.json:
        print(json.dumps(result, indent=1))
        return
    if args.csv:
        print(class_csv(result, scores), end="")
        return
    recorded = result[f"recorded_{scores.best}"]
    heads, cells = ["checkpoint", "weights"], [result["checkpoint"], result["weights"]]
    heads += scores.heads.values()
    cells += [percent(result[key]) for key in scores.heads]
    heads += ["correct" if "correct" in result else "images", "val loss", "recorded"]
    cells += [f"{result['correct']}/{result['total']}" if "correct" in result else str(result["total"])]
    cells += [number(result["val_loss"]), percent(recorded)]
    print(table([heads, cells]))
    if args.per_class:
        print("", table(class_rows(result["classes"], scores)), "", sep="\n")
    if not args.quiet:
        skipped = f", {count(len(result['unreadable']), 'image')} skipped as unreadable" if result["unreadable"] else ""
        print(
            f"{result['weights']} weights of {result['checkpoint']}, {result['model']}, on "
            f"{count(result['total'], 'validation image')} "
            f"of {result['data']}{skipped}"
        )
        print(f"{result['ops']} ops served by {result['backend']}")
        if not args.per_class and len(result["classes"]) > 1:
            worst = lowest(result["classes"], scores, 3)
            named = ", ".join(f"{c['name']} at {percent(c[scores.of_class])}" for c in worst)
            print(f"lowest by class: {named} (--per_class shows all)")
        if recorded is not None:
            verdict = "The recorded {} is reproduced." if result["reproduced"] else "This is NOT the recorded {}."
            print(verdict.format(scores.name))


def predict(config: TrainConfig, args: argparse.Namespace) -> None:
    dense = task_of(config.model.name) != "classification"
    options = prediction_dense.options(config, args.output, args.threshold, args.top)
    device = prepare(config.run)
    dtype = products(args.dtype, config.run, device)
    network = with_names(Network.open(Path(args.checkpoint), config, args.weights, device))
    bar = Bar(args.quiet)
    images = find_images(args.images, bar.line)
    if dtype is not None:
        serve(network, dtype, bar.line)
    kind = "json" if args.json else "csv" if args.csv else "text"
    if dense:
        network = prediction_dense.with_names(network)
        rows = prediction_dense.predict(network, images, options, bar.line)
        writers = prediction_dense.writers_for(network, kind, bar.result, images, options)
    else:
        rows = predict_images(network, images, args.top, bar.line)
        writers = [writer_for(kind, bar.result, images, network.class_names)]
    failed, named = 0, []
    bar.begin(len(images))
    with ExitStack() as open_writers:
        open_writers.callback(bar.close)
        for writer in writers:
            writer.begin()
            open_writers.callback(writer.end)
        for image, row in zip(images, rows, strict=True):
            for writer in writers:
                writer.add(row)
            if "error" in row:
                failed += 1
                named += [f"{image.path}: {row['error']}"] if image.named else []
            bar.update(image.path.name)
    if dense and not args.quiet and failed < len(images):
        print(f"files: {options.folder}", file=sys.stderr)
    told = f"{failed} of {count(len(images), 'image')} could not be read"
    if named or failed == len(images):
        raise Failure(": ".join([told, *named[:1]]) + (", and more" if len(named) > 1 else ""))
    if failed and not args.quiet:
        print(told, file=sys.stderr)


def compare(config: TrainConfig, args: argparse.Namespace) -> None:
    check_output(config.run.output)
    if task_of(config.model.name) != "classification":
        raise UsageError(f"model.name must be a classifier for mvit3 demo, got {config.model.name}")
    with alone(Path(config.run.output), World(torch.device("cpu"))):
        demo(config, args.quiet, args.json)


COMMANDS = {
    "train": train,
    "finetune": finetune,
    "models": models,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "bench": bench,
    "demo": compare,
}
