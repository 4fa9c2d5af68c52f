"""Every launch of a training step or of an inference call, on fake tensors and without a GPU: its grid, its arguments,
and its compiled kernel."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import mvit3_kernels
from benchmarks.gpu_model.device import MULTIPROCESSORS
from mvit3_kernels import _native, ops
from mvit3_kernels.ops import dispatch
from mvit3_kernels.ops.registry import FORMS

# Ops of PyTorch that launch nothing.
_VIEWS = """
_reshape_alias _unsafe_view alias as_strided chunk detach device empty empty_like empty_strided expand flatten
is_same_size lift_fresh _local_scalar_dense new_empty new_empty_strided permute prim reshape select slice split
split_with_sizes squeeze sym_size t transpose unbind unflatten unsqueeze view view_as_real
"""
VIEWS = frozenset(_VIEWS.split())


@dataclass
class Launch:
    """A launch of a Triton kernel. values: of its parameters; tensors are there as such."""

    op: str
    name: str
    grid: tuple[int, ...]
    values: dict[str, Any]
    options: dict[str, Any]
    compiled: Any
    function: Any  # the kernel's source


@dataclass
class Aten:
    """An op of PyTorch."""

    name: str
    tensors: list[Tensor]  # read, on meta
    outputs: list[Tensor]
    operations: float  # floating-point, of products
    backward: bool


@dataclass
class CudaOp:
    """An op of csrc/cuda."""

    name: str
    call: Any  # the named tuple of its arguments


@dataclass
class Trace:
    launches: list[Launch] = field(default_factory=list)
    aten: list[Aten] = field(default_factory=list)
    cuda: list[CudaOp] = field(default_factory=list)
    only: str = ""  # part of the names of the Triton kernels that are compiled and noted


def meta(t: Any) -> Any:
    if not isinstance(t, Tensor):
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


class _Watch(TorchDispatchMode):
    """Notes the ops that run: those of this library as (name, arguments on meta), the others as `Aten`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Aten | tuple[str, tuple]] = []
        self.backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "mvit3":
            self.seen.append((func.name().removeprefix("mvit3::"), tree_map(meta, args)))
            return result
        name = func._schema.name.partition("::")[2]
        if name not in VIEWS:
            tensors = [meta(t) for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
            outputs = [meta(t) for t in tree_leaves(result) if isinstance(t, Tensor)]
            self.seen.append(Aten(name, tensors, outputs, operations(func, args, kwargs or {}, result), self.backward))
        return result


def operations(func: Any, args: tuple, kwargs: dict, result: Any) -> float:
    """Floating-point operations of an op's products, as torch counts them."""
    from torch.utils.flop_counter import flop_registry

    count = flop_registry.get(func._overloadpacket)
    return float(count(*args, **kwargs, out_val=result)) if count else 0.0


def fake(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """`model` with tensors that have no contents."""
    for module in model.modules():
        for tensors, wrap in ((module._parameters, nn.Parameter), (module._buffers, lambda t: t)):
            for name, t in tensors.items():
                if t is not None:
                    tensors[name] = wrap(mode.from_tensor(t).detach())
    return model


def triton_modules() -> list[Any]:
    """All modules of ops, so that each that has a launcher is loaded."""
    for package in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}."):
        importlib.import_module(package.name)
    return [module for name, module in sys.modules.items() if name.startswith(ops.__name__)]


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, tensors without a GPU are dispatched and divided among programs as on an H200."""
    patches = [
        mock.patch.object(dispatch, "INTERPRETED", True),
        mock.patch.object(dispatch, "_gpu_why_not", lambda index: None),
        mock.patch.object(_native, "cuda_why_not", lambda x=None: None),
        mock.patch.object(_native, "why_not", lambda: "the model is of a GPU"),
        *(
            mock.patch.object(module, "multiprocessors", lambda x: MULTIPROCESSORS)
            for module in triton_modules()
            if hasattr(module, "multiprocessors")
        ),
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def step(make: Callable[[], nn.Module], training: bool, batch: int, side: int = 256) -> list[Aten | tuple[str, tuple]]:
    """The ops of a training step (forward, loss and backward) or of an inference call under bfloat16 autocast."""
    model = make().to(memory_format=torch.channels_last).train(training)
    watch = _Watch()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake(model, mode)
        images = torch.empty(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(batch, dtype=torch.long)
        with watch:
            with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
                logits = model(images)
            if training:
                watch.backward = True
                F.cross_entropy(logits.float(), labels).backward()
    return watch.seen


def launches(seen: list[Aten | tuple[str, tuple]], only: str = "") -> Trace:
    """What ops launch. Triton kernels are compiled for sm_90, each one once; those without `only` in their names are
    left out."""
    trace = Trace(only=only)
    for entry in seen:
        if isinstance(entry, Aten):
            trace.aten.append(entry)
        else:
            _run(entry[0], entry[1], trace)
    return trace


def trace(network: str, training: bool, batch: int, side: int = 256, only: str = "") -> Trace:
    """The launches of this library's network; of its Triton kernels those with `only` in their names."""

    def make() -> nn.Module:
        return mvit3_kernels.create_model(network, num_classes=1000, drop_rate=0.0, proj_drop_rate=0.0)

    with as_on_a_gpu():
        return launches(step(make, training, batch, side), only)


def _run(op: str, args: tuple, trace: Trace) -> None:
    """Runs the launcher of an op on meta tensors, noting instead of launching."""
    launcher = _launcher(op)
    if launcher is None:
        trace.cuda.append(CudaOp(op, FORMS[op].call(*args)))
        return
    inner = _Watch()
    with _noting(op, trace), inner:
        launcher(FORMS[op].call(*args))
    for entry in inner.seen:
        if isinstance(entry, Aten):
            trace.aten.append(entry)
        else:
            _run(*entry, trace)


def _launcher(op: str) -> Callable | None:
    """The function of triton.py that is the op's, if it has one."""
    for package in pkgutil.iter_modules(ops.__path__):
        if package.ispkg and op.startswith(package.name):
            module = sys.modules.get(f"{ops.__name__}.{package.name}.triton")
            if hasattr(module, op):
                return getattr(module, op)
    return None


@contextmanager
def _noting(op: str, trace: Trace) -> Iterator[None]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import KernelInterface, MockTensor

    stub = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: "offline 90",  # the key of the kernel cache: never that of a real device
        get_current_stream=lambda device: 0,
    )

    def note(kernel: Any, grid: tuple[int, ...]) -> Callable:
        def launch(*args: Any, **options: Any) -> None:
            if trace.only not in name_of(kernel):
                return
            mocked = [MockTensor(a.dtype) if isinstance(a, Tensor) else a for a in tree(args)]
            compiled = kernel.warmup(*mocked, grid=(1,), **options)
            names = kernel.arg_names
            values = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
            settings = {k: v for k, v in options.items() if k not in names}
            trace.launches.append(Launch(op, name_of(kernel), tuple(grid), values, settings, compiled, kernel))

        return launch

    def tree(args: tuple) -> tuple:
        return tuple(
            tuple(MockTensor(p.dtype) if isinstance(p, Tensor) else p for p in a) if isinstance(a, tuple) else a
            for a in args
        )

    previous = driver._active  # not driver.active, which looks for a GPU
    driver.set_active(stub)
    try:
        with mock.patch.object(KernelInterface, "__getitem__", note):
            yield
    finally:
        driver.set_active(previous)


def name_of(kernel: Any) -> str:
    """A kernel's name with that of its op, such as inverted_residual.project_fwd."""
    module = kernel.fn.__module__.removeprefix(f"{ops.__name__}.").partition(".")[0]
    return f"{module.removeprefix('triton_')}.{kernel.fn.__name__.removesuffix('_kernel').lstrip('_')}"
