"""A training step or an inference call as a CUDA graph: one launch instead of several hundred, for each shape of input.

`torch.cuda.make_graphed_callables` records forward and backward as two graphs of one shape, with the optimiser outside.
Here the whole step is one graph, and a sampler that changes the image size gets a graph for each size. All of them
share one memory pool: they never run side by side, and what outlives a replay (gradients, the static loss) stays
referenced and so is not reused.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .ops import dispatch

__all__ = ["CudaGraphError", "cuda_graph", "cuda_graph_step"]

# Inside the ordinary path of a network that makes graphs, and while a caller records one, the networks in it make none.
_within = threading.local()


@contextmanager
def without_graphs() -> Iterator[None]:
    """Inside, in this thread, fused networks make and use no graphs of their own."""
    before = within_a_call()
    _within.active = True
    try:
        yield
    finally:
        _within.active = before


def within_a_call() -> bool:
    """Whether this thread is inside of `without_graphs`."""
    return getattr(_within, "active", False)


DDP_WARMUP = 11  # eager steps that DistributedDataParallel needs before it can be recorded, by PyTorch's documentation


class CudaGraphError(RuntimeError):
    """A model or a step cannot be recorded as a CUDA graph; the message says why."""


class Recorder(Protocol):
    """What records and replays. `_Cuda` is the one that users meet; tests put their own in its place where there is no
    GPU."""

    def why_not(self, device: torch.device) -> str | None:
        """Why work on `device` cannot be recorded."""

    def aside(self, device: torch.device) -> Any:
        """A context whose work runs where a later `record` will record."""

    def record(self, device: torch.device, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Records what `run` launches, without running it: a function that runs it, and what `run` returned, filled by
        each replay."""


class _Cuda:
    """`errors`: which threads' calls that no graph can hold, such as an allocation, make a recording fail; see
    torch.cuda.graph."""

    def __init__(self, errors: str = "global") -> None:
        self._stream, self._pool, self._errors = None, None, errors

    def why_not(self, device: torch.device) -> str | None:
        if not torch.cuda.is_available():
            return "torch sees no GPU (torch.cuda.is_available() is False)"
        return None if device.type == "cuda" else f"the model is on {device}"

    @contextmanager
    def aside(self, device: torch.device) -> Iterator[None]:
        with torch.cuda.device(device):
            current = torch.cuda.current_stream()
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                yield
            current.wait_stream(self._stream)

    def record(self, device: torch.device, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        with torch.cuda.device(device):
            graph, self._pool = torch.cuda.CUDAGraph(), self._pool or torch.cuda.graph_pool_handle()
            # torch's default generator is part of every graph
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=self._errors):
                outputs = run()
        return graph.replay, outputs


@dataclass
class _Entry:
    """The graph of one kind of input."""

    inputs: list[Tensor]
    calls: int = 0
    replay: Callable[[], None] | None = None
    outputs: Any = None
    gradients: list[Tensor | None] | None = None


def _device_of(model: nn.Module, recorder: Recorder) -> torch.device:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        raise ValueError(f"model must be on one device, got {sorted(map(str, devices))}")
    device = devices.pop()
    reason = recorder.why_not(device)
    if reason is not None:
        raise CudaGraphError(f"no CUDA graph can be recorded: {reason}")
    return device


class _Graphs:
    """What a graph for training and one for inference share: the graphs by kind of input, the least recently used of
    which goes first."""

    def __init__(
        self, model: nn.Module, autocast: torch.dtype | None, warmup: int, max_graphs: int, recorder: Recorder
    ) -> None:
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast must be torch.bfloat16, torch.float16 or None, got {autocast}")
        for name, value in {"warmup": warmup, "max_graphs": max_graphs}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.device = _device_of(model, recorder)
        self.model, self.autocast, self.warmup, self.max_graphs = model, autocast, warmup, max_graphs
        self._recorder, self._entries = recorder, OrderedDict()

    def __len__(self) -> int:
        """Number of kinds of input that are known."""
        return len(self._entries)

    def reset(self) -> None:
        """Forgets all graphs. Needed after the model's tensors have been replaced (`model.to(...)`), not after
        `load_state_dict`."""
        self._entries.clear()

    def _entry(self, **inputs: Tensor) -> _Entry:
        """The entry for these inputs, which it now holds."""
        for name, t in inputs.items():
            if not isinstance(t, Tensor):
                raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
        shapes = tuple((tuple(t.shape), t.dtype) for t in inputs.values())
        key = (shapes, dispatch.forced_backend(), torch.are_deterministic_algorithms_enabled())
        entry = self._entries.get(key)
        if entry is None:
            while len(self._entries) >= self.max_graphs:
                self._entries.popitem(last=False)
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
                static = [torch.empty_like(t, device=self.device, requires_grad=False) for t in inputs.values()]
            entry = self._entries[key] = _Entry(static)
        self._entries.move_to_end(key)
        for static, t in zip(entry.inputs, inputs.values(), strict=True):
            static.copy_(t.detach(), non_blocking=True)
        return entry

    def _record(self, entry: _Entry, run: Callable[..., Any]) -> None:
        try:
            entry.replay, entry.outputs = self._recorder.record(self.device, lambda: run(*entry.inputs))
        except RuntimeError as error:
            raise CudaGraphError(
                f"the call cannot be recorded as a CUDA graph (does it wait for the GPU, or read from it?): {error}"
            ) from error

    def _precision(self) -> Any:
        # A cached cast of a weight would be recorded once and go stale with the first step.
        return (
            nullcontext()
            if self.autocast is None
            else torch.autocast(self.device.type, self.autocast, cache_enabled=False)
        )


class CudaGraph(_Graphs):
    """See `cuda_graph`."""

    def __call__(self, images: Tensor) -> Any:
        if self.model.training:
            raise ValueError("model must be in evaluation mode: call model.eval()")
        entry = self._entry(images=images)
        if entry.replay is None:
            with self._recorder.aside(self.device):
                for _ in range(self.warmup):
                    self._forward(*entry.inputs)
            self._record(entry, self._forward)
        entry.replay()
        return _pytree.tree_map_only(Tensor, torch.clone, entry.outputs)

    def _forward(self, images: Tensor) -> Any:
        # a graph recorded in inference mode would hold tensors that cannot be written outside of it
        with without_graphs(), torch.inference_mode(False), torch.no_grad(), self._precision():
            return self.model(images)


def cuda_graph(
    model: nn.Module,
    *,
    autocast: torch.dtype | None = None,
    warmup: int = 3,
    max_graphs: int = 16,
    recorder: Recorder | None = None,
) -> CudaGraph:
    """Inference as a CUDA graph: `run = cuda_graph(model.eval()); logits = run(images)`.

    Args:
        model: in evaluation mode, on one GPU. Its weights may be written in place (`load_state_dict`), not replaced:
            see `reset`.
        autocast: torch.bfloat16 or torch.float16 runs it under autocast of that dtype.
        warmup: eager calls before the first of a shape is recorded, at least 1.
        max_graphs: graphs that are kept, one for each shape and dtype of `images`; the least recently used is dropped.
        recorder: for tests.

    Returns:
        A function of `images`, of any device, shape and strides, that returns what the model returns, in copies that
        later calls leave alone. Python code of the model (hooks, prints) runs while recording only.

    Raises:
        CudaGraphError: there is no GPU, or the model is not on one, or what it does cannot be recorded.
        TypeError, ValueError: an argument does not fit.
    """
    return CudaGraph(model, autocast, warmup, max_graphs, recorder or _Cuda())


class CudaGraphStep(_Graphs):
    """See `cuda_graph_step`."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        autocast: torch.dtype | None,
        scaler: torch.amp.GradScaler | None,
        max_norm: float | None,
        warmup: int,
        max_graphs: int,
        recorder: Recorder,
    ) -> None:
        super().__init__(model, autocast, warmup, max_graphs, recorder)
        if isinstance(model, nn.parallel.DistributedDataParallel) and warmup < DDP_WARMUP:
            raise ValueError(f"warmup must be at least {DDP_WARMUP} for DistributedDataParallel, got {warmup}")
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        if self.scaler is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(
                "scaler needs an optimizer that skips a step without asking the host: build it with fused=True"
            )
        self.loss, self.optimizer, self.max_norm = loss, optimizer, max_norm
        self._rates = _make_capturable(optimizer, self.device)
        self._settings = [_settings(group) for group in optimizer.param_groups]
        learned = (p for group in optimizer.param_groups for p in group["params"])
        self._parameters = list(dict.fromkeys((*learned, *model.parameters())))

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        if not self.model.training:
            raise ValueError("model must be in training mode: call model.train()")
        self._follow_optimizer()
        entry = self._entry(images=images, targets=targets)
        entry.calls += 1
        if entry.calls <= self.warmup:
            with self._recorder.aside(self.device):
                return self._step(*entry.inputs).detach()
        if entry.replay is None:
            self._record(entry, self._step)
            entry.gradients = [p.grad for p in self._parameters]
        entry.replay()
        for p, gradient in zip(self._parameters, entry.gradients, strict=True):
            if p.grad is not gradient:
                p.grad = gradient
        return entry.outputs.detach().clone()

    def _step(self, images: Tensor, targets: Tensor) -> Tensor:
        # Without old gradients the new ones are not added to anything, and those of a graph lie in its memory, at the
        # same place each time.
        for p in self._parameters:
            p.grad = None
        with torch.enable_grad():
            with self._precision():
                loss = self.loss(self.model(images), targets)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.max_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self.max_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss

    def _follow_optimizer(self) -> None:
        """Puts learning rates where the graphs read them; anything else that changed would be ignored by a graph, so it
        is an error."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self._rates):
            raise ValueError(f"optimizer must keep its {len(self._rates)} parameter groups, it has {len(groups)} now")
        for number, (group, rate, before) in enumerate(zip(groups, self._rates, self._settings, strict=True)):
            given = group["lr"]
            if given is not rate:
                rate.fill_(given)
                group["lr"] = rate
            now = _settings(group)
            if now != before:
                changed = ", ".join(
                    f"{name} {before.get(name)} -> {value}" for name, value in now.items() if value != before.get(name)
                )
                raise ValueError(
                    f"between steps only lr may change, in parameter group {number} of the optimizer: {changed}"
                )


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What a graph takes from a parameter group as constants."""
    return {
        name: value
        for name, value in group.items()
        if name not in ("params", "lr", "initial_lr") and not isinstance(value, Tensor)
    }


def _make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> list[Tensor]:
    """Makes an optimiser step without the host: learning rates, which are returned, and step counters become tensors on
    the device."""
    for group in optimizer.param_groups:
        # Without fused=True SGD has no option for it, and reads a learning rate on the host.
        if "capturable" not in group and not (isinstance(optimizer, torch.optim.SGD) and group["fused"]):
            raise ValueError(
                "optimizer must have the option capturable (Adam, AdamW, RMSprop, ...) or be torch.optim.SGD with "
                "fused=True, "
                f"got {type(optimizer).__name__}"
            )
    rates = []
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
        rate = torch.empty((), dtype=torch.float32, device=device)
        rate.fill_(group["lr"])
        group["lr"] = rate
        rates.append(rate)
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(device)
    return rates


def cuda_graph_step(
    model: nn.Module,
    loss: Callable[[Any, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    max_norm: float | None = None,
    warmup: int = 3,
    max_graphs: int = 16,
    recorder: Recorder | None = None,
) -> CudaGraphStep:
    """A training step as a CUDA graph: forward, loss, backward, clipping and optimiser in one launch.

        step = cuda_graph_step(model, torch.nn.functional.cross_entropy, torch.optim.AdamW(model.parameters(),
        fused=True))
        for images, targets in loader:
            loss = step(images, targets)  # optimizer.step() and zero_grad() are in it

    Every call is one optimiser step on the data it is given. The first `warmup` calls of a shape run eagerly (they
    compile kernels and make the optimiser's state), the next one records the graph and replays it, all others replay.
    So warming up costs no data, and a network learns what it learns without graphs.

    Args:
        model: in training mode, on one GPU. Running statistics are updated, dropout differs from step to step and obeys
            torch.manual_seed. Its tensors may be written in place (`load_state_dict`), not replaced: see `reset`.
            DistributedDataParallel is taken with a warmup of at least 11, by PyTorch's rules for it; that has not been
            tried.
        loss: of the model's output and `targets`, a scalar tensor; must not read from the GPU.
        optimizer: one with the option `capturable`, which is switched on, or torch.optim.SGD with fused=True. Its
            learning rates become tensors, which schedulers write to; an assignment of a number, group["lr"] = 0.1, is
            honoured too. No other option may change between steps.
        autocast: torch.bfloat16 or torch.float16 runs model and loss under autocast of that dtype.
        scaler: scales the loss, for float16; needs an optimiser with fused=True.
        max_norm: clips the norm of all gradients.
        warmup: eager steps of each shape, at least 1.
        max_graphs: graphs that are kept, one for each shape and dtype of images and targets (a multi-scale sampler has
            several); the least recently used is dropped. They share their memory, but for a set of gradients each.
        recorder: for tests.

    Returns:
        step(images, targets): both tensors, of any device and strides; returns the detached loss, a tensor of its own.
        Gradients are in p.grad after the call, until the next one. Python code of model and loss (hooks, prints) runs
        while recording only.

    Raises:
        CudaGraphError: there is no GPU, or the model is not on one, or the step cannot be recorded.
        TypeError, ValueError: an argument does not fit.
    """
    return CudaGraphStep(model, loss, optimizer, autocast, scaler, max_norm, warmup, max_graphs, recorder or _Cuda())
