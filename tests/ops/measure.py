"""Calling an op in a test, and measuring what comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .inputs import Arguments, Draw, named


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def evaluate(function: Callable, arguments: Arguments) -> dict[str, Tensor]:
    """Every output of a call, and the gradients of all differentiable arguments for a fixed random gradient of y."""
    outputs = tensors(function(**arguments))
    y, draw = outputs[0], Draw(1)
    wanted = {name: t for name, t in named(arguments).items() if t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), draw(*y.shape).to(y), allow_unused=True) if wanted else ()
    results = {("y", "mean", "var")[min(i, 1 + (i - 1) % 2)] + f"[{i}]": t for i, t in enumerate(outputs)}
    return results | {
        f"d {name}": torch.zeros_like(t) if g is None else g for (name, t), g in zip(wanted.items(), grads, strict=True)
    }


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, expected in want.items():
        torch.testing.assert_close(
            got[name], expected, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


class Call(nn.Module):
    """The op as a module: feature maps are its inputs, every other tensor is a buffer."""

    def __init__(self, op: Callable, maps: tuple[str, ...], arguments: Arguments):
        super().__init__()
        self.op, self.maps = op, [name for name in maps if arguments.get(name) is not None]
        leaves, self.spec = tree_flatten({name: value for name, value in arguments.items() if name not in self.maps})
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                self.register_buffer(f"held_{i}", leaf)

    def forward(self, *maps: Tensor) -> Any:
        leaves = [getattr(self, f"held_{i}", constant) for i, constant in enumerate(self.constants)]
        return self.op(**tree_unflatten(leaves, self.spec), **dict(zip(self.maps, maps, strict=True)))
