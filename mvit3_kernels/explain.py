"""`explain` says which kernel served each call of a model and, for what ran as plain modules or as a reference, why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .inference import FusedNetwork
from .inference.graphed import SERVES
from .nn import guard
from .ops import dispatch
from .tables import table


@dataclass(frozen=True)
class Row:
    """One line of an explanation: `count` calls of `what` that ran the same way, for the same reason.

    kind is "network", "block" or "op"; what is the name of a module inside the model, or of an op; ran is "fused", of
    a network with products of bfloat16 "fused, bfloat16", on a GPU "CUDA graph" (the rows below are of what it holds),
    "ordinary path", "modules", or a backend; reason is empty where the best way was taken.
    """

    kind: str
    what: str
    ran: str
    reason: str = ""
    count: int = 1


@dataclass(frozen=True)
class Explanation:
    """The rows of a call, as a table when printed."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def reasons(self) -> list[str]:
        """Why something did not run the best way, each reason once."""
        return list(dict.fromkeys(row.reason for row in self.rows if row.reason))

    def __str__(self) -> str:
        header = ("", "what", "ran as", "calls", "why")
        return table(header, [(row.kind, row.what, row.ran, str(row.count), row.reason) for row in self.rows])


def explain(model: nn.Module, *inputs: object, **keywords: object) -> Explanation:
    """Calls `model(*inputs, **keywords)` once and says what ran.

    The call is an ordinary one: gradients, autocast, training mode and a forced backend are as around it, and in
    training mode it updates running statistics. The backward pass of a call uses the kernels of its forward pass. A
    compiled module is explained as it runs without the compiler.

    Args:
        model: a network, or any module that contains blocks of this library.
        inputs, keywords: what it is called with.

    Returns:
        An `Explanation`: rows for each fused network, each block and each op; `print` shows a table.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)
    names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}
    with _observed() as (networks, blocks, ops):
        model(*inputs, **keywords)
    rows = [Row("network", names.get(id(network), "?"), *_ran(network, reason)) for network, reason in networks]
    rows += [Row("block", names.get(id(b), "?"), "fused" if r is None else "modules", r or "") for b, r in blocks]
    rows += [Row("op", op, backend, reason) for op, backend, reason in ops]
    counted = Counter(rows)
    return Explanation(tuple(Row(row.kind, row.what, row.ran, row.reason, count) for row, count in counted.items()))


def _ran(network: FusedNetwork, reason: str | None) -> tuple[str, str]:
    """How a network ran, and why not as one program or graph."""
    if reason == SERVES:
        return "CUDA graph", ""
    if reason is not None:
        return "ordinary path", reason
    return ("fused, bfloat16" if network._fused.products is torch.bfloat16 else "fused"), ""


@contextmanager
def _observed() -> Iterator[tuple[list, list, list]]:
    before = guard.observed, dispatch.observed, FusedNetwork.observed
    guard.observed, dispatch.observed, FusedNetwork.observed = [], [], []
    try:
        with torch.compiler.set_stance("force_eager"):
            yield FusedNetwork.observed, guard.observed, dispatch.observed
    finally:
        guard.observed, dispatch.observed, FusedNetwork.observed = before
