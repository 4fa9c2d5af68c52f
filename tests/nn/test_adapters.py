"""What libraries do to modules takes effect: adapters, pruning, quantisation, weights that come at the call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from mvit3_kernels import fuse
from tests.inference.test_fuse import images

from .networks import FAMILIES, network


class LoRA(nn.Module):
    """A low-rank adapter as peft has it."""

    def __init__(self, base: nn.Module, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        convolution = isinstance(base, nn.Conv2d)
        inputs, outputs = (
            (base.in_channels, base.out_channels) if convolution else (base.in_features, base.out_features)
        )
        make = (
            (lambda a, b: nn.Conv2d(a, b, 1, bias=False)) if convolution else (lambda a, b: nn.Linear(a, b, bias=False))
        )
        self.down, self.up = make(inputs, rank), make(rank, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_take_effect_and_learn(name):
    torch.manual_seed(0)
    model, x = network(name, num_classes=10), images(2, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
    adapters = []
    for module in list(model.modules()):
        for key, child in list(module.named_children()):
            pointwise = isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1)
            if isinstance(child, nn.Linear) or pointwise:
                adapters.append(LoRA(child))
                setattr(module, key, adapters[-1])
    after = model(x)
    assert len(adapters) > 20 and (after - before).norm() > 1e-2 * before.norm()
    after.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.norm() > 0
        for adapter in adapters
        for p in (adapter.down.weight, adapter.up.weight)
    )


def test_pruned_weights_train_for_several_steps():
    model, x = network("mobilevitv3_xxs", num_classes=10), images(2, 3, 64, 64)
    prune.l1_unstructured(model.layer_3[1].global_rep[0].pre_norm_mha[1].qkv_proj, "weight", 0.5)
    prune.l1_unstructured(model.layer_1[0].block.exp_1x1.block.conv, "weight", 0.5)
    for _ in range(2):
        model(x).square().sum().backward()


def test_a_quantised_linear_is_called():
    model, x = network("mobilevitv3_xxs", num_classes=10), images(1, 3, 64, 64)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
    with torch.no_grad():
        want, got = model(x), quantised(x)
        assert 0 < (got - want).norm() < 0.1 * want.norm()
        assert torch.equal(fuse(quantised)(x), got)


def test_weights_that_come_at_the_call_are_used():
    """What accelerate's cpu_offload does: weights are elsewhere until the module's own forward fetches them."""
    model, x = network("mobilevitv3_xxs", num_classes=10), images(1, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        for module in model.modules():
            kept = dict(module._parameters)
            if not any(t is not None for t in kept.values()):
                continue
            forward = module.forward

            def fetching(x, module=module, kept=kept, forward=forward):
                module._parameters.update(kept)
                y = forward(x)
                module._parameters.update({key: None if t is None else t.to("meta") for key, t in kept.items()})
                return y

            module._parameters.update(
                {key: None if t is None else nn.Parameter(t.to("meta")) for key, t in kept.items()}
            )
            module.forward = fetching
        assert torch.allclose(model(x), want, rtol=1e-4, atol=1e-5)
