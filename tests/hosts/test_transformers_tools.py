"""What peft, accelerate, torchao and PyTorch's pruning do to a fused network of transformers is what they do to the
host."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import accelerate
import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from mvit3_kernels import explain, fuse
from tests.bounds import relative_errors

from .transformers_models import FAMILIES, distance, images, network, outputs, results

# The linear maps of a layer of attention.
MAPS = {
    "v1": ["query", "key", "value", "dense"],
    "v2": ["qkv_proj.convolution", "out_proj.convolution", "conv1.convolution", "conv2.convolution"],
}


def pairs(name: str) -> Iterator[tuple[nn.Module, nn.Module]]:
    for mode in ("training", "inference"):
        host = network(name).double()
        yield host, fuse(copy.deepcopy(host), mode=mode)


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_of_peft(name):
    x = images(2, 3, 128, 128, dtype=torch.float64)
    for models in pairs(name):
        for model in models:
            torch.manual_seed(0)
            peft.inject_adapter_in_model(
                peft.LoraConfig(r=4, target_modules=MAPS[name[:2]], init_lora_weights=False), model
            )
        host, fused = models
        want, found = results(host, x), results(fused, x)
        assert distance(found, want) <= 1e-12
        adapters = [t for key, t in found.items() if "lora" in key and key.startswith("d ")]
        assert len(adapters) >= 32 and all(t.norm() > 0 for t in adapters)
        assert any("peft" in reason for reason in explain(fused, x).reasons())


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_off_the_device(name):
    x = images(2, 3, 64, 64)
    for models in pairs(name):
        host, fused = (accelerate.cpu_offload(model.float(), torch.device("cpu")) for model in models)
        assert distance(outputs(fused, x), outputs(host, x)) == 0
        assert any("a forward of its own" in reason for reason in explain(fused, x).reasons())


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_quantised_weights(name):
    x = images(2, 3, 64, 64)
    for host, fused in pairs(name):
        want = outputs(host.float(), x)
        quantize_(fused.float(), Int8WeightOnlyConfig())
        errors = relative_errors(outputs(fused, x), want, least=0)
        assert 0 < errors["logits"] <= 0.02
        quantize_(host, Int8WeightOnlyConfig())
        assert distance(outputs(fused, x), outputs(host, x)) <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_weights_train(name):
    x = images(2, 3, 64, 64, dtype=torch.float64)
    for models in pairs(name):
        found = []
        for model in models:
            maps = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
            for module in maps:
                prune.l1_unstructured(module, "weight", 0.3)
            optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3)
            for _ in range(2):
                optimizer.zero_grad()
                model(x).logits.square().sum().backward()
                optimizer.step()
            for module in maps:
                prune.remove(module, "weight")
            assert all((module.weight == 0).sum() >= module.weight.numel() * 0.3 - 1 for module in maps)
            found.append(outputs(model.eval(), x))
        assert distance(*found) <= 1e-11
