"""Outputs and gradients of the blocks against published values are in tests/models/test_golden.py."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from mvit3_kernels.nn import MobileViTBlock, MobileViTV2Block, MobileViTV3Block, MobileViTV3SeparableBlock

BLOCKS = [MobileViTBlock, MobileViTV2Block, MobileViTV3Block, MobileViTV3SeparableBlock]
SEPARABLE = (MobileViTV2Block, MobileViTV3SeparableBlock)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 8), (7, 13)])
def test_any_size(block, size):
    module = block(12, 8, 16, 1).eval()
    y = module(torch.randn(2, 12, *size))
    even = tuple(side + side % 2 for side in size)
    assert y.shape == (2, 12, *(even if block in SEPARABLE else size))
    assert y.isfinite().all()


@pytest.mark.parametrize("block", BLOCKS)
def test_other_patch_sizes_and_batch_zero(block):
    module = block(12, 8, 16, 1, patch_size=(3, 1)).eval()
    assert module(torch.randn(2, 12, 6, 5)).shape == (2, 12, 6, 5)
    assert module(torch.randn(0, 12, 6, 5)).shape == (0, 12, 6, 5)


@pytest.mark.parametrize("block", BLOCKS)
def test_gradients_reach_every_parameter_and_copies_are_independent(block):
    module = block(12, 8, 16, 2).train()
    twin, pickled = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    x = torch.randn(2, 12, 5, 6)
    want = twin(x)
    module(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert all(p.grad is None for p in twin.parameters())
    assert torch.equal(pickled(x), want)
