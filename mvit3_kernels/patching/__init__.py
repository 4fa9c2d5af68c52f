"""`fuse` makes a model faster in one line; `unfuse` takes it back."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from .. import _native
from ..models.network import MobileViT
from ..ops import dispatch
from .program import Program

__all__ = ["fuse", "unfuse"]

MODES = ("inference",)


def fuse(model: nn.Module, mode: str = "inference") -> nn.Module:
    """Makes every network of this library inside `model` run as one fused program; returns `model`, changed in place.

    Inference, on a CPU: batch norms are folded, weights are packed for the kernels, and a forward pass is one call that works in memory
    kept between calls. Parameters, buffers and state-dict keys stay as they are; weights are packed again where they have changed.

    A call takes the ordinary path, with the same result, where the program cannot serve it: in training mode, on inputs that require
    grad, under autocast, on inputs or weights that are not float32 on the CPU, under torch.compile and export, or where a backend is forced
    that is not "cpu". What the program returns has no gradient.

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
    for network in networks:
        if not isinstance(network.__dict__.get("forward"), FusedForward):
            network.forward = FusedForward(network)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undoes `fuse`, in place; returns `model`. A model that is not fused stays as it is."""
    for network in _networks(model):
        if isinstance(network.__dict__.get("forward"), FusedForward):
            del network.forward
    return model


def _networks(model: nn.Module) -> list[MobileViT]:
    return [module for module in model.modules() if isinstance(module, MobileViT)]


class FusedForward:
    """Stands in for a network's forward: runs the program where it can, the network's own code elsewhere."""

    def __init__(self, network: MobileViT) -> None:
        self._network = weakref.ref(network)
        self._program: Program | None = None
        self._versions: tuple[object, ...] | None = None

    def why_not(self, x: Tensor) -> str | None:
        """Why the program cannot serve a call on `x`; None where it can."""
        network = self._network()
        if network.training:
            return "the network is in training mode"
        if torch.compiler.is_compiling() or dispatch.writes_aten():
            return "the network is being compiled or exported"
        if dispatch.forced_backend() not in (None, "cpu"):
            return f"backend {dispatch.forced_backend()!r} is forced"
        if x.device.type != "cpu" or x.dtype is not torch.float32 or x.ndim != 4:
            return f"x must be float32 images on the CPU, got {x.dtype} of {x.ndim} dimensions on {x.device}"
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        if x.requires_grad and torch.is_grad_enabled():
            return "x requires grad"
        return _native.why_not() or _weights_why_not(network)

    def __call__(self, x: Tensor) -> Tensor | list[Tensor]:
        network = self._network()
        if self.why_not(x) is not None:
            return type(network).forward(network, x)
        versions = _versions(network)
        if versions != self._versions:
            self._program, self._versions = Program.of(network), versions
        return self._program(x)

    # A copy or a pickle of the network has a program of its own, made at its first call.
    def __reduce__(self) -> tuple:
        return FusedForward, (self._network(),)


def _weights_why_not(network: nn.Module) -> str | None:
    for name, t in network.state_dict(keep_vars=True).items():
        if t.device.type != "cpu" or (t.is_floating_point() and t.dtype is not torch.float32):
            return f"{name} is {t.dtype} on {t.device}, not float32 on the CPU"
    return None


def _versions(network: nn.Module) -> tuple[object, ...]:
    """Changes whenever a weight is written or replaced."""
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in network.state_dict(keep_vars=True).values())
