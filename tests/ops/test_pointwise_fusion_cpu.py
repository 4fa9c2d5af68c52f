# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""The CPU kernel of pointwise_fusion, which is that of pointwise_conv with a second input."""

import torch

from mvit3_kernels.ops import Linear, pointwise_conv, pointwise_fusion

from .cpu_kernel import CpuKernel, in_float32, needs_the_kernels
from .test_pointwise_conv_cpu import registered
from .test_pointwise_fusion import TestPointwiseFusion as Reference


@needs_the_kernels
class TestPointwiseFusionCpu(CpuKernel):
    op = staticmethod(pointwise_fusion)
    maps = ("a", "b", "residual")
    shapes = (
        (2, 3, 5, 7, 2, 9),
        (1, 3, 4, 3, 17, 5),
        (3, 1, 14, 17, 31, 33),
        (2, 9, 7, 96, 48, 50),
        (1, 8, 8, 240, 320, 320),  # few rows: cut over outputs
        (2, 32, 20, 33, 32, 64),
        (3, 8, 8, 144, 128, 144),
        (1, 13, 17, 1, 1, 2),
    )
    options = {
        "training-silu-residual": {"act": "silu", "residual": True},
        "training": {"conv": False},
        "frozen-silu-residual": {"training": False, "act": "silu", "residual": True},
        "frozen-relu": {"training": False, "act": "relu"},
    }
    threaded = ((2, 8, 8, 64, 32, 192), (1, 30, 20, 48, 7, 80), (5, 16, 16, 33, 16, 70))
    arguments = staticmethod(Reference.arguments)

    @staticmethod
    def registered(arguments):
        a, b, weight, norm, act, residual = arguments.values()
        return registered(a, b, Linear(weight), norm, act, residual)

    def test_it_is_the_convolution_of_the_concatenation(self, shape, option):
        """Bit for bit: the tiles that are multiplied hold the same rows."""
        a, b, weight, *rest = in_float32(self.make(shape, option)).values()
        want, moments = pointwise_conv(torch.cat((a, b), -1), Linear(weight), *rest)
        found, found_moments = pointwise_fusion(a, b, weight, *rest)
        assert torch.equal(found, want)
        assert moments is None or all(torch.equal(x, y) for x, y in zip(moments, found_moments, strict=True))

    def test_batch_broadcast_in_memory(self):
        """Inputs with strides of zero are made contiguous once."""
        arguments = in_float32(self.make((1, 3, 5, 7, 2, 9), "frozen-relu"))
        wide = {**arguments, "b": arguments["b"].expand(1, 3, 5, 2)[:, :, :1].expand(1, 3, 5, 2)}
        dense = {**wide, "b": wide["b"].contiguous()}
        assert torch.equal(pointwise_fusion(**wide)[0], pointwise_fusion(**dense)[0])
