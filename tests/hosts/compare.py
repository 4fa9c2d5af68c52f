"""A fused model of a host against the host's own, from the same seed."""

from __future__ import annotations

import copy
import io

import torch
from torch import Tensor, nn

import mvit3_kernels
from tests.golden import fill


def prepare(model: nn.Module) -> nn.Module:
    """Weights under which a network listens to its images, in float64: every part of it shows in its results."""
    return fill(model).double()


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def flat(tensors: object) -> Tensor:
    """All values of a tensor, or of a collection of them, in a row."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    return torch.cat([torch.empty(0, dtype=torch.float64), *(t.detach().double().flatten() for t in tensors)])


def results(model: nn.Module, x: Tensor, training: bool) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of one step, whose random numbers come from one seed."""
    model.train(training)
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = model(x)
    outputs = [y] if isinstance(y, Tensor) else list(y)
    sum(t.square().mean() for t in outputs).backward()
    gradients = [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    return {"outputs": flat(outputs), "gradients": flat(gradients), "buffers": flat(model.buffers())}


def distances(model: nn.Module, x: Tensor, training: bool, mode: str = "training") -> dict[str, float]:
    """How far a fused copy of a host's model is from the model, relative to the results."""
    want = results(copy.deepcopy(model), x, training)
    got = results(mvit3_kernels.fuse(copy.deepcopy(model), mode), x, training)
    return {name: ((got[name] - t).norm() / t.norm().clamp(min=1e-300)).item() for name, t in want.items()}


def pickled(model: nn.Module) -> nn.Module:
    """A model that went through a file."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
