"""A run that begins, or goes on where a checkpoint has left it."""

from __future__ import annotations

from pathlib import Path

from . import checkpoint
from .config import TrainConfig
from .data import Loaders
from .distributed import World
from .ema import INITIAL_SHARE
from .options import UsageError
from .progress import Listener
from .trainer import Trainer


def start(config: TrainConfig, loaders: Loaders, world: World, listener: Listener | None = None) -> Trainer:
    """A trainer, fresh or where the checkpoint that `run.resume` means has left it."""
    trainer = Trainer(config, loaders, world, listener)
    resume, content, error = config.run.resume, None, None
    if world.first and resume != "never":  # only this process needs to see the folder
        try:
            content = checkpoint.latest(trainer.folder, trainer.listener.say) if resume == "auto" else checkpoint.load(Path(resume))
        except checkpoint.CheckpointError as found:
            error = found
    content, error = world.from_first((content, error))
    if error is not None:
        raise error
    if trainer.ema is not None and (share := trainer.ema.initial_share(trainer.total_steps)) > INITIAL_SHARE:
        trainer.listener.say(
            f"ema.momentum {config.ema.momentum:g} is small for {trainer.total_steps} steps: at their end {share:.0%} of the average are "
            "still initial weights; --ema.warmup true forgets them at once"
        )
    if content is not None:
        if resume == "auto" and (differences := changes(trainer, content)):
            raise UsageError(
                f"the checkpoint in {trainer.folder} was made with other options: {'; '.join(differences)}. "
                "Take another run.output, or --run.resume never, or name the checkpoint in --run.resume to go on with the new ones"
            )
        trainer.load(content)
        p = trainer.progress
        trainer.listener.say(f"going on at epoch {p.epoch + 1}, step {p.step} of {trainer.total_steps}")
    return trainer


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
    "run": {"output", "device", "threads", "resume", "max_steps", "save_epochs", "save_steps", "eval_epochs", "log_steps"}
    | {"tensorboard", "wandb", "keep_best", "max_bad_steps", "ops", "compile", "cuda_graph", "channels_last", "deterministic"},
}


def changes(trainer: Trainer, content: dict[str, object]) -> list[str]:
    """Options that decide the result, and differ from those of a checkpoint."""
    then, config = content["config"], trainer.config
    found = [
        f"{section}.{key} was {then[section][key]}, is {value}"
        for section, values in config.to_dict().items()
        for key, value in values.items()
        if key not in FREE.get(section, ()) and then.get(section, {}).get(key, value) != value
    ]
    before, now = then["data"]["batch_size"] * content["world_size"], config.data.batch_size * trainer.world.size
    if before != now:
        found.append(f"images per batch over all processes were {before}, are {now}")
    return found
