"""batch_norm_act's Triton kernels on CPU tensors, step by step; run by test_batch_norm_act_triton.py."""

import pytest
import torch
import triton.language as tl

from mvit3_kernels.ops import triton_common
from mvit3_kernels.ops.batch_norm_act import triton as kernels
from tests.bounds import check_bound, to
from tests.ops.batch_norm_act_cases import arguments, poison, results
from tests.ops.inputs import DTYPES
from tests.triton_tools import compute_like_a_gpu

poison()
compute_like_a_gpu()
SHAPES = [(1, 5, 7, 7), (3, 10, 10, 13), (2, 6, 7, 64)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Several programs, of several tiles each, on tiny maps."""
    monkeypatch.setattr(kernels, "TILE_BYTES", 8192)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("act", "residual"), [("identity", False), ("silu", False), ("silu", True), ("relu", True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bound(small_tiles, shape, dtype, act, residual, training):
    check_bound(results, arguments(shape, act, residual, training), "triton", dtype, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_in_the_dtype_of_x(small_tiles, dtype):
    check_bound(results, arguments((2, 6, 5, 24), "silu", True, True), "triton", dtype, dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 32, 40])
def test_shipped_tiles(channels, training):
    check_bound(
        results, arguments((2, 9, 30, channels), "silu", True, training), "triton", torch.bfloat16, torch.float32
    )


@pytest.mark.parametrize("training", [True, False])
def test_gradient_that_is_half_of_a_wider_one(small_tiles, training):
    """The gradient of a concatenation is read in place."""
    args = to(arguments((2, 6, 5, 24), "silu", False, training), torch.bfloat16, torch.float32)
    wide = torch.cat((torch.full_like(args["dy"], float("nan")), args["dy"]), -1)[..., 24:]
    assert triton_common.rows_at_one_distance(wide)[0] is wide
    expected = results(args, "triton")
    for name, value in results({**args, "dy": wide}, "triton").items():
        assert value is None or torch.equal(value, expected[name]), name


def test_one_row(small_tiles):
    check_bound(results, arguments((1, 1, 1, 13), "silu", True, False), "triton", torch.float32, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_mean(small_tiles, dtype):
    """A mean of 100 standard deviations: E[x^2] - E[x]^2 would lose four digits."""
    args = arguments((3, 10, 10, 13), "silu", False, True, mean=100.0)
    found = check_bound(results, args, "triton", dtype, torch.float32)
    exact = args["x"].detach().to(dtype).double()
    torch.testing.assert_close(found["var"].double(), exact.var((0, 1, 2), correction=0), rtol=1e-5, atol=0)


def test_an_outlier_in_the_first_row(small_tiles):
    args = arguments((3, 10, 10, 13), "identity", False, True)
    with torch.no_grad():
        args["x"][0, 0, 0] = 1e4
    check_bound(results, args, "triton", torch.float32, torch.float32)


def test_more_partials_than_one_read_takes(monkeypatch):
    monkeypatch.setattr(triton_common, "BLOCK_PARTS", tl.constexpr(4))
    monkeypatch.setattr(kernels, "TILE_BYTES", 512)
    monkeypatch.setattr(kernels, "multiprocessors", lambda x: 10)
    check_bound(results, arguments((1, 10, 15, 7), "silu", False, True), "triton", torch.float32, torch.float32)


@pytest.mark.parametrize("training", [True, False])
def test_batch_0(training):
    found = check_bound(
        results, arguments((0, 4, 4, 7), "silu", True, training), "triton", torch.float32, torch.float32
    )
    assert not found["dweight"].any() and not found["dbias"].any()


def test_strided_maps_and_parameters(small_tiles):
    args = arguments((2, 6, 5, 14), "silu", True, True)
    norm = args["norm"]
    whole = {name: args[name].detach() for name in ("x", "residual", "dy")}

    def strided(backend):
        x, residual = (
            whole[name].float().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for name in ("x", "residual")
        )
        weight, bias = (t.detach().float().repeat_interleave(2)[::2] for t in (norm.weight, norm.bias))
        args = {
            "x": x,
            "norm": norm._replace(weight=weight, bias=bias, running_mean=None, running_var=None),
            "act": "silu",
        }
        args |= {"residual": residual, "dy": whole["dy"].float().transpose(1, 2).contiguous().transpose(1, 2)}
        for leaf in (x, residual, weight, bias):
            leaf.requires_grad_()
        return results(args, backend)

    found, expected = strided("triton"), strided("reference")
    assert found["y"].is_contiguous()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_nan_stays(small_tiles):
    args = to(arguments((1, 5, 7, 7), "relu", False, False), torch.float32)
    with torch.no_grad():
        args["x"][0, 0, 0, 0] = float("nan")
    found = results(args, "triton")["y"]
    assert found[0, 0, 0, 0].isnan() and found.isnan().sum() == 1


@pytest.mark.parametrize("training", [True, False])
def test_runs_are_identical(small_tiles, training):
    args = arguments((1, 10, 10, 13), "silu", True, training)
    first, second = (results(to(args, torch.float32), "triton") for _ in range(2))
    for name, value in first.items():
        assert value is None or torch.equal(value, second[name]), name


@pytest.mark.parametrize("training", [True, False])
def test_opcheck(small_tiles, training):
    args = to(arguments((1, 2, 3, 5), "silu", True, training), torch.float32)
    torch.library.opcheck(torch.ops.mvit3.batch_norm_act_forward, (args["x"], *args["norm"], 1, args["residual"]))
