"""Which images form a batch, at which size, for which process: a function of (seed, epoch, batch) alone.

timm's scheduled batch sampler draws the sizes and fills the batches. It is given the whole epoch and batches of all
processes together, so that their number does not matter, and each process takes its part of every batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import torch
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch.utils.data import Sampler

from ..options import UsageError
from .config import SamplerConfig

# Batches of other sizes than the base are rounded down to this many images, so that 1, 2, 4 and 8 processes see the
# same ones.
MULTIPLE = 8

Sample = tuple[int, int, int, int]  # index of the image, size, epoch, position in the epoch


def spread(total: int, count: int) -> list[int]:
    """`count` indices below `total`, spread evenly; all of them where there are no more."""
    count = min(total, count)
    return [i * total // count for i in range(count)]


def batch_sizes(config: SamplerConfig, batch_size: int, world_size: int) -> dict[int, int]:
    """Images per batch of all processes, for each side of images: as many pixels as batch_size images of the base size
    on each process."""
    total = batch_size * world_size
    multiple = math.gcd(total, math.lcm(MULTIPLE, world_size))
    sizes = {}
    for size in config.sizes or (config.size,):
        fitting = total * config.size**2 // size**2 // multiple * multiple
        sizes[size] = max(fitting, multiple if config.shrink else total)
    return sizes


class _Permutation(Sampler):
    """(image, position) in the order of an epoch. With `repeats`, the first of them come so many times in a row, each
    augmented anew, and the others wait for another epoch (Hoffer et al. 2019, Berman et al. 2019): an epoch stays as
    long."""

    def __init__(self, count: int, seed: int, repeats: int) -> None:
        self.count, self.seed, self.repeats, self.epoch = count, seed, repeats, 0

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # 2^20 epochs before two seeds share an order.
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed((self.seed << 20) + self.epoch))
        order = order.repeat_interleave(self.repeats)[: self.count]
        return ((int(index), position) for position, index in enumerate(order.tolist()))


class BatchSampler(Sampler):
    """This process's part of each batch. Set `epoch` and `start`, the first batch, before an iteration."""

    def __init__(
        self, config: SamplerConfig, batch_size: int, count: int, seed: int, rank: int, world_size: int
    ) -> None:
        sizes = batch_sizes(config, batch_size, world_size)
        if min(sizes.values()) > count:
            processes = f" on each of {world_size} processes" if world_size > 1 else ""
            raise UsageError(
                f"data.batch_size must be at most the number of training images, {count}, got {batch_size}{processes}"
            )
        order = _Permutation(count, seed, config.aug_repeats)
        self.sizes, self.batches = list(sizes), ScheduledBatchSampler(order, list(sizes.values()), seed=seed)
        self.rank, self.world_size, self.epoch, self.start = rank, world_size, 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def images(self) -> int:
        """Images of an epoch, over all processes; what does not fill a last batch is left out."""
        return sum(count for _, count in self.batches.schedule)

    def __iter__(self) -> Iterator[list[Sample]]:
        self.batches.set_epoch(self.epoch)
        for batch in islice(self.batches, self.start, None):
            part = len(batch) // self.world_size
            mine = batch[self.rank * part : (self.rank + 1) * part]
            yield [(index, self.sizes[choice], self.epoch, position) for (index, position), choice in mine]
