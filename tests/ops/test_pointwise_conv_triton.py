import importlib

import pytest
import torch

from benchmarks.gpu_model.trace import VIEWS
from mvit3_kernels.ops import pointwise_conv
from mvit3_kernels.ops.registry import FORMS

from ..triton_tools import SHARED_MEMORY_LIMITS, offline, resources
from . import test_pointwise_conv_cpu as cpu
from .test_running_stats import Counted
from .triton_kernel import BF16, F16, F32, Case, TritonKernel, needs_triton


@needs_triton
class TestPointwiseConvTriton(TritonKernel):
    op = staticmethod(pointwise_conv)
    maps = ("x", "residual")
    arguments = staticmethod(cpu.TestPointwiseConvCpu.arguments)
    registered = staticmethod(cpu.TestPointwiseConvCpu.registered)
    alone = (90,)  # whose programs hold weights in shared memory
    # A configuration is decided by the dtype, by whether the inputs are a multiple of 64 and weights fit a program, by
    # what follows the product, and by whether there are few rows, or many: 512 here.
    cases = (
        Case(90, BF16, (2, 8, 8, 144, 144), {"act": "silu", "residual": True}, 128),
        Case(90, F16, (2, 8, 8, 320, 1280), {"training": False, "act": "silu", "bias": True, "residual": True}, 128),
        Case(90, F16, (2, 32, 32, 320, 1280), {"training": False, "act": "silu", "bias": True, "residual": True}, 128),
        Case(90, BF16, (2, 8, 8, 9, 27), {"act": "silu"}),
        Case(90, BF16, (2, 16, 16, 144, 128), {"act": "silu"}, 128),
        Case(90, BF16, (2, 16, 16, 192, 192), {"norm": False, "bias": True, "residual": True}, 128),
        Case(90, BF16, (2, 16, 16, 256, 512), {"training": False, "act": "silu"}, 128),
        Case(90, BF16, (3, 8, 8, 240, 320), {"act": "silu"}, 128),
        Case(90, F16, (3, 8, 8, 256, 512), {"act": "silu"}, 128),
        Case(90, F32, (2, 8, 8, 144, 144), {"training": False, "act": "silu", "bias": True, "residual": True}, 128),
        Case(80, BF16, (2, 8, 8, 320, 240), {"act": "silu"}, 128),
        Case(80, BF16, (2, 8, 8, 144, 144), {"training": False, "act": "silu", "residual": True}, 128),
        Case(80, BF16, (2, 32, 32, 144, 144), {"training": False, "act": "silu", "residual": True}, 128),
        Case(80, F32, (2, 8, 8, 144, 144), {"act": "silu"}, 128),
        Case(86, BF16, (2, 8, 8, 320, 1280), {"act": "silu"}, 128),
        Case("gfx942", F16, (2, 8, 8, 64, 64), {"act": "silu"}),
    )
    larger = (1, 9, 13, 144, 144)  # as few rows: of more, both passes take larger tiles

    @pytest.mark.parametrize("sizes", [(4, 16, 16, 128, 144), (4, 8, 8, 320, 240), (2, 8, 8, 256, 512)], ids=str)
    @pytest.mark.parametrize("dtype", [BF16, F16])
    def test_gradients_of_two_readers_fit(self, dtype, sizes):
        launcher = importlib.import_module("mvit3_kernels.ops.pointwise_conv.triton").pointwise_conv_twice_backward
        *pixels, inputs, outputs = sizes
        x, dy = (torch.empty(*pixels, channels, device="meta", dtype=dtype) for channels in (inputs, outputs))
        with offline(90) as kernels:
            weight = torch.empty(outputs, inputs, device="meta")
            launcher(FORMS["pointwise_conv_twice_backward"].call(dy, dy, x, weight, None))
        (used,) = map(resources, kernels)
        assert used.stack == 0 and used.shared <= SHARED_MEMORY_LIMITS[90] and used.load_bits == 128, used


@needs_triton
def test_backward_launches_nothing_for_a_bias_that_is_not_there():
    """Beside the norm's kernels there are two products, the second to float32, and a cast of the weight."""
    launcher = importlib.import_module("mvit3_kernels.ops.pointwise_conv.triton").pointwise_conv_backward
    given = {name: torch.empty(9, device="meta") for name in ("norm_weight", "norm_bias", "mean", "var")}
    maps = {name: torch.empty(2, 4, 4, 9, device="meta", dtype=BF16) for name in ("dy", "a", "p")}
    call = FORMS["pointwise_conv_backward"].call
    values = dict.fromkeys(call._fields) | given | maps | {"weight": torch.empty(9, 9, device="meta")}
    with offline(90, compiling=False), Counted() as counted:
        launcher(call(**values | {"training": True, "eps": 1e-5, "act": 1, "dropout": 0.0}))
    launched = [name for name in counted.names if name.partition("::")[2] not in VIEWS]
    assert launched == ["aten::_to_copy", "aten::mm", "aten::mm"]
