"""Registration of an op that has no kernel of its own yet: torch.ops.mvit3.<op> is then its public function, written in other ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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


def forbid_second_derivative(op: str) -> None:
    """Makes a kernel's backward op refuse to be differentiated: without a formula PyTorch would hand out second derivatives that
    silently lack this op's part."""
    name = op.partition("_backward")[0]

    def refuse(ctx: object, *_: object) -> None:
        raise NotImplementedError(f'{name} has second derivatives on the reference only: use mvit3_kernels.backend("reference")')

    torch.library.register_autograd(f"mvit3::{op}", refuse)
