"""What the tests of batch_norm_act's kernels call, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

import mvit3_kernels
from mvit3_kernels.ops import batch_norm_act

from .inputs import Arguments, Draw


def arguments(
    shape: tuple[int, int, int, int], act: str, residual: bool, training: bool, mean: float = 0.5
) -> Arguments:
    draw, channels = Draw(), shape[-1]
    norm = draw.batch_norm(channels, training)
    norm = norm._replace(weight=norm.weight.requires_grad_(), bias=norm.bias.requires_grad_())
    if not training:
        norm = norm._replace(running_mean=norm.running_mean + mean)
    return {
        "x": draw(*shape, mean=mean).requires_grad_(),
        "norm": norm,
        "act": act,
        "residual": draw(*shape).requires_grad_() if residual else None,
        "dy": draw(*shape),
    }


def results(args: Arguments, backend: str) -> dict[str, Tensor | None]:
    """Outputs and gradients of the public function."""
    x, norm, residual = args["x"], args["norm"], args["residual"]
    with mvit3_kernels.backend(backend):
        y, moments = batch_norm_act(x, norm, args["act"], residual)
        y.backward(args["dy"])
    mean, var = moments or (None, None)
    return {
        "y": y.detach(),
        "mean": mean,
        "var": var,
        "dx": x.grad,
        "dweight": norm.weight.grad,
        "dbias": norm.bias.grad,
        "dresidual": None if residual is None else residual.grad,
    }


def poison() -> None:
    """From here on torch.empty is full of NaN, so that an element nobody wrote, in an output or a workspace, shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
