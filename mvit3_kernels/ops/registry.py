"""Registration of ops by the names in their schemas.

An op has up to four registered forms, named alike everywhere:

- `<op>`: its public function with flat arguments, for every device, dtype and derivative (`register`);
- `<op>_inference`: a kernel without gradient (`kernel`);
- `<op>_forward`: a kernel whose outputs after the first are what backward keeps (`forward`);
- `<op>_backward`: the gradient of `<op>_forward` (`backward`).

Every schema names its outputs, and what belongs together bears one name: `<op>_backward` asks for inputs and outputs of
`<op>_forward` by their names and for the gradient of output y as `dy`, and gives the gradient of input x as `dx`. That
is all that autograd needs, so `backward` writes it.

Whoever implements a form in Python (its fake kernel, its launcher in triton.py) receives one `call`: a named tuple of
the schema's arguments.
"""

from __future__ import annotations

import importlib
from collections import namedtuple
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from . import dispatch, flops
from .types import BatchNorm, Moments

# A named tuple of the arguments of a form.
Call = Any
Function = Callable[[Call], object]

# Fields of a schema, as `types` groups them.
LAYER_NORM = "Tensor norm_weight, Tensor norm_bias, float eps, bool per_sample"

# An input of a backward form that is one of two: (flag, name where the flag is set, name where not), the names of
# inputs or outputs of the forward form.
Choice = tuple[str, str, str]
# `choices` of a backward pass through a batch norm: the batch's moments in training, else the running ones.
BATCH_STATISTICS: dict[str, Choice] = {
    "mean": ("training", "mean", "running_mean"),
    "var": ("training", "var", "running_var"),
}


def batch_norm_schema(prefix: str = "", optional: bool = False) -> str:
    """The fields of `types.BatchNorm` in a schema."""
    tensor = "Tensor?" if optional else "Tensor"
    return (
        f"{tensor} {prefix}weight, {tensor} {prefix}bias, Tensor? {prefix}running_mean, Tensor? {prefix}running_var, "
        f"bool {prefix}training, float {prefix}eps"
    )


def batch_norm(call: Call, prefix: str = "") -> BatchNorm:
    """The fields of `batch_norm_schema` in a call."""
    return BatchNorm(*(getattr(call, f"{prefix}{field}") for field in BatchNorm._fields))


def flat(y: Tensor, *moments: Moments | None) -> tuple[Tensor, ...]:
    """y, then mean and variance of each norm; empty tensors where a norm is not in training."""
    empty = (y.new_empty(0), y.new_empty(0))
    return (y, *(t for pair in moments for t in (pair or empty)))


class Form(NamedTuple):
    """What the schema of a registered form says."""

    call: type
    outputs: type
    tensors: tuple[str, ...]  # the arguments that are one tensor or None


FORMS: dict[str, Form] = {}


def _define(op: str, schema: str) -> Form:
    parsed = torch._C.parse_schema(f"mvit3::{op}{schema}")
    if any(not output.name for output in parsed.returns):
        raise ValueError(f"the schema of {op} must name its outputs, got {schema}")
    torch.library.define(f"mvit3::{op}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    FORMS[op] = Form(
        # PyTorch leaves out last arguments that are as the schema's default
        namedtuple(
            op,
            [argument.name for argument in parsed.arguments],
            defaults=[argument.default_value for argument in parsed.arguments if argument.has_default_value()],
        ),
        namedtuple(f"{op}_outputs", [output.name for output in parsed.returns]),
        tuple(a.name for a in parsed.arguments if str(a.type) in ("Tensor", "Optional[Tensor]")),
    )
    return FORMS[op]


def register(op: str, schema: str) -> Callable[[Function], Function]:
    """Defines torch.ops.mvit3.<op> as the decorated function of a call: differentiable, traceable and exportable
    because what it calls is."""

    def decorate(function: Function) -> Function:
        call = _define(op, schema).call
        torch.library.impl(f"mvit3::{op}", "CompositeImplicitAutograd")(lambda *args: function(call(*args)))
        return function

    return decorate


def forward(op: str, schema: str, triton: str | None = None) -> Callable[[Function], Function]:
    """Defines a kernel's form; the decorated function of a call is its fake kernel, which makes outputs of the right
    shape. `triton` names the package whose triton.py has the GPU kernel, a function `op` of a call; triton is imported
    at the first one. C++ kernels register themselves."""

    def decorate(fake: Function) -> Function:
        form = _define(op, schema)
        _implement(op, form, fake, triton)
        return fake

    return decorate


def _implement(op: str, form: Form, fake: Function, triton: str | None) -> None:
    torch.library.register_fake(f"mvit3::{op}")(lambda *args: fake(form.call(*args)))
    flops.register(op, getattr(torch.ops.mvit3, op), form.call)
    if triton is None:
        return

    key = "CPU" if dispatch.INTERPRETED else "CUDA"
    device = key.lower()

    def launch(*args: object) -> object:
        """What a launcher calls of PyTorch is not for autocast, which may differ between a forward and its backward."""
        launcher, autocast = getattr(importlib.import_module(f"{triton}.triton"), op), torch.is_autocast_enabled(device)
        if autocast:
            torch.set_autocast_enabled(device, False)
        try:
            return launcher(form.call(*args))
        finally:
            if autocast:
                torch.set_autocast_enabled(device, True)

    torch.library.impl(f"mvit3::{op}", key)(launch)


def kernel(op: str, schema: str, triton: str | None = None) -> Callable[[Function], Function]:
    """The same for a kernel without gradient, which refuses to be differentiated."""

    def decorate(fake: Function) -> Function:
        forward(op, schema, triton)(fake)
        _forbid_derivatives(
            op,
            f"torch.ops.mvit3.{op} is a kernel without gradient; call the public function of mvit3_kernels.ops instead",
        )
        return fake

    return decorate


def backward(
    op: str,
    schema: str,
    triton: str | None = None,
    choices: Mapping[str, Choice] | None = None,
    residual: str | None = None,
    again: str | None = None,
) -> None:
    """Defines `op`, the gradient of the form of the same name with `_forward` in place of `_backward`, its fake kernel,
    and the registration with autograd. Second derivatives are refused.

    Args:
        op, schema, triton: as in `forward`. An input's name is that of an input or an output of the forward form or,
            with a "d" in front, means the gradient of an output. An output is the gradient of a tensor, shaped like it,
            and empty where that is None; like the first input where the tensor is not asked for.
        choices: inputs that are one tensor or another.
        residual: an input of the forward form that is added to its first output, whose gradient is therefore that of
            the output.
        again: the second output of the forward form, where that is the first once more, for a second reader: backward
            gets the gradients of both, that of the second as `d<again>`, or None. A kernel cannot return one tensor
            twice, and returns an empty one in its place.
    """
    form, name = _define(op, schema), op.replace("_backward", "_forward")

    def fake(call: Call) -> tuple[Tensor, ...] | Tensor:
        first = next(t for t in call if isinstance(t, Tensor))
        gradients = tuple(_gradient_like(getattr(call, name[1:], first), first) for name in form.outputs._fields)
        return gradients if len(gradients) > 1 else gradients[0]

    _implement(op, form, fake, triton)
    public = name.partition("_forward")[0]
    _forbid_derivatives(
        op, f'{public} has second derivatives on the reference only: use mvit3_kernels.backend("reference")'
    )
    functions = _autograd(getattr(torch.ops.mvit3, op), FORMS[name], form, choices or {}, residual, again)
    _LIBRARY.impl(name, _differentiable(name, *functions, again is not None), "Autograd", with_keyset=True)


def _gradient_like(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)


def _autograd(
    op: Callable, ahead: Form, back: Form, choices: Mapping[str, Choice], residual: str | None, again: str | None
) -> tuple[Callable, Callable]:
    """The setup of the context and the gradient of a form. Names are looked up here, once: a call only picks by
    position."""
    arguments, outputs = ahead.call._fields, ahead.outputs._fields
    # the outputs behind these have no gradient
    differentiable = [f"d{name}" for name in outputs[: 1 if again is None else 2]]
    # what setup_context picks from: inputs and outputs, then choices, under whose names the chosen tensors are asked
    # for
    pool = (*arguments, *outputs)
    chosen = [tuple(pool.index(name) for name in choice) for choice in choices.values()]
    pool = (*(None if name in choices else name for name in pool), *choices)
    needed = [name for name in back.call._fields if name not in differentiable]
    unknown = [name for name in needed if name not in pool]
    if unknown:
        raise ValueError(f"{op}: no input or output of its forward form is called {', '.join(unknown)}")
    saved, values = ([pool.index(n) for n in needed if (n in back.tensors) is tensor] for tensor in (True, False))
    # what the backward form receives, as positions in (saved tensors, values, gradients of outputs)
    kept = [*(pool[i] for i in saved), *(pool[i] for i in values), *differentiable]
    order = [kept.index(name) for name in back.call._fields]
    given = [(arguments.index(name[1:]), i) for i, name in enumerate(back.outputs._fields)]
    added = None if residual is None else arguments.index(residual)

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        everything = [*inputs, *results]
        for flag, one, other in chosen:
            everything.append(everything[one if everything[flag] else other])
        ctx.mark_non_differentiable(*results[len(differentiable) :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*[everything[i] for i in saved])
        ctx.values = [everything[i] for i in values]
        ctx.given = [pair for pair in given if inputs[pair[0]] is not None]
        ctx.added = added is not None and inputs[added] is not None

    def gradient(ctx: Any, dy: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(arguments)
        second = rest[: len(differentiable) - 1]
        if dy is None:
            dy, second = next(iter(second), None), (None,) * len(second)
        if dy is None:
            return tuple(found)
        everything = [*ctx.saved_tensors, *ctx.values, dy, *second]
        picked = [everything[i] for i in order]
        # what refuses a second derivative is passed by where none is asked for
        refuses = torch.is_grad_enabled() or dispatch.transform() is not None
        results = op(*picked) if refuses else run_without_gradient(op, *picked)
        results = (results,) if isinstance(results, Tensor) else results
        for position, i in ctx.given:
            found[position] = results[i]
        if ctx.added:
            found[added] = dy
        return tuple(found)

    return setup_context, gradient


def _differentiable(name: str, setup_context: Callable, gradient: Callable, again: bool) -> Callable:
    """What torch.library.register_autograd makes of the two, but for its look-up of default arguments: the forms have
    none, and it takes as long as a kernel on a small map (35 us of 120)."""
    op = getattr(torch.ops.mvit3, name).default

    def run_below(keyset: torch.DispatchKeySet, args: tuple[object, ...]) -> object:
        with torch._C._AutoDispatchBelowAutograd():
            results = op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
            return (results[0], results[0].detach(), *results[2:]) if again else results

    def forward(ctx: Any, keyset: torch.DispatchKeySet, *args: object) -> object:
        output = run_below(keyset, args)
        setup_context(ctx, args, output)
        return output

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *gradient(ctx, *gradients)

    function = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )

    def run(keyset: torch.DispatchKeySet, *args: object) -> object:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return function.apply(keyset, *args)
        return run_below(keyset, args)

    return run


class _Guarded(torch.library.Library):
    """A library whose autograd kernels know the derivatives that they would drop without a word: tangents of
    forward-mode AD, and those of torch.func's transforms. They are refused."""

    def impl(self, op_name: str, fn: Callable, dispatch_key: str = "", *, with_keyset: bool = False) -> None:
        def guarded(keyset: torch.DispatchKeySet, *args: object) -> object:
            reason = dispatch.transform()
            if reason is not None and _differentiated(args):
                raise NotImplementedError(
                    f"torch.ops.mvit3.{op_name}: {reason}; call the public function of mvit3_kernels.ops instead"
                )
            return fn(keyset, *args)

        super().impl(op_name, guarded, dispatch_key, with_keyset=with_keyset)


_LIBRARY = _Guarded("mvit3", "FRAGMENT")


def _differentiated(args: tuple[object, ...]) -> bool:
    """Whether a transform that is active takes a derivative with respect to one of the tensors in `args`."""
    found = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in found):
        return True
    return (
        torch._C._are_functorch_transforms_active() and torch.is_grad_enabled() and any(t.requires_grad for t in found)
    )


def _forbid_derivatives(op: str, instead: str) -> None:
    """Makes a kernel's op refuse to be differentiated: without a formula PyTorch would hand out derivatives that
    silently lack this op's part."""

    def refuse(ctx: object, *_: object) -> None:
        raise NotImplementedError(instead)

    torch.library.register_autograd(f"mvit3::{op}", refuse, lib=_LIBRARY)


def run_without_gradient(op: Callable, *args: object) -> object:
    """Calls a kernel without gradient where no derivative is asked for. What refuses them costs 4 us a call, and is
    passed by here."""
    if torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
