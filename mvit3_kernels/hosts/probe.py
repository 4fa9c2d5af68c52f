"""Whether a plan is what a module of a host computes, found out by computing both.

A host that is copied into projects and changed there has no version that could be looked up. So a copy of the module,
with weights of this file in float64, runs its own code and its plan on small maps, in evaluation and in training. The
answer is kept for all modules of the same class, with the same classes and the same attributes below them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..inference import FusedNetwork
from ..nn.guard import HOOKS, is_plain
from ..ops.dispatch import backend
from .swapped import Swapped

# Another formula shows by more; where a host rounds to float32 in between it errs less.
TOLERANCE = 1e-6
# What does not count: `training` is probed both ways, the rest is for the guard.
PASSING = {*vars(nn.Module()), "_guard", "_fused"}
_answers: dict[tuple, str | None] = {}


def why_different(
    module: nn.Module,
    compute: Callable[[nn.Module, Tensor], Tensor],
    patch_size: tuple[int, int],
    modes: tuple[bool, ...] = (False, True),
) -> str | None:
    """Why a function does not compute what a module of a host does; None where it does.

    Args:
        module: takes maps (B, C, H, W); its first convolution says C. What is below it is plain
            (`guard.tampered_below`). It is left as it is.
        compute: of any copy of the module and a map, what the module is thought to make of it.
        patch_size: maps are probed that are and that are not made of whole patches.
        modes: the values of `training` that are probed.
    """
    key = _key(module)
    if key not in _answers:
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"), backend("reference"):
                _answers[key] = _probe(module, compute, patch_size, modes)
        # Whatever the code of a host raises, or ends the process by: the module is left, with the reason.
        except (Exception, SystemExit) as error:
            return f"its code cannot be tried on small maps: {type(error).__name__}: {error}"
    return _answers[key]


def _key(root: nn.Module) -> tuple:
    """All that the code of a module could look at but for its tensors."""
    found = []
    for name, module in root.named_modules():
        kind = getattr(type(module), "host", type(module))
        passing = PASSING | ({"p"} if isinstance(module, nn.Dropout) else set())
        plain = {k: v for k, v in vars(module).items() if k not in passing and not isinstance(v, Tensor)}
        found.append((name, kind, tuple(module._modules), repr(sorted(plain.items()))))
    return tuple(found)


def _probe(module: nn.Module, compute: Callable, patch_size: tuple[int, int], modes: tuple[bool, ...]) -> str | None:
    generator = torch.Generator().manual_seed(0)
    host = _twin(module, generator)
    twin = copy.deepcopy(host)
    for size in _sizes(patch_size, twin):
        for training in modes:
            x = torch.randn(2, _channels(host), *size, generator=generator, dtype=torch.float64)
            want, found = host.train(training)(x.clone()), compute(twin.train(training), x)
            if not isinstance(want, Tensor):
                return f"its code returns a {type(want).__name__}"
            if not _agree(found, want):
                return "its code computes something else than that of the known versions"
    if not all(_agree(*pair) for pair in zip(twin.buffers(), host.buffers(), strict=True)):
        return "its code leaves other buffers than that of the known versions"
    return None


def _sizes(patch_size: tuple[int, int], root: nn.Module) -> list[tuple[int, int]]:
    """Whole patches and not; the number of patches is the width of no layer (see `call_misfit` of ml-cvnets)."""
    ph, pw = patch_size
    widths = {t.shape[0] for t in root.parameters()}
    columns = next(n for n in range(4, 1000) if 3 * n not in widths)
    return [(3 * ph, columns * pw), (columns * ph - 1, 3 * pw - 1)]


def _channels(root: nn.Module) -> int:
    return next(module.in_channels for module in root.modules() if isinstance(module, nn.Conv2d))


def _twin(root: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy with other weights, in float64 on the CPU, that drops nothing and is the host's own."""
    tensors = {}
    for t in (*root.parameters(), *root.buffers()):
        if not t.is_floating_point():
            value = torch.zeros(t.shape, dtype=t.dtype)
        elif t.ndim < 2:  # of norms and biases; variances are positive
            value = torch.rand(t.shape, generator=generator, dtype=torch.float64) + 0.5
        else:
            value = torch.randn(t.shape, generator=generator, dtype=torch.float64) / math.prod(t.shape[1:]) ** 0.5
        tensors[id(t)] = nn.Parameter(value, requires_grad=False) if isinstance(t, nn.Parameter) else value
    # Hooks of the root do not concern it, nor should they see the copy.
    known = tensors | {id(group): type(group)() for name, group in vars(root).items() if name in HOOKS}
    twin = copy.deepcopy(root, known)
    for module in twin.modules():
        if isinstance(module, Swapped | FusedNetwork):
            module.restore()
        if is_plain(module, nn.Dropout):
            module.p = 0.0
    return twin


def _agree(found: Tensor, want: Tensor) -> bool:
    if found.shape != want.shape:
        return False
    error = (found.double() - want.double()).norm()
    return bool(error <= TOLERANCE * want.double().norm())
