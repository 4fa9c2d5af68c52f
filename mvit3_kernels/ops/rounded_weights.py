"""The weights of a network in the dtype of its maps: rounded together, once in a forward pass, for all products that
read them there and in its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch


class _Place(NamedTuple):
    """Of a weight in the buffer: the weight itself, as it was when it was rounded."""

    weight: Tensor
    version: int
    rounded: Tensor
    begin: int
    end: int


class _Pass:
    """One forward pass, of which nothing is rounded before an op asks."""

    def __init__(self, weights: Callable[[], Sequence[Tensor]]) -> None:
        self.weights = weights
        self.hooks = _hooks()
        self.buffer: Tensor | None = None
        self.places: dict[int, _Place] = {}

    def find(self, x: Tensor, weights: tuple[Tensor, ...]) -> list[_Place] | None:
        if self.buffer is None:
            self._round(x, weights[0].dtype)
        if self.buffer.dtype is not x.dtype or self.hooks != _hooks():
            return None
        places = [self.places.get(id(weight)) for weight in weights]
        for weight, place in zip(weights, places, strict=True):
            if place is None or place.weight is not weight or place.version != weight._version:
                return None
        return places

    @torch.no_grad()
    def _round(self, x: Tensor, dtype: torch.dtype) -> None:
        """Rounds the weights of this dtype, the only ones that one launch can take."""

        def fits(weight: Tensor) -> bool:  # nobody counts the changes of a tensor of inference mode
            same = weight.dtype is dtype and weight.device == x.device
            return same and weight.is_contiguous() and not weight.is_inference()

        weights = {id(weight): weight for weight in self.weights() if fits(weight)}
        ends = [0, *accumulate(aligned(weight) for weight in weights.values())]
        self.buffer = torch.empty(ends[-1], dtype=x.dtype, device=x.device)
        for (key, weight), (begin, end) in zip(weights.items(), pairwise(ends), strict=True):
            rounded = self.buffer.as_strided(weight.shape, weight.stride(), begin)
            self.places[key] = _Place(weight, weight._version, rounded, begin, end)
        if weights:
            torch._foreach_copy_([place.rounded for place in self.places.values()], list(weights.values()))


_current: ContextVar[_Pass | None] = ContextVar("mvit3_rounded_weights", default=None)


def _hooks() -> object:
    """What becomes of tensors that are saved for backward. A checkpoint, which begins here, runs its second pass when
    this one has ended, and must save as many tensors then."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def aligned(weight: Tensor) -> int:
    """Elements that a weight takes among rounded ones, each of which begins on 128 bytes."""
    return -(-weight.numel() // 64) * 64


@contextmanager
def rounded_together(weights: Callable[[], Sequence[Tensor]]) -> Iterator[None]:
    """What `weights` returns is rounded in one launch when the first op inside asks for one of them. It is asked then;
    weights that an op takes together stand one behind the other in its answer."""
    token = _current.set(_Pass(weights))
    try:
        yield
    finally:
        _current.reset(token)


def find_rounded(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...] | None:
    """Weights of another dtype in that of x, where a GPU's kernels multiply them with x; None where these round them by
    themselves: there is no pass of a network, or one of the weights is not among its own or has changed since."""
    places = _places(x, weights)
    return None if places is None else tuple(place.rounded for place in places)


def find_packed(x: Tensor, *weights: Tensor) -> Tensor | None:
    """The same for weights that one op takes together: one behind the other, each in `aligned` elements."""
    places = _places(x, weights)
    if places is None or any(one.end != other.begin for one, other in pairwise(places)):
        return None
    return _current.get().buffer[places[0].begin : places[-1].end]


def _places(x: Tensor, weights: tuple[Tensor, ...]) -> list[_Place] | None:
    current = None if torch.compiler.is_compiling() else _current.get()
    if current is None or not _launches(x) or any(weight.dtype is x.dtype for weight in weights):
        return None
    return current.find(x, weights)


def _launches(x: Tensor) -> bool:
    """Whether ops on `x` have the kernels of a GPU; those of a CPU round weights where they pack them."""
    return x.device.type == ("cpu" if dispatch.INTERPRETED else "cuda")
