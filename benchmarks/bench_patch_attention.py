"""patch_attention on the CPU beside its reference: unfold, PyTorch's fused attention and fold.

    python benchmarks/bench_patch_attention.py [--json] [--quick] [--threads 2]

"sdpa" is PyTorch's fused attention alone, on tokens that are already unfolded. The floor is the products at the rate of
`torch.mm` (two forward, five more backward) or the tensors at the rate of a copy, whichever takes longer. Outputs and
gradients are checked before they are timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

import mvit3_kernels
from benchmarks.common import Case, Make, Row, compiled, mode, run_cases, step
from mvit3_kernels.ops import patch_attention

HEADS, PATCH = 4, (2, 2)
# Width and side of the map in the three stages of mobilevitv3_s and mobilevitv3_xxs at 256x256, then mobilevitv3_s as a
# segmentation backbone at 512x512 and 1024x1024.
STAGES = ((144, 32), (192, 16), (240, 8), (64, 32), (80, 16), (96, 8))
LARGE = ((144, 64), (144, 128))
SHAPES = (*((8, *stage) for stage in STAGES), *((1, *stage) for stage in STAGES), *((1, *stage) for stage in LARGE))


def case(batch: int, width: int, side: int, dtype: torch.dtype, training: bool) -> Case:
    torch.manual_seed(0)
    qkv = torch.randn(batch, side, side, 3 * width).to(dtype)
    dy = torch.randn(batch, side, side, width).to(dtype) if training else None
    tokens = side * side // 4
    unfolded = {name: torch.randn(batch * 4, HEADS, tokens, width // HEADS).to(dtype) for name in "qkv"}

    def call(qkv: Tensor) -> Tensor:
        return patch_attention(qkv, HEADS, PATCH)

    def on(backend: str, qkv: Tensor = qkv, call: Callable[[Tensor], Tensor] = call) -> dict[str, Tensor]:
        with mvit3_kernels.backend(backend):
            return step(call, {"qkv": qkv}, dy)

    sdpa: Callable[[], object] = partial(
        step, F.scaled_dot_product_attention, unfolded, torch.randn_like(unfolded["q"]) if training else None
    )
    products, tensors = (7, 4 + 8) if training else (2, 4)
    flops = products * 2 * batch * 4 * tokens**2 * width

    def more(times: dict[str, dict[str, float]]) -> Row:
        return {"gflop_s": flops / times["ours"]["median_ms"] / 1e6}

    return Case(
        {
            "mode": mode(training),
            "dtype": str(dtype).removeprefix("torch."),
            "batch": batch,
            "width": width,
            "map": f"{side}x{side}",
        },
        {"eager": partial(on, "reference"), "sdpa": sdpa, "ours": partial(on, "cpu")},
        (lambda: on("reference", qkv.double())) if tokens <= 1024 else None,
        rounds=3 if tokens > 1024 else 15,
        warmup=1,
        flops=flops,
        bytes=tensors * qkv.numel() / 3 * qkv.element_size(),
        more=more,
        compiled=lambda: partial(on, "reference", call=compiled(call)),
    )


def cases(options: argparse.Namespace) -> Iterator[Make]:
    for dtype, shapes in ((torch.float32, SHAPES), (torch.bfloat16, SHAPES[:3])):
        for shape in shapes:
            yield from (partial(case, *shape, dtype, training) for training in (False, True))


if __name__ == "__main__":
    run_cases(__doc__.splitlines()[0], "patch_attention", cases)
