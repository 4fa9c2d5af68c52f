"""Which kernels serve a run: observed by the library, not assumed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import mvit3_kernels
from mvit3_kernels import _native

from .config import TrainConfig
from .network import evaluation_mode, train_mode
from .runtime import autocast, use_ops


@torch.no_grad()
def served(model: nn.Module, images: Tensor, config: TrainConfig, training: bool = True) -> str:
    """What computes a step of `model`: "cpu avx512 (batch_norm_act, ...)"; what runs as plain PyTorch, or module by
    module, is named with the reason."""
    run = config.run
    if run.ops == "reference":
        return "reference"
    model = copy.deepcopy(model)  # the forward pass updates running statistics
    if training:
        train_mode(model, config.model)
    else:
        evaluation_mode(model)
    images = images.contiguous(memory_format=torch.channels_last) if run.channels_last else images
    with use_ops(run.ops), autocast(run, images.device):
        found = mvit3_kernels.explain(model, images)
    ops: dict[tuple[str, str], set[str]] = {}
    for row in found:
        if row.kind == "op":
            ops.setdefault((row.ran, row.reason), set()).add(row.what)
    parts = []
    for (backend, reason), names in sorted(ops.items(), key=lambda item: item[0][0] == "reference"):
        name = f"cpu {_native.isa()}" if backend == "cpu" else backend
        parts.append(f"{name} ({', '.join(sorted(names))})" + (f": {reason}" if reason else ""))
    modules = [row for row in found if row.kind == "block" and row.reason]
    if modules:
        reasons = list(dict.fromkeys(row.reason for row in modules))
        parts.append(f"{len(modules)} blocks module by module: {reasons[0]}{', and more' * (len(reasons) > 1)}")
    return "; ".join(parts)
