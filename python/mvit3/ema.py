"""Moving average of a network's whole state."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Ema:
    """`module`, in evaluation mode, is the average: after each step average = (1 - momentum) * average + momentum * network, for parameters
    and buffers. Integer buffers are truncated after each update, as in the published training; no network reads them in evaluation.

    timm's ModelEmaV3 copies integer buffers instead, and collects both state dicts anew in each step.
    """

    def __init__(self, model: nn.Module, momentum: float) -> None:
        self.module, self.momentum = copy.deepcopy(model).eval().requires_grad_(False), momentum
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self._floats, self._float_sources = _columns([pair for pair in pairs if pair[0].is_floating_point()])
        self._integers, self._integer_sources = _columns([pair for pair in pairs if not pair[0].is_floating_point()])

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self._floats, self._float_sources, self.momentum)
        if self._integers:
            averages = torch._foreach_mul(self._integers, 1 - self.momentum)
            torch._foreach_add_(averages, torch._foreach_mul(self._integer_sources, self.momentum))
            torch._foreach_copy_(self._integers, averages)


def _columns(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [average for average, _ in pairs], [source for _, source in pairs]
