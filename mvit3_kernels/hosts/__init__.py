"""Networks of other libraries: their blocks are swapped for ones that run the ops. A host is never imported from here;
its adapter is, where a model has modules of it."""

from __future__ import annotations

import importlib

from torch import nn

from ..nn.guard import LOGGER, Block
from .plain import calls_children
from .swapped import SWAPPED, Swapped

__all__ = ["Swapped", "candidates", "load_adapters", "restore", "swap"]

# The packages with an adapter, a module of this package of the same name.
HOSTS = ("cvnets", "timm", "torchvision", "transformers")


def load_adapters(model: nn.Module) -> None:
    """Imports the adapters of the hosts that the modules of `model`, or what their classes are made of, come from. A
    host of a version that lacks what its adapter knows is left alone, which the log says. An adapter that imports no
    host has a `recognise`, which is shown the classes."""
    kinds = {base for module in model.modules() for base in type(module).__mro__}
    for host in sorted({kind.__module__.partition(".")[0] for kind in kinds} & set(HOSTS)):
        try:
            adapter = importlib.import_module(f"{__name__}.{host}")
            if hasattr(adapter, "recognise"):
                adapter.recognise(kinds)
        except (ImportError, AttributeError) as error:
            LOGGER.warning("modules of %s run as they are: this version of it is not known (%s)", host, error)


def swap(model: nn.Module) -> list[Swapped]:
    """Swaps every block inside `model` that has a plan, in place; returns those that were swapped now. Where something
    fails, nothing has changed."""
    found = [module for module, why in candidates(model).items() if why is None]
    done = []
    try:
        for module in found:
            module.__class__ = SWAPPED[type(module)]
            done.append(module)
    except BaseException:
        for module in done:
            module.restore()
        raise
    return done


def restore(model: nn.Module) -> None:
    """Undoes `swap`."""
    for module in model.modules():
        if isinstance(module, Swapped):
            module.restore()


def candidates(model: nn.Module) -> dict[nn.Module, str | None]:
    """The modules inside `model` that have a host and are not swapped, each with why it is left or None; but for the
    Sequentials inside of blocks, which speak for themselves."""
    left = (module for module in model.modules() if not isinstance(module, Block))
    found = {module: _why_left(module, host) for module in left if (host := _host_of(module)) is not None}
    blocks = (module for module in model.modules() if isinstance(module, Block) or found.get(module, "") is None)
    inside = {below for block in blocks if not calls_children(block) for below in block.modules()}
    return {module: why for module, why in found.items() if not (calls_children(module) and module in inside)}


def _host_of(module: nn.Module) -> type[nn.Module] | None:
    """The class of a host that can be swapped and that a module's class is or is made of."""
    return next((kind for kind in type(module).__mro__ if kind in SWAPPED and SWAPPED[kind].concerns(module)), None)


def _why_left(module: nn.Module, host: type[nn.Module]) -> str | None:
    if type(module) is not host:
        return f"is a subclass of {host.__module__}.{host.__qualname__}, and may do something else"
    return SWAPPED[host].why_left(module)
