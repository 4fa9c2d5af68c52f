"""PyTorch's own modules in any model: a convolution, the batch norm and the activation behind it, where they are in a
row in an nn.Sequential, the one module whose calls of its children are known. Other children are called as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, fx, nn

from ..inference.program import Program, emit
from ..nn import guard
from ..nn.guard import odd_attributes
from ..nn.layout import to_nchw, to_nhwc
from ..nn.plans import ConvPlan, Unfit, activation_name
from ..ops import dispatch
from ..ops.types import ACTIVATIONS
from .swapped import SWAPPED, Swapped, stands_for


class Stretch(NamedTuple):
    """Modules that are called one after the other, and the plans that compute the same."""

    modules: tuple[nn.Module, ...]
    plans: tuple[ConvPlan, ...]

    def why_modules(self, x: object) -> str | None:
        """Why a call on `x` calls the modules."""
        if not (isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point()):
            return "what comes in front of its convolution is no map (B, C, H, W)"
        # Another layout is copied on the way in and on the way out; benchmarks/NOTES.md has what is worth that.
        if not self._gives_channels_last(x) and sum(p.is_pointwise() or p.is_depthwise() for p in self.plans) < 2:
            return (
                "PyTorch's modules are as fast on maps that are not in channels_last memory, but for two and more 1x1 "
                "or depth-wise convolutions in a row"
            )
        return None

    def _gives_channels_last(self, x: Tensor) -> bool:
        return _is_channels_last(x) or _is_channels_last(self.plans[0].conv.weight)

    def run(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in and out, in the memory layout that the modules would give: what follows may view it."""
        y = to_nhwc(x)
        for plan in self.plans:
            y = plan.run(y)
        return to_nchw(y) if self._gives_channels_last(x) else to_nchw(y).contiguous()

    def why_not(self) -> str | None:
        """Why the modules of a stretch of one convolution are called after all."""
        for module in self.modules:
            if (reason := odd_attributes(module)) is not None:
                return f"its {type(module).__name__} {reason}"
        (plan,) = self.plans
        return plan.why_no_gain() or plan.misfit()


def _is_channels_last(t: Tensor) -> bool:
    return t.shape[1] > 1 and t.stride(1) == 1 and not t.is_contiguous()


def _stretch_at(children: list[nn.Module], start: int) -> Stretch | None:
    """What begins with the child at `start`: a Conv2d with a BatchNorm2d, or a 1x1 one with an activation."""
    conv, *others = children[start : start + 3]
    if type(conv) is not nn.Conv2d:
        return None
    norm = others.pop(0) if others and type(others[0]) is nn.BatchNorm2d else None
    act = activation_name(others[0]) if others else "identity"
    acts = act in ACTIVATIONS and act != "identity"
    plan = ConvPlan(conv, norm, act if acts else "identity")
    if norm is None and not (acts and plan.is_pointwise()):
        return None
    return Stretch(tuple(children[start : start + 1 + (norm is not None) + acts]), (plan,))


def _steps(sequence: nn.Sequential) -> Iterator[Stretch | nn.Module]:
    """Stretches of one convolution, and other children, in the order of their calls."""
    children, start = list(sequence), 0
    while start < len(children):
        stretch = _stretch_at(children, start)
        yield children[start] if stretch is None else stretch
        start += 1 if stretch is None else len(stretch.modules)


class SequencePlan(NamedTuple):
    """Stretches that gain, each as long as can be, and the modules between them."""

    steps: tuple[Stretch | nn.Module, ...]

    @staticmethod
    def of(sequence: nn.Sequential) -> SequencePlan:
        steps: list[Stretch | nn.Module] = []
        for step in _steps(sequence):
            if isinstance(step, nn.Module):
                steps.append(step)
            elif step.why_not() is not None:
                steps += step.modules
            elif steps and isinstance(steps[-1], Stretch):
                steps[-1] = Stretch(steps[-1].modules + step.modules, steps[-1].plans + step.plans)
            else:
                steps.append(step)
        return SequencePlan(tuple(steps))

    def misfit(self) -> str | None:
        return None

    def stretches(self) -> list[Stretch]:
        return [step for step in self.steps if isinstance(step, Stretch)]


class Sequence(Swapped):
    """An nn.Sequential, of whatever class that leaves its forward alone."""

    def describe(self) -> SequencePlan:
        plan = SequencePlan.of(self)
        if not plan.stretches():
            reasons = (step.why_not() for step in _steps(self) if isinstance(step, Stretch))
            raise Unfit(next(reasons, "it has no convolution with a norm or an activation behind it"))
        return plan

    def watched(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules of stretches: the others are called, whatever becomes of them."""
        yield "", self
        inside = {id(module) for stretch in SequencePlan.of(self).stretches() for module in stretch.modules}
        yield from ((name, module) for name, module in self.named_children() if id(module) in inside)

    def forward(self, input: object) -> object:
        # An exporter gets the graph that it would get of the host; torch.fx notes every parameter that is looked at.
        if dispatch.writes_aten() or isinstance(input, fx.Proxy) or self.why_modules() is not None:
            return nn.Sequential.forward(self, input)
        for step in self.plan().steps:
            input = step(input) if isinstance(step, nn.Module) else self._run(step, input)
        return input

    def _run(self, stretch: Stretch, x: object) -> object:
        reason = stretch.why_modules(x)
        if reason is None:
            return stretch.run(x)
        if guard.observed is not None:
            guard.observed.append((self, reason))
        for module in stretch.modules:
            x = module(x)
        return x


@stands_for(nn.Sequential)
class FusedSequential(Sequence, nn.Sequential):
    @classmethod
    def concerns(cls, module: nn.Module) -> bool:
        return is_sequential(module) and any(isinstance(step, Stretch) for step in _steps(module))


def is_sequential(module: nn.Module) -> bool:
    """Whether a module is an nn.Sequential or what `fuse` made of one, and not of a class made of it."""
    return type(module) in (nn.Sequential, FusedSequential)


def calls_children(module: nn.Module) -> bool:
    """Whether a module is, or would be swapped for, one that calls the modules inside of it."""
    return issubclass(SWAPPED.get(type(module), type(module)), Sequence)


@emit.register
def _(module: Sequence, program: Program, x: int) -> int:
    for step in SequencePlan.of(module).steps:
        for part in step.plans if isinstance(step, Stretch) else (step,):
            x = emit(part, program, x)
    return x
