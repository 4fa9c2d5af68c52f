from mvit3_kernels.ops import pointwise_conv

from . import test_pointwise_conv_cpu as cpu
from .triton_kernel import BF16, F16, F32, Case, TritonKernel, needs_triton


@needs_triton
class TestPointwiseConvTriton(TritonKernel):
    op = staticmethod(pointwise_conv)
    maps = ("x", "residual")
    arguments = staticmethod(cpu.TestPointwiseConvCpu.arguments)
    registered = staticmethod(cpu.TestPointwiseConvCpu.registered)
    # A configuration is decided by the dtype, and by whether the inputs are a multiple of 64.
    cases = (
        Case(90, BF16, (2, 8, 8, 144, 144), {"act": "silu", "residual": True}, 128),
        Case(90, F16, (2, 8, 8, 320, 1280), {"training": False, "act": "silu", "bias": True, "residual": True}, 128),
        Case(90, BF16, (2, 8, 8, 9, 27), {"act": "silu"}),
        Case(90, F32, (2, 8, 8, 144, 144), {"training": False, "act": "silu", "bias": True, "residual": True}, 128),
        Case(80, BF16, (2, 8, 8, 320, 240), {"act": "silu"}, 128),
        Case(80, BF16, (2, 8, 8, 144, 144), {"training": False, "act": "silu", "residual": True}, 128),
        Case(80, F32, (2, 8, 8, 144, 144), {"act": "silu"}, 128),
        Case(86, BF16, (2, 8, 8, 320, 1280), {"act": "silu"}, 128),
        Case("gfx942", F16, (2, 8, 8, 64, 64), {"act": "silu"}),
    )
    larger = (3, 9, 11, 144, 144)
