"""Stochastic depth: rates are timm's, and a block computes what is written out here in float64."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from torch import nn

import mvit3_kernels
from mvit3 import checkpoint
from mvit3.data import loaders
from mvit3.distributed import World
from mvit3.network import build_model, evaluation_mode, train_mode
from mvit3.trainer import Trainer
from mvit3_kernels.models.drop_path import DropPath, residuals, set_drop_path
from mvit3_kernels.models.network import LAYERS
from mvit3_kernels.nn import (
    InvertedResidual,
    MobileViTBlock,
    MobileViTV2Block,
    MobileViTV3Block,
    MobileViTV3SeparableBlock,
)

from .conftest import small_config

CPU = torch.device("cpu")
RATE, IMAGES = 0.4, 6


def hooks(model):
    """The hooks of a network by the name of the module that each is on."""
    return {
        name: hook
        for name, module in model.named_modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, DropPath)
    }


# What a block computes, from its weights.


class Draws:
    """The factors of the branches, in the order in which they end: 0 or 1 / (1 - rate) for each image."""

    def __init__(self, seed):
        torch.manual_seed(seed)

    def __call__(self, branch):
        kept = torch.empty(IMAGES).bernoulli_(1 - RATE) / (1 - RATE)
        return branch * kept.double().view(-1, *(1,) * (branch.ndim - 1))


def convolution(layer, x):
    conv, norm = layer.block.conv, layer.norm
    x = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if norm is not None:
        x = F.batch_norm(x, None, None, norm.weight, norm.bias, True, eps=norm.eps)
    return F.silu(x) if layer.act == "silu" else x


def tokens(x, inverse=None):
    """(B, D, H, W) as (B, P, N, D) in patches of 2x2, and back."""
    if inverse is not None:
        b, d, h, w = inverse
        return x.view(b, 2, 2, h // 2, w // 2, d).permute(0, 5, 3, 1, 4, 2).reshape(inverse)
    b, d, h, w = x.shape
    return x.view(b, d, h // 2, 2, w // 2, 2).permute(0, 3, 5, 2, 4, 1).reshape(b, 4, h * w // 4, d)


def normalised(norm, x):
    """(B, P, N, D) by LayerNorm over channels, or by GroupNorm of one group over the whole image."""
    dims = (-1,) if isinstance(norm, nn.LayerNorm) else (1, 2, 3)
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def linear(layer, x):
    conv = layer if isinstance(layer, nn.Linear) else layer.block.conv
    return x @ conv.weight.flatten(1).t() + conv.bias


def attended(attention, x):
    """Softmax attention of the N patches at each of the P positions, or separable attention."""
    qkv, dim = linear(attention.qkv_proj, x), x.shape[-1]
    if attention.num_heads is None:
        query, key, value = qkv.split((1, dim, dim), -1)
        return linear(attention.out_proj, F.relu(value) * (key * query.softmax(2)).sum(2, keepdim=True))
    q, k, v = qkv.view(*x.shape[:3], 3, attention.num_heads, -1).permute(3, 0, 1, 4, 2, 5)
    out = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
    return linear(attention.out_proj, out.transpose(2, 3).flatten(3))


def represented(block, x, drop):
    *layers, norm = block.global_rep
    t = tokens(x)
    for layer in layers:
        (norm1, attention, _), (norm2, fc1, _, fc2, _) = layer.branches()
        t = t + drop(attended(attention, normalised(norm1, t)))
        t = t + drop(linear(fc2, F.silu(linear(fc1, normalised(norm2, t)))))
    return tokens(normalised(norm, t), x.shape)


def v1(block, x, drop):
    local = convolution(block.local_rep.conv_1x1, convolution(block.local_rep.conv_3x3, x))
    return convolution(block.fusion, torch.cat((x, convolution(block.conv_proj, represented(block, local, drop))), 1))


def v2(block, x, drop):
    local = convolution(block.local_rep[1], convolution(block.local_rep[0], x))
    return convolution(block.conv_proj, represented(block, local, drop))


def v3(block, x, drop):
    local = convolution(block.local_rep.conv_1x1, convolution(block.local_rep.conv_3x3, x))
    projected = convolution(block.conv_proj, represented(block, local, drop))
    return x + drop(convolution(block.fusion, torch.cat((local, projected), 1)))


def v3_separable(block, x, drop):
    local = convolution(block.local_rep[1], convolution(block.local_rep[0], x))
    return x + drop(convolution(block.conv_proj, torch.cat((represented(block, local, drop), local), 1)))


def inverted_residual(block, x, drop):
    y = x
    for layer in block.block:
        y = convolution(layer, y)
    return x + drop(y)


BLOCKS = {
    "v1": (lambda: MobileViTBlock(16, 24, 48, 2), v1, 4),
    "v2": (lambda: MobileViTV2Block(16, 24, 48, 2), v2, 4),
    "v3": (lambda: MobileViTV3Block(16, 24, 48, 2), v3, 5),
    "v3 separable": (lambda: MobileViTV3SeparableBlock(16, 24, 48, 2), v3_separable, 5),
    "inverted residual": (lambda: InvertedResidual(16, 16, 32), inverted_residual, 1),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks(name, dtype):
    """Output, gradient of the input and of every parameter."""
    make, reference, count = BLOCKS[name]
    torch.manual_seed(1)
    block = make()
    for p in block.parameters():
        nn.init.normal_(p, 0.5 if p.ndim == 1 else 0, 0.3)
    exact = make().double()
    exact.load_state_dict(block.state_dict())
    block = block.to(dtype).to(memory_format=torch.channels_last)
    found = list(residuals(block, RATE))
    for module, hook in found:
        module.register_forward_hook(hook)
    assert len(found) == count
    x, dy = torch.randn(IMAGES, 16, 8, 12, dtype=torch.float64), torch.randn(IMAGES, 16, 8, 12, dtype=torch.float64)
    ours, theirs = x.clone().to(dtype).requires_grad_(), x.clone().requires_grad_()
    expected = reference(exact, theirs, Draws(3))
    expected.backward(dy)
    torch.manual_seed(3)
    y = block.train()(ours)
    y.backward(dy.to(dtype))
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype is torch.float64 else {"rtol": 2e-4, "atol": 2e-4}
    torch.testing.assert_close(y.double(), expected, **tolerance)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, **tolerance)
    scale = max(q.grad.abs().max() for q in exact.parameters())  # some are zero: of a bias before a batch norm
    for p, q in zip(block.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double() / scale, q.grad / scale, **tolerance)


@pytest.mark.parametrize("name", ["mobilevit_s", "mobilevitv2_050", "mobilevitv3_xxs", "mobilevitv3_050"])
def test_rates(name):
    """Linear over the blocks, one for all residuals of a block; where timm has the network, its attention has the
    same."""
    model = mvit3_kernels.create_model(name, 10)
    set_drop_path(model, RATE)
    found = hooks(model)
    depths = [len(getattr(model, layer)) for layer in LAYERS]
    for layer, rates in zip(LAYERS, calculate_drop_path_rates(RATE, depths, stagewise=True), strict=True):
        for number, rate in enumerate(rates):
            block = getattr(model, layer)[number]
            inside = {n: h for n, h in found.items() if f"{n}.".startswith(f"{layer}.{number}.")}
            assert [hook.rate for hook in inside.values()] == pytest.approx([rate] * len(inside))
            assert len(inside) == len(list(residuals(block, rate))) * (rate > 0)
    assert all(hook.rows == (1 if "v2" in name or "_0" in name or hook.residual else 4) for hook in found.values())
    if not name.startswith("mobilevitv3"):  # which `mvit3_kernels.timm` may have registered
        theirs = timm.create_model(name, drop_path_rate=RATE)
        theirs = [m.drop_path2.drop_prob for m in theirs.modules() if hasattr(m, "drop_path2")]
        ours = [hook.rate for n, hook in found.items() if "pre_norm_ffn" in n]
        assert ours == pytest.approx(theirs) and ours
    set_drop_path(model, 0.2)  # in place of the others
    assert max(hook.rate for hook in hooks(model).values()) == 0.2 and hooks(model).keys() == found.keys()
    set_drop_path(model, 0.0)
    assert not hooks(model)


@pytest.mark.parametrize("name", ["mobilevitv3_xxs", "mobilevitv3_050"])
def test_training_only(name):
    """In evaluation the network runs as one without it, bit by bit and fused; in training `explain` says what runs
    module by module. A frozen stage drops nothing."""
    config = small_config(model={"name": name, "drop_path_rate": RATE, "freeze_stages": 4, "proj_drop_rate": 0.0})
    model, plain = build_model(config, 10, CPU), build_model(small_config(model={"name": name}), 10, CPU).eval()
    images = torch.rand(2, 3, 64, 64)
    train_mode(model, config.model)
    with torch.no_grad():
        rows = {row.what: row for row in mvit3_kernels.explain(model, images)}
        assert rows["layer_5.1.global_rep"].ran == "modules" and "has a hook" in rows["layer_5.1.global_rep"].reason
        assert rows["layer_2.1"].ran == "fused"
        x = model.layer_2(model.layer_1(model.conv_1(images)))
        assert all(torch.equal(model.layer_3(x), model.layer_3(x)) for _ in range(4))
        x = model.layer_4(model.layer_3(x))
        assert not all(torch.equal(model.layer_5(x), model.layer_5(x)) for _ in range(4))
        evaluation_mode(model)
        model.load_state_dict(plain.state_dict())  # running statistics
        assert not hooks(model) and torch.equal(model(images), plain(images))


def test_a_draw_is_for_an_image():
    """All patches of an image share it; the kept ones are divided by 1 - rate; the share of the dropped is the rate."""
    branch = torch.ones(4000 * 4, 3, 2)
    torch.manual_seed(0)
    out = DropPath(0.25, rows=4)(nn.Dropout(0.0), (branch,), branch).view(4000, -1)
    assert torch.equal(out.amin(1), out.amax(1)) and set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((out[:, 0] == 0).float().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    low = branch.bfloat16()
    assert DropPath(0.25)(nn.Dropout(0.0), (low,), low).dtype is torch.bfloat16
    assert DropPath(0.25)(nn.Dropout(0.0).eval(), (low,), low) is None


def test_a_run_that_goes_on_draws_the_same(tmp_path):
    """Draws are a function of seed and step: with a checkpoint in between the weights are the same bits."""

    def run(output, steps, **more):
        changes = {"run": {"deterministic": True, "output": str(output), "max_steps": steps, **more}}
        config = small_config(
            model={"drop_path_rate": RATE},
            data={"limit_train": 48, "limit_val": 16, "workers": 0},
            ema={"enabled": False},
            **changes,
        )
        one = Trainer(config, loaders(config, seed=0), World(CPU))
        if output.exists():
            one.load(checkpoint.load(output / "last.pt"))
        one.fit()
        return one.model.state_dict()

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "parts", 1)
    parts = run(tmp_path / "parts", 3)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    without = run(tmp_path / "other", 3, seed=1)
    assert not torch.equal(without["classifier.fc.weight"], whole["classifier.fc.weight"])
