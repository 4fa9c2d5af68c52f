"""The compiled CPU kernel of batch_norm_act against the reference, on inputs that are awkward on purpose."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import mvit3_kernels
from mvit3_kernels import _native
from mvit3_kernels.ops import BatchNorm, batch_norm_act
from tests.bounds import check_bound, to
from tests.ops.batch_norm_act_cases import arguments, results
from tests.ops.inputs import Draw

pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason=f"no compiled kernels: {_native.why_not()}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTS = ("identity", "silu", "relu")


def check(args, dtype=torch.float32, parameters=torch.float32):
    return check_bound(results, args, "cpu", dtype, parameters)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def poisoned():
    """torch.empty full of NaN: an element of an output that nobody wrote shows."""
    deterministic, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("channels", [1, 3, 7, 16, 24, 33, 64, 240, 1024])
@pytest.mark.usefixtures("poisoned")
def test_bound(channels, act, training, dtype):
    check(arguments((2, 7, 13, channels), act, residual=channels % 2 == 1, training=training), dtype)


@pytest.mark.parametrize("shape", [(1, 1, 2, 5), (1, 1, 17, 3), (3, 1, 1, 130), (1, 5, 3, 1023), (2, 41, 37, 48)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_shapes(shape, residual):
    """Fewer rows than a period, a tail, and enough work for several threads."""
    for dtype in DTYPES:
        check(arguments(shape, "silu", residual, training=True), dtype)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_parameter_dtypes(parameters):
    check(arguments((2, 7, 13, 24), "silu", False, training=True), torch.bfloat16, parameters)


def test_gradients_have_the_dtype_of_their_parameters():
    """Each its own, whatever the public function lets through."""
    x, weight, bias = torch.randn(2, 5, 3, 6).bfloat16(), torch.randn(6).half(), torch.randn(6).double()
    _, mean, var = torch.ops.mvit3.batch_norm_act(x, weight, bias, None, None, True, 1e-5, 1, None)
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


@pytest.mark.parametrize("training", [True, False])
def test_batch_of_no_sample(training):
    args = arguments((0, 7, 13, 24), "silu", True, training)
    got = results(to(args, torch.float32), "cpu")
    assert got["y"].shape == got["dx"].shape == (0, 7, 13, 24)
    for name in ("dweight", "dbias", *(("mean", "var") if training else ())):
        assert got[name].shape == (24,) and not got[name].any()


def test_no_channels():
    y, mean, var = torch.ops.mvit3.batch_norm_act(torch.empty(2, 3, 4, 0), *torch.empty(2, 0), None, None, True, 1e-5, 1, None)
    assert y.shape == (2, 3, 4, 0) and mean.shape == var.shape == (0,)


@pytest.mark.parametrize("training", [True, False])
def test_strides(training):
    """NCHW memory, a slice, a broadcast gradient: the same bits as from contiguous copies."""
    args = arguments((2, 9, 8, 24), "silu", True, training)
    args["dy"] = torch.linspace(-1, 1, 24, dtype=args["dy"].dtype).expand(2, 9, 8, 24)
    norm, want = args["norm"], None
    for change in (torch.clone, lambda t: t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), _sliced, lambda t: t):
        x, residual, dy = (change(args[name].detach().float()) for name in ("x", "residual", "dy"))
        float_norm = BatchNorm(*(t.detach().float() for t in norm[:4]), training, norm.eps)
        y, mean, var = torch.ops.mvit3.batch_norm_act(x, *float_norm, 1, residual)
        moments = (mean, var) if training else float_norm[2:4]
        got = (y, *torch.ops.mvit3.batch_norm_act_backward(dy, x, *float_norm[:2], *moments, training, norm.eps, 1))
        assert y.is_contiguous() and got[1].is_contiguous()
        want = want or got
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def _sliced(t):
    wide = torch.full((t.shape[0] + 1, t.shape[1], 2 * t.shape[2], t.shape[3] + 3), float("nan"))
    wide[1:, :, ::2, 1:-2] = t
    return wide[1:, :, ::2, 1:-2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_memory(dtype):
    """Data that starts in the middle of a vector."""
    storage = Draw()(2 * 7 * 13 * 32 + 1).to(dtype)
    x = storage[1:].view(2, 7, 13, 32)
    args = (torch.ones(32), torch.zeros(32), None, None, True, 1e-5, 1, None)
    for got, want in zip(torch.ops.mvit3.batch_norm_act(x, *args), torch.ops.mvit3.batch_norm_act(x.clone(), *args), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("where", ["x", "dy"])
def test_not_finite(where, act, training, value):
    """NaN and infinity come out where they come out of the reference, NaN as NaN."""
    args = arguments((2, 7, 13, 24), act, False, training)
    args[where].data[1, 3, 5, 7] = value
    args = {**args, "x": args["x"].detach().float().requires_grad_(), "dy": args["dy"].float()}
    args["norm"] = BatchNorm(*(t.detach().float() for t in args["norm"][:4]), training, 1e-5)
    args["norm"] = args["norm"]._replace(weight=args["norm"].weight.requires_grad_(), bias=args["norm"].bias.requires_grad_())
    got, want = ({k: t.clone() for k, t in results(_fresh(args), backend).items() if t is not None} for backend in ("cpu", "reference"))
    for name in got:
        assert torch.equal(got[name].isfinite(), want[name].isfinite()), name
        if name not in ("mean", "var", "dweight"):  # an infinite value makes a sum infinite or NaN, by the order of its terms
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
    args = {"x": x, "norm": eye._replace(weight=eye.weight.requires_grad_(), bias=eye.bias.requires_grad_()), "act": "silu"}
    check({**args, "residual": None, "dy": torch.ones_like(x)}, dtype)


def test_large_output_bypasses_the_cache():
    """Outputs too large for the cache take other store instructions."""
    x = torch.randn(1, 1024, 321, 64)
    args = (torch.rand(64), torch.rand(64), None, None, True, 1e-5, 1, None)
    y, mean, var = torch.ops.mvit3.batch_norm_act(x, *args)
    want, wmean, wvar = torch.ops.mvit3.batch_norm_act(x[:, :1], args[0], args[1], mean, var, False, 1e-5, 1, None)
    assert wmean.numel() == wvar.numel() == 0
    torch.testing.assert_close(y[:, :1], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean, x.double().mean((0, 1, 2)).float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var, x.double().var((0, 1, 2), correction=0).float(), rtol=1e-6, atol=0)
    dx, *_ = torch.ops.mvit3.batch_norm_act_backward(x, x, args[0], args[1], mean, var, False, 1e-5, 1)
    part, *_ = torch.ops.mvit3.batch_norm_act_backward(x[:, -1:], x[:, -1:], args[0], args[1], mean, var, False, 1e-5, 1)
    torch.testing.assert_close(dx[:, -1:], part, rtol=0, atol=0)


def test_thread_counts_agree_and_repeat(threads):
    args = arguments((2, 65, 63, 24), "silu", True, training=True)
    seen = {}
    for count in (1, 2, 3):
        threads(count)
        seen[count] = check(args)
        again = check(args)
        for name, t in seen[count].items():
            assert torch.equal(t, again[name]), name
    for name, t in seen[1].items():
        torch.testing.assert_close(seen[2][name], t, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen[3][name], t, rtol=1e-5, atol=1e-5)


def test_concurrent_python_threads():
    x, params = torch.randn(4, 33, 31, 48), (torch.rand(48), torch.rand(48), None, None, True, 1e-5, 1, None)
    want = torch.ops.mvit3.batch_norm_act(x, *params)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: torch.ops.mvit3.batch_norm_act(x, *params), range(24)):
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_inputs_are_left_alone():
    args = arguments((2, 7, 13, 24), "silu", True, training=True)
    tensors = [args["x"], args["residual"], args["dy"], *args["norm"][:2]]
    before = [t.detach().clone() for t in tensors]
    with torch.no_grad():
        torch.ops.mvit3.batch_norm_act(
            *(t.float() for t in tensors[:1]), *(t.float() for t in tensors[3:]), None, None, True, 1e-5, 1, None
        )
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


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
    given = {"x": torch.zeros(2, 3, 4, 8), "weight": torch.ones(8), "bias": torch.ones(8), "running_mean": None, "running_var": None}
    given |= {"training": True, "eps": 1e-5, "act": 1, "residual": None} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mvit3.batch_norm_act(*given.values())
