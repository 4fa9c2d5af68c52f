"""feed_forward and norm_linear on the CPU, at the shapes of mobilevitv3_s (per token) and mobilevitv3_100 (per sample), 256x256 input.

    python benchmarks/bench_feed_forward.py [--json] [--threads 2] [--dtype float32]

"eager" is the same in plain PyTorch; "composed" is feed_forward as norm_linear's kernel and PyTorch's SiLU and product. The floor is the
bare `torch.mm` calls of the products that no method can leave out (a hidden tensor computed again is not among them), or the bytes that
must move at the rate of a copy, whichever is more. "kept" is what a training step holds for backward, parameters aside. Results and
gradients are held to twice eager's error before they are timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import mvit3_kernels
from benchmarks.common import check, interleaved, machine, table, write
from mvit3_kernels.ops import LayerNorm, Linear, feed_forward, norm_linear

# (op, network, width, outputs or hidden width, side of the map, per sample)
CASES = (
    ("norm_linear", "mobilevitv3_s", 144, 432, 32, False),
    ("norm_linear", "mobilevitv3_s", 192, 576, 16, False),
    ("norm_linear", "mobilevitv3_s", 240, 720, 8, False),
    ("feed_forward", "mobilevitv3_s", 144, 288, 32, False),
    ("feed_forward", "mobilevitv3_s", 192, 384, 16, False),
    ("feed_forward", "mobilevitv3_s", 240, 480, 8, False),
    ("feed_forward", "mobilevitv3_100", 128, 256, 32, True),
    ("feed_forward", "mobilevitv3_100", 192, 384, 16, True),
    ("feed_forward", "mobilevitv3_100", 256, 512, 8, True),
)
COMPOSED = sys.modules["mvit3_kernels.ops.feed_forward"]


def products(op: str, rows: int, width: int, wide: int, training: bool) -> Callable[[], None]:
    """The bare products, float32."""
    a, b, w, wt = torch.randn(rows, width), torch.randn(rows, wide), torch.randn(wide, width), torch.randn(width, wide)

    def run() -> None:
        for _ in range(2 if op == "feed_forward" else 1):
            torch.mm(a, wt)
            if training:
                torch.mm(b, w)
                torch.mm(b.t(), a)

    return run


def kept(step: Callable[[], Tensor], parameters: list[Tensor]) -> float:
    """MiB that the graph of step() keeps."""
    storages: dict[int, int] = {}
    aside = {t.untyped_storage().data_ptr() for t in parameters}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in aside:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = step()
    del y
    return sum(storages.values()) / 2**20


def measure(case: tuple, batch: int, training: bool, dtype: torch.dtype, copy_gb_s: float) -> dict[str, object]:
    op, network, width, wide, side, per_sample = case
    torch.manual_seed(0)
    two = op == "feed_forward"
    rows = batch * side * side
    tensors = {"x": torch.randn(batch, side, side, width), "gamma": torch.rand(width) + 0.5, "beta": torch.randn(width)}
    tensors |= {"w1": torch.randn(wide, width) / width**0.5, "b1": torch.randn(wide)}
    if two:
        tensors |= {"w2": torch.randn(width, wide) / wide**0.5, "b2": torch.randn(width)}
    dy = torch.randn(batch, side, side, width if two else wide)

    def call(x: Tensor, gamma: Tensor, beta: Tensor, *linears: Tensor) -> Tensor:
        norm = LayerNorm(gamma, beta, 1e-5, per_sample)
        return feed_forward(x, norm, Linear(*linears[:2]), Linear(*linears[2:])) if two else norm_linear(x, norm, Linear(*linears))

    def leaves(of_x: torch.dtype, of_parameters: torch.dtype = torch.float32) -> list[Tensor]:
        return [t.to(of_x if name == "x" else of_parameters).requires_grad_(training) for name, t in tensors.items()]

    def step(given: list[Tensor]) -> dict[str, Tensor]:
        y = call(*given)
        found = {"y": y.detach()}
        if training:
            found |= dict(zip(tensors, torch.autograd.grad(y, given, dy.to(y.dtype)), strict=True))
        return found

    mine = leaves(dtype)

    def ours() -> dict[str, Tensor]:
        return step(mine)

    def eager() -> dict[str, Tensor]:
        with mvit3_kernels.backend("reference"):
            return step(mine)

    def composed() -> dict[str, Tensor]:
        with mock.patch.object(COMPOSED, "KERNELS", ()):
            return step(mine)

    with mvit3_kernels.backend("reference"):
        truth = step([t.to(dtype).double().requires_grad_(training) if t.ndim == 4 else t.double().requires_grad_(training) for t in mine])
    error = max(check(ours(), eager(), truth).values())
    candidates = {"eager": eager, "ours": ours, "mm": products(op, rows, width, wide, training)}
    if two:
        candidates["composed"] = composed
    times = interleaved(candidates, rounds=15 if rows > 1024 else 51, warmup=3)
    ms = {name: t["median_ms"] for name, t in times.items()}
    maps = rows * (width + (width if two else wide)) * (3 if training else 1) - (rows * width if training and not two else 0)
    floor = max(ms["mm"], maps * torch.empty(0, dtype=dtype).element_size() / copy_gb_s / 1e6)
    memory = {}
    if training:
        memory["ours_kept_mib"] = kept(lambda: call(*mine), mine[1:])
        with mvit3_kernels.backend("reference"):
            memory["eager_kept_mib"] = kept(lambda: call(*mine), mine[1:])
    return {
        "op": op,
        "network": network,
        "shape": f"{batch}x{side}x{side}x{width}->{wide}",
        "mode": "training" if training else "evaluation",
        "eager_ms": ms["eager"],
        "composed_ms": ms.get("composed", float("nan")),
        "ours_ms": ms["ours"],
        "against_eager": ms["eager"] / ms["ours"],
        "floor_ms": floor,
        "of_floor": floor / ms["ours"],
        "eager_kept_mib": memory.get("eager_kept_mib", float("nan")),
        "ours_kept_mib": memory.get("ours_kept_mib", float("nan")),
        "error": f"{error:.1e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="write results/feed_forward_cpu.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the feature maps")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = machine() | {"dtype": options.dtype}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    dtype = getattr(torch, options.dtype)
    rows = [measure(case, batch, training, dtype, facts["copy_gb_s"]) for training in (False, True) for batch in (8, 1) for case in CASES]
    print(table(rows))
    if options.json:
        print(write("feed_forward", rows, facts, "feed_forward_cpu"))


if __name__ == "__main__":
    main()
