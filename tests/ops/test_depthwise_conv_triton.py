import importlib

import pytest
import torch

import mvit3_kernels
from mvit3_kernels.ops import depthwise_conv
from mvit3_kernels.ops.types import ACTIVATIONS

from ..triton_tools import SHARED_MEMORY_LIMITS, resources
from .test_depthwise_conv import TestDepthwiseConv as Reference
from .triton_kernel import BF16, F16, F32, Case, TritonKernel, needs_triton

reference_arguments = Reference.arguments
del Reference


def arguments(draw, *sizes, mean=0.0, **options):
    given = reference_arguments(draw, *sizes, **options)
    given["x"] += mean
    return given


def registered(x, weight, norm, act, stride, dilation, way=""):
    """The registered ops of the kernels, each with its arguments."""
    forward, backward = (
        getattr(torch.ops.mvit3, f"depthwise_conv_{name}{way}").default for name in ("forward", "backward")
    )
    geometry = (ACTIVATIONS.index(act), stride, dilation)
    inputs = (x, weight, *norm, *geometry)
    yield forward, inputs
    y, mean, var, *stored = forward(*inputs)
    used = (mean, var) if norm.training else (norm.running_mean, norm.running_var)
    parameters = (x, weight, norm.weight, norm.bias)
    inputs = (torch.ones_like(y), *parameters, *used, *stored, norm.training, norm.eps, *geometry)
    yield backward, inputs


@needs_triton
class TestDepthwiseConvTriton(TritonKernel):
    op = staticmethod(depthwise_conv)
    arguments = staticmethod(arguments)
    registered = staticmethod(lambda given: registered(**given))
    # A configuration is decided by the dtype and the channels; a block of them may be full or not, and rows lie on 16
    # bytes or not.
    cases = (
        Case(90, BF16, (2, 8, 8, 256), {"act": "silu"}, 64),
        Case(90, BF16, (8, 64, 64, 64), {"act": "silu", "stride": 2}, 64),
        Case(90, BF16, (2, 8, 8, 64), {"act": "silu", "stride": 2}, 32),
        Case(90, F16, (2, 8, 8, 320), {"act": "silu", "dilation": 2}, 64),
        Case(90, BF16, (2, 8, 8, 640), {"act": "silu", "dilation": 4, "training": False}, 64),
        Case(90, BF16, (2, 8, 8, 33), {"act": "silu"}),
        Case(90, F16, (2, 8, 8, 9), {"act": "relu", "stride": 2, "training": False}),
        Case(90, F32, (2, 8, 8, 128), {"act": "silu"}, 128),
        Case(90, F32, (2, 8, 8, 27), {"act": "silu", "stride": 2}),
        Case(80, BF16, (2, 8, 8, 512), {"act": "silu"}, 64),
        Case(80, BF16, (2, 8, 8, 128), {"act": "silu", "stride": 2, "training": False}, 64),
        Case(80, F16, (2, 8, 8, 35), {"act": "silu", "stride": 2, "dilation": 3}),
        Case(80, F32, (2, 8, 8, 320), {"act": "silu", "stride": 2}, 128),
        Case("gfx942", BF16, (2, 8, 8, 256), {"act": "silu", "dilation": 2}),
        Case("gfx942", F16, (2, 8, 8, 128), {"act": "silu", "stride": 2}),
    )
    larger = (3, 9, 11, 256)

    def test_the_way_with_cuda_compiles_without_a_graph_break(self, monkeypatch):
        monkeypatch.setattr(importlib.import_module("mvit3_kernels._native"), "cuda_why_not", lambda x: None)
        with mvit3_kernels.backend("cuda"):
            self.test_compiles_without_a_graph_break(monkeypatch)

    @pytest.mark.parametrize(("dtype", "stride"), [(BF16, 1), (F32, 2)], ids=str)
    def test_every_configuration_fits(self, monkeypatch, dtype, stride):
        """Those that a tuning run may choose as well."""
        kernels = importlib.import_module("mvit3_kernels.ops.depthwise_conv.triton")
        listed = kernels.configurations
        for i in (1, 2):
            monkeypatch.setattr(kernels, "configurations", lambda *args, i=i, **kw: listed(*args, **kw)[i:])
            for kernel in self.compiled(Case(90, dtype, (2, 8, 8, 256), {"act": "silu", "stride": stride})):
                used = resources(kernel)
                assert used.stack == 0, f"{kernel.metadata.name} spills: {used}"
                assert used.shared <= min(SHARED_MEMORY_LIMITS.values()), f"{kernel.metadata.name}: {used}"
