from mvit3_kernels.ops import pointwise_fusion

from . import test_pointwise_fusion_cpu as cpu
from .triton_kernel import BF16, F16, F32, Case, TritonKernel, needs_triton


@needs_triton
class TestPointwiseFusionTriton(TritonKernel):
    op = staticmethod(pointwise_fusion)
    maps = ("a", "b", "residual")
    arguments = staticmethod(cpu.TestPointwiseFusionCpu.arguments)
    registered = staticmethod(cpu.TestPointwiseFusionCpu.registered)
    alone = (90,)  # whose programs hold weights in shared memory
    cases = (
        Case(90, BF16, (2, 8, 8, 144, 128, 128), {"act": "silu", "residual": True}, 128),
        Case(90, BF16, (2, 8, 8, 192, 256, 256), {"training": False, "act": "silu", "residual": True}, 128),
        Case(90, BF16, (2, 16, 16, 144, 128, 128), {"act": "silu"}, 128),
        Case(90, BF16, (3, 8, 8, 192, 256, 256), {"act": "silu"}, 128),
        Case(90, F16, (2, 16, 16, 192, 256, 256), {"act": "silu"}, 128),
        Case(80, BF16, (2, 8, 8, 240, 320, 320), {"act": "silu", "residual": True}, 128),
        Case(80, F32, (2, 8, 8, 144, 128, 128), {"training": False, "act": "silu", "residual": True}, 128),
        Case(86, BF16, (2, 8, 8, 192, 256, 256), {"act": "silu", "residual": True}, 128),
        Case("gfx942", F16, (2, 8, 8, 144, 128, 128), {"act": "silu", "residual": True}),
    )
    larger = (3, 5, 7, 144, 128, 128)  # as few rows
