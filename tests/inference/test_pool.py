"""Global pooling in front of the last product (docs/algebra.md, L): what runs, and that it is the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mvit3_kernels import _native, list_models
from mvit3_kernels.inference.program import IMAGE, Program, emit, pool
from mvit3_kernels.models.network import GlobalPool
from mvit3_kernels.nn import ConvNormAct, GlobalRepresentation, MobileViTV3SeparableBlock, SeparableLayer
from tests.bounds import assert_bound, largest
from tests.inference.test_bfloat16 import with_statistics
from tests.inference.test_fuse import images, network

pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason="the compiled kernels are not built")

SIZES = [(2, 2), (6, 10), (16, 14), (64, 2)]


@torch.no_grad()
def check(run: Program, modules: nn.Module, x: Tensor) -> None:
    """Errs at most twice as much as the modules in float32, both against float64."""
    reference, exact = modules(x), copy.deepcopy(modules).double()(x.double())
    assert_bound({"y": run(x)}, {"y": reference}, {"y": exact}, 1e-6, size=largest, least=0)


def pooled(channels: int, modules: nn.Module) -> Program:
    run = Program(channels)
    run.finish([emit(modules, run, IMAGE)], lambda results: results[0].flatten(1))
    run.pack()
    return run


def separable(dim: int) -> nn.Sequential:
    return GlobalRepresentation([SeparableLayer(dim, 2 * dim)], nn.GroupNorm(1, dim))


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (lambda: ConvNormAct(19, 35, 1, act="identity"), ["global_pool", "pointwise_conv"]),
        (lambda: separable(19), ["separable_attention", "feed_forward", "norm_pool"]),
        (
            lambda: nn.Sequential(separable(19), ConvNormAct(19, 35, 1, act="identity")),
            ["separable_attention", "feed_forward", "norm_pool", "pointwise_conv"],
        ),
        (
            lambda: nn.Sequential(ConvNormAct(19, 24, 1, act="identity"), ConvNormAct(24, 9, 1, act="identity")),
            ["global_pool", "pointwise_conv", "pointwise_conv"],
        ),
        (lambda: ConvNormAct(19, 35, 1, act="silu"), ["pointwise_conv", "global_pool"]),
        (lambda: ConvNormAct(19, 35, 3, act="identity"), ["conv3x3", "global_pool"]),
    ],
    ids=["product", "norm", "norm, product", "two products", "activation", "taps"],
)
def test_what_stands_in_front_of_the_mean(make, kinds, shape):
    torch.manual_seed(0)
    modules = with_statistics(nn.Sequential(make(), GlobalPool()))
    run = pooled(19, modules)
    assert run.kinds == kinds
    check(run, modules, images(3, 19, *shape) + 1.5)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_a_block_with_two_inputs_and_a_residual(shape):
    torch.manual_seed(0)
    block = MobileViTV3SeparableBlock(24, 20, 40, 1)
    modules = with_statistics(nn.Sequential(block, GlobalPool()))
    run = pooled(24, modules)
    assert run.kinds[-4:] == ["norm_pool", "global_pool", "global_pool", "pointwise_conv"]
    check(run, modules, images(2, 24, *shape) - 0.7)


def test_a_map_that_is_read_elsewhere_stays_whole():
    """Its product runs anyway: a second one would be more work."""
    torch.manual_seed(0)
    conv, tail = ConvNormAct(8, 24, 1, act="identity").eval(), ConvNormAct(24, 5, 1).eval()
    run = Program(8)
    x = emit(conv, run, IMAGE)
    run.finish([emit(tail, run, x), pool(run, x)], lambda results: results)
    whole, mean = run(images(2, 8, 6, 6))
    assert run.kinds == ["pointwise_conv", "pointwise_conv", "global_pool"]
    with torch.no_grad():
        y = conv(images(2, 8, 6, 6))
        torch.testing.assert_close(whole.permute(0, 3, 1, 2), tail(y), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mean.flatten(1), y.mean((2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list_models())
def test_every_network(name):
    """Where the last block ends without an activation, the mean stands in front of its product; else behind it."""
    kinds = Program.of(network(name)).kinds
    separable = "separable_attention" in kinds
    assert ("norm_pool" in kinds) == separable
    assert kinds[-2] == ("pointwise_conv" if separable else "global_pool")
    if separable:
        assert kinds.count("layer_norm") == (2 if "v3" in name else 0)


@torch.no_grad()
def test_operations_of_the_last_product():
    """One row of it is left of 64; what else the pooled steps cost is a sum over their maps."""
    program = Program.of(network("mobilevitv2_100"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    table = torch.ops.mvit3.engine_regions(program._engine, torch.empty(1, 3, 256, 256))
    torch.set_num_threads(threads)
    work = {int(step): table[table[:, 0] == step, 1:].sum().item() for step in table[:, 0]}
    last = len(program.kinds)
    assert work[last - 1] == 256 * 512 and work[last] == 512 * 1008  # a thousand classes in whole vectors
    assert work[last - 2] == 2 * 3 * 64 * 256
