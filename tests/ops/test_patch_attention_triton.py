import itertools

import torch

from mvit3_kernels.ops import patch_attention

from .inputs import seed
from .triton_kernel import BF16, F16, F32, Case, TritonKernel, needs_triton


def arguments(draw, batch, height, width, heads, dim, patch=(2, 2), dropout=0.0):
    return {
        "qkv": draw(batch, height, width, 3 * heads * dim),
        "num_heads": heads,
        "patch_size": patch,
        "dropout": dropout,
        "seed": seed() if dropout else None,
    }


def registered(arguments):
    qkv, heads, patch, *dropout = arguments.values()
    geometry = (heads, *patch, *dropout)
    yield torch.ops.mvit3.patch_attention_forward.default, (qkv, *geometry)
    out, lse = torch.ops.mvit3.patch_attention_forward(qkv, *geometry)
    yield torch.ops.mvit3.patch_attention_backward.default, (torch.ones_like(out), qkv, out, lse, *geometry)


@needs_triton
class TestPatchAttentionTriton(TritonKernel):
    op = staticmethod(patch_attention)
    maps = ("qkv",)
    arguments = staticmethod(arguments)
    registered = staticmethod(registered)
    # A configuration is decided by the head's width as a power of 2, the length of a group (at most 16, 64 or, on sm_90
    # and without dropout, 256 tokens, or more) and float32.
    alone = (90,)
    cases = (
        Case(90, BF16, (1, 32, 32, 4, 36), {"dropout": 0.1}, 64),
        Case(90, BF16, (1, 32, 32, 4, 9), {"dropout": 0.1}),
        Case(90, BF16, (1, 32, 32, 4, 36), {}, 64),
        Case(90, F16, (1, 32, 32, 4, 16), {}, 128),
        Case(90, BF16, (1, 32, 32, 4, 30)),
        Case(90, BF16, (1, 32, 32, 4, 48), {}, 128),
        Case(90, F16, (1, 32, 32, 4, 64), {}, 128),
        Case(90, BF16, (1, 16, 16, 4, 60), {"dropout": 0.1}, 64),
        Case(80, F16, (1, 16, 16, 4, 60), {}, 64),
        Case("gfx942", BF16, (1, 16, 16, 4, 48)),
        Case(90, BF16, (1, 8, 8, 4, 60)),
        Case(80, BF16, (1, 16, 16, 4, 48)),
        Case(90, BF16, (1, 16, 16, 4, 64), load_bits=128),
        Case(90, BF16, (1, 8, 8, 4, 60), {"dropout": 0.1}, 64),
        Case(90, F16, (1, 16, 16, 2, 128), {"dropout": 0.1}, 128),
        Case(90, F32, (1, 16, 16, 4, 60), {"dropout": 0.1}, 128),
        Case(90, F32, (1, 16, 16, 2, 120), {"dropout": 0.1}, 128),
        Case(80, BF16, (1, 32, 32, 4, 36), {"dropout": 0.1}, 64),
        Case(80, BF16, (1, 16, 16, 4, 9), {"dropout": 0.1}),
        Case(80, BF16, (1, 16, 16, 4, 64), {"dropout": 0.1}, 128),
        Case(80, F32, (1, 8, 8, 4, 60), {"dropout": 0.1}, 128),
        Case(86, BF16, (1, 16, 16, 4, 48), {"dropout": 0.1}, 128),
        # The heads of the networks.
        *(
            Case(architecture, kind, (1, 32, 32, 2, dim), {"dropout": 0.1})
            for dim, kind in zip((16, 20, 24, 30, 36, 48, 60, 64), itertools.cycle((BF16, F16)), strict=False)
            for architecture in (90, 80, "gfx942")
        ),
    )
    larger = (3, 14, 22, 4, 36)
