from mvit3_kernels.ops import separable_attention

from . import test_separable_attention_cpu as cpu
from .triton_kernel import BF16, F16, F32, Case, TritonKernel, needs_triton

DROPOUTS = {"attention_dropout": 0.1, "output_dropout": 0.1}


@needs_triton
class TestSeparableAttentionTriton(TritonKernel):
    op = staticmethod(separable_attention)
    arguments = staticmethod(cpu.TestSeparableAttentionCpu.arguments)
    registered = staticmethod(cpu.TestSeparableAttentionCpu.registered)
    # A configuration is decided by the two tiles of a row.
    cases = (
        Case(90, BF16, (2, 32, 32, 128, (2, 2)), DROPOUTS, 64),
        Case(90, BF16, (2, 8, 8, 64, (2, 2)), {"per_sample": False}, 64),
        Case(90, BF16, (2, 16, 16, 192, (2, 2)), DROPOUTS, 64),
        Case(90, F16, (2, 8, 8, 256, (2, 2)), {"bias": False}, 64),
        Case(90, BF16, (2, 8, 8, 384, (2, 2)), DROPOUTS, 64),
        Case(90, BF16, (2, 8, 8, 512, (2, 2)), {"per_sample": False, **DROPOUTS}, 64),
        Case(90, BF16, (2, 8, 8, 9, (2, 2)), {"per_sample": False}),
        Case(90, F32, (2, 16, 16, 128, (2, 2)), DROPOUTS, 64),
        Case(90, F32, (2, 8, 8, 256, (2, 2)), {"per_sample": False, **DROPOUTS}, 64),
        Case(80, BF16, (2, 16, 16, 96, (2, 2)), DROPOUTS, 64),
        Case(80, F16, (2, 16, 16, 192, (2, 2)), DROPOUTS, 64),
        Case(80, BF16, (2, 8, 8, 512, (2, 2)), DROPOUTS, 64),
        Case(80, F32, (2, 8, 8, 192, (2, 2)), DROPOUTS, 64),
        Case("gfx942", BF16, (2, 8, 8, 128, (2, 2)), DROPOUTS),
        Case("gfx942", F16, (2, 8, 8, 512, (2, 2))),
    )
    larger = (3, 18, 22, 128, (2, 2))
    alone = (90,)
