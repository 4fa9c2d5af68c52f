"""Moving average of a network's whole state."""

from __future__ import annotations

import copy

import torch
from torch import nn

INITIAL_SHARE = 0.01  # of the initial weights in an average, from which on it is said


class Ema:
    """`module`, in evaluation mode, is the average: after each step average = (1 - m) * average + m * network, for
    parameters and buffers. Integer buffers are truncated after each update, as in the published training; no network
    reads them in evaluation.

    m is `momentum`, as published; with `warmup` it begins at 1 and falls to `momentum` as 1 - decay of timm's warm-up
    does, so that the average of a short training is one of what was trained, not of the initial weights. `steps`:
    updates so far.

    timm's ModelEmaV3 copies integer buffers instead, and collects both state dicts anew in each step.
    """

    def __init__(self, model: nn.Module, momentum: float, warmup: bool = False) -> None:
        self.module, self.momentum, self.warmup, self.steps = (
            copy.deepcopy(model).eval().requires_grad_(False),
            momentum,
            warmup,
            0,
        )
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self._floats, self._float_sources = _columns([pair for pair in pairs if pair[0].is_floating_point()])
        self._integers, self._integer_sources = _columns([pair for pair in pairs if not pair[0].is_floating_point()])

    @property
    def share(self) -> float:
        """Of the network in the next update: 1 - the decay that timm's ModelEmaV3 with use_warmup takes."""
        return max((1 + self.steps) ** (-2 / 3), self.momentum) if self.warmup else self.momentum

    def initial_share(self, steps: int) -> float:
        """Share of the initial weights in the average after so many steps."""
        return float(steps == 0) if self.warmup else (1 - self.momentum) ** steps

    @torch.no_grad()
    def update(self) -> None:
        share = self.share
        torch._foreach_lerp_(self._floats, self._float_sources, share)
        if self._integers:
            averages = torch._foreach_mul(self._integers, 1 - share)
            torch._foreach_add_(averages, torch._foreach_mul(self._integer_sources, share))
            torch._foreach_copy_(self._integers, averages)
        self.steps += 1


def _columns(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [average for average, _ in pairs], [source for _, source in pairs]
