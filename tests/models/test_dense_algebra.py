"""Identities I and J of docs/algebra.md against the modules as they are written, forward and backward, in float64; and
that the heads use them only where nothing asks for the modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvit3_kernels.models.segmentation import ASPP, PSP

SIZES = ((2, 9, 12), (3, 6, 6), (1, 2, 1), (2, 1, 7))  # batch, height, width: also those that a token covers alone


def pyramid(kind: str, training: bool) -> nn.Module:
    torch.manual_seed(0)
    module = ASPP(12, 10, (1, 2, 30), nn.Dropout(0.0)) if kind == "aspp" else PSP(64, 10, 0.0)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 2)
            nn.init.normal_(m.bias)
    return module.double().train(training)


def run(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The output, all gradients and all buffers after a step."""
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(dy)
    return [y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()]


def hooked(module: nn.Module, name: str) -> nn.Module:
    module = copy.deepcopy(module)
    module.get_submodule(name).register_forward_hook(lambda module, inputs, output: None)
    return module


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind, name", [("aspp", "aspp_layer.project"), ("psp", "fusion.0")])
def test_pooled_branches_join_before_they_are_up_sampled(kind, name, training):
    module = pyramid(kind, training)
    channels = 12 if kind == "aspp" else 64
    for batch, height, width in SIZES:
        if training and (batch == 1 or batch * height * width < 8):
            continue  # a norm of one value of each channel
        x, dy = (torch.randn(batch, c, height, width, dtype=torch.float64) for c in (channels, 10))
        plain = hooked(module, name)
        assert module.why_modules() is None and plain.why_modules().startswith(name)
        for got, want in zip(run(copy.deepcopy(module), x + 3, dy), run(plain, x + 3, dy), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind, name", [("aspp", "aspp_layer.project"), ("psp", "fusion.0")])
def test_checkpointing_counts_a_batch_as_often_as_the_modules(kind, name, reentrant):
    module = pyramid(kind, True)
    x = torch.randn(4, 12 if kind == "aspp" else 64, 6, 6, dtype=torch.float64, requires_grad=True)
    buffers = []
    for each in (module, hooked(module, name)):
        y = checkpoint(each, x, use_reentrant=reentrant)
        y.sum().backward()
        buffers.append(dict(each.named_buffers()))
    assert buffers[1][next(key for key in buffers[1] if key.endswith("tracked"))] == 2
    torch.testing.assert_close(*buffers, rtol=1e-9, atol=1e-9)


CHANGES = {
    "aspp_layer.project": lambda m: setattr(m.aspp_layer["project"].block, "norm", nn.SyncBatchNorm(10)),
    "fusion.0": lambda m: setattr(m.fusion[0].block.conv, "stride", (2, 2)),
}


@pytest.mark.parametrize("kind, name", [("aspp", "aspp_layer.project"), ("psp", "fusion.0")])
def test_changed_modules_are_called(kind, name):
    module = pyramid(kind, False)
    assert module.why_modules() is None
    CHANGES[name](module)
    assert module.why_modules() is not None
    if kind == "psp":
        assert module(torch.randn(2, 64, 8, 8, dtype=torch.float64)).shape == (2, 10, 4, 4)


def test_low_precision_is_that_of_the_modules():
    """Under autocast the sum of two products is not worse than one product of the concatenation."""
    for kind, name, channels in (("aspp", "aspp_layer.project", 12), ("psp", "fusion.0", 64)):
        module = pyramid(kind, True)
        x = torch.randn(4, channels, 12, 12, dtype=torch.float64)
        exact = copy.deepcopy(module)(x)
        module = module.float()
        with torch.autocast("cpu", torch.bfloat16):
            plain, ours = hooked(module, name)(x.float()), module(x.float())
        error, allowed = ((y.double() - exact).norm() / exact.norm() for y in (ours, plain))
        assert error < 1.5 * allowed, kind
