"""The networks are the published ones: names, logits, stages, gradients and running statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import mvit3_kernels
from mvit3_kernels import create_model, list_models
from mvit3_kernels.nn import MobileViTBlock, MobileViTV2Block, MobileViTV3Block, MobileViTV3SeparableBlock
from tests import golden

STAGES = ("conv_1", "layer_1", "layer_2", "layer_3", "layer_4", "layer_5", "conv_1x1_exp")
SIZES = ((256, 256), (200, 232))
NO_DROPOUT = {"drop_rate": 0.0, "proj_drop_rate": 0.0}


def keys(module: nn.Module) -> list[list]:
    return [[name, list(t.shape)] for name, t in module.state_dict().items()]


def test_every_published_model_is_listed():
    assert sorted(golden.MODELS.values()) == list_models()


@pytest.mark.parametrize("published", golden.MODELS)
def test_state_dict_is_the_published_one(published):
    assert keys(create_model(golden.MODELS[published])) == golden.state_dicts()[published]


@pytest.mark.parametrize("published", [name for name in golden.MODELS if name in golden.stored()])
def test_logits(published):
    want = golden.load(published)
    model = golden.fill(create_model(golden.MODELS[published])).eval().double()
    stages: dict[str, torch.Tensor] = {}
    for name in STAGES:
        getattr(model, name).register_forward_hook(lambda _, __, out, name=name: stages.__setitem__(name, out))
    for size in SIZES:
        tag, x = f"{size[0]}x{size[1]}", golden.image(0, 2, 3, *size)
        with torch.no_grad():
            assert golden.relative(model(x.double()), want[f"logits_{tag}"]) < 1e-10
            for name in STAGES:
                assert list(stages[name].shape) == list(want[f"stage_{tag}_{name}_shape"])
                assert golden.relative(golden.summary(stages[name]), want[f"stage_{tag}_{name}_mean_std_l2"]) < 1e-10
                assert golden.relative(stages[name].flatten()[:16], want[f"stage_{tag}_{name}_first16"]) < 1e-10
    single = golden.fill(create_model(golden.MODELS[published])).eval()
    for size in SIZES:
        with torch.no_grad():
            assert golden.relative(single(golden.image(0, 2, 3, *size)), want[f"logits_{size[0]}x{size[1]}"]) < 1e-5


@pytest.mark.parametrize(
    "published",
    [name for name in golden.MODELS if "train128_loss" in (golden.load(name) if name in golden.stored() else ())],
)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_training_step(published, dtype, bound):
    """Loss, logits, every gradient and every running statistic. float32 gradients go through 50 layers of rounding:
    1e-4 of the largest entry; the forward pass is held to 1e-5."""
    want = golden.load(published)
    model = golden.fill(create_model(golden.MODELS[published], **NO_DROPOUT)).train().to(dtype)
    x = golden.image(0, 2, 3, 128, 128).to(dtype).requires_grad_()
    logits = model(x)
    loss = (logits * golden.image(1, *logits.shape).to(dtype)).sum()
    loss.backward()
    forward_bound = min(bound, 1e-5)
    assert golden.relative(logits, want["train128_logits"]) < forward_bound
    assert abs(loss.item() - want["train128_loss"]) < forward_bound * np.abs(want["train128_logits"]).sum()
    assert golden.relative(golden.summary(x.grad)[1:], want["train128_input_grad_mean_std_l2"][1:]) < bound
    assert golden.relative(x.grad.flatten()[:16], want["train128_input_grad_first16"]) < bound

    parameters = dict(model.named_parameters())
    assert list(parameters) == list(want["train128_param_names"])
    scale = np.nanmax(want["train128_grad_l2"])
    for name, l2, first8 in zip(
        want["train128_param_names"], want["train128_grad_l2"], want["train128_grad_first8"], strict=True
    ):
        grad = parameters[name].grad.double()
        # A mathematically zero gradient is recorded as rounding noise: those compare against the scale of the whole
        # network.
        assert abs(grad.norm().item() - l2) <= bound * max(l2, 1e-2 * scale), name
        first8 = torch.from_numpy(first8[~np.isnan(first8)])
        assert (grad.flatten()[: len(first8)] - first8).abs().max() <= bound * max(l2, 1e-2 * scale), name

    buffers = dict(model.named_buffers())
    for name, l2 in zip(want["train128_running_names"], want["train128_running_l2_after"], strict=True):
        assert abs(buffers[name].double().norm().item() - l2) <= forward_bound * l2, name
    assert all(b == 1 for name, b in buffers.items() if name.endswith("num_batches_tracked"))


def block(name: str) -> nn.Module:
    channels = int(name.rsplit("_c", 1)[1]) if "_c" in name else 64
    if name.startswith("block_mobilevitv1"):
        return MobileViTBlock(channels, 64, 128, 2)
    if name.startswith("block_mobilevitv3_v1style"):
        return MobileViTV3Block(channels, 64, 128, 2)
    if name.startswith("block_mobilevitv2"):
        return MobileViTV2Block(channels, 64, 128, 2)
    return MobileViTV3SeparableBlock(channels, 64, 128, 2, dilation=2 if name.endswith("dil2") else 1)


@pytest.mark.parametrize("name", [name for name in golden.state_dicts() if name.startswith("block_")])
def test_block_state_dict(name):
    assert keys(block(name)) == golden.state_dicts()[name]


@pytest.mark.parametrize("name", golden.stored("block_"))
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_block(name, mode, dtype, bound):
    want = golden.load(name)
    module = golden.fill(block(name)).to(dtype).train(mode == "train")
    x = golden.image(0, 2, 64, 12, 16).to(dtype).requires_grad_()
    y = module(x)
    (y * golden.image(1, *y.shape).to(dtype)).sum().backward()
    assert golden.relative(y[:, ::8], want[f"{mode}_out"]) < bound
    assert golden.relative(x.grad[:, ::8], want[f"{mode}_input_grad"]) < bound
    norms = [p.grad.norm() for p in module.parameters()]
    assert [n for n, _ in module.named_parameters()] == list(want["param_names"])
    assert golden.relative(torch.stack(norms), want[f"{mode}_param_grad_l2"]) < bound
    if mode == "eval":
        odd = module(golden.image(0, 2, 64, 11, 15).to(dtype))
        assert golden.relative(odd[:, ::8], want["eval_odd_11x15_out"]) < bound


@pytest.mark.parametrize(
    "name, ours", [("enc_os16_mobilevitv3_small_v3", "mobilevitv3_s"), ("enc_os16_mobilevitv3_1.00", "mobilevitv3_100")]
)
def test_encoder_with_output_stride(name, ours):
    want = golden.load(name)
    model = golden.fill(create_model(ours, features_only=True, output_stride=16)).eval().double()
    with torch.no_grad():
        maps = model(golden.image(0, 2, 3, 128, 128).double())
    assert model.feature_info.reduction() == [2, 4, 8, 16, 16]
    for number, found in enumerate(maps, start=1):
        assert list(found.shape) == list(want[f"enc128_layer_{number}_shape"])
        assert golden.relative(golden.summary(found), want[f"enc128_layer_{number}_mean_std_l2"]) < 1e-10
        assert golden.relative(found.flatten()[:16], want[f"enc128_layer_{number}_first16"]) < 1e-10


# (convolution, padding, dilation) of the published encoders at output stride 8; every other depth-wise convolution has
# 1 and 1.
DILATED = {
    "mobilevitv3_s": {"layer_5.0.block.conv_3x3.block.conv": 2},
    "mobilevitv3_100": {
        "layer_4.1.local_rep.0.block.conv": 2,
        "layer_5.0.block.conv_3x3.block.conv": 2,
        "layer_5.1.local_rep.0.block.conv": 4,
    },
}


@pytest.mark.parametrize("ours", DILATED)
def test_dilations_at_output_stride_8(ours):
    model = create_model(ours, features_only=True, output_stride=8)
    found = {
        n: m.dilation[0]
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) and m.dilation[0] > 1
    }
    assert found == DILATED[ours]
    assert [m.shape[-1] for m in model.eval()(torch.zeros(1, 3, 64, 64))] == [32, 16, 8, 8, 8]


def test_reference_and_free_choice_agree():
    model = golden.fill(create_model("mobilevitv3_xxs")).eval()
    x = golden.image(0, 2, 3, 64, 64)
    with torch.no_grad(), mvit3_kernels.backend("reference"):
        want = model(x)
    with torch.no_grad():
        assert golden.relative(model(x), want.double().numpy()) < 1e-5
