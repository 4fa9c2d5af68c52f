"""Whole networks in training on the CPU kernels: held to twice the reference's error, both against float64."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import mvit3_kernels
from mvit3_kernels import _native, create_model
from tests import golden
from tests.bounds import assert_bound, half_a_rounding

pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))


def step(model: nn.Module, x: Tensor, backend: str | None = None) -> dict[str, Tensor]:
    """Logits, running statistics, and the gradients of the images and of every parameter."""
    model, x = copy.deepcopy(model).to(x.dtype), x.clone().requires_grad_()
    with nullcontext() if backend is None else mvit3_kernels.backend(backend):
        y = model(x)
        (y * golden.image(1, *y.shape).to(y)).sum().backward()
    statistics = {name: t for name, t in model.named_buffers() if "running" in name}
    return {
        "y": y.detach(),
        "d x": x.grad,
        **statistics,
        **{f"d {name}": p.grad for name, p in model.named_parameters()},
    }


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050", "mobilevitv3_xxs", "mobilevitv3_050"])
def test_training_step(name):
    """The last stage of these images is 2 x 3 pixels: some families resize it to whole patches."""
    model = golden.fill(create_model(name, drop_rate=0.0, proj_drop_rate=0.0)).train()
    x = golden.image(0, 4, 3, 64, 96)
    truth = step(model, x.double(), "reference")
    found = step(model, x)
    assert found["y"].dtype == torch.float32
    assert_bound(found, step(model, x, "reference"), truth, half_a_rounding(torch.float32))
