from mvit3_kernels.ops import dropout

from . import test_dropout_cpu as cpu
from .triton_kernel import BF16, F16, F32, Case, TritonKernel, needs_triton


@needs_triton
class TestDropoutTriton(TritonKernel):
    op = staticmethod(dropout)
    maps = ("x", "residual")
    arguments = staticmethod(cpu.TestDropoutCpu.arguments)
    registered = staticmethod(cpu.TestDropoutCpu.registered)
    cases = (
        Case(90, BF16, (2, 8, 8, 144), {"p": 0.1, "residual": True}),
        Case(80, F32, (2, 8, 8, 144), {"p": 0.1}),
        Case("gfx942", F16, (2, 8, 8, 144), {"p": 0.1, "residual": True}),
    )
    larger = (3, 9, 11, 144)
