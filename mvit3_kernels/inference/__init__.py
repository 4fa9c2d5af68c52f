"""Networks as programs of the compiled engine: when a program serves a call, and when it must be packed again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._device import DeviceContext

from .. import _native
from ..models.detection import SSDNetwork
from ..models.network import MobileViT
from ..models.segmentation import SegmentationNetwork
from ..nn.guard import (
    METHODS,
    Block,
    Guard,
    is_as_written,
    known,
    methods_called,
    replaced_method,
    tampered_below,
)
from ..ops import dispatch
from .dense import BOXES, RAW
from .graphed import SERVES, Graphed
from .program import WEIGHTS, Program, Result

__all__ = [
    "FusedNetwork",
    "bfloat16_why_not",
    "fuse_networks",
    "networks",
    "refresh",
    "stands_for_network",
    "unfuse_networks",
]

LOGGER = logging.getLogger("mvit3_kernels")


def fuse_networks(model: nn.Module, dtype: torch.dtype | str = torch.float32, graphs: bool = True) -> None:
    """Makes every network inside `model` that has a fused class, and blocks that run as ops, run as one program where
    that serves a call, its products of `dtype`; "auto" is bfloat16 where that is faster; and on a GPU, with `graphs`,
    as a CUDA graph. Where this fails nothing has changed."""
    _watch_optimizers()
    before = []
    try:
        for network in networks(model):
            before.append((network, type(network), vars(network).get("_fused")))
            if type(network) in FUSED and any(isinstance(module, Block) for module in network.modules()):
                network.__class__ = FUSED[type(network)]
                network._fused = Fused(dtype, graphs)
            elif isinstance(network, FusedNetwork) and network._fused.asked() != (dtype, graphs):
                network._fused = Fused(dtype, graphs)
    except BaseException:
        for network, kind, fused in before:
            network.__class__ = kind
            vars(network).pop("_fused", None)
            if fused is not None:
                network._fused = fused
        raise


def unfuse_networks(model: nn.Module) -> None:
    """Undoes `fuse_networks`."""
    for network in networks(model):
        if isinstance(network, FusedNetwork):
            network.restore()


def refresh(model: nn.Module) -> nn.Module:
    """Makes fused networks inside `model` pack their weights again at the next call; returns `model`. `fuse` says when
    that is needed."""
    for network in networks(model):
        if isinstance(network, FusedNetwork):
            network._fused.forget()
    return model


def bfloat16_why_not() -> str | None:
    """Why products of bfloat16 cannot be had; None where they can."""
    if _native.isa() == "avx512_bf16":
        return None
    kernels = _native.why_not() or f"those for {_native.isa()} are loaded"
    return f"torch.bfloat16 needs the compiled kernels for a CPU with AVX512_BF16: {kernels}"


def network_of(module: nn.Module) -> type[nn.Module] | None:
    """The class of a network that can be fused and that a module's class is made of, without being it."""
    kind = type(module)
    return None if kind in FUSED or kind in PLAIN else next((base for base in kind.__mro__ if base in FUSED), None)


def networks(model: nn.Module) -> list[nn.Module]:
    """Networks of dense prediction and their backbones, which run as programs of their own where those cannot."""
    return [module for module in model.modules() if type(module) in FUSED or type(module) in PLAIN]


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


class FusedNetwork:
    """What `fuse` makes of a network: its methods run the program where it can, the network's own code elsewhere."""

    _fused: Fused
    # children that are called as modules where the program cannot stand in for them
    apart: tuple[str, ...] = ()
    # networks that ran, and why not as a program, while `explain` listens
    observed: list[tuple[nn.Module, str | None]] | None = None

    def __new__(cls, *args: object, **keywords: object) -> nn.Module:
        """A network made anew by a fused one's class, as `type(model).from_pretrained` of transformers does, is plain:
        it is `fuse` that fuses. Copies and pickles make theirs without arguments."""
        return PLAIN[cls](*args, **keywords) if args or keywords else super().__new__(cls)

    def restore(self) -> None:
        """Makes this the plain network again."""
        self.__class__ = PLAIN[type(self)]
        del self._fused

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript compiles the plain network, and puts what it is given here in the place of this one."""
        LOGGER.warning("torch.jit.script takes back what fuse did: it compiles a network as it was")
        self.restore()
        return self

    def returned(self) -> object:
        """Which maps the network returns, where an object says that which the guard does not look into."""
        info = getattr(getattr(self, "encoder", self), "feature_info", None)
        return getattr(info, "out_indices", None)

    def _runs_program(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or dispatch.writes_aten():
            return False
        reason = self._fused.why_not(self, x)
        if FusedNetwork.observed is not None:
            FusedNetwork.observed.append((self, reason))
        if reason is not None:
            self._fused.tell(reason)
        return reason is None

    def _ordinary(self, method: Callable[[Tensor], Any], x: Tensor) -> Any:
        """`method(x)`, of the network as it was written; on a GPU from a CUDA graph, where that serves the call."""
        if torch.compiler.is_compiling() or dispatch.writes_aten() or _watched(x) is not None:
            return method(x)
        fused = self._fused
        if not fused.makes_graphs:
            return method(x)
        if FusedNetwork.observed is not None:  # as it would run otherwise, for `explain` wants to see its ops
            if not _on_cpu(x):
                reason = fused.graphed.why_not(self, method, x, fused)
                FusedNetwork.observed[-1] = (self, reason or SERVES)
            return method(x)
        result, reason = fused.graphed.run(self, method, x, fused)
        if reason is not None and not _on_cpu(x):
            fused.tell(reason)
        return result


# The classes of networks that can be fused, each with its fused class, and the way back.
FUSED: dict[type[nn.Module], type[FusedNetwork]] = {}
PLAIN: dict[type[FusedNetwork], type[nn.Module]] = {}


def stands_for_network(plain: type[nn.Module]) -> Callable[[type[FusedNetwork]], type[FusedNetwork]]:
    """Registers a fused class in the place of a network's class."""

    def register(fused: type[FusedNetwork]) -> type[FusedNetwork]:
        if is_as_written(plain):
            FUSED[plain], PLAIN[fused] = fused, plain
        else:
            LOGGER.warning("no program is made of a %s: a method of it had been replaced", plain.__qualname__)
        METHODS[fused] = (*methods_called(fused), *methods_called(plain))
        return fused

    return register


# A network of dense prediction may stand in for its fused backbone, as for one that is not.
known(MobileViT)


@known
@stands_for_network(MobileViT)
class FusedMobileViT(FusedNetwork, MobileViT):
    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        return self._fused.run(x) if self._runs_program(x) else self._ordinary(super().forward, x)


@stands_for_network(SegmentationNetwork)
class FusedSegmentationNetwork(FusedNetwork, SegmentationNetwork):
    def small_logits(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return (self._fused.run(x), None) if self._runs_program(x) else self._ordinary(super().small_logits, x)


@stands_for_network(SSDNetwork)
class FusedSSDNetwork(FusedNetwork, SSDNetwork):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._fused.run(x, RAW) if self._runs_program(x) else self._ordinary(super().forward, x)

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._fused.run(x, BOXES) if self._runs_program(x) else self._ordinary(super().predict, x)


class Fused:
    """The program of a network, the weights that it was packed from, and the structure that it was made from."""

    def __init__(self, dtype: torch.dtype | str = torch.float32, graphs: bool = True) -> None:
        self.dtype = dtype  # as asked for: "auto" means something else on another machine
        self.makes_graphs = graphs
        self.graphed = Graphed()
        self._guard = Guard()
        self.products: torch.dtype | None = None  # of the program, where there is one
        self._program: Program | None = None
        self._weights: Weights | None = None
        self._returned: object = None
        self._told: set[str] = set()
        self._lock = threading.Lock()  # calls come from several threads; one of them packs, the others wait
        self._chosen = threading.local()  # the program of a thread's call, which another thread may replace meanwhile

    def asked(self) -> tuple[torch.dtype | str, bool]:
        """What `fuse` was asked for."""
        return self.dtype, self.makes_graphs

    def forget(self) -> None:
        """Makes the next call pack the weights; those that have begun end with the program that they began with."""
        with self._lock:
            self._guard.answer = None
        self.graphed.forget()

    def why_not(self, network: nn.Module, x: Tensor) -> str | None:
        """Why the program cannot serve a call on `x`; None where it can."""
        reason = _call_why_not(x) or _native.why_not()
        if reason is not None:
            return reason
        with self._lock:
            # The structure first: what the guard reads, the question about the weights finds in the caches.
            reason = self._guard.ask(network, self._pack, owner=self)
            returned = network.returned()
            if returned != self._returned or (self._weights is not None and self._weights.changed()):
                self._guard.answer = None
                reason = self._guard.ask(network, self._pack, owner=self)
            program, weights = self._program, self._weights
        if reason is None and torch.is_grad_enabled() and weights.require_grad():
            return (
                "gradients are recorded and weights of the network require grad: call it under torch.no_grad() or "
                "inference_mode()"
            )
        if reason is None and x.dtype is not program.images:
            reason = f"x is {x.dtype}, the network's weights are {program.images}"
        self._chosen.program = program
        return reason or program.misfit(x)

    def _pack(self, network: nn.Module) -> str | None:
        self._returned = network.returned()
        reason = replaced_method(network) or tampered_below(network, network.apart)
        program = weights = products = None
        if reason is None:
            # Also where there is no program: moving the network or casting it may give it one, and leaves its modules
            # as they are.
            weights, products = Weights(network), self._products()
            reason = bfloat16_why_not() if products is torch.bfloat16 else None
            made = reason or Program.of(network, products)
            program, reason = (None, made) if isinstance(made, str) else (made, None)
        # All at once: a call of another thread that may run the program has it until then.
        self._program, self._weights, self.products = program, weights, None if program is None else products
        return reason

    def _products(self) -> torch.dtype:
        if self.dtype != "auto":
            return self.dtype
        return torch.bfloat16 if bfloat16_why_not() is None and _native.prefers_bfloat16() else torch.float32

    def run(self, x: Tensor, ending: int = 0) -> Result:
        program, self._chosen.program = self._chosen.program, None
        return program(x, ending)

    def ends(self, ending: int) -> bool:
        """Whether the program, which serves a call, has this ending."""
        return self._chosen.program.ends(ending)

    def tell(self, reason: str) -> None:
        """Logs a reason once: as a warning where a user surely wants the program and has to do something for it."""
        if reason not in self._told:
            self._told.add(reason)
            level = logging.WARNING if reason.startswith("gradients are recorded") else logging.DEBUG
            LOGGER.log(level, "a fused network takes the ordinary path: %s", reason)

    # A copy or a pickle of the network has a program of its own, made at its first call.
    def __reduce__(self) -> tuple:
        return Fused, self.asked()


def _call_why_not(x: Tensor) -> str | None:
    """Why no program can serve a call on `x` now, whatever the network."""
    if dispatch.forced_backend() not in (None, "cpu"):
        return f"backend {dispatch.forced_backend()!r} is forced"
    reason = _watched(x)
    if reason is not None:
        return reason
    if x.device.type != "cpu" or x.dtype not in WEIGHTS or x.ndim != 4:
        return f"x must be images on the CPU, float32 or half, got {x.dtype} of {x.ndim} dimensions on {x.device}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if x.requires_grad and torch.is_grad_enabled():
        return "x requires grad"
    return None


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _watched(x: Tensor) -> str | None:
    """Who sees the operators of a call on `x`, or gives them another meaning; None where nobody does."""
    if type(x) not in (Tensor, nn.Parameter):
        return f"x must be a plain tensor, got {type(x).__name__}"
    reason = dispatch.transform()
    if reason is not None:
        return reason
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a mode of torch.utils._python_dispatch watches PyTorch's operators"
    for i in range(torch._C._len_torch_function_stack()):
        if type(torch._C._get_function_stack_at(i)) is not DeviceContext:  # of `with torch.device(...)`
            return "a mode of torch.overrides watches PyTorch's functions"
    return None


class Weights:
    """The parameters and buffers of a network at one moment. Asked at every call, so it avoids all but the cheapest
    questions."""

    def __init__(self, network: nn.Module) -> None:
        # A weight may be a plain attribute too: what another network computed, or a part of it that is masked.
        computed = [t for module in network.modules() for t in vars(module).values() if isinstance(t, Tensor)]
        tensors = (*network.parameters(), *network.buffers(), *computed)
        self._tensors = [t for t in tensors if t.is_floating_point()]
        # A quantised tensor, or another that is not plain, is in no program, but may be in a head that stands apart.
        plain = [t for t in self._tensors if type(t) in (nn.Parameter, Tensor)]
        self._memory = [t.untyped_storage() for t in plain]  # stays where it is for as long as it is watched
        # Tensors made in inference mode count no versions.
        self._counted = [(t, t._version, t.data_ptr()) for t in plain if not t.is_inference()]
        self._others = [(t, t.data_ptr()) for t in plain if t.is_inference()]
        self._steps = _optimizer_steps
        self._number = torch.ops.mvit3.weights_new(plain, _read_by_changed(self._counted))

    def __del__(self) -> None:
        if torch is not None and hasattr(self, "_number"):  # at exit of the interpreter
            torch.ops.mvit3.weights_free(self._number)

    def changed(self) -> bool:
        """Whether a weight has been written or moved since this was made, as far as `fuse` promises to notice."""
        stepped, self._steps = self._steps != _optimizer_steps, _optimizer_steps
        # The bytes first: meanwhile comes what the loops read, which a call pushes out of the caches.
        if torch.ops.mvit3.weights_changed(self._number, stepped):
            return True
        for t, version, address in self._counted:
            if t._version != version or t.data_ptr() != address:
                return True
        return any(t.data_ptr() != address for t, address in self._others)

    def require_grad(self) -> bool:
        return any(t.requires_grad for t in self._tensors)


def _read_by_changed(counted: Sequence[tuple[Tensor, int, int]]) -> list[int]:
    """Addresses of the objects that `Weights.changed` reads of each tensor. They are fetched ahead and nothing else, so
    that what a version of PyTorch or of Python keeps elsewhere only comes later."""
    line = 64
    found = []
    for entry in counted:
        t, _, address = entry
        inside = t._cdata  # of PyTorch's own object, some lines long
        found += [id(entry), id(t), id(address), t.untyped_storage()._cdata, *range(inside, inside + 4 * line, line)]
    return found
