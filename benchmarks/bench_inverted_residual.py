"""inverted_residual on the CPU, a training step of one block (forward and backward) beside the block of plain modules in channels_last.

    python benchmarks/bench_inverted_residual.py [--json] [--threads 2] [--batch 8]

"composed" is the same op as PyTorch's products around batch_norm_act: what runs where the kernel does not. Outputs and input gradients are
checked against each other before they are timed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.common import interleaved, machine, table, write
from benchmarks.peers import inverted_residual as plain
from mvit3_kernels.nn import InvertedResidual
from mvit3_kernels.ops import inverted_residual as public  # noqa: F401 -- loads the op's module

# (input, expanded and output channels, side of the map, stride)
BLOCKS = (
    (16, 64, 32, 128, 1),
    (32, 128, 64, 128, 2),
    (64, 256, 64, 64, 1),
    (64, 256, 128, 64, 2),
    (128, 512, 256, 32, 2),
    (256, 1024, 320, 16, 2),
)
OP = sys.modules["mvit3_kernels.ops.inverted_residual"]


def measure(batch: int, inputs: int, wide: int, outputs: int, side: int, stride: int) -> dict[str, object]:
    torch.manual_seed(0)
    block = InvertedResidual(inputs, outputs, wide, stride).to(memory_format=torch.channels_last)
    peer = plain(block)
    x = torch.randn(batch, inputs, side, side).to(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn_like(block(x))

    def step(module: torch.nn.Module) -> tuple[Tensor, Tensor]:
        y = module(x)
        return y.detach(), torch.autograd.grad(y, (x, *module.parameters()), dy)[0]

    def ours() -> tuple[Tensor, Tensor]:
        return step(block)

    def composed() -> tuple[Tensor, Tensor]:
        with mock.patch.object(OP, "KERNELS", ()):
            return step(block)

    want = step(peer)
    error = max(float((a - b).norm() / b.norm()) for run in (ours, composed) for a, b in zip(run(), want, strict=True))
    if not error < 1e-4:
        raise AssertionError(f"{inputs} -> {wide} -> {outputs}: results differ by {error:.1e} of the norm")
    times = interleaved({"eager": lambda: step(peer), "composed": composed, "ours": ours}, rounds=7)
    ms = {f"{name}_ms": t["median_ms"] for name, t in times.items()}
    shape = {"channels": f"{inputs}->{wide}->{outputs}", "map": f"{side}x{side}", "stride": stride}
    return {**shape, **ms, "against_eager": ms["eager_ms"] / ms["ours_ms"], "error": f"{error:.1e}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="write results/inverted_residual_cpu.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rows = [measure(options.batch, *block) for block in BLOCKS]
    print(table(rows))
    if options.json:
        print(write("inverted_residual", rows, facts, "inverted_residual_cpu"))


if __name__ == "__main__":
    main()
