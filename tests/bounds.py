"""The error bound of the contract: a kernel may err twice as much as the reference does in the same dtype, both against
float64. Every test of it calls `assert_bound`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Results = Mapping[str, Tensor | None]

# A few float32 roundings of the result's own size. Where the reference beats that, with few elements, it was lucky.
FLOOR = 4 * torch.finfo(torch.float32).eps
TINY = 1e-300


def half_a_rounding(dtype: torch.dtype) -> float:
    """What storing the exact result costs."""
    return torch.finfo(dtype).eps / 2


def root_mean_square(t: Tensor) -> Tensor:
    return t.square().mean().sqrt()


def largest(t: Tensor) -> Tensor:
    return t.abs().max()


def relative_errors(
    got: Results, truth: Results, least: float = 1.0, size: Callable[[Tensor], Tensor] = root_mean_square
) -> dict[str, float]:
    """The size of each result's error, relative to that of the true one where it is above `least`, by default the size
    of the inputs: some gradients are mathematically zero (a bias before batch norm, the bias of the keys), and what is
    left of them is rounding noise."""
    errors = {}
    for name, true in truth.items():
        if true is None:
            assert got[name] is None, name
        elif true.numel() == 0:
            errors[name] = 0.0
        else:
            true = true.detach().double()
            scale = size(true).clamp(min=max(least, TINY))
            errors[name] = (size(got[name].detach().double() - true) / scale).item()
    return errors


# How results are pooled: the name of a result's group.
def kind(name: str) -> str:
    """Outputs together, gradients together."""
    return "gradients" if name.startswith("d ") else "outputs"


def each(name: str) -> str:
    return name


def together(name: str) -> str:
    return "results"


def pooled(errors: Mapping[str, float], group: Callable[[str], str] = kind) -> dict[str, float]:
    """Root mean square over the results of each group: one of few elements may be exact by luck, all of them are
    not."""
    chosen: dict[str, list[float]] = {}
    for name, error in errors.items():
        chosen.setdefault(group(name), []).append(error)
    return {name: (sum(error**2 for error in of) / len(of)) ** 0.5 for name, of in chosen.items()}


def assert_bound(
    found: Results,
    reference: Results,
    truth: Results,
    floor: float,
    *,
    group: Callable[[str], str] = kind,
    least: float = 1.0,
    size: Callable[[Tensor], Tensor] = root_mean_square,
    most: float | None = None,
) -> None:
    """Results by name: each group of `found` errs at most twice as much as that of `reference`, both against `truth`.

    Args:
        floor: beside it, relative to the size of the true result.
        group: which results are pooled: `kind`, `each` or `together`.
        least, size: as in `relative_errors`.
        most: above this, or NaN, the error of a result of the reference counts as this: a broken reference allows no
            more.
    """
    assert found.keys() == reference.keys() == truth.keys()
    for name, t in truth.items():
        assert t is None or found[name].shape == t.shape, f"{name}: {tuple(found[name].shape)}, not {tuple(t.shape)}"
    errors, allowed = (relative_errors(t, truth, least, size) for t in (found, reference))
    if most is not None:
        allowed = {name: error if error < most else most for name, error in allowed.items()}
    theirs = pooled(allowed, group)
    for name, error in pooled(errors, group).items():
        bound = 2 * theirs[name] + floor
        assert error <= bound, f"{name}: error {error:.3e}, allowed {bound:.3e}; each {errors}, the reference {allowed}"


def to(arguments: Any, dtype: torch.dtype, parameters: torch.dtype | None = None, device: str = "cpu") -> Any:
    """A copy of nested arguments: maps (4-d) in `dtype`, parameters (fewer dimensions) in `parameters`, on `device`."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return (
            leaf.detach()
            .to(device, dtype if leaf.ndim == 4 else parameters or dtype)
            .requires_grad_(leaf.requires_grad)
        )

    return tree_map(convert, arguments)


def check_bound(
    function: Callable[[Any, str], Results],
    arguments: Any,
    backend: str,
    dtype: torch.dtype,
    parameters: torch.dtype,
    device: str = "cpu",
) -> Results:
    """Checks `function(arguments, backend)`, results by name, on `backend` against the reference in the same dtype and
    in float64."""
    rounded = to(arguments, dtype, parameters, device)
    result = function(to(rounded, dtype, parameters, device), backend)
    peer = function(to(rounded, dtype, parameters, device), "reference")
    exact = function(to(rounded, torch.float64, None, device), "reference")
    for name, t in result.items():
        assert t is None or t.dtype == peer[name].dtype, f"{name}: {t.dtype}"
    assert_bound(result, peer, exact, FLOOR, group=each, least=0)
    return result
