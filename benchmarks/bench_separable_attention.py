"""separable_attention on the CPU in float32, without gradients and as a training step, at the layers of mobilevitv3_100 and its siblings.

    python benchmarks/bench_separable_attention.py [--json] [--threads 2] [--width 1.0]

"eager" is the layer as one writes it in PyTorch on the same memory (GroupNorm, the 1x1 convolutions as products, softmax, residual),
"composed" the op's reference on the kernels of other ops. The floor is the time of the products (2 D x D a token forward, 5 backward)
at the rate of torch.mm on this machine and, where they pass the cache, of the passes over memory at the rate of a copy. Outputs and
gradients are checked against eager before they are timed.
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

from benchmarks.common import check, interleaved, machine, table, write
from mvit3_kernels.ops import LayerNorm, Linear, separable_attention

# (channels at width 1.0, side of the map, layers)
STAGES = ((128, 32, 2), (192, 16, 4), (256, 8, 3))
OP = sys.modules["mvit3_kernels.ops.separable_attention"]
PATCH = (2, 2)


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


def measure(batch: int, channels: int, side: int, layers: int, facts: dict[str, object], training: bool) -> dict[str, object]:
    torch.manual_seed(0)

    def leaf(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size)).requires_grad_(training)

    x, norm = leaf(batch, side, side, channels), LayerNorm(leaf(channels), leaf(channels), 1e-5, True)
    qkv = Linear(leaf(1 + 2 * channels, channels, scale=channels**-0.5), leaf(1 + 2 * channels))
    out_proj = Linear(leaf(channels, channels, scale=channels**-0.5), leaf(channels))
    inputs, dy = (x, *norm[:2], *qkv, *out_proj), torch.randn(x.shape)

    def run(function, inputs=inputs, dy=dy) -> dict[str, Tensor]:
        x, weight, bias, w, b, wo, bo = inputs
        y = function(x, LayerNorm(weight, bias, 1e-5, True), Linear(w, b), Linear(wo, bo))
        grads = torch.autograd.grad(y, inputs, dy) if training else ()
        return {"y": y.detach(), **{f"gradient {i}": g for i, g in enumerate(grads)}}

    def composed() -> dict[str, Tensor]:
        with mock.patch.object(OP, "KERNELS", ()):
            return run(separable_attention)

    exact = [t.detach().double().requires_grad_(training) for t in inputs]
    check(run(separable_attention), run(eager), run(eager, exact, dy.double()))
    times = interleaved({"eager": lambda: run(eager), "composed": composed, "ours": lambda: run(separable_attention)}, rounds=15)
    ms = {f"{name}_ms": t["median_ms"] for name, t in times.items()}
    tokens = batch * side * side
    products = 2 * tokens * channels**2 * (7 if training else 2) / float(facts["mm_gflop_s"]) / 1e6
    # Tensors within the cache cost no pass; forward reads x and writes y, backward reads x and dy and writes dx.
    size = 4 * tokens * channels
    passes = (5 if training else 2) * size / float(facts["copy_gb_s"]) / 1e6 if size > 2**23 else 0.0
    floor = products + passes
    return {
        "mode": "training" if training else "evaluation",
        "batch": batch,
        "channels": channels,
        "map": f"{side}x{side}",
        "layers": layers,
        **ms,
        "against_eager": ms["eager_ms"] / ms["ours_ms"],
        "against_composed": ms["composed_ms"] / ms["ours_ms"],
        "floor_ms": floor,
        "of_floor": floor / ms["ours_ms"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="write results/separable_attention_cpu.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    cases = [(batch, training) for training in (False, True) for batch in (1, 8, 32)]
    rows = [
        measure(batch, int(c * options.width), side, layers, facts, training) for batch, training in cases for c, side, layers in STAGES
    ]
    print(table(rows))
    if options.json:
        print(write("separable_attention", rows, facts, "separable_attention_cpu"))


if __name__ == "__main__":
    main()
