"""Blocks of hosts, the libraries that people have their networks from: a swapped block is the host's own module with
another class, which runs an op where that is exactly what the host's modules do, and them elsewhere.

Parameters, buffers, children and state-dict keys stay what and where they are. An adapter, `hosts/<package>.py`,
describes each block of its host as a plan (`nn/plans.py`); all that follows from a plan is here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from ..inference.program import Program, check, emit
from ..nn import guard
from ..nn.guard import KNOWN, LOGGER, METHODS, Block, is_as_written, known, methods_called, replaced_in_class
from ..nn.layout import to_nchw, to_nhwc
from ..nn.plans import Unfit, UnfitNow

# The classes of hosts that are swapped, each with the class that takes its place.
SWAPPED: dict[type[nn.Module], type[Swapped]] = {}


class Swapped(Block):
    """A block of a host. The subclass has the host's class behind this one, and is importable, so that a swapped model
    can be pickled and copied."""

    host: type[nn.Module]

    @classmethod
    def concerns(cls, module: nn.Module) -> bool:
        """Whether anything is to be said about a module of the host's class, or of one that is made of it."""
        return True

    def describe(self) -> NamedTuple:
        """The plan of this block; of a module of the host's class too, which has none of the methods of this one.

        Raises:
            Unfit: it has none. `UnfitNow` where a flag that changes with training is the reason.
        """
        raise NotImplementedError

    def plan(self) -> NamedTuple:
        """The plan, kept for as long as the guard finds the block unchanged; asked for after `why_modules`."""
        if torch.compiler.is_compiling():
            return self.describe()
        known = self._guard
        if known.plan is None or known.plan[0] is not known.answer:
            known.plan = known.answer, self.describe()
        return known.plan[1]

    def misfit(self) -> str | None:
        if (reason := _replaced(self, self.host)) is not None:
            return reason
        try:
            return self.describe().misfit()
        except Unfit as reason:
            return str(reason)

    @classmethod
    def why_left(cls, module: nn.Module) -> str | None:
        """Why a module of the host's class is not worth swapping: it has no plan, whatever its flags are."""
        if (reason := _replaced(module, cls.host)) is not None:
            return reason
        try:
            return cls.describe(module).misfit()
        except UnfitNow:
            return None
        except Unfit as reason:
            return str(reason)

    def forward(self, x: Tensor | None = None, *args: object, **keywords: object) -> Tensor:
        if isinstance(args, fx.Proxy):  # torch.fx traces this very block, with something in the place of each name
            return super().forward(x)
        # A tracer of torch.fx hands over something that is no tensor; a host may call its map `input` or `features`.
        if args or keywords or not isinstance(x, Tensor) or x.ndim != 4:
            if guard.observed is not None:
                guard.observed.append((self, "what it is called with is not just a map (B, C, H, W)"))
            return super().forward(*(() if x is None else (x,)), *args, **keywords)
        if self._why_host(x) is not None:
            return super().forward(x)
        return to_nchw(self.plan().run(to_nhwc(x)))

    def call_misfit(self, x: Tensor) -> str | None:
        """Why the plan is not what the host's modules do with this very map (B, C, H, W), where that depends on it."""
        return None

    def _why_host(self, x: Tensor) -> str | None:
        reason = self.why_modules()
        if reason is None and (reason := self.call_misfit(x)) is not None and guard.observed is not None:
            guard.observed[-1] = self, reason
        return reason

    def restore(self) -> None:
        """Makes this the host's own module again."""
        self.__class__ = self.host
        vars(self).pop("_guard", None)

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript compiles the host's own code, and puts what it is given here in the place of this module."""
        LOGGER.warning("torch.jit.script takes back what fuse did: it compiles a %s as it was", self.host.__name__)
        self.restore()
        return self


def stands_for(host: type[nn.Module]) -> Callable[[type[Swapped]], type[Swapped]]:
    """Registers a swapped class in the place of a host's class."""

    def register(swapped: type[Swapped]) -> type[Swapped]:
        swapped.host = host
        SWAPPED[host] = swapped
        known_of_host(host)
        METHODS[swapped] = (*methods_called(swapped), *METHODS.get(host, ()))
        return known(swapped)

    return register


def known_of_host(*kinds: type[nn.Module]) -> None:
    """Says that a plan may stand in for modules of a host's classes, unless someone has put another function in the
    place of a method before."""
    for kind in kinds:
        if is_as_written(kind):
            known(kind)


def _replaced(module: nn.Module, host: type[nn.Module]) -> str | None:
    """Which method, that the host's class calls in a module, is not the host's."""
    if host not in KNOWN:
        return f"is a {host.__qualname__}, of which a method had been replaced"
    called = {name for _, name, _ in METHODS[host]} - {"forward"}
    own = next((f"has a {name} of its own" for name in vars(module) if name in called), None)
    return replaced_in_class(host) or own


@emit.register
def _(module: Swapped, program: Program, x: int) -> int:
    check(module)
    return emit(module.describe(), program, x)
