"""inverted_residual on the CPU, evaluation and a training step of one block (forward and backward), in float32.

    python benchmarks/bench_inverted_residual.py [--json] [--quick] [--threads 2] [--batch 8 1]

Beside it: "eager" is the block of plain modules in channels_last; "composed" is the same op as PyTorch's products
around `batch_norm_act`: what runs where the kernel does not. The floor is the products alone, timed as `torch.mm` of
the same sizes in the same turns, or the tensors that must be read and written at the rate of a copy, whichever takes
longer. Results are checked before they are timed.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.common import Case, Make, batches, compiled, mode, run_cases
from mvit3.bench.plain import inverted_residual as plain
from mvit3_kernels.nn import InvertedResidual
from mvit3_kernels.ops import inverted_residual as public  # noqa: F401 -- loads the op's module

# (where it stands, input, expanded and output channels, side of the map, stride)
SHAPES = (
    ("v3-S", 16, 64, 32, 128, 1),
    ("v3-S", 32, 128, 64, 128, 2),
    ("v3-S", 64, 256, 64, 64, 1),
    ("v3-S", 64, 256, 128, 64, 2),
    ("v3-S", 128, 512, 256, 32, 2),
    ("v3-S", 256, 1024, 320, 16, 2),
    ("v3-1.0", 32, 64, 64, 128, 1),
    ("v3-1.0", 64, 128, 128, 128, 2),
    ("v3-1.0", 128, 256, 128, 64, 1),
    ("v3-1.0", 128, 256, 256, 64, 2),
    ("v3-1.0", 256, 512, 384, 32, 2),
    ("v3-1.0", 384, 768, 512, 16, 2),
)
OP = sys.modules["mvit3_kernels.ops.inverted_residual"]


class Block:
    def __init__(
        self, batch: int, inputs: int, wide: int, outputs: int, side: int, stride: int, training: bool
    ) -> None:
        torch.manual_seed(0)
        self.block = (
            InvertedResidual(inputs, outputs, wide, stride).to(memory_format=torch.channels_last).train(training)
        )
        self.peer = plain(self.block).train(training)
        self.x = torch.randn(batch, inputs, side, side).to(memory_format=torch.channels_last)
        self.dy = torch.randn(batch, outputs, side // stride, side // stride).to(memory_format=torch.channels_last)
        rows, out_rows = batch * side**2, batch * (side // stride) ** 2
        self.factors = [
            (torch.randn(m, k), torch.randn(k, n), torch.randn(m, n))
            for m, k, n in ((rows, inputs, wide), (out_rows, wide, outputs))
        ]

    def step(self, module: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """The output, and in training the gradients of x and of every parameter; `call` runs in place of the module."""
        learned = {name: p for name, p in module.named_parameters() if self.block.training}
        x = self.x.to(next(module.parameters()).dtype).requires_grad_(self.block.training)
        with torch.set_grad_enabled(self.block.training):
            y = (call or module)(x)
        found = {"y": y.detach()}
        if self.block.training:
            grads = torch.autograd.grad(y, (x, *learned.values()), self.dy.to(y))
            found |= {f"d{i}": g for i, g in enumerate(grads)}
        return found

    def eager(self) -> dict[str, Tensor]:
        return self.step(self.peer)

    def compiled(self, peer: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        return self.step(self.peer, peer)

    def ours(self) -> dict[str, Tensor]:
        return self.step(self.block)

    def composed(self) -> dict[str, Tensor]:
        with mock.patch.object(OP, "KERNELS", ()):
            return self.step(self.block)

    def mm(self) -> None:
        for x, w, y in self.factors:
            torch.mm(x, w)
            if self.block.training:
                torch.mm(y, w.t())
                torch.mm(x.t(), y)

    def floats(self) -> int:
        """What must be read and written. In training that is x twice (for its moments as well), the depth-wise
        convolution's output z and that of the projection p written and read forward, and y; backward x, p and dy twice,
        z twice, and dx."""
        x, y, z = self.x.numel(), self.dy.numel(), self.factors[1][0].numel()
        return 4 * x + 4 * z + 7 * y if self.block.training else x + y


def case(place: str, batch: int, shape: tuple[int, ...], training: bool) -> Case:
    block = Block(batch, *shape, training)
    inputs, wide, outputs, side, stride = shape
    return Case(
        {
            "place": place,
            "map": f"{batch}x{side}x{side}",
            "channels": f"{inputs}->{wide}->{outputs}",
            "stride": stride,
            "mode": mode(training),
        },
        {run.__name__: run for run in (block.eager, block.composed, block.ours, block.mm)},
        lambda: block.step(copy.deepcopy(block.peer).double()),
        rounds=7 if batch > 1 else 25,
        bytes=4 * block.floats(),
        compiled=lambda: partial(block.compiled, compiled(block.peer)),
    )


def cases(options: argparse.Namespace) -> Iterator[Make]:
    for batch in options.batch:
        for training in (False, True):
            yield from (partial(case, place, batch, tuple(shape), training) for place, *shape in SHAPES)


if __name__ == "__main__":
    run_cases(__doc__.splitlines()[0], "inverted_residual", cases, batches)
