# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""The Triton kernels of every op but batch_norm_act on a GPU: shapes of the networks at 256x256, and odd ones."""

import itertools

import pytest
import torch

from mvit3_kernels import backend
from mvit3_kernels.ops import LayerNorm, Linear, feed_forward, norm_linear, patch_attention, pointwise_conv, pointwise_fusion
from tests.ops import (
    test_feed_forward_cpu,
    test_norm_linear_cpu,
    test_patch_attention_triton,
    test_pointwise_conv_cpu,
    test_pointwise_fusion_cpu,
)
from tests.ops.inputs import mapped
from tests.ops.triton_kernel import TritonResults

pytestmark = pytest.mark.usefixtures("poisoned")


class GpuKernel(TritonResults):
    cpu: type  # where the arguments of the same op are made

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
    shapes = ((2, 3, 5, 7, 9), (8, 32, 32, 144, 432), (8, 16, 16, 192, 576), (8, 8, 8, 240, 720), (2, 7, 13, 33, 70), (2, 8, 8, 512, 512))
    options = cpu.options


class TestFeedForward(GpuKernel):
    op = staticmethod(feed_forward)
    cpu = test_feed_forward_cpu.TestFeedForwardCpu
    shapes = ((2, 3, 5, 7, 9), (8, 32, 32, 144, 288), (8, 16, 16, 192, 384), (8, 8, 8, 240, 480), (2, 7, 13, 33, 70), (2, 8, 8, 256, 512))
    options = cpu.options


class TestPointwiseConv(GpuKernel):
    op = staticmethod(pointwise_conv)
    maps = ("x", "residual")
    cpu = test_pointwise_conv_cpu.TestPointwiseConvCpu
    shapes = ((2, 3, 5, 7, 9), (8, 32, 32, 144, 144), (8, 8, 8, 320, 240), (8, 8, 8, 320, 1280), (2, 9, 7, 96, 50), (1, 13, 17, 1, 2))
    options = cpu.options


class TestPointwiseFusion(GpuKernel):
    op = staticmethod(pointwise_fusion)
    maps = ("a", "b", "residual")
    cpu = test_pointwise_fusion_cpu.TestPointwiseFusionCpu
    shapes = ((2, 3, 5, 7, 2, 9), (8, 32, 32, 144, 128, 128), (8, 16, 16, 192, 256, 256), (8, 8, 8, 240, 320, 320))
    options = cpu.options


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


def test_more_than_2_to_the_31_elements_of_attention():
    enough_memory(40)
    qkv = torch.randn(11000, 32, 64, 96, device="cuda", dtype=torch.bfloat16)
    close_at_the_end(lambda qkv: patch_attention(qkv, 2), qkv)


def test_recorded_configurations_are_offered():
    """Every record for this GPU is one of those that its kernel lists, and no kernel ignores its record."""
    import argparse

    from benchmarks.gpu_baselines import _on, _op_cases, _spatial_cases, _step
    from mvit3_kernels.ops import tuning

    options = argparse.Namespace(device="cuda", tiny=False)
    with tuning.watch() as seen:
        for case in itertools.chain(_op_cases(2, options), _spatial_cases(2, options)):
            _step(_on(case.backends[0], case.call), case.leaves, case.mode == "step")()
    offered = {choice.key: choice.offered for choice in seen}
    assert len(offered) > 20
    for key, config in tuning.recorded().get(tuning.architecture(torch.empty(0, device="cuda")), {}).items():
        assert key in offered and config in offered[key], key
