"""Chains: steps that work on every row alone run tile by tile in one loop, and the maps between them exist in tiles
alone. Each result is that of the steps one by one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from mvit3_kernels import _native
from mvit3_kernels.inference.program import IMAGE, Program, emit
from mvit3_kernels.nn import ConvNormAct, GlobalRepresentation, TransformerLayer
from tests.inference.test_bfloat16 import HALF, with_statistics
from tests.inference.test_fuse import images

pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason="the compiled kernels are not built")

DTYPES = [torch.float32, *([HALF] if _native.isa() == "avx512_bf16" else [])]
SIZES = [(1, 1, 1), (1, 10, 6), (3, 13, 30), (2, 34, 32)]  # batch, height, width: up to 2176 rows


@pytest.fixture(params=[1, 2, 3])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def results(program: Program, x: torch.Tensor, ending: int) -> list[torch.Tensor]:
    return torch.ops.mvit3.engine_run(program._engine, x, ending)


def check(modules: list[nn.Module], dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """The last map alone, where the maps in front of it are nobody's, and every map that an output may be."""
    program, x = Program(3, dtype), IMAGE
    for module in modules:
        x = emit(module, program, x)
    everything = [i for i, step in enumerate(program._steps, 1) if step.kind != "norm_qkv"]  # of bfloat16
    program.finish([x], lambda maps: maps)
    program.finish(everything, lambda maps: maps)
    program.pack()
    image = images(size[0], 3, *size[1:])
    assert torch.equal(results(program, image, 0)[0], results(program, image, 1)[-1])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_chain_reads_lives_until_its_end(threads, dtype, size):
    """Its last map, which a convolution reads, is larger than what the first step read long before."""
    rows = [ConvNormAct(a, b, 1) for a, b in itertools.pairwise([16, 23, 40, 17, 65])]
    modules = (ConvNormAct(3, 16, 3), *rows, ConvNormAct(65, 8, 3))
    check([with_statistics(module) for module in modules], dtype, size)


@pytest.mark.parametrize("size", [(1, 2, 2), (1, 10, 12), (3, 14, 30), (2, 34, 32)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transformers(threads, dtype, size):
    """Projection, its residual, feed-forward and the next layer's norm in one loop, attention between them."""
    layers = [TransformerLayer(36, 72, 4), TransformerLayer(36, 50, 4)]
    tokens = GlobalRepresentation(layers, nn.LayerNorm(36))
    modules = (ConvNormAct(3, 20, 3), ConvNormAct(20, 36, 1, act="identity"), tokens, ConvNormAct(36, 21, 1))
    check([with_statistics(module) for module in modules], dtype, size)
