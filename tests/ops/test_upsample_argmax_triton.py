"""The Triton kernel of upsample_argmax, where there is no GPU."""

from __future__ import annotations

import torch

from mvit3_kernels.ops import upsample_argmax

from .inputs import Arguments, Draw
from .test_upsample_cross_entropy import labels
from .triton_kernel import BF16, F16, F32, Case, TritonKernel, needs_triton


def arguments(draw: Draw, batch: int, height: int, width: int, classes: int, scale: int, counted: bool = True):
    size = (height * scale, width * scale)
    return {
        "logits": draw(batch, height, width, classes),
        "size": size,
        "align_corners": False,
        "target": labels(draw, classes, batch, *size) if counted else None,
    }


def registered(given: Arguments):
    inputs = (given["logits"], *given["size"], given["align_corners"], given["target"])
    yield torch.ops.mvit3.upsample_argmax_inference.default, inputs


@needs_triton
class TestUpsampleArgmaxTriton(TritonKernel):
    op = staticmethod(upsample_argmax)
    maps = ("logits",)
    arguments = staticmethod(arguments)
    registered = staticmethod(registered)
    cases = (
        Case(90, F32, (4, 32, 32, 21, 16)),
        Case(90, BF16, (4, 32, 32, 150, 16), {"counted": False}),
        Case(90, F32, (4, 32, 32, 1000, 16)),
        Case(80, F16, (4, 32, 32, 150, 16)),
        Case("gfx942", BF16, (4, 32, 32, 21, 16)),
    )
    result = torch.int64
    larger = (7, 33, 9, 21, 5)
