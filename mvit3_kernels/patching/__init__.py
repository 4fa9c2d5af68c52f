"""`fuse` makes a model faster in one line; `unfuse` takes it back."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import _native
from ..models.network import MobileViT
from ..nn.guard import Guard, replaced_method, tampered_below
from ..ops import dispatch
from .program import Program

__all__ = ["fuse", "refresh", "unfuse"]

MODES = ("inference",)
LOGGER = logging.getLogger("mvit3_kernels")


def fuse(model: nn.Module, mode: str = "inference") -> nn.Module:
    """Makes every network of this library inside `model` run as one fused program; returns `model`, changed in place.

    Inference, on a CPU: batch norms are folded, weights are packed for the kernels, and a forward pass is one call that works in
    memory kept between calls. Parameters, buffers and state-dict keys stay as they are.

    A call takes the ordinary path, with the same result, where the program cannot serve it: where gradients are recorded (inputs or
    weights require grad, outside of `torch.no_grad()` and `torch.inference_mode()`), with a batch norm or an active dropout in
    training mode, under autocast, on inputs or weights that are not float32 on the CPU, under torch.compile, export, torch.func
    and dispatch modes, where a backend is forced that is not "cpu", and where a module has been replaced, hooked or changed so
    that the program would not do what it does. `mvit3_kernels.explain(model, images)` says which path a call takes and why.

    Weights that were written are packed again. A replaced tensor or module, a write by PyTorch's own operators, the step of an
    optimizer and whatever rewrites a tensor as a whole are noticed at the next call. A write to single elements that PyTorch does
    not count (through numpy, `p.data`, or to tensors made in inference mode) is noticed after at most 128 calls, each of which
    looks at a 128th of every tensor: call `refresh(model)` after such a write.

    Args:
        model: a network of `create_model`, or a module that contains such networks.
        mode: "inference".

    Raises:
        ValueError: `mode` is unknown, or there is nothing in `model` to fuse.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    networks = _networks(model)
    if not networks:
        raise ValueError(f"model must be or contain a network of mvit3_kernels.create_model, got {type(model).__name__} without one")
    _watch_optimizers()
    for network in networks:
        if type(network) is MobileViT:
            network.__class__ = FusedMobileViT
            network._fused = Fused()
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undoes `fuse`, in place; returns `model`. A model that is not fused stays as it is."""
    for network in _networks(model):
        if type(network) is FusedMobileViT:
            network.__class__ = MobileViT
            del network._fused
    return model


def refresh(model: nn.Module) -> nn.Module:
    """Makes fused networks inside `model` pack their weights again at the next call; returns `model`. `fuse` says when that is needed."""
    for network in _networks(model):
        if type(network) is FusedMobileViT:
            network._fused = Fused()
    return model


def _networks(model: nn.Module) -> list[MobileViT]:
    return [module for module in model.modules() if type(module) in (MobileViT, FusedMobileViT)]


_optimizer_steps = 0
_optimizers_are_watched = False


def _watch_optimizers() -> None:
    """Counts the steps of all optimizers: fused ones write parameters without counting a version."""
    global _optimizers_are_watched
    if not _optimizers_are_watched:
        _optimizers_are_watched = True
        register_optimizer_step_post_hook(_count_step)


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


class FusedMobileViT(MobileViT):
    """What `fuse` makes of a network: its forward runs the program where it can, the network's own code elsewhere."""

    _fused: Fused
    observed: list[tuple[MobileViT, str | None]] | None = None  # networks that ran, and why not as a program, while `explain` listens

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if torch.compiler.is_compiling() or dispatch.writes_aten():
            return super().forward(x)
        reason = self._fused.why_not(self, x)
        if FusedMobileViT.observed is not None:
            FusedMobileViT.observed.append((self, reason))
        if reason is not None:
            self._fused.tell(reason)
            return super().forward(x)
        return self._fused.run(x)


class Fused:
    """The program of a network, the weights that it was packed from, and the structure that it was made from."""

    def __init__(self) -> None:
        self._guard = Guard()
        self._program: Program | None = None
        self._weights: Weights | None = None
        self._out_indices: tuple[int, ...] | None = None
        self._told: set[str] = set()

    def why_not(self, network: MobileViT, x: Tensor) -> str | None:
        """Why the program cannot serve a call on `x`; None where it can."""
        reason = _call_why_not(x) or _native.why_not()
        if reason is not None:
            return reason
        # The structure first: what the guard reads, the question about the weights finds in the caches.
        reason = self._guard.ask(network, self._pack, owner=self)
        indices = network.feature_info.out_indices  # of an object that the guard does not look into
        if indices != self._out_indices or (self._weights is not None and self._weights.changed()):
            self._guard.answer = None
            reason = self._guard.ask(network, self._pack, owner=self)
        if reason is None and torch.is_grad_enabled() and self._weights.require_grad():
            return "gradients are recorded and weights of the network require grad: call it under torch.no_grad() or inference_mode()"
        return reason

    def _pack(self, network: MobileViT) -> str | None:
        self._program = self._weights = None
        self._out_indices = network.feature_info.out_indices
        reason = replaced_method(network) or tampered_below(network)
        if reason is not None:
            return reason
        # Also where there is no program: moving the network or casting it may give it one, and leaves its modules as they are.
        self._weights = Weights(network)
        made = Program.of(network)
        if isinstance(made, str):
            return made
        self._program = made
        return None

    def run(self, x: Tensor) -> Tensor | list[Tensor]:
        return self._program(x)

    def tell(self, reason: str) -> None:
        """Logs a reason once: as a warning where a user surely wants the program and has to do something for it."""
        if reason not in self._told:
            self._told.add(reason)
            level = logging.WARNING if reason.startswith("gradients are recorded") else logging.DEBUG
            LOGGER.log(level, "a fused network takes the ordinary path: %s", reason)

    # A copy or a pickle of the network has a program of its own, made at its first call.
    def __reduce__(self) -> tuple:
        return Fused, ()


def _call_why_not(x: Tensor) -> str | None:
    """Why no program can serve a call on `x` now, whatever the network."""
    if dispatch.forced_backend() not in (None, "cpu"):
        return f"backend {dispatch.forced_backend()!r} is forced"
    if type(x) not in (Tensor, nn.Parameter):
        return f"x must be a plain tensor, got {type(x).__name__}"
    reason = dispatch.transform()
    if reason is not None:
        return reason
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a mode of torch.utils._python_dispatch watches PyTorch's operators"
    if x.device.type != "cpu" or x.dtype is not torch.float32 or x.ndim != 4:
        return f"x must be float32 images on the CPU, got {x.dtype} of {x.ndim} dimensions on {x.device}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if x.requires_grad and torch.is_grad_enabled():
        return "x requires grad"
    return None


class Weights:
    """The parameters and buffers of a network at one moment. Asked at every call, so it avoids all but the cheapest questions."""

    def __init__(self, network: nn.Module) -> None:
        self._tensors = [t for t in (*network.parameters(), *network.buffers()) if t.is_floating_point()]
        self._memory = [t.untyped_storage() for t in self._tensors]  # stays where it is for as long as it is watched
        # Tensors made in inference mode count no versions.
        self._counted = [(t, t._version, t.data_ptr()) for t in self._tensors if not t.is_inference()]
        self._others = [(t, t.data_ptr()) for t in self._tensors if t.is_inference()]
        self._steps = _optimizer_steps
        self._number = torch.ops.mvit3.weights_new(self._tensors)

    def __del__(self) -> None:
        if torch is not None and hasattr(self, "_number"):  # at exit of the interpreter
            torch.ops.mvit3.weights_free(self._number)

    def changed(self) -> bool:
        """Whether a weight has been written or moved since this was made, as far as `fuse` promises to notice."""
        for t, version, address in self._counted:
            if t._version != version or t.data_ptr() != address:
                return True
        for t, address in self._others:
            if t.data_ptr() != address:
                return True
        stepped, self._steps = self._steps != _optimizer_steps, _optimizer_steps
        return torch.ops.mvit3.weights_changed(self._number, stepped)

    def require_grad(self) -> bool:
        return any(t.requires_grad for t in self._tensors)
