"""A run that begins, or goes on where a checkpoint has left it."""

from __future__ import annotations

from pathlib import Path

from . import checkpoint
from .config import TrainConfig
from .data import Loaders
from .data.identity import difference
from .distributed import World
from .ema import INITIAL_SHARE
from .options import UsageError
from .progress import Listener, Progress
from .trainer import Trainer, data_identity

NAMES = 5  # class names that a message shows


def start(config: TrainConfig, loaders: Loaders, world: World, listener: Listener | None = None) -> Trainer:
    """A trainer, fresh or where the checkpoint that `run.resume` means has left it.

    Raises:
        UsageError: the checkpoint belongs to other classes, other data or other options.
        CheckpointError: it cannot be read, or belongs to another network.
    """
    told = listener if listener and world.first else Listener()
    content, error = None, None
    if world.first:  # only this process needs to see the folder
        try:
            content = _find(config, told)
            if content is not None:
                _check(config, loaders, world, content, told)
        except (checkpoint.CheckpointError, UsageError) as found:
            error = found
    content, error = world.from_first((content, error))
    if error is not None:
        raise error
    # The weights of a checkpoint replace those of model.pretrained, which may be gone by now.
    trainer = Trainer(config, loaders, world, listener, pretrained=content is None)
    if trainer.ema is not None and (share := trainer.ema.initial_share(trainer.total_steps)) > INITIAL_SHARE:
        told.say(
            f"ema.momentum {config.ema.momentum:g} is small for {trainer.total_steps} steps: at their end {share:.0%} "
            "of the average are "
            "still initial weights; --ema.warmup true forgets them at once"
        )
    if content is not None:
        trainer.load(content)
        if config.run.resume != "auto" and world.first:
            _settle(trainer, Path(config.run.resume))
        p = trainer.progress
        if p.epoch < config.schedule.epochs:
            told.say(f"going on at epoch {p.epoch + 1}, step {p.step} of {trainer.total_steps}")
        else:
            told.say(f"all {p.epoch} epochs are done")
    return trainer


def _find(config: TrainConfig, told: Listener) -> dict[str, object] | None:
    resume = config.run.resume
    if resume == "never":
        return None
    return checkpoint.latest(Path(config.run.output), told.say) if resume == "auto" else checkpoint.load(Path(resume))


def _check(config: TrainConfig, loaders: Loaders, world: World, content: dict[str, object], told: Listener) -> None:
    """UsageError where a checkpoint is of other classes or beyond the training; unless it was named, of other data or
    options."""
    auto = config.run.resume == "auto"
    where = f"the checkpoint in {config.run.output}" if auto else f"the checkpoint {config.run.resume}"
    then, now = content.get("data") or {"name": _name(content["config"]["data"])}, data_identity(config, loaders)
    before, here = content["class_names"], list(loaders.class_names)
    if before != here:
        raise UsageError(
            f"{where} was trained on {then['name']} with {_classes(before, here)}; {now['name']} has "
            f"{_classes(here, before)}. Take "
            "another run.output, and to begin with its weights --model.pretrained CHECKPOINT --model.drop_head true"
        )
    if content["num_classes"] != (config.model.num_classes or loaders.num_classes):
        raise UsageError(
            f"{where} has {content['num_classes']} outputs, model.num_classes asks for "
            f"{config.model.num_classes or loaders.num_classes}"
        )
    progress = content["progress"]
    done = progress["epoch"] + (progress["batch"] > 0)
    if done > config.schedule.epochs:
        raise UsageError(f"schedule.epochs must be at least {done}, where {where} is, got {config.schedule.epochs}")
    other = [
        f"{part} images: {text}"
        for part, key in (("training", "train"), ("validation", "val"))
        if key in then and (text := difference(then[key], now[key]))
    ]
    if other and auto:
        raise UsageError(
            f"{where} was trained on {then['name']}, and {now['name']} holds other images ({'; '.join(other)}). Take "
            "another run.output, "
            "or --run.resume never, or name the checkpoint in --run.resume to go on with these images"
        )
    if other:
        told.say(f"{where} was trained on {then['name']}; it goes on with {now['name']} ({'; '.join(other)})")
    if auto and (differences := changes(config, world, content)):
        raise UsageError(
            f"{where} was made with other options: {'; '.join(differences)}. "
            "Take another run.output, or --run.resume never, or name the checkpoint in --run.resume to go on with the "
            "new ones"
        )


def _name(data: dict[str, object]) -> str:
    return str(data["root"] or data["source"])


def _classes(names: list[str], others: list[str]) -> str:
    """ "3 classes (a, b, c)"; of many the names that the others do not have."""
    shown = names if len(names) <= NAMES else [name for name in names if name not in set(others)] or names
    more = ", ..." if len(shown) > NAMES or len(shown) < len(names) else ""
    return f"{len(names)} class{'es' if len(names) > 1 else ''} ({', '.join(shown[:NAMES])}{more})"


def _settle(trainer: Trainer, origin: Path) -> None:
    """After a named checkpoint: run.output gets it, and its best.pt, where that can be had; else the best from here on
    is kept."""
    p, best, also = trainer.progress, trainer.folder / checkpoint.BEST, []
    if p.best_epoch == p.epoch and not p.batch:
        also = [checkpoint.BEST]
    elif not _is_best(best, p):
        if _is_best(origin.parent / checkpoint.BEST, p):
            best.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.link(origin.parent / checkpoint.BEST, best)
        elif p.best_epoch:
            trainer.listener.say(
                f"{checkpoint.BEST} of epoch {p.best_epoch} is not beside {origin}: the best of the epochs from here "
                "on is kept"
            )
            p.best, p.best_epoch, p.best_weights = -1.0, 0, ""
    trainer.save(also)


def _is_best(path: Path, p: Progress) -> bool:
    try:
        progress = checkpoint.load(path)["progress"]
    except checkpoint.CheckpointError:
        return False
    return (progress["epoch"], progress["best_epoch"], progress["best"]) == (p.best_epoch, p.best_epoch, p.best)


# Options that nothing of what is computed depends on; and the batch of a process, which that of all processes replaces.
FREE = {
    "data": {
        "root",
        "train",
        "val",
        "cache",
        "download",
        "workers",
        "prefetch",
        "batch_size",
        "eval_batch_size",
        "max_corrupt",
        "limit_val",
    },
    "run": {
        "output",
        "device",
        "threads",
        "resume",
        "max_steps",
        "save_epochs",
        "save_steps",
        "eval_epochs",
        "log_steps",
    }
    | {
        "tensorboard",
        "wandb",
        "keep_best",
        "max_bad_steps",
        "ops",
        "compile",
        "cuda_graph",
        "channels_last",
        "deterministic",
    },
}


def changes(config: TrainConfig, world: World, content: dict[str, object]) -> list[str]:
    """Options that decide the result, and differ from those of a checkpoint."""
    then = content["config"]
    found = [
        f"{section}.{key} was {then[section][key]}, is {value}"
        for section, values in config.to_dict().items()
        for key, value in values.items()
        if key not in FREE.get(section, ()) and then.get(section, {}).get(key, value) != value
    ]
    before, now = then["data"]["batch_size"] * content["world_size"], config.data.batch_size * world.size
    if before != now:
        found.append(f"images per batch over all processes were {before}, are {now}")
    return found
