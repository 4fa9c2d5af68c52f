"""Libraries that wrap, replace or move the modules of a network take effect on ours as on any other."""

from __future__ import annotations

import accelerate
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from mvit3_kernels import create_model, fuse
from tests.golden import fill
from tests.nn.networks import by_modules

NAMES = ("mobilevitv3_xxs", "mobilevitv3_050")  # softmax attention in Linear layers, separable in convolutions


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def network(name: str) -> nn.Module:
    return fill(create_model(name, num_classes=10)).eval()


@pytest.mark.parametrize("name", NAMES)
def test_lora_of_peft(name):
    torch.manual_seed(0)
    model, x = network(name), images()
    with torch.no_grad():
        before = model(x)
    layer = r"\.block\.conv" if name == "mobilevitv3_050" else ""
    config = peft.LoraConfig(r=4, target_modules=rf".*(qkv_proj|out_proj){layer}", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapters = {key: p for key, p in adapted.named_parameters() if "lora_" in key}
    after = adapted(x)
    assert len(adapters) == 2 * 2 * 9 and (after - before).norm() > 1e-3 * before.norm()
    torch.testing.assert_close(by_modules(adapted, x), after, rtol=1e-4, atol=1e-4)
    after.square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in adapters.values())
    with torch.no_grad():
        with adapted.disable_adapter():
            assert torch.allclose(adapted(x), before, rtol=1e-4, atol=1e-4)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(fuse(merged)(x), after, rtol=1e-3, atol=1e-3)


def test_int8_weights_of_torchao():
    model, x = network("mobilevitv3_xxs"), images()
    with torch.no_grad():
        want = model(x)
        quantize_(model, Int8WeightOnlyConfig(), lambda module, _: isinstance(module, nn.Linear))
        for prepare in (lambda model: model, fuse):
            error = (prepare(model)(x) - want).norm() / want.norm()
            assert 0 < error < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_accelerate_moves_away(name):
    model, x = network(name), images()
    hook = register_module_forward_hook(lambda *_: None)  # so that every module is called here too
    with torch.no_grad():
        want = model(x)
    hook.remove()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(x), want)


def test_grad_cam_of_any_layer():
    """Activation and gradient of a layer through hooks, as Grad-CAM takes them: those of a network of plain modules."""
    x, found = images(1), []
    for fused in (False, True):
        model = network("mobilevitv3_xxs")
        model = fuse(model) if fused else model
        for name in ("layer_2.1", "layer_3.1.local_rep", "layer_4.1.global_rep.1", "layer_5.1.fusion", "conv_1x1_exp"):
            layer, kept = model.get_submodule(name), {}

            def forward(module, inputs, y, kept=kept):
                kept["y"] = y
                y.register_hook(lambda dy: kept.update(dy=dy))

            handle = layer.register_forward_hook(forward)
            model(x)[0, 3].backward()
            handle.remove()
            cam = torch.relu((kept["dy"].mean((2, 3), keepdim=True) * kept["y"]).sum(1))
            assert kept["dy"].norm() > 0 and cam.shape[1:] == kept["y"].shape[2:]
            found.append(cam.detach())
    half = len(found) // 2
    for a, b in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(a, b)
