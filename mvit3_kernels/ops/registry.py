"""Registration of an op that has no kernel of its own yet: torch.ops.mvit3.<op> is then its public function, written in other ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from . import dispatch
from .types import Moments


def batch_norm_schema(prefix: str = "", optional: bool = False) -> str:
    """The fields of `types.BatchNorm` in a schema."""
    tensor = "Tensor?" if optional else "Tensor"
    return (
        f"{tensor} {prefix}weight, {tensor} {prefix}bias, Tensor? {prefix}running_mean, Tensor? {prefix}running_var, "
        f"bool {prefix}training, float {prefix}eps"
    )


def register(op: str, schema: str) -> Callable[[Callable], Callable]:
    """Defines torch.ops.mvit3.<op> as the decorated function: differentiable, traceable and exportable because what it calls is."""

    def decorate(function: Callable) -> Callable:
        torch.library.define(f"mvit3::{op}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"mvit3::{op}", "CompositeImplicitAutograd")(function)
        return function

    return decorate


def flat(y: Tensor, *moments: Moments | None) -> tuple[Tensor, ...]:
    """y, then mean and variance of each norm; empty tensors where a norm is not in training."""
    empty = (y.new_empty(0), y.new_empty(0))
    return (y, *(t for pair in moments for t in (pair or empty)))


class _Guarded(torch.library.Library):
    """A library whose autograd kernels know the derivatives that they would drop without a word: tangents of forward-mode AD, and those
    of torch.func's transforms. They are left to the op's reference or refused."""

    references: ClassVar[dict[str, Callable]] = {}

    def impl(self, op_name: str, fn: Callable, dispatch_key: str = "", *, with_keyset: bool = False) -> None:
        def guarded(keyset: torch.DispatchKeySet, *args: object) -> object:
            reason = dispatch.transform()
            if reason is not None and _differentiated(args):
                if op_name in self.references:
                    return self.references[op_name](*args)
                raise NotImplementedError(f"torch.ops.mvit3.{op_name}: {reason}; call the public function of mvit3_kernels.ops instead")
            return fn(keyset, *args)

        super().impl(op_name, guarded, dispatch_key, with_keyset=with_keyset)


_LIBRARY = _Guarded("mvit3", "FRAGMENT")


def _differentiated(args: tuple[object, ...]) -> bool:
    """Whether a transform that is active takes a derivative with respect to one of the tensors in `args`."""
    found = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in found):
        return True
    return torch._C._are_functorch_transforms_active() and torch.is_grad_enabled() and any(t.requires_grad for t in found)


def register_gradient(op: str, backward: Callable, setup_context: Callable | None = None, reference: Callable | None = None) -> None:
    """torch.library.register_autograd for a kernel: its gradient. Other derivatives are those of `reference` or, without one, refused."""
    if reference is not None:
        _LIBRARY.references[op] = reference
    torch.library.register_autograd(f"mvit3::{op}", backward, setup_context=setup_context, lib=_LIBRARY)


def forbid_derivatives(op: str, instead: str) -> None:
    """Makes a kernel's op refuse to be differentiated: without a formula PyTorch would hand out derivatives that silently lack this op's
    part."""

    def refuse(ctx: object, *_: object) -> None:
        raise NotImplementedError(instead)

    register_gradient(op, refuse)


def forbid_second_derivative(op: str) -> None:
    name = op.partition("_backward")[0]
    forbid_derivatives(op, f'{name} has second derivatives on the reference only: use mvit3_kernels.backend("reference")')


def forbid_gradient(op: str) -> None:
    forbid_derivatives(op, f"torch.ops.mvit3.{op} is a kernel without gradient; call the public function of mvit3_kernels.ops instead")


def run_without_gradient(op: Callable, *args: object) -> object:
    """Calls a kernel that `forbid_gradient` was said of, where no derivative is asked for. What refuses them costs 4 us a call, and is
    passed by here."""
    if torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
