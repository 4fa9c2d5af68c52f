"""How a Triton kernel of this library is launched.

Triton finds out at every launch what a kernel is to be compiled for, argument by argument, and looks for it under a
text that it makes of that: some 10 us, most of what a launch costs a CPU. Here that happens once for each list of
arguments that could make a difference. From then on the compiled kernel is found by a key and started as Triton starts
it.

A kernel can never be taken for another: the key holds whatever Triton's choice depends on, rather more than less. Of a
tensor these are its dtype and its address modulo 16, of all else the kind and the value. Whatever is of a kind that the
key does not know is launched by Triton alone. So is a call that is to be observed (hooks, debugging), on another GPU
than NVIDIA's, and with a version of Triton whose rules are not known to be these. One check is left out: that constants
of a module, which a kernel reads, are what they were when it was compiled.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction, KernelInterface

# Whose rules were compared with the key by tests/ops/test_launch_triton.py.
KNOWN_VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")
# Of one kernel on one GPU. A call with more, as of maps of many sizes, begins anew.
MOST_LAUNCHES = 1024

_launch = KernelInterface.__getitem__
# None where someone has put another function in its place already.
LAUNCH_OF_TRITON = _launch if _launch.__module__ == JITFunction.__module__ else None


def _why_never() -> str | None:
    if torch.version.hip is not None:
        return "on an AMD GPU Triton's choice depends on the sizes of tensors too"
    if not triton.__version__.startswith(KNOWN_VERSIONS):
        return f"triton {triton.__version__} is not one of {', '.join(f'{known}x' for known in KNOWN_VERSIONS)}"
    return None


WHY_NEVER = _why_never()


class Launch(NamedTuple):
    """A compiled kernel as it is started."""

    kernel: CompiledKernel
    run: Callable[..., None]
    function: int
    metadata: Any
    constants: tuple  # values of the parameters behind those that are given by position


def launch_key_python(tensor: type, arguments: tuple, options: dict[str, Any]) -> Hashable:
    """What a launch with these arguments and options is compiled for; None where a value is of a kind that is not
    known. `_host.launch_key` is the same."""
    parts = []
    for value in (*arguments, *options.values()):
        kind = type(value)
        if issubclass(kind, tensor):
            kind, part = tensor, (value.dtype, value.data_ptr() % 16)
        elif kind is tuple:
            part = launch_key_python(tensor, value, {})
            if part is None:
                return None
        elif kind is float:
            part = value.hex()  # zero has a sign, and no number is equal to NaN
        elif kind in (int, bool, str) or value is None:
            part = value
        else:
            return None
        parts += (kind, part)
    return len(arguments), *options, *parts


try:
    launch_key = importlib.import_module("mvit3_kernels._host").launch_key
except (ImportError, AttributeError):  # not built, or as it was before
    launch_key = launch_key_python


def why_ordinary() -> str | None:
    """None where launches are found by their keys, else the reason why Triton looks for each kernel itself."""
    if WHY_NEVER is not None:
        return WHY_NEVER
    runtime, compilation = knobs.runtime, knobs.compilation
    special = compilation.instrumentation_mode or getattr(compilation, "fpsan_homomorphic_casts", False)  # 3.9 has it
    if runtime.debug or special or runtime.add_stages_inspection_hook is not None:
        return "debugging, instrumentation or inspection of Triton is on"
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if getattr(hook, "calls", hook):  # a chain of hooks, or one
            return "a hook observes launches"
    return None


class Kernel(JITFunction):
    """A Triton kernel whose launches are found by their keys."""

    def __init__(self, function: Callable, **options: Any) -> None:
        super().__init__(function, **options)
        self._launches: defaultdict[Any, dict[Hashable, Launch]] = defaultdict(dict)  # by the current GPU

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        if KernelInterface.__getitem__ is not LAUNCH_OF_TRITON:  # someone notes launches instead
            return super().__getitem__(grid)
        return lambda *arguments, **options: self._launch(grid, arguments, options)

    def _launch(self, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any]) -> CompiledKernel:
        if self.pre_run_hooks or callable(grid) or why_ordinary() is not None:
            return self.run(*arguments, grid=grid, warmup=False, **options)
        active = driver.active
        device = active.get_current_device()
        key = launch_key(Tensor, arguments, options)
        launch = self._launches[device].get(key)
        if launch is None:
            compiled = self.run(*arguments, grid=grid, warmup=False, **options)
            if key is not None:
                self._remember(device, key, compiled, arguments, options)
            return compiled
        x, y, z = (*grid, 1, 1)[:3]
        stream = active.get_current_stream(device)
        launch.run(
            x, y, z, stream, launch.function, launch.metadata, None, None, None, *arguments, *launch.constants
        )  # fmt: skip
        return launch.kernel

    def _remember(self, device: Any, key: Hashable, compiled: Any, arguments: tuple, options: dict[str, Any]) -> None:
        """Keeps what a launch found, where every parameter that is not given by position is a constant: those are the
        same wherever the key is."""
        rest = self.params[len(arguments) :]
        ordinary = type(compiled) is not CompiledKernel or compiled.metadata.target.backend != "cuda"
        if ordinary or not all(parameter.is_constexpr for parameter in rest):
            return
        constants = tuple(options.get(parameter.name, parameter.default) for parameter in rest)
        launches = self._launches[device]
        if len(launches) >= MOST_LAUNCHES:
            launches.clear()
        launches[key] = Launch(compiled, compiled.run, compiled.function, compiled.packed_metadata, constants)


def jit_kernel(function: Callable | None = None, **options: Any) -> Any:
    """triton.jit for the functions that launchers start; those that these call have triton.jit itself."""
    if function is None:
        return partial(jit_kernel, **options)
    return triton.jit(function, **options) if knobs.runtime.interpret else Kernel(function, **options)
