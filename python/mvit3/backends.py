"""Which kernels serve a run: observed, not assumed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mvit3_kernels import _native
from mvit3_kernels.ops.dispatch import forced_backend

from .config import RunConfig
from .runtime import autocast, use_ops


class _Calls(TorchDispatchMode):
    """Collects the names of this library's ops that reach a kernel; an op served by its reference never shows up as itself."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mvit3":
            self.names.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def served(model: nn.Module, images: Tensor, run: RunConfig, training: bool = True) -> str:
    """What computes a step of `model`: "cpu avx512 (batch_norm_act)", or "reference" and why no kernel does."""
    if run.ops == "reference":
        return "reference"
    model = copy.deepcopy(model).train(training)  # the forward pass updates running statistics
    images = images.contiguous(memory_format=torch.channels_last) if run.channels_last else images
    with use_ops(run.ops), autocast(run, images.device), _Calls() as calls:
        model(images)
    if calls.names:
        kind = f"cpu {_native.isa()}" if images.device.type == "cpu" else images.device.type
        return f"{kind} ({', '.join(sorted(calls.names))})"
    if forced_backend():
        return f"reference: the backend is forced to {forced_backend()!r}"
    if images.device.type == "cpu" and _native.why_not():
        return f"reference: {_native.why_not()}"
    return f"reference: no op of this network has a kernel for {images.device.type}"
