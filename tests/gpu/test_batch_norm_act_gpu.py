import pytest
import torch

from mvit3_kernels import backend
from mvit3_kernels.ops import BatchNorm, batch_norm_act
from tests.bounds import check_bound, to
from tests.ops.batch_norm_act_cases import arguments, results
from tests.ops.inputs import DTYPES

pytestmark = pytest.mark.usefixtures("poisoned")
# Maps of the networks at 256x256, and odd ones.
SHAPES = [
    (16, 128, 128, 16), (16, 64, 64, 64), (16, 32, 32, 96), (16, 16, 16, 160), (16, 8, 8, 640), (1, 8, 8, 320),
    (1, 256, 256, 32), (64, 1, 1, 320), (2, 7, 13, 7), (3, 11, 5, 1), (2, 9, 30, 40), (5, 3, 3, 1024),
]  # fmt: skip


def on_gpu(args, dtype=torch.bfloat16):
    return to(args, dtype, torch.float32, "cuda")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("act", "residual"), [("identity", True), ("silu", False), ("silu", True), ("relu", False)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bound(shape, dtype, act, residual, training):
    check_bound(results, arguments(shape, act, residual, training), "triton", dtype, torch.float32, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_the_dtype_of_x(dtype):
    check_bound(results, arguments((8, 16, 16, 160), "silu", True, True), "triton", dtype, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_mean(dtype):
    args = arguments((8, 32, 32, 96), "silu", False, True, mean=100.0)
    found = check_bound(results, args, "triton", dtype, torch.float32, "cuda")
    exact = args["x"].detach().to("cuda", dtype).double()
    torch.testing.assert_close(found["var"].double(), exact.var((0, 1, 2), correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_batch_0(training):
    found = results(on_gpu(arguments((0, 4, 4, 16), "silu", True, training)), "triton")
    assert found["y"].shape == (0, 4, 4, 16) and not found["dweight"].any() and not found["dbias"].any()


def test_strided_map():
    args = on_gpu(arguments((4, 16, 16, 64), "silu", False, True))
    x = args["x"].detach()
    strided = {**args, "x": x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()}
    expected = results(on_gpu(arguments((4, 16, 16, 64), "silu", False, True)), "triton")
    for name, value in results(strided, "triton").items():
        assert value is None or torch.equal(value, expected[name]), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(32, 64, 64, 64), (32, 8, 8, 640)])
def test_runs_are_identical(shape, training):
    args = arguments(shape, "silu", True, training)
    first = results(on_gpu(args), "triton")
    for _ in range(3):
        for name, value in results(on_gpu(args), "triton").items():
            assert value is None or torch.equal(value, first[name]), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, training):
    args = on_gpu(arguments((2, 5, 7, 24), "silu", True, training), dtype)
    # Comparing compiled with eager is a matter of rounding, not of NaN in memory.
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(torch.ops.mvit3.batch_norm_act_forward, (args["x"], *args["norm"], 1, args["residual"]))


@pytest.mark.parametrize("training", [True, False])
def test_graph_capture(training):
    """Forward and backward can be captured and replayed on new data, and never wait for the GPU."""
    args = on_gpu(arguments((8, 16, 16, 96), "silu", True, training))
    x, norm, residual, dy = args["x"], args["norm"], args["residual"], args["dy"]

    def step():
        with backend("triton"):
            y, _ = batch_norm_act(x, norm, "silu", residual)
        return y.detach(), *torch.autograd.grad(y, (x, norm.weight, norm.bias, residual), dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        dy.copy_(torch.randn_like(dy))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)


def test_compile_does_not_break_the_graph():
    args = on_gpu(arguments((4, 16, 16, 64), "silu", True, True))

    def call(x, weight, bias, residual):
        return batch_norm_act(x, BatchNorm(weight, bias, None, None, True), "silu", residual)[0]

    inputs = (args["x"], args["norm"].weight, args["norm"].bias, args["residual"])
    y = torch.compile(call, fullgraph=True)(*inputs)
    gradients = torch.autograd.grad(y, inputs, args["dy"])
    expected = call(*inputs)
    assert torch.equal(y, expected)
    for found, other in zip(gradients, torch.autograd.grad(expected, inputs, args["dy"]), strict=True):
        assert torch.equal(found, other)


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    shape, channels = (520, 256, 256, 64), 64
    torch.use_deterministic_algorithms(False)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    weight, bias, mean, var = torch.rand(4, channels, device="cuda").unbind()
    norm = BatchNorm(weight, bias, mean, var + 0.5, False)
    with backend("triton"):
        y, _ = batch_norm_act(x, norm, "silu")
        with backend("reference"):
            last, _ = batch_norm_act(x[-1:], norm, "silu")
        torch.testing.assert_close(y[-1:], last, rtol=2e-2, atol=2e-2)
        del y
        _, moments = batch_norm_act(x, norm._replace(training=True), "silu")
    torch.testing.assert_close(moments.mean, torch.zeros_like(mean), rtol=0, atol=1e-3)
    torch.testing.assert_close(moments.var, torch.ones_like(mean), rtol=1e-3, atol=0)
