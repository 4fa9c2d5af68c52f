"""`fuse` makes a model faster in one line; `unfuse` takes it back."""

from __future__ import annotations

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


def _networks(model: nn.Module) -> list[MobileViT]:
    return [module for module in model.modules() if type(module) in (MobileViT, FusedMobileViT)]


class FusedMobileViT(MobileViT):
    """What `fuse` makes of a network: its forward runs the program where it can, the network's own code elsewhere."""

    _fused: Fused

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if torch.compiler.is_compiling() or dispatch.writes_aten() or self._fused.why_not(self, x) is not None:
            return super().forward(x)
        return self._fused.run(self, x)


class Fused:
    """The program of a network and the weights that it was made from."""

    def __init__(self) -> None:
        self._weights: Weights | None = None
        self._program: Program | None = None

    def why_not(self, network: MobileViT, x: Tensor) -> str | None:
        """Why the program cannot serve a call on `x`; None where it can."""
        if network.training:
            return "the network is in training mode"
        if dispatch.forced_backend() not in (None, "cpu"):
            return f"backend {dispatch.forced_backend()!r} is forced"
        if x.device.type != "cpu" or x.dtype is not torch.float32 or x.ndim != 4:
            return f"x must be float32 images on the CPU, got {x.dtype} of {x.ndim} dimensions on {x.device}"
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        if x.requires_grad and torch.is_grad_enabled():
            return "x requires grad"
        reason = _native.why_not()
        if reason is not None:
            return reason
        if self._weights is None or self._weights.changed():
            self._program, self._weights = None, Weights(network)
        return self._weights.reason

    def run(self, network: MobileViT, x: Tensor) -> Tensor | list[Tensor]:
        program = self._program
        if program is None:
            program = self._program = Program.of(network)
        return program(x)

    # A copy or a pickle of the network has a program of its own, made at its first call.
    def __reduce__(self) -> tuple:
        return Fused, ()


class Weights:
    """The parameters and buffers of a network at one moment. Asked at every call, so it avoids all but the cheapest questions."""

    def __init__(self, network: nn.Module) -> None:
        modules = list(network.modules())
        self._children = [(module._modules, name) for module in modules for name in module._modules]
        self._tensors = [
            (tensors, name)
            for module in modules
            for tensors in (module._parameters, module._buffers)
            for name, t in tensors.items()
            if t is not None and t.is_floating_point()
        ]
        self._state = self._observe()
        self.reason = self._why_not()

    def changed(self) -> bool:
        """Whether a weight has been written, moved or replaced, or a module replaced, since this was made."""
        return self._observe() != self._state

    def _observe(self) -> tuple[list, list, list]:
        tensors = [group.get(name) for group, name in self._tensors]
        if any(t is None for t in tensors):
            return [], [], []
        try:
            versions = [t._version for t in tensors]
        except RuntimeError:  # made in inference mode: such tensors count no versions
            versions = [0 if t.is_inference() else t._version for t in tensors]
        return [t.data_ptr() for t in tensors], versions, [id(group.get(name)) for group, name in self._children]

    def _why_not(self) -> str | None:
        for group, name in self._tensors:
            t = group[name]
            if t.device.type != "cpu" or t.dtype is not torch.float32:
                return f"the network's {name} is {t.dtype} on {t.device}, not float32 on the CPU"
        return None
