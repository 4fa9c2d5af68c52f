"""patch_attention on the CPU beside its reference: unfold, PyTorch's fused attention and fold.

    python benchmarks/bench_patch_attention.py [--json] [--threads 2]

"sdpa" is PyTorch's fused attention alone, on tokens that are already unfolded. The floor is the products at the rate of `torch.mm`
(two forward, five more backward) or the tensors at the rate of a copy, whichever takes longer. Outputs and gradients are checked before
they are timed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

import mvit3_kernels
from benchmarks.common import check, interleaved, machine, table, write
from mvit3_kernels.ops import patch_attention

HEADS, PATCH = 4, (2, 2)
# Width and side of the map in the three stages of mobilevitv3_s and mobilevitv3_xxs at 256x256, then mobilevitv3_s as a segmentation
# backbone at 512x512 and 1024x1024.
STAGES = ((144, 32), (192, 16), (240, 8), (64, 32), (80, 16), (96, 8))
LARGE = ((144, 64), (144, 128))
SHAPES = (*((8, *stage) for stage in STAGES), *((1, *stage) for stage in STAGES), *((1, *stage) for stage in LARGE))


def measure(batch: int, width: int, side: int, dtype: torch.dtype, facts: dict[str, object], quick: bool) -> list[dict[str, object]]:
    torch.manual_seed(0)
    qkv = torch.randn(batch, side, side, 3 * width).to(dtype).requires_grad_()
    dout = torch.randn(batch, side, side, width).to(dtype)
    tokens = side * side // 4
    unfolded = [torch.randn(batch * 4, HEADS, tokens, width // HEADS).to(dtype).requires_grad_() for _ in range(3)]
    dunfolded = torch.randn_like(unfolded[0])

    def on(backend: str, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
        with mvit3_kernels.backend(backend):
            out = patch_attention(x, HEADS, PATCH)
        return {"out": out.detach(), "dqkv": torch.autograd.grad(out, x, dy)[0]}

    def forward(backend: str) -> None:
        with torch.no_grad(), mvit3_kernels.backend(backend):
            patch_attention(qkv, HEADS, PATCH)

    @torch.no_grad()
    def sdpa() -> None:
        F.scaled_dot_product_attention(*unfolded)

    def sdpa_step() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(*unfolded), unfolded, dunfolded)

    if tokens <= 1024:
        truth = on("reference", qkv.detach().double().requires_grad_(), dout.double())
        check(on("cpu", qkv, dout), on("reference", qkv, dout), truth)
    runs = {
        "evaluation": {"eager": lambda: forward("reference"), "sdpa": sdpa, "ours": lambda: forward("cpu")},
        "training": {"eager": lambda: on("reference", qkv, dout), "sdpa": sdpa_step, "ours": lambda: on("cpu", qkv, dout)},
    }
    rows = []
    for mode, candidates in runs.items():
        rounds = 3 if tokens > 1024 else 5 if quick else 15
        times = {who: t["median_ms"] for who, t in interleaved(candidates, rounds, warmup=1).items()}
        products, tensors = (2, 4) if mode == "evaluation" else (7, 4 + 8)
        flops = products * 2 * batch * 4 * tokens**2 * width
        size = tensors * qkv.numel() / 3 * qkv.element_size()
        floor = max(flops / facts["mm_gflop_s"], size / facts["copy_gb_s"]) / 1e6
        shape = {"mode": mode, "dtype": str(dtype).removeprefix("torch."), "batch": batch, "width": width, "map": f"{side}x{side}"}
        rates = {"against_eager": times["eager"] / times["ours"], "gflop_s": flops / times["ours"] / 1e6}
        ms = {f"{who}_ms": t for who, t in times.items()}
        rows.append({**shape, **ms, "floor_ms": floor, **rates, "of_floor": floor / times["ours"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="write results/patch_attention_cpu.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    cases = [(shape, torch.float32) for shape in SHAPES] + [(shape, torch.bfloat16) for shape in SHAPES[:3]]
    rows = [row for shape, dtype in cases for row in measure(*shape, dtype, facts, options.quick)]
    print(table(rows))
    if options.json:
        print(write("patch_attention", rows, facts, "patch_attention_cpu"))


if __name__ == "__main__":
    main()
