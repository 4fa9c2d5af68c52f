"""A row of the table: one network, mode, batch and candidate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import mvit3_kernels
from benchmarks.gpu_model import cuda_kernels, device, model, peers
from benchmarks.gpu_model.model import Prediction
from benchmarks.gpu_model.trace import Launch, Trace, step, trace
from mvit3.bench.plain import plain

NETWORKS = ("mobilevitv3_s", "mobilevitv3_100", "mobilevitv3_xxs", "mobilevitv2_100", "mobilevit_s")
BATCHES = (1, 32, 256)
MODES = ("train", "infer")
CANDIDATES = ("ours", "compile", "eager")


def network(name: str) -> nn.Module:
    return mvit3_kernels.create_model(name, num_classes=1000, drop_rate=0.0, proj_drop_rate=0.0)


def ours(name: str, training: bool, batch: int) -> tuple[list[Prediction], list[Launch]]:
    found = trace(name, training, batch)
    return [*of_trace(found), *optimizer(name, training)], found.launches


def of_trace(found: Trace) -> list[Prediction]:
    made = [model.triton(launch) for launch in found.launches]
    for op in found.cuda:
        made += [model.cuda(launch, op.call.stride) for launch in cuda_kernels.launches(op.name, op.call)]
    return [*made, *(peers.aten(op) for op in found.aten)]


def optimizer(name: str, training: bool) -> list[Prediction]:
    return [peers.adamw(sum(p.numel() for p in network(name).parameters()))] if training else []


def eager(name: str, training: bool, batch: int) -> list[Prediction]:
    seen = step(lambda: plain(network(name)), training, batch)
    return [*(peers.aten(op) for op in seen), *optimizer(name, training)]


def compiled(name: str, training: bool, batch: int) -> list[Prediction]:
    graph = peers.graph(lambda: plain(network(name)), training, batch)
    return [*peers.Fusion(graph).kernels(), *optimizer(name, training)]


PEERS: dict[str, Callable[[str, bool, int], list[Prediction]]] = {"eager": eager, "compile": compiled}


def row(name: str, mode: str, batch: int, candidate: str, made: list[Prediction]) -> dict[str, Any]:
    """A row of benchmarks/results/gpu_model.json: a step lasts as long as the GPU works or as the CPU launches,
    whichever is longer; as a CUDA graph as long as the GPU works."""
    launches = sum(p.launches for p in made)
    gpu = sum(p.seconds for p in made)
    cpu = sum(p.launches * device.CPU[p.kind] for p in made)
    graph = gpu - launches * (device.START - device.START_IN_GRAPH)
    parts: dict[str, list[Prediction]] = {}
    for p in made:
        parts.setdefault(p.name, []).append(p)
    kernels = [_part(part, group) for part, group in parts.items()]
    return {
        "network": name,
        "mode": mode,
        "batch": batch,
        "candidate": candidate,
        "predicted_ms": round(max(gpu, cpu) * 1e3, 4),
        "gpu_ms": round(gpu * 1e3, 4),
        "cpu_ms": round(cpu * 1e3, 4),
        "graph_ms": round(graph * 1e3, 4),
        "limit": "gpu" if gpu >= cpu else "launches",
        "launches": launches,
        "gigabytes": round(sum(p.bytes for p in made) / 1e9, 4),
        "floor_ms": round(sum(p.bytes for p in made) / device.MEMORY * 1e3, 4),
        "kernels": sorted(kernels, key=lambda k: -k["ms"])[:40],
    }


def floor(p: Prediction) -> float:
    """Seconds that no kernel of the same bytes and products could do without, of as many launches."""
    return max(p.bytes / device.MEMORY, p.products / device.WGMMA) + p.launches * device.START


def _part(name: str, group: list[Prediction]) -> dict[str, Any]:
    longest = max(group, key=lambda p: p.seconds)
    return {
        "kernel": name,
        "launches": sum(p.launches for p in group),
        "ms": round(sum(p.seconds for p in group) * 1e3, 4),
        "floor_ms": round(sum(floor(p) for p in group) * 1e3, 4),
        "limit": longest.limit,
        "blocks": longest.blocks,
        "resident": longest.resident,
        "waves": round(longest.waves, 2),
        "giga_instructions": round(sum(p.instructions for p in group) / 1e9, 3),
        "teraflop": round(sum(p.products for p in group) / 1e12, 4),
        "sure": all(p.sure for p in group),
    }
