"""When a block may run as one fused op, and when it must call its modules.

A fused op reads the parameters of the modules below a block and never calls them. That is right only while they are
exactly what the op computes: their own classes, no hooks, no forward of their own, plain tensors, the attributes and
flags that the op assumes. A block asks `Block.why_modules` at every call; where the answer is a reason it runs module
by module and calls each of them.

The answer is examined once and kept with a snapshot of all that it depends on: the classes of the modules, every entry
of their `__dict__`, their children, parameters and buffers, the dictionaries of hooks. While the snapshot holds the
answer does; comparing addresses costs some 50 ns a module (`csrc/host.cpp`), and nothing can be changed by way of
Python without changing one of them.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

LOGGER = logging.getLogger("mvit3_kernels")

PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}") for name in HOOKS)
CALL = nn.Module.__call__
# The classes that a fused op stands in for.
KNOWN: set[type[nn.Module]] = set()
# What classes do when they are called: their forward and the methods that it calls, as (class, name, function), unless
# someone has put another function in the place of one.
METHODS: dict[type[nn.Module], tuple[tuple[type[nn.Module], str, Callable], ...]] = {}


def known(kind: type[nn.Module]) -> type[nn.Module]:
    """Says that a fused op may stand in for modules of this class."""
    KNOWN.add(kind)
    METHODS.setdefault(kind, methods_called(kind))
    return kind


def methods_called(kind: type[nn.Module]) -> tuple[tuple[type[nn.Module], str, Callable], ...]:
    """The forward of a class and the methods that it calls by name, at any depth."""
    found, names = {}, ["forward"]
    while names:
        name = names.pop()
        method = getattr(kind, name, None)
        if name not in found and inspect.isfunction(method) and method is not getattr(nn.Module, name, None):
            found[name] = method
            names += getattr(inspect.unwrap(method), "__code__", method.__code__).co_names
    return tuple((kind, name, method) for name, method in found.items())


def is_as_written(kind: type[nn.Module]) -> bool:
    """Whether the methods that are called are those that a class, or one that it is made of, was written with."""
    for _, name, method in methods_called(kind):
        owner = next(base for base in kind.__mro__ if name in vars(base))
        if (method.__module__, method.__qualname__) != (owner.__module__, f"{owner.__qualname__}.{name}"):
            return False
    return True


for _kind in (
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.Linear,
    nn.AdaptiveAvgPool2d,
    nn.Dropout,
    nn.Dropout2d,
    nn.SiLU,
    nn.ReLU,
    nn.Identity,
    nn.Sequential,
    nn.ModuleDict,
    nn.ModuleList,
):
    known(_kind)

# The class of the root; modules and tensors with their classes; dictionaries with their contents; empty dictionaries;
# methods; all of these packed for `_host.unchanged`. `unchanged_python` reads the others.
Snapshot = tuple[type, tuple, tuple, tuple, tuple, bytes]


def take_snapshot(root: nn.Module, owner: object = None) -> Snapshot:
    """All that an answer about `root` depends on, as `unchanged` compares it.

    `owner`, an attribute of `root`, keeps the snapshot. So that a module without users is freed at once, the snapshot
    refers neither to it nor to `root` nor to its `__dict__`: that stands as None, and the owner in it as an Ellipsis.
    """
    chain = itertools.chain.from_iterable
    objects, dicts, hooks = [], [], list(GLOBAL_HOOKS)
    modules = [module for _, module in _watched(root)]
    for module in modules:
        own = vars(module)
        dicts += (own, module._modules, module._parameters, module._buffers)
        if module is not root:
            objects += (module, type(module))
            hooks += (own[name] for name in HOOKS)  # those of the root run when it is called
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is not None:  # torch.utils.swap_tensors gives a tensor another class
                objects += (t, type(t))
    dicts += (group for group in hooks if group)
    contents = [
        (group, tuple(... if owner is not None and one is owner else one for one in chain(group.items())))
        for group in dicts
    ]
    contents[0] = (None, contents[0][1])
    kinds = {type(module) for module in modules} & METHODS.keys()
    methods = [(nn.Module, "__call__", nn.Module.__call__)]
    methods += [(owner, name, getattr(owner, name, None)) for kind in kinds for owner, name, _ in METHODS[kind]]
    pairs, empty = tuple(chain(contents)), tuple(group for group in hooks if not group)
    parts = tuple(objects), pairs, empty, tuple(chain(methods))
    return type(root), *parts, pack(root, parts)


def unchanged_python(root: nn.Module, snapshot: Snapshot) -> bool:
    """Whether `root` and the modules below it are as `snapshot` says, where there is no compiled extension to ask."""
    root_kind, objects, dicts, empty, methods, _ = snapshot
    if type(root) is not root_kind or any(empty):
        return False
    if any(type(one) is not kind for one, kind in zip(objects[::2], objects[1::2], strict=True)):
        return False
    for group, items in zip(dicts[::2], dicts[1::2], strict=True):
        found = vars(root) if group is None else group
        if 2 * len(found) != len(items):
            return False
        pairs = zip(itertools.chain.from_iterable(found.items()), items, strict=True)
        if any(a is not b and b is not ... for a, b in pairs):
            return False
    kinds = zip(methods[::3], methods[1::3], methods[2::3], strict=True)
    return all(getattr(kind, name, None) is method for kind, name, method in kinds)


try:
    _host = importlib.import_module("mvit3_kernels._host")
    unchanged, pack = _host.unchanged, _host.pack
except (ImportError, AttributeError):  # not built, or built for another Python: _native keeps the reason
    unchanged, pack = unchanged_python, lambda root, parts: b""


class Guard:
    """The last answer about a module and the snapshot under which it holds. Copies and pickles of the module begin
    without one."""

    __slots__ = ("altered", "answer", "plan")

    def __init__(self) -> None:
        self.answer: tuple[Snapshot, str | None] | None = None
        self.altered: str | None = None  # what `altered` says of the module itself, under the same snapshot
        self.plan: tuple | None = None  # what a block keeps for as long as this very answer holds, with the answer

    def __deepcopy__(self, memo: dict) -> Guard:
        return Guard()

    def __reduce__(self) -> tuple:
        return Guard, ()

    def ask(self, module: nn.Module, examine: Callable[[nn.Module], str | None], owner: object = None) -> str | None:
        """The answer of `examine(module)`, kept for as long as nothing that it depends on changes. `owner` is the
        attribute of `module` that holds this guard, where that is not the guard itself."""
        known = self.answer
        if known is not None and unchanged(module, known[0]):
            return known[1]
        reason = examine(module)
        if reason is not None and LOGGER.isEnabledFor(logging.DEBUG) and (known is None or known[1] != reason):
            LOGGER.debug("a %s runs module by module: %s", type(module).__name__, reason)
        self.altered = altered(module)
        self.answer = take_snapshot(module, self if owner is None else owner), reason
        return reason


# Blocks that ran and why they ran module by module, while `explain` listens.
observed: list[tuple[nn.Module, str | None]] | None = None


class Block(nn.Module):
    """A module that computes what the modules below it do in one op, where that is exactly the same.

    A subclass says in `misfit` what its op assumes about the modules; what holds for every block is in `examine`.
    """

    _guard: Guard | None = None

    def misfit(self) -> str | None:
        """Why the modules, each plain by itself, do not form what the fused op computes; None where they do."""
        raise NotImplementedError

    def watched(self) -> Iterable[tuple[str, nn.Module]]:
        """This block, under the name "", and the modules below it that the fused op stands in for."""
        return self.named_modules()

    def why_modules(self, ahead: bool = False) -> str | None:
        """Why this block calls its modules one by one; None where one op stands in for them. `explain` does not hear
        who asks `ahead` of the call."""
        if torch.compiler.is_compiling():
            return _constant_why_modules(self)
        guard = self._guard
        if guard is None:
            guard = self._guard = Guard()
        known = guard.answer
        reason = known[1] if known is not None and unchanged(self, known[0]) else guard.ask(self, examine)
        if observed is not None and not ahead:
            observed.append((self, reason))
        return reason

    def why_called(self, ahead: bool = False) -> str | None:
        """The same for a caller who stands in for the call of this block itself: its class, forward and hooks count
        too."""
        if torch.compiler.is_compiling():
            return _constant_tampered(self) or self.why_modules(ahead)
        reason = hooked(self) or self.why_modules(ahead)  # hooks of its own are not in the snapshot
        return reason or self._guard.altered


@torch.compiler.assume_constant_result  # torch.compile asks while it traces; it guards on the modules by itself
def _constant_why_modules(block: Block) -> str | None:
    return examine(block)


@torch.compiler.assume_constant_result
def _constant_tampered(block: Block) -> str | None:
    return tampered(block)


def examine(block: Block) -> str | None:
    """Why a fused op may not stand in for the modules below `block`."""
    return tampered_below(block) or block.misfit()


def tampered_below(root: nn.Module, apart: tuple[str, ...] = ()) -> str | None:
    """Why calling the modules below `root` is not what their classes, as this library or PyTorch wrote them, do with
    plain parameters. The children named in `apart`, and what is below them, do not matter."""
    if nn.Module.__call__ is not CALL:
        return "torch.nn.Module.__call__ has been replaced"
    if any(GLOBAL_HOOKS):
        return "there is a hook for all modules (torch.nn.modules.module.register_module_forward_hook or a relative)"
    for name, module in _watched(root):
        if name.partition(".")[0] in apart:
            continue
        reason = tampered(module) if module is not root else _odd_tensors(module)
        if reason is not None:
            return f"{name} {reason}" if name else reason
    return None


def _watched(root: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return root.watched() if isinstance(root, Block) else root.named_modules()


def tampered(module: nn.Module) -> str | None:
    """Why calling `module` is not what its class, as this library or PyTorch wrote it, does with plain parameters."""
    return hooked(module) or altered(module)


def hooked(module: nn.Module) -> str | None:
    own = vars(module)
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return f"has a hook ({', '.join(name.strip('_').replace('_', ' ') for name in HOOKS if own[name])})"
    return None


def altered(module: nn.Module) -> str | None:
    """`tampered` but for hooks."""
    kind = type(module)
    if kind not in KNOWN:
        return f"is a {kind.__module__}.{kind.__qualname__}, which only its own forward can compute"
    return replaced_method(module) or _odd_tensors(module) or odd_attributes(module)


def replaced_method(module: nn.Module) -> str | None:
    """Which method of a module, or of its class, has been replaced."""
    kind = type(module)
    own = next((f"has a {name} of its own" for name in vars(module) if callable(getattr(kind, name, None))), None)
    return replaced_in_class(kind) or own


def replaced_in_class(kind: type[nn.Module]) -> str | None:
    for owner, name, method in METHODS.get(kind, ()):
        if getattr(owner, name, None) is not method:
            return f"is a {owner.__qualname__}, whose {name} has been replaced"
    return None


def _odd_tensors(module: nn.Module) -> str | None:
    for name, t in _tensors(module):
        if type(t) not in PLAIN_TENSORS:
            return f"has a {name} that is a {type(t).__name__}, not a plain tensor"
    return None


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    groups = (
        module._parameters,
        module._buffers,
        {name: t for name, t in vars(module).items() if isinstance(t, Tensor)},
    )
    return ((name, t) for group in groups for name, t in group.items() if t is not None)


def odd_attributes(module: nn.Module) -> str | None:
    """What no fused op knows of PyTorch's classes, and of hosts' that are made of them."""
    if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return f"has padding {module.padding!r} in mode {module.padding_mode!r}"
    if isinstance(module, nn.BatchNorm2d):
        if module.weight is None or module.bias is None:
            return "has no weight or no bias"
        if (module.running_mean is None) != (module.running_var is None):
            return "has one of running_mean and running_var only"
    if isinstance(module, nn.LayerNorm | nn.GroupNorm):
        if module.weight is None or module.bias is None:
            return "has no weight or no bias"
        if isinstance(module, nn.GroupNorm) and module.num_groups != 1:
            return f"has {module.num_groups} groups"
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
            return f"normalises over {tuple(module.normalized_shape)}"
    if isinstance(module, nn.Dropout | nn.Dropout2d) and module.training and not 0 <= module.p < 1:
        return f"drops with probability {module.p}"
    return None


def inherits(kind: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether a class is one of PyTorch's, or made of it without another method where it is called."""
    return issubclass(kind, base) and all(getattr(kind, name, None) is method for _, name, method in METHODS[base])


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module computes what one of these classes of PyTorch does: hosts have subclasses that add nothing."""
    kind = type(module)
    return kind in kinds or (kind in KNOWN and any(inherits(kind, base) for base in kinds))


def is_dropout(module: nn.Module) -> bool:
    return is_plain(module, nn.Dropout, nn.Identity)


def dropout_rate(module: nn.Module) -> float:
    """The probability with which a Dropout, or what took its place, drops an element now."""
    return module.p if is_plain(module, nn.Dropout) and module.training else 0.0
