# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""The CUDA C++ kernels of the depth-wise convolution on a GPU: shapes of the networks at 256x256, and odd ones."""

import pytest
import torch
from torch import Tensor

from mvit3_kernels import _native
from mvit3_kernels.ops import depthwise_conv
from tests.cuda import emulation
from tests.gpu.replays import check_graph, check_repeats
from tests.ops import test_depthwise_conv_triton
from tests.ops.test_depthwise_conv_cuda import CASES, arguments, check

from .test_kernels_gpu import GpuKernel

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(_native.cuda_why_not() is not None, reason=str(_native.cuda_why_not())),
]

NAMES = ("filter", "backward")
STAGES = {
    f"{shape}, stride {stride}, dilation {dilation}": (shape, stride, dilation, dtype, torch.float32)
    for shape, stride, dilation, dtype in (
        ((4, 128, 128, 64), 1, 1, torch.bfloat16),
        ((4, 128, 128, 128), 2, 1, torch.bfloat16),
        ((4, 64, 64, 256), 1, 1, torch.float16),
        ((4, 32, 32, 512), 2, 1, torch.float16),
        ((8, 8, 8, 640), 1, 1, torch.bfloat16),
        ((8, 16, 16, 1024), 1, 2, torch.bfloat16),
        ((4, 32, 32, 144), 1, 1, torch.float32),
    )
}


def on_gpu(*case) -> dict:
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in arguments(*case).items()}


def run(name: str, a: dict) -> dict[str, Tensor]:
    geometry = (a["stride"], a["dilation"])
    if name == "filter":
        z, *moments = torch.ops.mvit3.depthwise_conv_filter(a["x"], a["weight"], *geometry, 100)
        return {"z": z, **emulation.joined(*moments)}
    results = torch.ops.mvit3.depthwise_conv_filter_backward(a["dz"], a["x"], a["weight"], *geometry)
    return dict(zip(("dx", "dweight"), results, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", [*CASES, *STAGES])
def test_bound(name, case):
    check(name, on_gpu(*{**CASES, **STAGES}[case]), run)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_meaning_of_the_triton_primitives(name, stride):
    from mvit3_kernels.ops.depthwise_conv import triton

    a = on_gpu((4, 31, 33, 96), stride, 1, torch.bfloat16, torch.float32)
    found, primitive = run(name, a), triton.depthwise if name == "filter" else triton.depthwise_backward
    maps = (a["x"],) if name == "filter" else (a["dz"], a["x"])
    for value, other in zip(found.values(), primitive(*maps, a["weight"], stride, 1), strict=True):
        assert value.dtype == other.dtype and value.shape == other.shape and value.stride() == other.stride()
        small = value.dtype is torch.bfloat16
        torch.testing.assert_close(value, other, rtol=2e-2 if small else 1e-3, atol=2e-2 if small else 1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 5, 4, 8), (2, 0, 4, 8)], ids=str)
def test_empty_maps(name, shape):
    for value in run(name, on_gpu(shape, 1, 1, torch.bfloat16, torch.float32)).values():
        assert not value.any()


@pytest.mark.parametrize("name", NAMES)
def test_repeats_to_the_bit_and_on_another_stream(name):
    a = on_gpu((8, 64, 64, 256), 1, 1, torch.bfloat16, torch.float32)
    check_repeats(lambda: run(name, a))


@pytest.mark.parametrize("name", NAMES)
def test_in_a_graph(name):
    a = on_gpu((2, 32, 32, 256), 1, 1, torch.bfloat16, torch.float32)
    check_graph(lambda: run(name, a))


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    a = on_gpu((1, 64, 64, 64), 1, 1, torch.bfloat16, torch.float32)
    want, batch = {name: run(name, a) for name in NAMES}, 2**31 // (64 * 64 * 64) + 2
    many = {k: v.expand(batch, -1, -1, -1).contiguous() if k in ("x", "dz") else v for k, v in a.items()}
    assert many["x"].numel() > 2**31
    for name, key in (("filter", "z"), ("backward", "dx")):
        assert torch.equal(run(name, many)[key][-1], want[name][key][0]), name


class TestDepthwiseConv(GpuKernel):
    """The op whose last pass of backward is one of them; the rest are its Triton kernels."""

    backend = "cuda"
    op = staticmethod(depthwise_conv)
    cpu = test_depthwise_conv_triton.TestDepthwiseConvTriton
    shapes = ((2, 5, 4, 9), (2, 7, 13, 40), (8, 32, 32, 256), (8, 8, 8, 640))
    options = {
        "silu": {"act": "silu"},
        "stride": {"act": "relu", "stride": 2},
        "frozen-dilation": {"training": False, "dilation": 2},
    }
    test_maps_that_are_too_large = None  # of the backend "triton"


TestDepthwiseConv.registered = staticmethod(lambda given: test_depthwise_conv_triton.registered(**given, way="_cuda"))
