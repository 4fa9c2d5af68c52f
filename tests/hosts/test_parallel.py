"""Wrappers of several processes around a fused network of a host, and around one that is fused afterwards."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from mvit3_kernels import explain, fuse

from .compare import images, prepare

PROCESSES = 2


def _steps(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Losses of three steps."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(3):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    network = prepare(timm.create_model("mobilevit_xxs", num_classes=3)).train()
    x = images(2 * PROCESSES, 3, 32, 32)[2 * rank : 2 * rank + 2]

    def shard(model: nn.Module) -> nn.Module:
        for stage in model.stages:
            fully_shard(stage)
        return fully_shard(model)

    wrappers = {"ddp": DistributedDataParallel, "fsdp": shard}
    found = {}
    for name, wrap in wrappers.items():
        found[f"{name} host"] = _steps(wrap(copy.deepcopy(network)), x)
        found[f"{name} fused before"] = _steps(wrap(fuse(copy.deepcopy(network), "training")), x)
        found[f"{name} fused after"] = _steps(fuse(wrap(copy.deepcopy(network)), "training"), x)
    model = DistributedDataParallel(fuse(copy.deepcopy(network), "training"))
    found["reasons"] = [row.reason for row in explain(model, x) if row.kind == "block" and row.reason]
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_wrappers_go_on(tmp_path: Path) -> None:
    """DDP and FSDP2, made before `fuse` and after it, train as around the host."""
    spawn(_work, (str(tmp_path),), PROCESSES)
    losses = []
    for rank in range(PROCESSES):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert not found.pop("reasons")  # under DDP blocks run as ops
        for name, values in found.items():
            want = found[f"{name.split()[0]} host"]
            assert all((a - b).abs() <= 1e-12 * b.abs() for a, b in zip(values, want, strict=True)), name
        losses.append(found["ddp host"])
    assert losses[0][0] != losses[1][0] and losses[0][2] != losses[0][0]
