# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""The CPU kernel of batch_norm_act, on inputs that are awkward on purpose."""

from __future__ import annotations

import pytest
import torch

import mvit3_kernels
from mvit3_kernels.ops import BatchNorm, batch_norm_act
from mvit3_kernels.ops.types import ACTIVATIONS

from ..bounds import FLOOR, assert_bound, check_bound, each
from .batch_norm_act_cases import arguments, results
from .cpu_kernel import CpuKernel, needs_the_kernels
from .inputs import DTYPES, Draw
from .test_batch_norm_act import TestBatchNormAct as Reference

pytestmark = needs_the_kernels


def check(args, dtype=torch.float32, parameters=torch.float32):
    return check_bound(results, args, "cpu", dtype, parameters)


@pytest.fixture
def poisoned():
    """torch.empty full of NaN: an element of an output that nobody wrote shows."""
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@needs_the_kernels
class TestBatchNormActCpu(CpuKernel):
    op = staticmethod(batch_norm_act)
    maps = ("x", "residual")
    # Channels of less and more than a vector; fewer rows than a period, a tail, and enough work for several threads.
    # Not two rows: of a norm of two values all but rounding cancels in the gradient (test_two_rows).
    shapes = (
        *((2, 7, 13, channels) for channels in (3, 1, 7, 16, 24, 33, 64, 240, 1024)),
        *((1, 1, 3, 5), (1, 1, 17, 3), (3, 1, 1, 130), (1, 5, 3, 1023), (2, 41, 37, 48)),
    )
    options = {
        "training-silu": {"act": "silu"},
        "training-silu-residual": {"act": "silu", "residual": True},
        "frozen-silu": {"act": "silu", "training": False},
        "frozen-residual": {"residual": True, "training": False},
    }
    bound_options = {
        "training-identity": {},
        "training-identity-residual": {"residual": True},
        "training-relu": {"act": "relu"},
        "training-relu-residual": {"act": "relu", "residual": True},
        "frozen-identity": {"training": False},
        "frozen-silu-residual": {"act": "silu", "residual": True, "training": False},
        "frozen-relu": {"act": "relu", "training": False},
        "frozen-relu-residual": {"act": "relu", "residual": True, "training": False},
    }
    threaded = ((2, 65, 63, 24), (4, 33, 31, 48))

    @pytest.fixture(autouse=True)
    def unwritten_elements_show(self, request):
        if request.function.__name__ == "test_bound":
            request.getfixturevalue("poisoned")

    @staticmethod
    def arguments(draw, *sizes, mean=0.5, **options):
        return Reference.arguments(draw, *sizes, mean=mean, **options)

    @staticmethod
    def registered(arguments):
        x, norm, act, residual = arguments.values()
        inputs, code = (x, *norm), ACTIVATIONS.index(act)
        yield torch.ops.mvit3.batch_norm_act_forward.default, (*inputs, code, residual)
        y, *moments = torch.ops.mvit3.batch_norm_act_forward(*inputs, code, residual)
        used = moments if norm.training else norm[2:4]
        backward = (torch.ones_like(y), x, norm.weight, norm.bias, *used, norm.training, norm.eps, code)
        yield torch.ops.mvit3.batch_norm_act_backward.default, backward

    def allowed(self, arguments, dtype, parameters):
        return self.results("reference", arguments, dtype, parameters)

    def check(self, found, reference, truth, dtype):
        """With parameters in float32 each result alone, beside a few roundings to that."""
        if found["d norm.weight"].dtype == torch.float32:
            assert_bound(found, reference, truth, FLOOR, group=each, least=0)
        else:
            super().check(found, reference, truth, dtype)


def test_two_rows():
    """The gradient of x beside the terms that cancel in it: dy times weight / deviation."""
    x, dy = torch.randn(1, 1, 2, 5), torch.randn(1, 1, 2, 5)
    weight, bias = torch.rand(5) + 0.5, torch.randn(5)

    def gradients(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        with mvit3_kernels.backend(backend):
            y, _ = batch_norm_act(leaves[0], BatchNorm(*leaves[1:], None, None, True), "silu")
        return [y, *torch.autograd.grad(y, leaves, dy.to(dtype))]

    terms = dy.abs() * weight / x.std((0, 1, 2), correction=0)
    sizes = (1.0, terms.max(), 1.0, 1.0)
    for got, want, size in zip(
        gradients("cpu", torch.float32), gradients("reference", torch.float64), sizes, strict=True
    ):
        assert (got.double() - want).abs().max() < 2e-6 * size


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_parameter_dtypes(parameters):
    check(arguments((2, 7, 13, 24), "silu", False, training=True), torch.bfloat16, parameters)


def test_gradients_have_the_dtype_of_their_parameters():
    """Each its own, whatever the public function lets through."""
    x, weight, bias = torch.randn(2, 5, 3, 6).bfloat16(), torch.randn(6).half(), torch.randn(6).double()
    _, mean, var = torch.ops.mvit3.batch_norm_act_forward(x, weight, bias, None, None, True, 1e-5, 1, None)
    dx, dweight, dbias = torch.ops.mvit3.batch_norm_act_backward(x, x, weight, bias, mean, var, True, 1e-5, 1)
    assert (dx.dtype, dweight.dtype, dbias.dtype) == (torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("mean", [100.0, -1000.0])
@pytest.mark.parametrize("rows", [91, 70000])
def test_mean_of_many_deviations(mean, rows):
    check(arguments((1, rows // 7, 7, 24), "silu", False, training=True, mean=mean))


def test_outlier_in_the_first_row():
    """The first row is the pivot of the sums: one that lies far off must not cost precision."""
    args = arguments((2, 61, 67, 16), "identity", False, training=True)
    args["x"].data[0, 0, 0] = 1e4
    check(args)


@pytest.mark.parametrize("value", [0.0, 3.0, 1e4, -7.3])
def test_constant_channels(value):
    x = torch.full((2, 50, 41, 24), value)
    with mvit3_kernels.backend("cpu"):
        y, moments = batch_norm_act(x, BatchNorm(torch.ones(24), torch.full((24,), 0.25), None, None, True))
    assert torch.equal(moments.mean, x[0, 0, 0]) and not moments.var.any()
    assert torch.equal(y, torch.full_like(y, 0.25))


def test_no_channels():
    y, mean, var = torch.ops.mvit3.batch_norm_act_forward(
        torch.empty(2, 3, 4, 0), *torch.empty(2, 0), None, None, True, 1e-5, 1, None
    )
    assert y.shape == (2, 3, 4, 0) and mean.shape == var.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_memory(dtype):
    """Data that starts in the middle of a vector."""
    storage = Draw()(2 * 7 * 13 * 32 + 1).to(dtype)
    x = storage[1:].view(2, 7, 13, 32)
    args = (torch.ones(32), torch.zeros(32), None, None, True, 1e-5, 1, None)
    for got, want in zip(
        torch.ops.mvit3.batch_norm_act_forward(x, *args),
        torch.ops.mvit3.batch_norm_act_forward(x.clone(), *args),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("where", ["x", "dy"])
def test_not_finite(where, act, training, value):
    """NaN and infinity come out where they come out of the reference, NaN as NaN."""
    args = arguments((2, 7, 13, 24), act, False, training)
    args[where].data[1, 3, 5, 7] = value
    args = {**args, "x": args["x"].detach().float().requires_grad_(), "dy": args["dy"].float()}
    args["norm"] = BatchNorm(*(t.detach().float() for t in args["norm"][:4]), training, 1e-5)
    args["norm"] = args["norm"]._replace(
        weight=args["norm"].weight.requires_grad_(), bias=args["norm"].bias.requires_grad_()
    )
    got, want = (
        {k: t.clone() for k, t in results(_fresh(args), backend).items() if t is not None}
        for backend in ("cpu", "reference")
    )
    for name in got:
        assert torch.equal(got[name].isfinite(), want[name].isfinite()), name
        # an infinite value makes a sum infinite or NaN, by the order of its terms
        if name not in ("mean", "var", "dweight"):
            assert torch.equal(got[name].isnan(), want[name].isnan()), name


def _fresh(args):
    norm = args["norm"]
    leaves = (norm.weight.detach().requires_grad_(), norm.bias.detach().requires_grad_())
    return {**args, "x": args["x"].detach().requires_grad_(), "norm": norm._replace(weight=leaves[0], bias=leaves[1])}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_range(dtype):
    """SiLU from far below to far above zero, values and gradients."""
    x = torch.linspace(-200, 200, 4 * 16 * 16 * 16, dtype=torch.float64).to(dtype).view(4, 16, 16, 16).requires_grad_()
    eye = BatchNorm(torch.ones(16), torch.zeros(16), torch.zeros(16), torch.ones(16), False, 0.0)
    args = {
        "x": x,
        "norm": eye._replace(weight=eye.weight.requires_grad_(), bias=eye.bias.requires_grad_()),
        "act": "silu",
    }
    check({**args, "residual": None, "dy": torch.ones_like(x)}, dtype)


def test_large_output_bypasses_the_cache():
    """Outputs too large for the cache take other store instructions."""
    x = torch.randn(1, 1024, 321, 64)
    args = (torch.rand(64), torch.rand(64), None, None, True, 1e-5, 1, None)
    y, mean, var = torch.ops.mvit3.batch_norm_act_forward(x, *args)
    want, wmean, wvar = torch.ops.mvit3.batch_norm_act_forward(
        x[:, :1], args[0], args[1], mean, var, False, 1e-5, 1, None
    )
    assert wmean.numel() == wvar.numel() == 0
    torch.testing.assert_close(y[:, :1], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean, x.double().mean((0, 1, 2)).float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var, x.double().var((0, 1, 2), correction=0).float(), rtol=1e-6, atol=0)
    dx, *_ = torch.ops.mvit3.batch_norm_act_backward(x, x, args[0], args[1], mean, var, False, 1e-5, 1)
    part, *_ = torch.ops.mvit3.batch_norm_act_backward(
        x[:, -1:], x[:, -1:], args[0], args[1], mean, var, False, 1e-5, 1
    )
    torch.testing.assert_close(dx[:, -1:], part, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 8, dtype=torch.float64)}, "x must be float32, bfloat16 or float16"),
        ({"x": torch.zeros(3, 4, 8)}, r"x must be a feature map"),
        ({"weight": torch.zeros(7)}, "weight must have shape"),
        ({"bias": torch.zeros(8, dtype=torch.int32)}, "bias must be float32"),
        ({"residual": torch.zeros(2, 3, 4, 7)}, r"residual must have shape \(2, 3, 4, 8\), got \(2, 3, 4, 7\)"),
        ({"residual": torch.zeros(2, 3, 4, 8).half()}, "residual must have the dtype of x"),
        ({"training": False}, "running_mean and running_var must be given"),
        ({"act": 3}, "act must be 0"),
    ],
)
def test_raw_op_refuses(change, message):
    given = {
        "x": torch.zeros(2, 3, 4, 8),
        "weight": torch.ones(8),
        "bias": torch.ones(8),
        "running_mean": None,
        "running_var": None,
    }
    given |= {"training": True, "eps": 1e-5, "act": 1, "residual": None} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mvit3.batch_norm_act_forward(*given.values())
