"""The error bound of the contract: a kernel may err twice as much as the reference does in the same dtype, both against float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Results = Mapping[str, Tensor | None]

# A few float32 roundings of the result's own size. Where the reference beats that, with few elements, it was lucky.
FLOOR = 4 * torch.finfo(torch.float32).eps


def to(arguments: Any, dtype: torch.dtype, parameters: torch.dtype | None = None, device: str = "cpu") -> Any:
    """A copy of nested arguments: maps (4-d) in `dtype`, parameters (fewer dimensions) in `parameters`, on `device`."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().to(device, dtype if leaf.ndim == 4 else parameters or dtype).requires_grad_(leaf.requires_grad)

    return tree_map(convert, arguments)


def check_bound(
    function: Callable[[Any, str], Results], arguments: Any, backend: str, dtype: torch.dtype, parameters: torch.dtype, device: str = "cpu"
) -> Results:
    """Checks `function(arguments, backend)`, results by name, on `backend` against the reference in the same dtype and in float64."""
    rounded = to(arguments, dtype, parameters, device)
    result = function(to(rounded, dtype, parameters, device), backend)
    peer = function(to(rounded, dtype, parameters, device), "reference")
    exact = function(to(rounded, torch.float64, None, device), "reference")
    assert result.keys() == peer.keys() == exact.keys()
    for name, truth in exact.items():
        got, other = result[name], peer[name]
        assert (got is None) == (truth is None), name
        if truth is None:
            continue
        assert got.dtype == other.dtype and got.shape == truth.shape, f"{name}: {got.dtype} {tuple(got.shape)}"
        error, allowed = (float((t.detach().double() - truth).norm()) for t in (got, other))
        bound = 2 * allowed + FLOOR * float(truth.detach().norm())
        assert error <= bound, f"{name}: error {error:.3e}, allowed {bound:.3e} (reference {allowed:.3e})"
    return result
