"""Wrappers of several processes around a fused network of a host, and around one that is fused afterwards."""

from __future__ import annotations

import copy
import os
import warnings
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mvit3_kernels import explain, fuse

from .compare import images, prepare

PROCESSES = 2
Process = get_context("spawn").Process


def _steps(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Losses of two steps."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 1e-2), []
    for _ in range(2):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def _work(rank: int, folder: str) -> None:
    timeout = timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout, rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    model = timm.create_model("mobilevit_xxs")
    network = prepare(nn.Sequential(model.stem, *model.stages[:3])).train()
    x = images(PROCESSES, 3, 32, 32)[rank : rank + 1]

    def shard(model: nn.Module) -> nn.Module:
        for stage in model:
            fully_shard(stage)
        return fully_shard(model)

    wrappers = {"ddp": DistributedDataParallel, "fsdp": shard}
    found = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"FSDP2-wrapped module .* returned a view")
        for name, wrap in wrappers.items():
            found[f"{name} host"] = _steps(wrap(copy.deepcopy(network)), x)
            found[f"{name} fused before"] = _steps(wrap(fuse(copy.deepcopy(network), "training")), x)
            found[f"{name} fused after"] = _steps(fuse(wrap(copy.deepcopy(network)), "training"), x)
    model = DistributedDataParallel(fuse(copy.deepcopy(network), "training"))
    found["reasons"] = [row.reason for row in explain(model, x) if row.kind == "block" and row.reason]
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_wrappers_go_on(tmp_path: Path) -> None:
    """DDP and FSDP2, made before `fuse` and after it, train as around the host; what FSDP2's modules return is their
    own, so that a write to it keeps the hooks of backward."""
    other = Process(target=_work, args=(1, str(tmp_path)), daemon=True)
    other.start()
    _work(0, str(tmp_path))
    other.join()
    losses = []
    for rank in range(PROCESSES):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert not found.pop("reasons")  # under DDP blocks run as ops
        for name, values in found.items():
            want = found[f"{name.split()[0]} host"]
            assert all((a - b).abs() <= 1e-12 * b.abs() for a, b in zip(values, want, strict=True)), name
        losses.append(found["ddp host"])
    assert losses[0][0] != losses[1][0] and losses[0][1] != losses[0][0]
