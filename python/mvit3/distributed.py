"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process among `size`; `device` is its own. Decisions are agreed on through `_host`, a group that needs no
    GPU."""

    device: torch.device
    rank: int = 0
    size: int = 1
    _host: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some process; all of them get the same answer."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, self._host)
        return bool(flags)

    def from_first(self, value: object) -> object:
        """The first process's value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self._host)
        return box[0]

    def gather(self, value: object) -> list[object]:
        """The values of all processes, by their ranks."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        dist.all_gather_object(found, value, group=self._host)
        return found

    def mean(self, values: Tensor) -> Tensor:
        """Element by element over the processes."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size

    def sync_buffers(self, model: nn.Module) -> None:
        """Gives all processes the first one's running statistics, which are those that are saved."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def data_parallel(model: nn.Module) -> nn.Module:
    """The network with gradients averaged over the processes. Running statistics stay with a process, and the first
    one's are evaluated and saved: the result of broadcasting them in each step, which is PyTorch's default."""
    # of 1x1 filters, which have two spellings
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    new = "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel).parameters
    return nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True, **{"forward_sync_buffers" if new else "broadcast_buffers": False}
    )


def is_peer_lost(error: BaseException) -> bool:
    """Whether an error only says that another process of the run has ended."""
    texts = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return dist.is_initialized() and isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


@contextmanager
def world(device: torch.device) -> Iterator[World]:
    """The world of this process: alone, or as torchrun's environment says; NCCL between GPUs, gloo between CPUs."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    host = dist.new_group(backend="gloo") if device.type == "cuda" else dist.group.WORLD
    yield World(device, dist.get_rank(), size, host)
    dist.destroy_process_group()  # not after an error: it would wait for processes that wait for this one
