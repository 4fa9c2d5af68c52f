"""CUDA graphs that `fuse` makes of a network's calls on a GPU: one launch in the place of a hundred.

A graph holds addresses, so weights that are written are read by the next call, and nothing is packed. What it does not
see is Python: a hook, a module that was replaced, a weight that lies elsewhere. The guard asks about these at each call
(`nn/guard.py`), and all graphs are forgotten where the answer is another one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .. import graphs
from ..nn.guard import Guard, replaced_method, tampered_below
from ..ops import dispatch

# Calls of a kind that run as they are: they compile what is to be compiled, and a size that does not come back costs no
# graph, whose recording takes as long as some hundred calls.
FIRST_CALLS = 2
MOST_GRAPHS = 8
MOST_KINDS = 64  # whose calls are counted
# Values of the images from which on a GPU works longer than its launches take, so that a graph would only keep memory.
MOST_VALUES = 32 * 3 * 384 * 384

SERVES = "a CUDA graph"  # how `explain` says that there is no reason why not

Method = Callable[[Tensor], Any]


@dataclass
class _Kind:
    """Calls that one graph serves."""

    calls: int = 0
    images: Tensor | None = None  # what the graph reads
    replay: Callable[[], None] | None = None
    outputs: Any = None
    refused: str | None = None

    def why_not(self) -> str | None:
        """Why the next call does not come from the graph."""
        if self.calls < FIRST_CALLS:
            return (
                f"no CUDA graph yet: the first {FIRST_CALLS} calls of a kind run as they are, {self.calls} have so far"
            )
        return self.refused


class Graphed:
    """The graphs of a network. All of them belong to the stream of the first: they share memory, so that no two may
    run side by side."""

    def __init__(self) -> None:
        self._guard = Guard()
        self._lock = threading.Lock()  # a graph has one set of inputs and outputs: a call fills, runs and copies alone
        self._kinds: OrderedDict[tuple, _Kind] = OrderedDict()
        self._forget()

    def _forget(self) -> None:
        """Drops all graphs. A call of each kind runs as it is before the next is recorded, so that a network that
        changes between any two calls never waits for a recording."""
        for key, kind in self._kinds.items():
            self._kinds[key] = _Kind(min(kind.calls, FIRST_CALLS - 1))
        self._recorder: graphs.Recorder = graphs._Cuda("thread_local")  # other threads may allocate meanwhile
        self._places: list[tuple[Tensor, int]] = []
        self._memory: list[Any] = []
        self._stream: int | None = None
        self._learns = False

    def forget(self) -> None:
        """Makes the next call examine the network anew."""
        with self._lock:
            self._guard.answer = None

    def run(self, network: nn.Module, method: Method, x: Tensor, owner: object) -> tuple[Any, str | None]:
        """What `method(x)`, a method of `network`, returns; and why it did not come from a graph. `owner` is the
        attribute of `network` that holds this."""
        reason = self._call_why_not(network, x)
        if reason is None:
            with self._lock:
                reason = self._follow(network, x, owner)
                kind = None if reason else self._kind(network, method, x)
                reason = reason or self._serve(kind, method, x)
                if reason is None:
                    return _pytree.tree_map_only(Tensor, torch.clone, kind.outputs), None
        with graphs.without_graphs():
            return method(x), reason

    def why_not(self, network: nn.Module, method: Method, x: Tensor, owner: object) -> str | None:
        """Why the next call would not come from a graph; it is not counted."""
        reason = self._call_why_not(network, x)
        if reason is not None:
            return reason
        with self._lock:
            return self._follow(network, x, owner) or self._kind(network, method, x).why_not()

    def _call_why_not(self, network: nn.Module, x: Tensor) -> str | None:
        """Why no graph can serve a call on `x` now, whatever the network is made of."""
        if graphs.within_a_call():
            return "a network around it, or a caller, makes a graph of the whole call"
        reason = self._recorder.why_not(x.device)
        if reason is not None:
            return f"no CUDA graph: {reason}"
        if getattr(network, "_is_replica", False):
            return "no CUDA graph: it is a replica of torch.nn.DataParallel"
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return "no CUDA graph: the stream is captured by the caller"
        if x.numel() > MOST_VALUES:
            return (
                f"no CUDA graph: x has {x.numel()} values, and from {MOST_VALUES} on launches are not what takes time"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            return "no CUDA graph: x requires grad"
        return None

    def _follow(self, network: nn.Module, x: Tensor, owner: object) -> str | None:
        """Forgets the graphs of what the network was before; why it can have none as it is."""
        reason = self._guard.ask(network, self._examine, owner=owner)
        if any(t.data_ptr() != place for t, place in self._places):
            self._guard.answer = None
            reason = self._guard.ask(network, self._examine, owner=owner)
        if reason is not None:
            return f"no CUDA graph: {reason}"
        if torch.is_grad_enabled() and self._learns:
            return "no CUDA graph: gradients are recorded and weights require grad: call it under torch.no_grad()"
        device = self._places[0][0].device
        if x.device != device:
            return f"no CUDA graph: x is on {x.device}, the network on {device}"
        stream = _stream(device)
        if self._stream is None:
            self._stream = stream
        return None if stream == self._stream else "no CUDA graph: its graphs belong to another stream"

    def _examine(self, network: nn.Module) -> str | None:
        self._forget()
        # what is called apart from the method is in no graph
        reason = replaced_method(network) or tampered_below(network, network.apart)
        if reason is not None:
            return reason
        if any(module.training for module in network.modules()):
            return "a module is in training mode"
        computed = [t for module in network.modules() for t in vars(module).values() if isinstance(t, Tensor)]
        tensors = [*network.parameters(), *network.buffers(), *computed]
        if len({t.device for t in tensors}) != 1:
            return "its tensors are not on one device"
        self._places = [(t, t.data_ptr()) for t in tensors]
        self._memory = [t.untyped_storage() for t in tensors]  # so that no other tensor can come to lie there
        self._learns = any(t.requires_grad for t in tensors)
        return None

    def _kind(self, network: nn.Module, method: Method, x: Tensor) -> _Kind:
        returned = getattr(network, "returned", lambda: None)()
        key = (method.__name__, repr(returned), tuple(x.shape), x.dtype, _autocast(x.device), *_settings())
        kind = self._kinds.setdefault(key, _Kind())
        self._kinds.move_to_end(key)
        if len(self._kinds) > MOST_KINDS:
            self._kinds.popitem(last=False)
        return kind

    def _serve(self, kind: _Kind, method: Method, x: Tensor) -> str | None:
        """Runs the graph of a kind, which it records first where there is none; why not."""
        reason = kind.why_not()
        kind.calls += 1
        if reason is not None:
            return reason
        with torch.inference_mode(False), torch.no_grad():
            if kind.replay is None:
                self._record(kind, method, x)
                if kind.refused is not None:
                    return kind.refused
            else:
                kind.images.copy_(x)
            kind.replay()
        return None

    def _record(self, kind: _Kind, method: Method, x: Tensor) -> None:
        recorded = [other for other in self._kinds.values() if other.replay is not None]
        for other in recorded[: max(len(recorded) - MOST_GRAPHS + 1, 0)]:
            other.replay = other.outputs = other.images = None
        kind.images = torch.empty_like(x, requires_grad=False).copy_(x)

        def call() -> Any:
            with graphs.without_graphs(), _uncached_casts(x.device):
                return method(kind.images)

        try:
            with self._recorder.aside(x.device):
                call()
            kind.replay, kind.outputs = self._recorder.record(x.device, call)
        except RuntimeError as error:
            kind.images, kind.refused = None, f"no CUDA graph: it cannot be recorded: {error}"


def _autocast(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _uncached_casts(device: torch.device) -> Any:
    """The autocast around the call, without its cache: a cast of a weight that was made before is not in a graph, and
    its memory another's tomorrow."""
    dtype = _autocast(device)
    return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)


def _settings() -> tuple:
    """What PyTorch's and this library's choice of kernels depends on."""
    return (
        dispatch.forced_backend(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
