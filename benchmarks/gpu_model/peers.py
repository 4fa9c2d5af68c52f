"""The peers by the same rates: eager PyTorch, an op after the other, and compiled code, whose kernels are counted on
the graph that torch.compile would generate them from.

An op's time is the longer of its bytes and its operations, at the share of the rates that PyTorch's kernels reach. The
shares are guesses, within some 30 %, from published profiles of such kernels.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu_model import device
from benchmarks.gpu_model.model import Prediction
from benchmarks.gpu_model.trace import VIEWS, Aten, fake, operations

# Passes over its operands that an op makes beyond reading and writing each once, and its launches.
PASSES = {
    "native_batch_norm": (1.5, 2),
    "cudnn_batch_norm": (1.5, 2),
    "_native_batch_norm_legit": (1.5, 2),
    "native_batch_norm_backward": (1.67, 2),
    "convolution_backward": (1.4, 3),
    "native_layer_norm_backward": (1.3, 2),
    "_foreach_add_": (1.0, 1),
}
REACHED = 0.85  # of the rate of a copy, by element-wise kernels and reductions
DEPTHWISE_REACHED = 0.35  # by cuDNN's and PyTorch's depth-wise kernels in channels_last
CONVOLUTION = 350e12  # operations/s of cuDNN in 16 bits
PRODUCT = 500e12  # of cuBLAS
ATTENTION = 300e12


def nbytes(tensors: list[Tensor]) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def aten(op: Aten, kind: str = "aten") -> Prediction:
    moved = nbytes(op.tensors) + nbytes(op.outputs)
    more, launches = PASSES.get(op.name, (1.0, 1))
    rate, share, products = PRODUCT, REACHED, op.operations
    if "convolution" in op.name or "conv2d" in op.name:
        rate = CONVOLUTION
        if is_depthwise(op):
            share, products = DEPTHWISE_REACHED, 0.0  # which torch counts as if every channel met every other
    elif "attention" in op.name:
        rate, launches = ATTENTION, 2 if op.name.endswith("backward") else 1
    if products and all(t.dtype is torch.float32 for t in op.tensors):
        rate = device.FLOAT32
    limits = {"memory": more * moved / share / device.MEMORY, "tensor cores": products / rate}
    limit = max(limits, key=limits.get)
    seconds = limits[limit] + launches * device.START
    return Prediction(op.name, kind, seconds, limit, bytes=moved * more, products=products, launches=launches)


def is_depthwise(op: Aten) -> bool:
    """Whether a convolution's weight has one input channel for each of its outputs."""
    weights = [t for t in op.tensors if t.dim() == 4 and t.shape[1] == 1 and t.shape[2] == 3]
    return bool(weights)


def adamw(parameters: int) -> Prediction:
    """The fused optimiser: parameters, gradients and two moments are read, three of them written."""
    moved = 28.0 * parameters
    return Prediction(
        "adamw", "aten", moved / device.MEMORY / REACHED + 3 * device.START, "memory", bytes=moved, launches=3
    )


# Compiled code


def graph(make: Callable[[], nn.Module], training: bool, batch: int, side: int = 256) -> fx.Graph:
    """The operations of a step as inductor sees them, forward and backward in one graph, with the sizes of each value
    in `meta["val"]`."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    model = make().to(memory_format=torch.channels_last).train(training)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake(model, mode)
        images = torch.empty(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(batch, dtype=torch.long)
        names, values = zip(*model.named_parameters(), strict=True)

        def step(images: Tensor, *parameters: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
                logits = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (images,))
                if not training:
                    return logits
                return torch.autograd.grad(F.cross_entropy(logits.float(), labels), parameters)

        traced = make_fx(step, select_decomp_table(), tracing_mode="real")(images, *values)
    traced.graph.eliminate_dead_code()
    return traced.graph


LIBRARY = ("convolution", "mm", "addmm", "bmm", "baddbmm", "attention", "convolution_backward")
REDUCTIONS = ("sum", "mean", "var_mean", "amax", "amin", "var", "max", "prod", "any")


def name_of(node: fx.Node) -> str:
    target = node.target
    return target._schema.name.partition("::")[2] if isinstance(target, torch._ops.OpOverload) else str(target)


def is_library(node: fx.Node) -> bool:
    return node.op == "call_function" and any(
        name_of(node) == name or (name == "attention" and name in name_of(node)) for name in LIBRARY
    )


def is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and name_of(node) in VIEWS


class Fusion:
    """Which values compiled code writes to memory: what library calls make and read, results of reductions, and what
    the step returns. Everything between them is fused into whoever reads it."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.written: set[fx.Node] = set()
        for node in graph.nodes:
            one_of = node.target is operator.getitem and node.args[0] in self.written
            if is_library(node) or name_of(node) in REDUCTIONS or one_of:
                self.written.add(node)
            if is_library(node) or node.op == "output":
                self.written |= {self.origin(n) for n in node.all_input_nodes}
        self.leaves: dict[fx.Node, frozenset[fx.Node]] = {}

    def origin(self, node: fx.Node) -> fx.Node:
        """The value that a view shows."""
        while is_view(node) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node

    def read_by(self, node: fx.Node) -> frozenset[fx.Node]:
        """The values in memory that computing `node` reads."""
        found: set[fx.Node] = set()
        for value in map(self.origin, node.all_input_nodes):
            if value in self.written or value.op == "placeholder":
                found.add(value)
            else:
                found |= self.leaves.get(value, frozenset())
        return frozenset(found)

    def kernels(self) -> list[Prediction]:
        made: list[Prediction] = []
        # Bytes written by kernels that read the same maps, which become one kernel.
        fused: dict[tuple[bool, frozenset[fx.Node]], float] = {}
        for node in self.graph.nodes:
            if node.op != "call_function" or is_view(node) or node.target is operator.getitem:
                continue
            read = self.leaves[node] = self.read_by(node)
            if is_library(node):
                made.append(self.library(node, read))
            elif node in self.written:
                largest = max(map(size, read), default=0.0)
                # a sum and what needs it are two kernels
                key = name_of(node) in REDUCTIONS, frozenset(n for n in read if size(n) > largest / 100)
                fused[key] = fused.get(key, 0.0) + size(node)
        for (_, maps), written in fused.items():
            moved = written + sum(map(size, maps))
            seconds = moved / device.MEMORY / REACHED + device.START
            made.append(Prediction("fused", "compiled", seconds, "memory", bytes=moved))
        return made

    def library(self, node: fx.Node, read: frozenset[fx.Node]) -> Prediction:
        args, kwargs = torch.utils._pytree.tree_map(value_of, (node.args, node.kwargs))
        count = operations(node.target, args, kwargs, node.meta.get("val"))
        tensors = [value_of(n) for n in node.all_input_nodes if isinstance(value_of(n), Tensor)]
        outputs = [t for t in torch.utils._pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]
        return aten(Aten(name_of(node), tensors, outputs, count, False), "compiled")


def value_of(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def size(node: fx.Node) -> float:
    return nbytes([t for t in torch.utils._pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)])
