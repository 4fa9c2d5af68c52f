"""separable_attention on the CPU in float32, without gradients and as a training step, at the layers of mobilevitv3_100
and its siblings.

    python benchmarks/bench_separable_attention.py [--json] [--quick] [--threads 2] [--width 1.0]

"eager" is the layer as one writes it in PyTorch on the same memory (GroupNorm, the 1x1 convolutions as products,
softmax, residual), "composed" the op's reference on the kernels of other ops. The floor is the time of the products (2
D x D a token forward, 5 backward) at the rate of torch.mm on this machine and, where they pass the cache, of the passes
over memory at the rate of a copy. Outputs and gradients are checked against eager before they are timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Case, Make, compiled, mode, run_cases, step
from mvit3_kernels.ops import LayerNorm, Linear, separable_attention

# (channels at width 1.0, side of the map, layers)
STAGES = ((128, 32, 2), (192, 16, 4), (256, 8, 3))
OP = sys.modules["mvit3_kernels.ops.separable_attention"]


def eager(x: Tensor, norm: LayerNorm, qkv: Linear, out_proj: Linear) -> Tensor:
    """Written for this memory: tokens are rows, products are addmm."""
    batch, height, width, d = x.shape
    normed = torch.group_norm(x.permute(0, 3, 1, 2), 1, norm.weight, norm.bias, norm.eps).permute(0, 2, 3, 1)
    query, key, value = F.linear(normed, qkv.weight, qkv.bias).split((1, d, d), -1)
    patches = (batch, height // 2, 2, width // 2, 2)
    weights = (
        query.reshape(patches)
        .permute(0, 2, 4, 1, 3)
        .flatten(3)
        .softmax(-1)
        .view(batch, 2, 2, height // 2, width // 2)
        .permute(0, 3, 1, 4, 2)
    )
    context = (key.reshape(*patches, d) * weights[..., None]).sum((1, 3), keepdim=True)
    attended = (F.relu(value).reshape(*patches, d) * context).reshape(x.shape)
    return x + F.linear(attended, *out_proj)


def case(batch: int, channels: int, side: int, layers: int, training: bool) -> Case:
    torch.manual_seed(0)
    wide, rate = 1 + 2 * channels, channels**-0.5
    leaves = {"x": torch.randn(batch, side, side, channels)}
    leaves |= {"weight": torch.randn(channels), "bias": torch.randn(channels)}
    leaves |= {"qkv_weight": rate * torch.randn(wide, channels), "qkv_bias": torch.randn(wide)}
    leaves |= {"out_weight": rate * torch.randn(channels, channels), "out_bias": torch.randn(channels)}
    dy = torch.randn(leaves["x"].shape) if training else None

    def run(function: Callable[..., Tensor], leaves: dict[str, Tensor] = leaves) -> dict[str, Tensor]:
        def call(x: Tensor, weight: Tensor, bias: Tensor, *linears: Tensor) -> Tensor:
            return function(x, LayerNorm(weight, bias, 1e-5, True), Linear(*linears[:2]), Linear(*linears[2:]))

        return step(call, leaves, dy)

    def composed() -> dict[str, Tensor]:
        with mock.patch.object(OP, "KERNELS", ()):
            return run(separable_attention)

    tokens = batch * side * side
    size = 4 * tokens * channels
    return Case(
        {
            "mode": mode(training),
            "batch": batch,
            "channels": channels,
            "map": f"{side}x{side}",
            "layers": layers,
        },
        {"eager": lambda: run(eager), "composed": composed, "ours": lambda: run(separable_attention)},
        lambda: run(eager, {name: t.double() for name, t in leaves.items()}),
        flops=2 * tokens * channels**2 * (7 if training else 2),
        # Tensors within the cache cost no pass; forward reads x and writes y, backward reads x and dy and writes dx.
        bytes=(5 if training else 2) * size if size > 2**23 else 0.0,
        overlap=False,
        compiled=lambda: partial(run, compiled(eager)),
    )


def cases(options: argparse.Namespace) -> Iterator[Make]:
    for training in (False, True):
        for batch in (1, 8, 32):
            for channels, side, layers in STAGES:
                yield partial(case, batch, int(channels * options.width), side, layers, training)


def more_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=float, default=1.0)


if __name__ == "__main__":
    run_cases(__doc__.splitlines()[0], "separable_attention", cases, more_options)
