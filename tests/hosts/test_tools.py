"""What peft, accelerate, torchao, PyTorch's pruning and quantisation, hooks and counters do to a fused network of timm
is what they do to the host; test_transformers_tools.py has some of it for networks of transformers."""

from __future__ import annotations

import copy

import accelerate
import peft
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from mvit3_kernels import explain, fuse
from tests.golden import fill

from . import transformers_models
from .compare import results

TIMM = ("mobilevit_xxs", "mobilevitv2_050")
NAMES = (*TIMM, *transformers_models.FAMILIES)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A host and its fused copy, in evaluation."""
    host = fill(timm.create_model(name, num_classes=100)).eval() if name in TIMM else transformers_models.network(name)
    return host, fuse(copy.deepcopy(host))


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


def distance(found: Tensor, want: Tensor) -> float:
    return ((found - want).norm() / want.norm()).item()


@pytest.mark.parametrize("name", TIMM)
def test_adapters_of_peft(name):
    host, fused = (model.double() for model in pair(name))
    maps = ["qkv", "proj", "fc1", "fc2"] if name == "mobilevit_xxs" else ["qkv_proj", "out_proj"]
    for model in (host, fused):
        torch.manual_seed(0)
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=maps, init_lora_weights=False), model)
    x = images().double()
    want, found = (results(model, x, training=True) for model in (host, fused))
    assert all(distance(found[part], t) <= 1e-12 for part, t in want.items())
    adapters = [p for key, p in fused.named_parameters() if "lora" in key]
    assert len(adapters) >= 32 and all(p.grad.norm() > 0 for p in adapters)
    assert any("peft" in reason for reason in explain(fused, x).reasons())


@torch.no_grad()
@pytest.mark.parametrize("name", TIMM)
def test_weights_off_the_device(name):
    host, fused = (accelerate.cpu_offload(model, torch.device("cpu")) for model in pair(name))
    assert torch.equal(logits(fused, images()), logits(host, images()))


@torch.no_grad()
@pytest.mark.parametrize("name", TIMM)
def test_int8_weights_of_torchao(name):
    """Of MobileViTv2 they are in the head alone, which runs behind the program of what is in front of it."""
    (host, fused), x = pair(name), images()
    want = logits(host, x)
    logits(fused, x)
    for model in (host, fused):
        quantize_(model, Int8WeightOnlyConfig())
    assert 0 < distance(logits(fused, x), want) <= 0.02
    assert distance(logits(fused, x), logits(host, x)) <= 1e-5
    assert (explain(fused, x).rows[0].ran == "fused") == (name == "mobilevitv2_050")


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_dynamic_quantisation(name):
    (host, fused), x = pair(name), images()
    want = logits(host, x)
    host, fused = (torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8) for model in (host, fused))
    assert 0 < distance(logits(fused, x), want) <= 0.05
    assert distance(logits(fused, x), logits(host, x)) <= 1e-3  # a last bit may round to another integer


@pytest.mark.parametrize("name", TIMM)
def test_pruned_weights_train(name):
    x, found = images().double(), []
    for model in pair(name):
        maps = [module for module in model.double().train().modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        for module in maps:
            prune.l1_unstructured(module, "weight", 0.3)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            logits(model, x).square().sum().backward()
            optimizer.step()
        for module in maps:
            prune.remove(module, "weight")
        assert all((module.weight == 0).sum() >= module.weight.numel() * 0.3 - 1 for module in maps)
        found.append(logits(model.eval(), x))
    assert distance(*found) <= 1e-11


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_counted_as_the_hosts(name):
    for grad in (False, True):
        counts = []
        for model in pair(name):
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
                y = logits(model, images())
                if grad:
                    y.sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] > 1e6 and abs(counts[1] - counts[0]) <= 0.01 * counts[0]


@pytest.mark.parametrize("name", NAMES)
def test_grad_cam(name):
    """Activation and gradient of a layer through hooks, of every seventh convolution."""
    cams = []
    for model in pair(name):
        convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        for layer in convolutions[::7]:
            kept = {}

            def forward(module, inputs, y, kept=kept):
                kept["y"] = y
                y.register_hook(lambda dy: kept.update(dy=dy))

            handle = layer.register_forward_hook(forward)
            logits(model, images(1))[0, 3].backward()
            handle.remove()
            cams.append((kept["dy"].mean((2, 3), keepdim=True) * kept["y"]).sum(1).detach())
    half = len(cams) // 2
    assert half >= 4
    for found, want in zip(cams[half:], cams[:half], strict=True):
        assert want.norm() > 0 and distance(found, want) <= 1e-3
