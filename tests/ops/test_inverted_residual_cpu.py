# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""The CPU kernel of inverted_residual."""

import sys

import pytest
import torch

import mvit3_kernels
from mvit3_kernels.ops import inverted_residual

from ..bounds import assert_bound, half_a_rounding, relative_errors, together
from .cpu_kernel import CpuKernel, in_float32, needs_the_kernels
from .inputs import DTYPES, Draw, mapped
from .test_inverted_residual_triton import arguments, registered

OP = sys.modules["mvit3_kernels.ops.inverted_residual"]
GEOMETRY = {
    "plain": {},
    "stride": {"stride": 2},
    "dilation": {"dilation": 2, "act": "relu"},
    "stride-dilation": {"stride": 2, "dilation": 2},
    "dilation-4": {"dilation": 4},
    "stride-dilation-3": {"stride": 2, "dilation": 3},
}
# (batch, height, width, channels, expanded, outputs), odd on purpose; the last ones fill several tiles, panels and
# ranges of rows.
SHAPES = (
    (2, 7, 13, 5, 9, 5),
    (2, 40, 16, 1, 20, 1),
    (1, 33, 5, 8, 40, 8),
    (3, 16, 16, 16, 64, 33),
    (2, 30, 70, 24, 48, 24),
    (2, 9, 130, 48, 200, 17),
)


@needs_the_kernels
class TestInvertedResidualCpu(CpuKernel):
    """Training, in both ways: with the expanded tensor kept, and with it made again in backward."""

    op = staticmethod(inverted_residual)
    shapes = SHAPES
    options = {"plain": {}, "stride-relu": {"stride": 2, "act": "relu"}}
    threaded = ((3, 20, 12, 8, 32, 8), (2, 9, 7, 6, 12, 6), (2, 11, 7, 6, 14, 6))
    test_small_batches = None  # none is refused, one is among the shapes

    @pytest.fixture(autouse=True, params=["stored", "recomputed"])
    def way(self, request, monkeypatch):
        self.store = request.param == "stored"
        monkeypatch.setattr(OP, "_stores", lambda *_: self.store)

    @staticmethod
    def arguments(draw, *sizes, **options):
        return arguments(draw, *sizes, **{"mean": 1.0, **options})

    def make(self, shape, option=None):
        """The smallest map of another seed: under 0 a rounding to bfloat16 takes one of its few values over ReLU's kink
        in one of the two computations alone."""
        return super().make(shape, option, 1 if shape == SHAPES[0] else 0)

    def registered(self, given):
        return registered(**given, store=self.store)

    def check(self, found, reference, truth, dtype):
        """Beside the common bound, without a floor and relative to the true results alone, however small they are."""
        if truth["d expand.weight"].shape[1] == 1:
            # the norm takes away all that a single weight does, so its gradient is eps and rounding
            found, reference, truth = (
                {name: t for name, t in of.items() if name != "d expand.weight"} for of in (found, reference, truth)
            )
        assert_bound(found, reference, truth, half_a_rounding(dtype))
        assert_bound(found, reference, truth, 0.0, group=together, least=0)
        errors, allowed = (relative_errors(results, truth, 0) for results in (found, reference))
        for name, error in errors.items():
            assert error < 50 * max(allowed[name], torch.finfo(dtype).eps), (name, error, allowed[name])

    @pytest.mark.parametrize("mean", [1.0, 5.0])
    @pytest.mark.parametrize("geometry", GEOMETRY)
    def test_bound_of_every_geometry(self, shape, geometry, mean):
        """In float32: the reference's gradient of a dilated convolution in bfloat16 is wrong."""
        self.hold(self.arguments(Draw(), *shape, **GEOMETRY[geometry], mean=mean), torch.float32)

    @pytest.mark.parametrize("geometry", ["plain", "stride"])
    def test_few_positions(self, geometry):
        self.hold(self.arguments(Draw(), 2, 3, 5, 8, 16, 8, **GEOMETRY[geometry]), torch.float32)


# Those with few rows are cut by channels.
EVALUATED = (
    *SHAPES,
    (0, 4, 4, 3, 6, 3),
    (1, 1, 1, 3, 6, 3),
    (2, 2, 1, 8, 16, 8),
    (1, 8, 9, 200, 400, 200),
    (1, 7, 33, 16, 100, 16),
)


@needs_the_kernels
class TestEvaluation:
    @staticmethod
    def make(sizes, option="plain", training=False):
        return arguments(Draw(), *sizes, mean=1.0, training=training, **GEOMETRY[option])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("option", GEOMETRY)
    @pytest.mark.parametrize("sizes", EVALUATED, ids=str)
    @torch.no_grad()
    def test_bound(self, sizes, option, dtype):
        given = mapped(self.make(sizes, option), lambda _, t: t.to(dtype))
        results = {}
        for name in ("cpu", "reference"):
            with mvit3_kernels.backend(name):
                y, moments = inverted_residual(**given)
            assert moments == (None, None, None) and y.dtype == dtype
            results[name] = {"y": y}
        exact = {"y": inverted_residual(**mapped(given, lambda _, t: t.double()))[0]}
        assert_bound(results["cpu"], results["reference"], exact, half_a_rounding(dtype), least=0)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @torch.no_grad()
    def test_nan_and_infinity_reach_the_output(self, value):
        given = self.make((1, 8, 8, 6, 12, 6))
        given["x"][0, 4, 4, 2] = value
        found, exact = (inverted_residual(**case)[0] for case in (in_float32(given), given))
        assert torch.equal(found.isnan(), exact.isnan())

    def test_registration(self):
        x, *parts = list(in_float32(self.make((2, 5, 7, 3, 6, 3))).values())[:4]
        fixed = [value for weight, norm in parts for value in (weight, *norm[:4], norm.eps)]
        torch.library.opcheck(torch.ops.mvit3.inverted_residual_inference.default, (x, *fixed, 2, 1, 1))

    def test_gradients_take_another_way(self):
        given = mapped(self.make((2, 4, 5, 3, 6, 3)), lambda _, t: t.float())
        given["x"].requires_grad_()
        with (
            mvit3_kernels.backend("cpu"),
            pytest.raises(mvit3_kernels.BackendError, match="gradients in training only"),
        ):
            inverted_residual(**given)
        y, _ = inverted_residual(**given)
        assert torch.autograd.grad(y.sum(), given["x"])[0].isfinite().all()

    @pytest.mark.parametrize("change", [torch.Tensor.double, lambda x: x[:0]], ids=["float64", "empty"])
    def test_a_call_that_the_kernel_refuses_takes_another_way(self, change):
        given = in_float32(self.make((2, 4, 5, 3, 6, 3), training=True))
        given["x"] = change(given["x"])
        if given["x"].dtype == torch.float64:
            given = mapped(given, lambda _, t: t.double())
        reason = "float32, bfloat16 and float16" if len(given["x"]) else "x is empty"
        with mvit3_kernels.backend("cpu"), pytest.raises(mvit3_kernels.BackendError, match=reason):
            inverted_residual(**given)
        assert len(inverted_residual(**given)[0]) == len(given["x"])
