"""depthwise_conv on the CPU: evaluation, and training forward and backward, beside plain modules in channels_last.

    python benchmarks/bench_depthwise_conv.py [--json] [--threads 2]

"composed" is the same op as PyTorch's convolution and batch_norm_act: what runs where the kernel does not. Results are checked against each
other before they are timed. The floor is the bytes that a kernel must move, at the rate of a large copy: x and y once in evaluation; in
training x twice and y forward, x and dy twice and dx backward. Below the size of the caches arithmetic is the limit, not the floor.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import interleaved, machine, table, write
from mvit3_kernels.ops import BatchNorm, depthwise_conv

OP = sys.modules["mvit3_kernels.ops.depthwise_conv"]

# (batch, channels, side of the map, stride): blocks of mobilevitv3_s and mobilevitv3_100, then parts of wide inverted residuals.
SHAPES = [
    *(
        (batch, channels, side, 1)
        for batch in (8, 1)
        for channels, side in ((128, 32), (256, 16), (320, 8), (256, 32), (384, 16), (512, 8))
    ),
    (8, 256, 64, 1),
    (8, 256, 64, 2),
    (8, 512, 32, 1),
    (8, 512, 32, 2),
    (8, 1024, 16, 1),
    (8, 1024, 16, 2),
]


def measure(dtype: torch.dtype, batch: int, channels: int, side: int, stride: int, copy_rate: float) -> list[dict[str, object]]:
    torch.manual_seed(0)
    x = torch.randn(batch, side, side, channels).to(dtype).requires_grad_()
    learned = [(torch.randn(channels, 1, 3, 3) / 3), torch.rand(channels) + 0.5, torch.randn(channels)]
    weight, gamma, beta = (t.requires_grad_() for t in learned)
    mean, var = torch.zeros(channels), torch.ones(channels)
    dy = torch.randn(batch, -(-side // stride), -(-side // stride), channels).to(dtype)

    def eager(training: bool) -> Tensor:
        z = F.conv2d(x.permute(0, 3, 1, 2), weight.to(dtype), None, stride, 1, 1, channels)
        return F.silu(F.batch_norm(z, mean, var, gamma, beta, training, 0.0)).permute(0, 2, 3, 1)

    def ours(training: bool) -> Tensor:
        return depthwise_conv(x, weight, BatchNorm(gamma, beta, mean, var, training), "silu", stride)[0]

    def composed(training: bool) -> Tensor:
        with mock.patch.object(OP, "KERNELS", ()):
            return ours(training)

    def step(run) -> tuple[Tensor, ...]:
        y = run(True)
        return y.detach(), *torch.autograd.grad(y, (x, weight, gamma, beta), dy)

    want = step(eager)
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(step(ours), want, strict=True))
    if not error < (1e-4 if dtype == torch.float32 else 0.05):
        raise AssertionError(f"{channels} channels: results differ by {error:.1e} of the norm")
    candidates = {"eager": eager, "composed": composed, "ours": ours}
    megabytes_x, megabytes_y = (t.numel() * t.element_size() / 1e6 for t in (x, dy))
    rows = []
    for mode, moved in (("evaluation", megabytes_x + megabytes_y), ("training", 5 * megabytes_x + 3 * megabytes_y)):

        def call(run, mode: str = mode) -> None:
            with torch.set_grad_enabled(mode == "training"):
                run(False) if mode == "evaluation" else step(run)

        times = interleaved({name: lambda run=run: call(run) for name, run in candidates.items()}, rounds=7 if batch > 1 else 25)
        ms = {f"{name}_ms": t["median_ms"] for name, t in times.items()}
        floor = moved / copy_rate
        shape = {"dtype": str(dtype).removeprefix("torch."), "shape": f"{batch}x{channels}x{side}x{side}", "stride": stride, "mode": mode}
        ratio = {"against_eager": ms["eager_ms"] / ms["ours_ms"], "floor_ms": floor, "of_floor": floor / ms["ours_ms"]}
        rows.append({**shape, **ms, **ratio, "error": f"{error:.1e}"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="write results/depthwise_conv_cpu.json")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.empty(31 << 18)  # as in a network: once something large was freed, the allocator keeps what is below 32 MiB
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rows = [row for shape in SHAPES for row in measure(torch.float32, *shape, facts["copy_gb_s"])]
    rows += [row for shape in SHAPES[:2] for row in measure(torch.bfloat16, *shape, facts["copy_gb_s"])]
    print(table(rows))
    if options.json:
        print(write("depthwise_conv", rows, facts, "depthwise_conv_cpu"))


if __name__ == "__main__":
    main()
