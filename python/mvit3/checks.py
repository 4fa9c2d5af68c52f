"""What data and batch must be for a network to learn from them."""

from __future__ import annotations

from .config import TrainConfig
from .data import Loaders
from .data.sampler import batch_sizes
from .distributed import World
from .options import UsageError
from .tasks import Task


def count_classes(config: TrainConfig, loaders: Loaders, task: Task) -> int:
    """Outputs of the classifier. UsageError where the data has more classes, or cannot be learnt."""
    count = config.model.num_classes or loaders.num_classes
    if count < loaders.num_classes:
        raise UsageError(
            f"model.num_classes must be at least {loaders.num_classes}, the classes of the data; got {count}"
        )
    task.check(config, loaders)
    return count


def check_batch_norm(config: TrainConfig, world: World, task: Task) -> None:
    """UsageError where batch norm would see one value per channel behind the last stride, which has no variance."""
    for size, images in batch_sizes(config.sampler, config.data.batch_size, world.size).items():
        mine = images if config.run.sync_bn else images // world.size
        if mine == 1 and task.stride is None:
            raise UsageError(
                f"data.batch_size must be at least 2 for {config.model.name}: its head has the mean over the map of an "
                "image, and batch norm needs more than one value per channel"
            )
        if mine == 1 and size <= task.stride:
            raise UsageError(
                f"data.batch_size must be at least 2 for images of {size} pixels: the last map of one image is 1x1, "
                "and batch norm needs "
                f"more than one value per channel; or take sampler.size above {task.stride}"
            )
