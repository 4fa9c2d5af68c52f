# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""The CPU kernel of depthwise_conv."""

import pytest
import torch

import mvit3_kernels
from mvit3_kernels.ops import BatchNorm, depthwise_conv

from ..bounds import assert_bound, half_a_rounding, relative_errors, together
from .cpu_kernel import CpuKernel, in_float32, needs_the_kernels
from .inputs import Draw, mapped
from .test_depthwise_conv_triton import arguments, registered

# (stride, dilation, act): every way that the window moves, and rows and columns that no output reads.
GEOMETRY = {
    "plain": (1, 1, "silu"),
    "stride": (2, 1, "silu"),
    "dilation": (1, 2, "relu"),
    "stride-dilation": (2, 2, "silu"),
    "dilation-4": (1, 4, "identity"),
    "stride-dilation-3": (2, 3, "relu"),
    "stride-dilation-6": (2, 6, "silu"),
    "dilation-20": (1, 20, "silu"),
}
OPTIONS = {
    f"{mode}-{name}": {"stride": stride, "dilation": dilation, "act": act, "training": mode == "training"}
    for mode in ("training", "frozen")
    for name, (stride, dilation, act) in GEOMETRY.items()
}
USED = ("training-plain", "training-stride-dilation", "frozen-stride", "frozen-stride-dilation")


@needs_the_kernels
class TestDepthwiseConvCpu(CpuKernel):
    op = staticmethod(depthwise_conv)
    # (batch, height, width, channels), odd on purpose; the last ones fill several runs, rings and parts.
    shapes = (
        (2, 7, 13, 5),
        (3, 16, 16, 16),
        (1, 33, 5, 40),
        (2, 30, 70, 24),
        (1, 5, 130, 33),
        (5, 9, 8, 320),
    )
    options = {name: OPTIONS[name] for name in USED}
    bound_options = {name: option for name, option in OPTIONS.items() if name not in USED}
    threaded = ((3, 20, 32, 48), (2, 9, 37, 16), (2, 10, 37, 23))

    @staticmethod
    def arguments(draw, *sizes, **options):
        return arguments(draw, *sizes, **{"mean": 5.0 if sizes[3] == 24 else 1.0, **options})

    @staticmethod
    def registered(given):
        return registered(**given)

    def check(self, found, reference, truth, dtype):
        """Beside the common bound: relative to the true result alone, however small that is. The library's weight
        gradient of dilated bfloat16 convolutions is off by its own size, or NaN, and allows no more than 0.1."""
        floor = half_a_rounding(dtype)
        assert_bound(found, reference, truth, floor, most=0.1)
        assert_bound(found, reference, truth, floor / len(truth) ** 0.5, group=together, least=0, most=0.1)
        allowed = relative_errors(reference, truth, 0)
        for name, error in relative_errors(found, truth, 0).items():
            theirs = allowed[name] if allowed[name] < 0.1 else 0.1
            assert error < 20 * max(theirs, 1e-7), (name, error, theirs)

    @pytest.mark.parametrize(
        "sizes", [(1, 1, 1, 16), (1, 1, 9, 7), (2, 9, 1, 17), (1, 2, 2, 48), (0, 4, 4, 16)], ids=str
    )
    @pytest.mark.parametrize("geometry", GEOMETRY)
    def test_tiny_maps(self, sizes, geometry):
        stride, dilation, act = GEOMETRY[geometry]
        alone = sizes[:3] == (1, 1, 1) or (sizes[:3] == (1, 2, 2) and stride == 2)
        given = self.arguments(Draw(), *sizes, stride=stride, dilation=dilation, act=act, training=not alone)
        exact = self.results("reference", given, torch.float64)
        found = self.results("cpu", given)
        for name, t in found.items():
            torch.testing.assert_close(t.double(), exact[name], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("geometry", GEOMETRY)
    def test_nan_and_infinity_reach_what_they_touch_and_nothing_else(self, value, geometry):
        given = self.make((1, 9, 8, 18), f"frozen-{geometry}")
        given["x"][0, 4, 4, 2] = value
        with torch.no_grad():
            found, exact = (self.op(**case)[0] for case in (in_float32(given), given))
        assert torch.equal(found.isfinite(), exact.isfinite())
        given["norm"] = given["norm"]._replace(training=True)
        y = self.op(**in_float32(given))[0]
        assert y.isnan().any(2).any(1)[0].tolist() == [channel == 2 for channel in range(18)]

    def test_a_constant_map_normalises_to_the_bias(self):
        weight, beta = torch.zeros(16, 1, 3, 3), torch.arange(16.0)
        weight[:, 0, 1, 1] = 1 / 3
        x = torch.full((2, 8, 8, 16), 3.0).bfloat16()
        y, moments = depthwise_conv(x, weight, BatchNorm(torch.ones(16), beta, None, None, True), "identity")
        assert moments.var.abs().max() == 0
        torch.testing.assert_close(y.float(), beta.expand_as(y), rtol=0, atol=1e-4)

    def test_nothing_but_x_and_parameters_is_kept(self):
        given = mapped(self.make((2, 16, 16, 32), "training-plain"), lambda _, t: t.float().requires_grad_())
        kept = []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
            mvit3_kernels.backend("cpu"),
        ):
            self.op(**given)
        x = given["x"]
        assert [t.data_ptr() for t in kept if t.numel() >= x.numel()] == [x.data_ptr()]

    def test_without_a_forced_backend_float64_takes_another_way(self):
        assert self.op(**self.make(self.shapes[0]))[0].dtype == torch.float64
