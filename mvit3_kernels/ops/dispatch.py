"""Which backend runs a call, and why another one cannot.

An op has a reference (plain PyTorch, runs anywhere) and any number of kernels. Each kernel carries one predicate; the
same predicate answers "take this kernel?" when the backend is chosen freely and "why not?" when the user forces one.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _native
from .sizes import values_per_channel

LOGGER = logging.getLogger("mvit3_kernels")

BACKENDS = ("reference", "cpu", "triton", "cuda")
ENVIRONMENT = "MVIT3_BACKEND"

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton's own switch: kernels run on CPU tensors, step by step. It takes the place of the compiled CPU kernels, for
# tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# looked up once: torch 2.11's dynamo cannot trace the look-up
HAS_TRITON = importlib.util.find_spec("triton") is not None


class BackendError(RuntimeError):
    """A backend was forced that cannot take the call; the message names the op, the backend and the reason."""


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    `why_not` takes the op's tensors and returns None when the kernel can run the call, else the reason why it cannot.
    """

    backend: str
    why_not: Callable[..., str | None]

    def can_run(self, *args: object) -> bool:
        return self.why_not(*args) is None


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced: ContextVar[str | None] = ContextVar("mvit3_backend", default=None)
# The same for torch.compile, which guards on a module's variable, so that a change of backend recompiles; it does not
# guard on a thread-local, and before 2.13 it cannot read a ContextVar. With several threads compiled code sees the
# latest `backend(...)` of any.
_forced_for_compiler: str | None = None
_environment: str | None = None
if os.environ.get(ENVIRONMENT):
    _environment = _checked(os.environ[ENVIRONMENT], f"environment variable {ENVIRONMENT}")


def forced_backend() -> str | None:
    """The backend forced by `backend(...)` or, outside of it, by MVIT3_BACKEND; None when the choice is free."""
    name = _forced_for_compiler if torch.compiler.is_compiling() else _forced.get()
    return _environment if name is None else name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force every op called inside the `with` block (in this thread) to one of "reference", "cpu", "triton", "cuda".

    A forced backend that cannot take a call raises `BackendError` with the reason. The backward pass of a call uses the
    backend that its forward pass used.
    """
    global _forced_for_compiler
    token = _forced.set(_checked(name, "backend"))
    _forced_for_compiler = name
    try:
        yield
    finally:
        _forced.reset(token)
        _forced_for_compiler = _forced.get()


def writes_aten() -> bool:
    """Whether the program is being exported: an exporter must see plain ATen, so every op is its reference there."""
    # The flag behind torch.compiler.is_exporting(): torch 2.11's dynamo takes that function for true whenever it
    # traces.
    return torch.compiler._is_exporting_flag or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


# dynamo enters a transform while it traces it, so the answer is right, and stays out of the graph
@torch.compiler.assume_constant_result
def transform() -> str | None:
    """Why no kernel may run under the current transform of PyTorch: a functorch level (grad, vjp, jvp, vmap, ...) or
    forward-mode AD is active; None outside of them."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func (grad, vjp, jvp, vmap, ...) is active, which only plain PyTorch can follow"
    if forward_ad._current_level >= 0:
        return "forward-mode AD (torch.autograd.forward_ad) is active, and kernels have no forward derivatives"
    return None


# Calls of ops, what ran and why, while `explain` listens; and the (op, reason) pairs that are in the log.
observed: list[tuple[str, str, str]] | None = None
_noted: set[tuple[str, str]] = set()


def select(op: str, kernels: Sequence[Kernel], *args: object) -> Kernel | None:
    """The kernel that runs this call of `op`, or None for the reference.

    Raises:
        BackendError: a backend is forced that has no kernel for this op, or whose kernel cannot take the call.
    """
    forced = forced_backend()
    if forced == "reference" or writes_aten():
        return _note(op, None, "it is forced" if forced == "reference" else "an exporter sees plain PyTorch")
    reason = transform()
    reasons = [] if reason is None else [reason]
    for kernel in kernels if reason is None else ():
        if forced is None or kernel.backend == forced:
            reason = kernel.why_not(*args)
            if reason is None:
                return _note(op, kernel, "")
            reasons.append(f"{kernel.backend}: {reason}")
    if forced is None:
        return _note(op, None, "; ".join(dict.fromkeys(reasons)) or "the op has no kernel")
    raise BackendError(f"{op} cannot run on backend {forced!r}: {reason or 'the op has no kernel for this backend'}")


def _note(op: str, kernel: Kernel | None, reason: str) -> Kernel | None:
    if torch.compiler.is_compiling():
        return kernel
    if observed is not None:
        observed.append((op, "reference" if kernel is None else kernel.backend, reason))
    if kernel is None and (op, reason) not in _noted:
        _noted.add((op, reason))
        LOGGER.debug("%s runs as its reference: %s", op, reason)
    return kernel


def autocast(x: Tensor) -> Tensor:
    """`x` as a matrix product sees it: in autocast's lower precision where autocast is on, unchanged elsewhere."""
    dtype = _autocast_dtype(x)
    return x if dtype is x.dtype else x.to(dtype)


def as_autocast(x: Tensor) -> Tensor:
    """Shape, device and dtype of `autocast(x)`, for a kernel that reads `x` as it is."""
    dtype = _autocast_dtype(x)
    return x if dtype is x.dtype else x.new_empty((), dtype=dtype).expand(x.shape)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype is torch.float32:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _dtype_why_not(x: Tensor) -> str | None:
    return None if x.dtype in KERNEL_DTYPES else f"its kernels take float32, bfloat16 and float16, x is {x.dtype}"


def cpu_why_not(x: Tensor) -> str | None:
    """Why the compiled CPU kernels cannot take a call on `x`."""
    if x.device.type != "cpu":
        return f"x is on {x.device}"
    return _native.why_not() or _dtype_why_not(x)


_gpus: dict[int, str | None] = {}
_logged: set[str] = set()


# torch.compile asks while it traces, and neither the log nor the driver is in its graph
@torch.compiler.assume_constant_result
def _gpu_why_not(index: int) -> str | None:
    """Why no Triton kernel runs on a GPU. The first time that a reason comes up it is logged: calls then run on another
    kernel or on the reference, which is right but not what someone who has a GPU expects."""
    if index in _gpus:
        return _gpus[index]
    reason = None
    if not HAS_TRITON:
        reason = "triton is not installed"
    elif torch.version.cuda and torch.cuda.get_device_capability(index) < (8, 0):
        reason = f"{torch.cuda.get_device_name(index)} has compute capability below 8.0"
    if reason is not None and reason not in _logged:
        _logged.add(reason)
        LOGGER.warning(
            "no Triton kernel of mvit3_kernels runs here (%s): ops without another kernel run in plain PyTorch", reason
        )
    _gpus[index] = reason
    return reason


def triton_why_not(x: Tensor) -> str | None:
    """Why the Triton kernels cannot take a call on `x`."""
    if x.device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"x is on {x.device}" + (" and TRITON_INTERPRET=1 is set" if INTERPRETED else "")
    reason = _gpu_why_not(x.device.index) if x.is_cuda else None if HAS_TRITON else "triton is not installed"
    return reason or _dtype_why_not(x)


def triton_32_bit_why_not(x: Tensor) -> str | None:
    """The same for kernels that count pixels, and the elements of a sample, in 32 bits; a map may have any number of
    elements."""
    if max(values_per_channel(x), math.prod(x.shape[1:])) >= 2**31:
        return (
            "its kernels take maps of less than 2^31 pixels, and of less than 2^31 elements a sample, x is "
            f"{tuple(x.shape)}"
        )
    return triton_why_not(x)


def hopper_why_not(x: Tensor) -> str | None:
    """Why kernels whose tiles are chosen for NVIDIA's compute capability 9.0, and need its shared memory, cannot take a
    call on `x`, which Triton's kernels can."""
    if x.is_cuda and not _is_hopper(x.device.index):
        return "its tiles are those of a GPU of compute capability 9.0"
    return None


@torch.compiler.assume_constant_result
def _is_hopper(index: int) -> bool:
    return not torch.version.hip and torch.cuda.get_device_capability(index) == (9, 0)


def triton_upsampling_why_not(x: Tensor, size: Sequence[int]) -> str | None:
    """The same for kernels that up-sample maps to this size, and count outputs and shares of them in 32 bits."""
    axes = zip(x.shape[1:3], size, strict=True)
    if size[0] * size[1] >= 2**31 or any(2 * (n + 1) * (m + 1) >= 2**31 for n, m in axes):
        return f"its kernels count outputs in 32 bits, {tuple(x.shape[1:3])} to {tuple(size)} is too large"
    return triton_32_bit_why_not(x)
