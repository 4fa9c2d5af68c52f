"""pointwise_conv and pointwise_fusion on the CPU, evaluation and a training step (forward and backward), in float32.

    python benchmarks/bench_pointwise.py [--json] [--quick] [--threads 2] [--batch 8 1]

Beside them: "eager" is the same as plain modules in channels_last; "composed" is concatenation and PyTorch's product
around `batch_norm_act`: what runs where the kernel does not. The floor is the products alone, timed as `torch.mm` of
the same sizes in the same turns, or the tensors that must be read and written at the rate of a copy, whichever takes
longer. Results are checked before they are timed.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.common import Case, Make, batches, compiled, mode, run_cases
from mvit3_kernels.ops import BatchNorm, Linear, batch_norm_act, pointwise_conv, pointwise_fusion
from mvit3_kernels.ops.pointwise_conv import reference

# (where it stands, side of the map, channels of a, of b, outputs, norm, activation, residual)
SHAPES = (
    ("v3-S local", 32, 128, 0, 144, False, "identity", False),
    ("v3-S out_proj", 32, 144, 0, 144, False, "identity", True),
    ("v3-S conv_proj", 32, 144, 0, 128, True, "silu", False),
    ("v3-S fusion", 32, 144, 128, 128, True, "silu", True),
    ("v3-S fusion", 16, 192, 256, 256, True, "silu", True),
    ("v3-S local", 8, 320, 0, 240, False, "identity", False),
    ("v3-S fusion", 8, 240, 320, 320, True, "silu", True),
    ("v3-S head", 8, 320, 0, 1280, True, "silu", False),
    ("v3-S expansion", 32, 128, 0, 512, True, "silu", False),
    ("v3-S projection", 16, 512, 0, 256, True, "identity", False),
    ("v3-1.0 local", 32, 256, 0, 128, False, "identity", False),
    ("v3-1.0 fusion", 32, 128, 128, 256, True, "identity", True),
    ("v3-1.0 fusion", 16, 192, 192, 384, True, "identity", True),
    ("v3-1.0 fusion", 8, 256, 256, 512, True, "identity", True),
)
ACTIVATIONS = {"identity": nn.Identity(), "silu": nn.SiLU()}


class Layer:
    def __init__(
        self, batch: int, side: int, first: int, second: int, outputs: int, norm: bool, act: str, residual: bool
    ) -> None:
        torch.manual_seed(0)
        self.act, self.second = act, second
        self.inputs = [torch.randn(batch, side, side, c) for c in (first, second, residual * outputs) if c]
        self.dy = torch.randn(batch, side, side, outputs)
        self.conv, self.norm = (
            nn.Conv2d(first + second, outputs, 1, bias=not norm),
            nn.BatchNorm2d(outputs) if norm else None,
        )
        if norm:
            nn.init.uniform_(self.norm.weight, 0.5, 1.5)
            nn.init.normal_(self.norm.bias)
            nn.init.normal_(self.norm.running_mean)
        rows = batch * side * side
        self.products = (
            torch.randn(rows, first + second),
            torch.randn(first + second, outputs),
            torch.randn(rows, outputs),
        )

    def parts(self, inputs: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """One or two inputs, and the residual."""
        count = 2 if self.second else 1
        return inputs[:count], inputs[count] if len(inputs) > count else None

    def parameters(self) -> tuple[Linear, BatchNorm | None]:
        n = self.norm
        norm = None if n is None else BatchNorm(n.weight, n.bias, n.running_mean, n.running_var, n.training, n.eps)
        return Linear(self.conv.weight, self.conv.bias), norm

    def ours(self, inputs: list[Tensor]) -> Tensor:
        x, residual = self.parts(inputs)
        conv, norm = self.parameters()
        if self.second:
            return pointwise_fusion(*x, conv.weight, norm, self.act, residual)[0]
        return pointwise_conv(*x, conv, norm, self.act, residual)[0]

    def composed(self, inputs: list[Tensor]) -> Tensor:
        x, residual = self.parts(inputs)
        x = torch.cat(x, -1) if self.second else x[0]
        return reference.pointwise_conv(x, *self.parameters(), self.act, residual, batch_norm_act=batch_norm_act)[0]

    def eager(self, inputs: list[Tensor]) -> Tensor:
        x, residual = self.parts([t.permute(0, 3, 1, 2) for t in inputs])
        y = self.conv(torch.cat(x, 1) if self.second else x[0])
        y = ACTIVATIONS[self.act](y if self.norm is None else self.norm(y))
        return (y if residual is None else y + residual).permute(0, 2, 3, 1)

    def step(self, run) -> dict[str, Tensor]:
        """Outputs, and gradients where the norm is in training."""
        if not self.conv.training:
            with torch.no_grad():
                return {"y": run(self.inputs)}
        inputs = [t.detach().requires_grad_() for t in self.inputs]
        learned = [*inputs, *self.conv.parameters(), *(self.norm.parameters() if self.norm else ())]
        y = run(inputs)
        return {"y": y.detach()} | {f"d{i}": g for i, g in enumerate(torch.autograd.grad(y, learned, self.dy.to(y)))}

    def multiply(self) -> None:
        x, w, y = self.products
        torch.mm(x, w)
        if self.conv.training:
            torch.mm(y, w.t())
            torch.mm(y.t(), x)

    def floats(self) -> int:
        """What must be read and written. Training with a norm writes and reads p forward, and reads p and dy twice
        backward."""
        x, _, y = (t.numel() for t in self.products)
        if not self.conv.training:
            return sum(t.numel() for t in self.inputs) + y
        kept = self.norm is not None or self.act != "identity"
        return sum(t.numel() for t in self.inputs) + (6 if self.norm else 4 if kept else 1) * y + y + 2 * x

    def mode(self, training: bool) -> None:
        for module in (self.conv, self.norm):
            if module is not None:
                module.train(training)

    def truth(self) -> dict[str, Tensor]:
        double = Layer.__new__(Layer)
        double.__dict__.update(self.__dict__)
        double.inputs = [t.double() for t in self.inputs]
        double.conv, double.norm = (
            copy.deepcopy(module).double() if module is not None else None for module in (self.conv, self.norm)
        )
        return double.step(double.eager)


def case(place: str, batch: int, shape: tuple, training: bool) -> Case:
    layer = Layer(batch, *shape)
    layer.mode(training)
    side, first, second, outputs = shape[:4]
    return Case(
        {
            "place": place,
            "map": f"{batch}x{side}x{side}",
            "channels": f"{first}+{second}->{outputs}" if second else f"{first}->{outputs}",
            "mode": mode(training),
        },
        {
            **{run.__name__: partial(layer.step, run) for run in (layer.eager, layer.composed, layer.ours)},
            "mm": layer.multiply,
        },
        layer.truth,
        rounds=11 if batch > 1 else 31,
        bytes=4 * layer.floats(),
        compiled=lambda: partial(layer.step, compiled(layer.eager)),
    )


def cases(options: argparse.Namespace) -> Iterator[Make]:
    for batch in options.batch:
        for training in (False, True):
            yield from (partial(case, place, batch, tuple(shape), training) for place, *shape in SHAPES)


if __name__ == "__main__":
    run_cases(__doc__.splitlines()[0], "pointwise", cases, batches)
