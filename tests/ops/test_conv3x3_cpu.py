# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""The CPU kernel of conv3x3."""

import pytest
import torch

import mvit3_kernels
from mvit3_kernels.nn import ConvNormAct
from mvit3_kernels.ops import conv3x3, dispatch
from mvit3_kernels.ops.types import ACTIVATIONS

from ..bounds import assert_bound, half_a_rounding
from .cpu_kernel import CpuKernel, in_float32, needs_the_kernels
from .inputs import Draw, mapped
from .test_conv3x3 import TestConv3x3 as Reference


@needs_the_kernels
class TestConv3x3Cpu(CpuKernel):
    op = staticmethod(conv3x3)
    # (batch, height, width, channels, outputs), odd on purpose
    shapes = (
        (2, 7, 13, 5, 9),
        (1, 33, 5, 40, 17),
        (3, 16, 16, 16, 48),
        (1, 6, 9, 97, 130),  # several tasks of the weight's gradient
        (2, 12, 30, 1, 33),
    )
    options = {
        "training": {"act": "silu"},
        "training-dilation": {"act": "relu", "dilation": 3},
        "frozen-dilation": {"training": False, "dilation": 6, "act": "silu"},
        "plain": {"norm": False, "dilation": 2},
    }
    bound_options = {
        "frozen": {"training": False, "act": "relu"},
        "plain-outside": {"norm": False, "dilation": 40},
    }
    threaded = ((3, 20, 32, 48, 40), (2, 10, 37, 23, 100))
    # PyTorch's gradient of a dilated convolution in bfloat16 spreads NaN to pixels that no tap connects, on some CPUs.
    spoiled_in = torch.float64
    arguments = staticmethod(Reference.arguments)

    @staticmethod
    def registered(given):
        x, weight, norm, act, _, dilation = given.values()
        gamma, beta, mean, var, training, eps = norm or (None, None, None, None, False, 0.0)
        if not training:
            inference = (x, weight, gamma, beta, mean, var, eps, ACTIVATIONS.index(act), dilation)
            yield torch.ops.mvit3.conv3x3_inference.default, inference
        yield torch.ops.mvit3.conv3x3_forward.default, (x, weight, dilation)
        dy = torch.randn(*x.shape[:3], weight.shape[0])
        yield torch.ops.mvit3.conv3x3_backward.default, (dy, x, weight, dilation)

    def test_evaluation_without_gradients(self, shape, dtype):
        given = Reference().cast(self.make(shape, "frozen-dilation"), dtype, dtype)
        truth, _ = conv3x3(**Reference().cast(given, torch.float64, torch.float64))
        found = {}
        for backend in ("reference", "cpu"):
            with mvit3_kernels.backend(backend), torch.no_grad():
                y, moments = conv3x3(**given)
            assert moments is None and y.dtype == dtype and y.is_contiguous()
            found[backend] = {"y": y}
        assert_bound(found["cpu"], found["reference"], {"y": truth}, half_a_rounding(dtype), least=0)

    def test_a_tap_outside_of_the_map_has_no_gradient(self):
        """Of rates beyond height or width: exactly zero, and the others are those of the map without them."""
        given = mapped(self.make((2, 8, 20, 24, 40), "plain"), lambda _, t: t.float().requires_grad_())
        for dilation, height, width in ((8, slice(1, 2), slice(0, 3)), (20, slice(1, 2), slice(1, 2))):
            given["dilation"] = dilation
            with mvit3_kernels.backend("cpu"):
                (found,) = torch.autograd.grad(conv3x3(**given)[0].sum(), given["weight"])
            inside = torch.zeros(3, 3, dtype=torch.bool)
            inside[height, width] = True
            assert not found[..., ~inside].any() and found[..., inside].all()

    @pytest.mark.parametrize(
        "sizes", [(1, 1, 1, 16, 8), (1, 1, 9, 7, 5), (2, 9, 1, 17, 16), (0, 4, 4, 16, 16)], ids=str
    )
    @pytest.mark.parametrize("dilation", [1, 4])
    def test_tiny_maps(self, sizes, dilation):
        given = self.arguments(Draw(), *sizes, dilation=dilation, act="silu", training=False)
        exact = self.results("reference", given, torch.float64)
        for name, t in self.results("cpu", given).items():
            torch.testing.assert_close(t.double(), exact[name], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_nan_and_infinity_reach_what_they_touch_and_nothing_else(self, value):
        given = self.make((1, 9, 8, 18, 20), "frozen-dilation")
        given["x"][0, 4, 7, 2], given["dilation"] = value, 3
        for case in (given, {**given, "dilation": 1}):
            with torch.no_grad(), mvit3_kernels.backend("cpu"):
                found = conv3x3(**in_float32(case))[0]
            with torch.no_grad():
                exact = conv3x3(**case)[0]
            assert torch.equal(found.isfinite(), exact.isfinite())

    def test_the_kernel_checks_what_it_is_given(self):
        x, weight = torch.randn(1, 4, 5, 6), torch.randn(7, 6, 3, 3)
        with pytest.raises(RuntimeError, match=r"weight must have shape \(7, 6, 3, 3\), got \(7, 5, 3, 3\)"):
            torch.ops.mvit3.conv3x3_forward(x, weight[:, 1:], 1)
        with pytest.raises(RuntimeError, match=r"dy must have shape \(1, 4, 5, 7\), got \(1, 4, 5, 6\)"):
            torch.ops.mvit3.conv3x3_backward(x, x, weight, 1)
        with pytest.raises(RuntimeError, match="dilation must be at least 1, got 0"):
            torch.ops.mvit3.conv3x3_forward(x, weight, 0)
        with pytest.raises(mvit3_kernels.BackendError, match="takes stride 1, got 2"), mvit3_kernels.backend("cpu"):
            conv3x3(x, weight, stride=2)

    @pytest.mark.parametrize(
        ("change", "training", "reason"),
        [
            ({}, True, None),
            ({"dtype": torch.float16, "dilation": 1}, True, None),
            ({"dtype": torch.bfloat16}, True, "of bfloat16 is faster"),
            ({"channels": 48}, True, "fewer than 96 channels"),
            ({"channels": 48}, False, None),
            ({"channels": 24}, False, "fewer than 32 channels"),
            ({"dilation": 1}, True, "in training PyTorch's convolution is as fast on more than 256 pixels"),
            ({"dilation": 1}, False, None),
            ({"dilation": 1, "height": 16}, True, None),
            ({"dilation": 6}, True, None),
            ({"dilation": 1, "channels": 1024}, False, "of more than 512 channels is as fast"),
            ({"dilation": 6, "channels": 1024}, False, None),
            ({"stride": 2}, False, "takes stride 1, got 2"),
        ],
        ids=str,
    )
    def test_what_is_left_to_the_library(self, change, training, reason, monkeypatch):
        """And that a call says so: `explain` reads what `select` notes."""
        options = {"dtype": torch.float32, "height": 32, "channels": 96, "dilation": 12, "stride": 1, **change}
        dtype, height, channels, dilation, stride = options.values()
        monkeypatch.setattr(dispatch, "observed", [])
        x = torch.zeros(1, height, 16, channels, dtype=dtype)
        weight = torch.zeros(96, channels, 3, 3, dtype=dtype, requires_grad=training)
        conv3x3(x, weight, stride=stride, dilation=dilation)
        ((op, backend, why),) = dispatch.observed
        assert (op, backend) == ("conv3x3", "cpu" if reason is None else "reference")
        assert (reason or "") in why

    def test_a_module_runs_it(self):
        layer = ConvNormAct(96, 100, 3, dilation=6, act="relu")
        x = torch.randn(2, 96, 12, 9, requires_grad=True)
        assert "conv3x3" in str(mvit3_kernels.explain(layer, x))
        want = torch.relu(layer.norm(layer.block.conv(x)))
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
        assert layer.norm.num_batches_tracked == 3
