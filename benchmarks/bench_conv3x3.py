"""Dense 3x3 convolution, batch normalisation and SiLU in evaluation on the CPU: the stem and MobileViTv1's blocks.

    python benchmarks/bench_conv3x3.py [--json] [--threads 2]

"folded" is the library's convolution with the norm folded into its weight beforehand, then SiLU in place; "eager" the three plain calls.
Ours packs the weight at every call; "packing" is that part (a map of one pixel),
and the rate and its share of torch.mm's are those of the rest.
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
from mvit3_kernels.ops import BatchNorm, conv3x3

# (batch, channels of the two maps, outputs, side, stride, layout)
SHAPES = [
    *((batch, c, others, c, side, 1, "nhwc") for batch in (1, 8) for c, side in ((96, 32), (128, 16), (160, 8)) for others in (0, c)),
    *((batch, 3, 0, outputs, 256, 2, layout) for batch in (1, 8) for outputs in (16, 32) for layout in ("nhwc", "nchw")),
]


@torch.no_grad()
def measure(batch: int, channels: int, others: int, outputs: int, side: int, stride: int, layout: str, mm_rate: float) -> dict[str, object]:
    torch.manual_seed(0)
    image = torch.randn(batch, channels, side, side)
    image = image.to(memory_format=torch.channels_last) if layout == "nhwc" else image
    other = torch.randn(batch, side, side, others) if others else None
    inputs = channels + others
    weight = (torch.randn(outputs, inputs, 3, 3) / (3 * inputs**0.5)).to(memory_format=torch.channels_last)
    gamma, beta, mean, var = (torch.rand(outputs) + 0.5 for _ in range(4))
    norm = BatchNorm(gamma, beta, mean, var, False)
    scale = gamma * (var + norm.eps).rsqrt()
    folded_weight, folded_bias = weight * scale[:, None, None, None], beta - mean * scale

    def concat() -> Tensor:
        return image if other is None else torch.cat((image, other.permute(0, 3, 1, 2)), 1)

    def eager() -> Tensor:
        return F.silu(F.batch_norm(F.conv2d(concat(), weight, None, stride, 1), mean, var, gamma, beta, False))

    def folded() -> Tensor:
        return F.silu(F.conv2d(concat(), folded_weight, folded_bias, stride, 1), inplace=True)

    def ours(x: Tensor = image, second: Tensor | None = other) -> Tensor:
        return conv3x3.conv3x3_inference(x.permute(0, 2, 3, 1), second, weight, norm, "silu", stride).permute(0, 3, 1, 2)

    pixel = (image[:1, :, :1, :1].contiguous(), None if other is None else other[:1, :1, :1].contiguous())
    with mock.patch.object(conv3x3, "MOST_PIXELS", 10**9):
        error = float((ours() - eager()).norm() / eager().norm())
        if not error < 1e-5:
            raise AssertionError(f"{inputs} -> {outputs}: results differ by {error:.1e} of the norm")
        candidates = {"eager": eager, "folded": folded, "ours": ours, "packing": lambda: ours(*pixel)}
        times = interleaved(candidates, rounds=25 if batch == 1 else 9)
    ms = {f"{name}_ms": t["median_ms"] for name, t in times.items()}
    gflop = 2 * 9 * batch * (side // stride) ** 2 * inputs * outputs / 1e9
    rate = gflop / max(ms["ours_ms"] - ms["packing_ms"], 1e-6) * 1e3
    name = f"{channels}{f'+{others}' if others else ''}->{outputs}"
    shape = {"batch": batch, "channels": name, "map": f"{side}x{side}", "stride": stride, "layout": layout}
    return {**shape, **ms, "gflop_s": rate, "of_mm": rate / mm_rate, "error": f"{error:.1e}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="write results/conv3x3_cpu.json")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.empty(31 << 18)  # as in a network: once something large was freed, the allocator keeps what is below 32 MiB
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rows = [measure(*shape, facts["mm_gflop_s"]) for shape in SHAPES]
    print(table(rows))
    if options.json:
        print(write("conv3x3", rows, facts, "conv3x3_cpu"))


if __name__ == "__main__":
    main()
