"""`fuse` makes a model faster in one line, `unfuse` takes it back, `fuse_report` says what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from . import hosts
from .hosts import Swapped
from .inference import PLAIN, bfloat16_why_not, fuse_networks, network_of, unfuse_networks
from .nn.guard import Block, examine
from .tables import table

MODES = ("inference", "training")
DTYPES = (torch.float32, torch.bfloat16, "auto")


def fuse(
    model: nn.Module, mode: str = "inference", dtype: torch.dtype | str = torch.float32, *, graphs: bool = True
) -> nn.Module:
    """Makes networks of this library, of timm, transformers, torchvision and ml-cvnets, and convolutions of any model,
    faster; returns `model`, changed in place.

    Blocks of the others, and an nn.Sequential that has a convolution with a batch norm and an activation in a row, get
    another class, which runs them as ops, in training and in evaluation, where that is exactly what their modules do,
    and runs their modules elsewhere. Those of this library are made of ops already. Parameters, buffers, modules and
    state-dict keys stay what and where they are, so optimizers, averages and wrappers made before go on.
    `fuse_report(model)` says what became of each block, `explain(model, images)` how a call runs.

    mode "inference" also makes every network one program, for a CPU: batch norms are folded, weights are packed for the
    kernels, and a forward pass is one call that works in memory kept between calls. A call takes the ordinary path,
    with the same result, where the program cannot serve it: where gradients are recorded (inputs or weights require
    grad, outside of `torch.no_grad()` and `torch.inference_mode()`), with a batch norm or an active dropout in training
    mode, under autocast, where images and weights are not on the CPU and of one dtype, float32, float16 or bfloat16,
    under torch.compile, export, torch.func and dispatch modes, where a backend is forced that is not "cpu",
    and where a module has been replaced, hooked or changed so that the program would not do what it does.

    On a GPU mode "inference" makes networks of `create_model` run as CUDA graphs, from the third call with images of a
    shape on: one launch for each call, from memory kept between calls. Weights may be written at any time; what was
    replaced, hooked or moved is noticed at the next call, which begins anew. At most 8 graphs are kept, the least
    recently used goes first, and all belong to the stream that the first was made on. Other calls run the ordinary
    path: in training mode, where gradients are recorded (as above), while the caller records a graph, on another
    stream, for images of more than 14 million values (which keep a GPU busy), and under what a program gives way to.
    Whoever wants a graph of hooks and all, or of another model, has `cuda_graph`.

    Dropouts of a swapped block drop as often as the host's, in the same places, with other random numbers.

    Weights that were written are packed again. A replaced tensor or module, a write by PyTorch's own operators, the
    step of an optimizer and whatever rewrites a tensor as a whole are noticed at the next call. A write to single
    elements that PyTorch does not count (through numpy, `p.data`, or to tensors made in inference mode) is noticed
    after at most 128 calls, each of which looks at a 128th of every tensor: call `refresh(model)` after such a write.

    With `dtype=torch.bfloat16` the matrix products and dense convolutions of a program read both operands rounded to
    bfloat16, as under autocast. Sums, maps, norms, softmax, activations, depth-wise taps and the convolution that reads
    the images stay float32, as do weights, images and outputs. A network of half precision (`model.half()`) is computed
    as if it were float32, and its outputs are rounded to its dtype. Outputs err at most twice as much as the network's
    under `torch.autocast("cpu", torch.bfloat16)` in plain PyTorch, both against float64.

    A model may be called from several threads at once. They share its packed weights, each call works in memory of its
    own. So n streams on a server with many cores are n Python threads: let each of them call
    `torch.set_num_threads(cores // n)` first, which holds for that thread, and then this one model, under
    `torch.inference_mode()`, which is a thread's own too. The first call packs the weights, the others wait for it.

    Args:
        model: a network of `create_model`, of timm, transformers, torchvision or ml-cvnets, or any module that contains
            such networks, their blocks or such an nn.Sequential.
        mode: "inference" or "training".
        dtype: what the products of programs are made of: torch.float32, torch.bfloat16, or "auto", which is bfloat16
            where that is faster (with AMX, or AVX512_BF16 on a CPU that is not Intel's) and float32 elsewhere. Networks
            that are fused already take the new one.

    Raises:
        ValueError: `mode` or `dtype` is unknown, there is nothing in `model` to fuse, `dtype` is given for "training",
            or it is torch.bfloat16 where the CPU does not multiply that. A network that comes to such a CPU fused, by a
            pickle, takes the ordinary path there, and `explain` says why. Where this is raised, nothing has changed.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
    if mode == "training" and dtype is not torch.float32:
        raise ValueError(f'dtype must be torch.float32 where mode is "training", which autocast governs, got {dtype!r}')
    if dtype is torch.bfloat16 and (reason := bfloat16_why_not()) is not None:
        raise ValueError(f'dtype {reason}; "auto" takes torch.float32 here')
    hosts.load_adapters(model)
    swapped = hosts.swap(model)
    if not any(isinstance(module, Block) for module in model.modules()):
        raise ValueError(_nothing(model))
    if mode == "inference":
        try:
            fuse_networks(model, dtype, graphs)
        except BaseException:
            for module in swapped:
                module.restore()
            raise
    return model


def _nothing(model: nn.Module) -> str:
    left = [f"{row.name or 'it'}, a {row.kind}: {row.reason}" for row in _rows(model)]
    kinds = Counter(type(module).__name__ for module in model.modules() if module is not model)
    found = ", ".join(left[:3]) or ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "no modules"
    return (
        "model must be or contain a network of mvit3_kernels.create_model, or blocks of timm, transformers, "
        "torchvision or ml-cvnets, or an nn.Sequential of convolutions and batch norms that an op stands for, got "
        f"{type(model).__name__} without one ({found})"
    )


def unfuse(model: nn.Module) -> nn.Module:
    """Undoes `fuse`, in place; returns `model`. A model that is not fused stays as it is."""
    unfuse_networks(model)
    hosts.restore(model)
    return model


@dataclass(frozen=True)
class FuseRow:
    """What became of a module: `name` inside the model, the class `kind` that it has without `fuse`, `became` ("" where
    it was left), and `reason`: why it was left or, as it is now, runs its modules one by one."""

    name: str
    kind: str
    became: str
    reason: str = ""


@dataclass(frozen=True)
class FuseReport:
    """The rows of a model, as a table when printed."""

    rows: tuple[FuseRow, ...]

    def __iter__(self) -> Iterator[FuseRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def left(self) -> list[FuseRow]:
        """The rows of blocks that were left as they are."""
        return [row for row in self.rows if not row.became]

    def __str__(self) -> str:
        return table(
            ("module", "is a", "became", "why not fused"),
            [(row.name, row.kind, row.became or "left", row.reason) for row in self.rows],
        )


def fuse_report(model: nn.Module) -> FuseReport:
    """What `fuse` made of the networks and blocks inside `model` and, for what it left, why. It calls nothing.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    hosts.load_adapters(model)
    return FuseReport(tuple(_rows(model)))


def _rows(model: nn.Module) -> Iterator[FuseRow]:
    candidates = hosts.candidates(model)
    for name, module in model.named_modules():
        kind = type(module)
        if kind in PLAIN:
            yield FuseRow(name, PLAIN[kind].__name__, _label(kind, PLAIN[kind]))
        elif isinstance(module, Swapped):
            yield FuseRow(name, kind.host.__name__, _label(kind, kind.host), examine(module) or "")
        elif isinstance(module, Block):
            yield FuseRow(name, kind.__name__, kind.__name__, examine(module) or "")
        elif (plain := network_of(module)) is not None:
            yield FuseRow(name, kind.__name__, "", f"is a subclass of {plain.__qualname__}, and may do something else")
        elif module in candidates:
            yield FuseRow(name, kind.__name__, "", candidates[module] or "fuse has not been called")


def _label(became: type[nn.Module], was: type[nn.Module]) -> str:
    """The name of a class, with its module where it has the name of the class before it."""
    return became.__name__ if became.__name__ != was.__name__ else f"{became.__module__}.{became.__name__}"
