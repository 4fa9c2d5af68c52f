# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""The Triton kernels of every op but batch_norm_act on a GPU: shapes of the networks at 256x256, and odd ones."""

import pytest
import torch

from mvit3_kernels import backend
from mvit3_kernels.ops import (
    BatchNorm,
    ConvNorm,
    LayerNorm,
    Linear,
    depthwise_conv,
    dropout,
    feed_forward,
    global_representation,
    inverted_residual,
    norm_linear,
    patch_attention,
    pointwise_conv,
    pointwise_fusion,
    separable_attention,
)
from tests.ops import (
    test_depthwise_conv_triton,
    test_dropout_cpu,
    test_feed_forward_cpu,
    test_global_representation_triton,
    test_inverted_residual_triton,
    test_norm_linear_cpu,
    test_patch_attention_triton,
    test_pointwise_conv_cpu,
    test_pointwise_fusion_cpu,
    test_separable_attention_cpu,
)
from tests.ops.inputs import mapped
from tests.ops.kernel import KernelTester
from tests.ops.triton_kernel import TritonResults

pytestmark = pytest.mark.usefixtures("poisoned")


class GpuKernel(TritonResults):
    cpu: type  # where the arguments of the same op are made
    registration_tests = KernelTester.registration_tests

    def __init_subclass__(cls):
        cls.arguments, cls.registered = (staticmethod(getattr(cls.cpu, name)) for name in ("arguments", "registered"))

    def make(self, *arguments):
        return mapped(super().make(*arguments), lambda _, t: t.cuda())

    @pytest.fixture(autouse=True)
    def unpoisoned_where_torch_compares(self, request):
        if "registration" in request.node.name or "compiles" in request.node.name:
            torch.use_deterministic_algorithms(False)  # rounding is compared there, not NaN in memory


class TestPatchAttention(GpuKernel):
    op = staticmethod(patch_attention)
    maps = ("qkv",)
    cpu = test_patch_attention_triton
    one_pixel = {"patch_size": (1, 1)}
    shapes = (
        (2, 6, 4, 2, 9),
        (4, 32, 32, 4, 36),
        (4, 16, 16, 4, 48),
        (4, 8, 8, 4, 60),
        (2, 14, 22, 4, 20),
        (1, 16, 12, 1, 128),
        (1, 64, 128, 1, 64),
    )
    options = {"plain": {}, "dropout": {"dropout": 0.3}, "one-position": {"patch": (1, 1)}}


class TestNormLinear(GpuKernel):
    op = staticmethod(norm_linear)
    cpu = test_norm_linear_cpu.TestNormLinearCpu
    shapes = (
        (2, 3, 5, 7, 9),
        (8, 32, 32, 144, 432),
        (8, 16, 16, 192, 576),
        (8, 8, 8, 240, 720),
        (2, 7, 13, 33, 70),
        (2, 8, 8, 512, 512),
    )
    options = cpu.options


class TestFeedForward(GpuKernel):
    op = staticmethod(feed_forward)
    cpu = test_feed_forward_cpu.TestFeedForwardCpu
    shapes = (
        (2, 3, 5, 7, 9),
        (8, 32, 32, 144, 288),
        (8, 16, 16, 192, 384),
        (8, 8, 8, 240, 480),
        (2, 7, 13, 33, 70),
        (2, 8, 8, 256, 512),
    )
    options = cpu.options


class TestDropout(GpuKernel):
    op = staticmethod(dropout)
    maps = ("x", "residual")
    cpu = test_dropout_cpu.TestDropoutCpu
    shapes = ((2, 3, 5, 7), (8, 32, 32, 144), (8, 8, 8, 240), (2, 7, 13, 33))
    options = cpu.options


class TestPointwiseConv(GpuKernel):
    op = staticmethod(pointwise_conv)
    maps = ("x", "residual")
    cpu = test_pointwise_conv_cpu.TestPointwiseConvCpu
    shapes = (
        (2, 3, 5, 7, 9),
        (8, 32, 32, 144, 144),
        (8, 8, 8, 320, 240),
        (8, 8, 8, 320, 1280),
        (2, 9, 7, 96, 50),
        (1, 13, 17, 1, 2),
    )
    options = cpu.options


class TestPointwiseFusion(GpuKernel):
    op = staticmethod(pointwise_fusion)
    maps = ("a", "b", "residual")
    cpu = test_pointwise_fusion_cpu.TestPointwiseFusionCpu
    shapes = ((2, 3, 5, 7, 2, 9), (8, 32, 32, 144, 128, 128), (8, 16, 16, 192, 256, 256), (8, 8, 8, 240, 320, 320))
    options = cpu.options


class TestDepthwiseConv(GpuKernel):
    op = staticmethod(depthwise_conv)
    cpu = test_depthwise_conv_triton.TestDepthwiseConvTriton
    shapes = ((2, 5, 4, 9), (8, 64, 64, 64), (8, 32, 32, 512), (8, 16, 16, 256), (4, 8, 8, 1024), (2, 7, 13, 33))
    options = {
        "silu": {"act": "silu"},
        "large-mean-stride": {"act": "silu", "mean": 10.0, "stride": 2},
        "dilation": {"act": "relu", "dilation": 2},
        "frozen": {"training": False},
        "frozen-stride-dilation": {"training": False, "stride": 2, "dilation": 3},
    }


class TestSeparableAttention(GpuKernel):
    op = staticmethod(separable_attention)
    cpu = test_separable_attention_cpu.TestSeparableAttentionCpu
    shapes = (
        (2, 4, 6, 5, (2, 2)),
        (8, 32, 32, 128, (2, 2)),
        (8, 16, 16, 192, (2, 2)),
        (8, 8, 8, 256, (2, 2)),
        (2, 8, 8, 512, (2, 2)),
        (1, 7, 13, 33, (1, 1)),
    )
    options = cpu.options
    one_pixel = {"patch_size": (1, 1)}


class TestInvertedResidual(GpuKernel):
    op = staticmethod(inverted_residual)
    cpu = test_inverted_residual_triton.TestInvertedResidualTriton
    shapes = (
        (2, 9, 7, 5, 9, 5),
        (4, 64, 64, 16, 64, 32),
        (4, 32, 32, 64, 256, 64),
        (8, 32, 32, 128, 512, 256),
        (8, 16, 16, 256, 1024, 320),
        (8, 16, 16, 384, 768, 512),
    )
    options = {"training": {}, "stride": {"stride": 2, "act": "relu"}, "large-mean": {"mean": 10.0, "dilation": 2}}


class TestInvertedResidualCuda(GpuKernel):
    """The fused kernels in CUDA C++, which take 16 bits: what KernelTester does in float32 is left to the Triton
    way."""

    op = staticmethod(inverted_residual)
    backend = "cuda"
    cpu = test_inverted_residual_triton.TestInvertedResidualTriton
    shapes = ((2, 9, 7, 5, 9, 5), (4, 64, 64, 16, 64, 32), (4, 32, 32, 64, 256, 64), (4, 33, 31, 64, 256, 128))
    options = {"training": {}, "stride": {"stride": 2}, "evaluation": {"training": False}}
    test_maps_that_are_too_large = test_small_batches = test_strides_do_not_matter = (
        test_nan_and_infinity_reach_the_results
    ) = None
    test_arguments_are_not_changed = test_registration_of_the_kernel = test_compiles_whole = test_what_it_refuses = None
    test_second_derivative_is_refused = test_runs_are_identical = None

    @pytest.fixture(autouse=True)
    def built(self):
        from mvit3_kernels import _native

        if reason := _native.cuda_why_not(torch.empty(0, device="cuda", dtype=torch.bfloat16)):
            pytest.skip(reason)

    test_bound = None

    @pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
    def test_bound_in_16_bits(self, shape, option, half):
        dtype, arguments = half, mapped(self.make(shape, option), lambda _, t: t.to(half).double())
        if option == "evaluation":  # without gradients
            truth = self.evaluated("reference", arguments, torch.float64)
            reference, found = (self.evaluated(name, arguments, dtype) for name in ("reference", "cuda"))
        else:
            truth = self.results("reference", arguments, torch.float64)
            reference, found = (self.results(name, arguments, dtype, torch.float32) for name in ("reference", "cuda"))
            again = self.results("cuda", arguments, dtype, torch.float32)
            for name, t in self.results("cuda", arguments, dtype, torch.float32).items():
                assert torch.equal(t, again[name]), name
        self.check(found, reference, truth, dtype)

    def evaluated(self, name, arguments, dtype):
        given = mapped(
            arguments, lambda label, t: t.to(dtype if label == "x" or dtype is torch.float64 else torch.float32)
        )
        with backend(name), torch.no_grad():
            return {"y": inverted_residual(**given)[0]}


class TestGlobalRepresentation(GpuKernel):
    """The op of a whole stage, of calls without gradients, and the kernels that spread a layer of few tokens over the
    GPU; all others run as the ops of the layers."""

    op = staticmethod(global_representation)
    cpu = test_global_representation_triton.TestGlobalRepresentationTriton
    shapes = ((140, 4, 6, 9, 10), (140, 16, 16, 192, 384), (140, 8, 8, 240, 480), (140, 8, 8, 256, 512))
    shapes += ((1, 32, 32, 144, 288), (2, 8, 8, 240, 480))
    options = {
        "heads": {"num_heads": 3},
        "separable": {"per_sample": True, "conv": True},
        "separable-per-token": {"layers": 1, "patch_size": (2, 1), "bias": False, "final": False},
    }
    one_pixel = {"patch_size": (1, 1)}
    test_second_derivative_is_refused = test_registration_of_the_kernel = None  # there are no gradients

    def make(self, shape, option=None, start=0):
        if option == "heads" and shape[3] % 3:
            pytest.skip(f"{shape[3]} channels are not three heads")
        return super().make(shape, option, start)

    def results(self, name, arguments, dtype=torch.float32, parameters=None):
        def leaf(label, t):
            return t.detach().to(dtype if label == "x" else parameters or dtype) if t.is_floating_point() else t

        with backend(name), torch.no_grad():
            return {"y": self.op(**mapped(arguments, leaf))}


def enough_memory(gigabytes):
    if torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")
    torch.use_deterministic_algorithms(False)  # filling memory takes as long as the test


def close_at_the_end(call, x):
    """The last sample of many is what it is alone."""
    with backend("triton"):
        torch.testing.assert_close(call(x)[-1:], call(x[-1:].clone()), rtol=0, atol=0)


@pytest.mark.parametrize("per_sample", [False, True])
def test_more_than_2_to_the_31_elements_of_rows(per_sample):
    enough_memory(40)
    x = torch.randn(520, 256, 256, 64, device="cuda", dtype=torch.bfloat16)
    norm = LayerNorm(torch.rand(64, device="cuda"), torch.rand(64, device="cuda"), per_sample=per_sample)
    first, second = (Linear(torch.randn(64, 64, device="cuda") / 8) for _ in range(2))
    close_at_the_end(lambda x: norm_linear(x, norm, first), x)
    close_at_the_end(lambda x: feed_forward(x, norm, first, second), x)
    close_at_the_end(lambda x: pointwise_conv(x, first, act="silu")[0], x)
    qkv = Linear(torch.randn(129, 64, device="cuda") / 8)
    close_at_the_end(lambda x: separable_attention(x, norm, qkv, second), x)


def evaluated(channels):
    """A norm in evaluation."""
    one, zero = torch.ones(channels, device="cuda"), torch.zeros(channels, device="cuda")
    return BatchNorm(one, zero, zero, one, False)


@pytest.mark.parametrize("stride", [1, 2])
def test_more_than_2_to_the_31_elements_of_convolutions(stride):
    enough_memory(60)
    x = torch.randn(520, 256, 256, 64, device="cuda", dtype=torch.bfloat16)
    taps = torch.randn(64, 1, 3, 3, device="cuda")
    with torch.no_grad():
        close_at_the_end(lambda x: depthwise_conv(x, taps, evaluated(64), "silu", stride)[0], x)
        del x
        x = torch.randn(130, 256, 256, 64, device="cuda", dtype=torch.bfloat16)  # expanded it has more
        wide, wide_taps, narrow = (
            torch.randn(shape, device="cuda") / 8 for shape in ((256, 64), (256, 1, 3, 3), (64, 256))
        )
        parts = (ConvNorm(wide, evaluated(256)), ConvNorm(wide_taps, evaluated(256)), ConvNorm(narrow, evaluated(64)))
        close_at_the_end(lambda x: inverted_residual(x, *parts, stride=stride)[0], x)


def test_more_than_2_to_the_31_elements_of_attention():
    enough_memory(40)
    qkv = torch.randn(11000, 32, 64, 96, device="cuda", dtype=torch.bfloat16)
    close_at_the_end(lambda qkv: patch_attention(qkv, 2), qkv)


def test_recorded_configurations_are_offered():
    """Every record for this GPU is one of those that its kernel lists, and no kernel ignores its record."""
    from benchmarks.gpu_cases import on_backend, op_cases
    from mvit3_kernels.ops import tuning

    with tuning.watch() as seen:
        for case in op_cases(2, "cuda"):
            case.step(on_backend(case.backends[0], case.call))()
    offered = {choice.key: choice.offered for choice in seen}
    assert len(offered) > 20
    for key, config in tuning.recorded().get(tuning.architecture(torch.empty(0, device="cuda")), {}).items():
        assert key in offered and config in offered[key], key
