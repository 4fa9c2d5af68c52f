from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mvit3_kernels.nn import ConvNormAct, InvertedResidual


def plain(module: ConvNormAct) -> nn.Sequential:
    """The same layer as PyTorch modules, with its own copy of parameters and buffers."""
    act = {"silu": nn.SiLU, "relu": nn.ReLU, "identity": nn.Identity}[module.act]()
    return nn.Sequential(*copy.deepcopy(module.block), act)


def same(got: torch.Tensor, want: torch.Tensor, bound: float = 1e-12) -> bool:
    return (got - want).abs().max().item() <= bound * max(want.abs().max().item(), 1)


LAYERS = {
    "pointwise": dict(in_channels=5, out_channels=7),
    "pointwise_bias_no_norm": dict(in_channels=5, out_channels=7, bias=True, norm=False, act="identity"),
    "pointwise_bias_and_norm": dict(in_channels=5, out_channels=7, bias=True, act="relu"),
    "pointwise_stride": dict(in_channels=5, out_channels=7, stride=2),
    "depthwise": dict(in_channels=6, out_channels=6, kernel_size=3, groups=6),
    "depthwise_stride": dict(in_channels=6, out_channels=6, kernel_size=3, groups=6, stride=2, act="identity"),
    "depthwise_dilation": dict(in_channels=6, out_channels=6, kernel_size=3, groups=6, dilation=2),
    "depthwise_no_norm": dict(in_channels=6, out_channels=6, kernel_size=3, groups=6, norm=False),
    "depthwise_5x5": dict(in_channels=6, out_channels=6, kernel_size=5, groups=6),
    "dense": dict(in_channels=3, out_channels=8, kernel_size=3, stride=2),
    "dense_one_channel": dict(in_channels=1, out_channels=4, kernel_size=3),
    "grouped": dict(in_channels=6, out_channels=4, kernel_size=3, groups=2),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_conv_norm_act_is_conv_norm_act(name, training):
    torch.manual_seed(0)
    layer = ConvNormAct(**LAYERS[name]).double().train(training)
    if layer.norm is not None:
        nn.init.normal_(layer.norm.weight), nn.init.normal_(layer.norm.bias), layer.norm.running_var.uniform_(0.5, 2)
    want = plain(layer)
    x = torch.randn(3, LAYERS[name]["in_channels"], 7, 13, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    for _ in range(2):  # twice: running statistics accumulate
        got, expected = layer(a), want(b)
    assert got.shape == expected.shape and same(got, expected)
    dy = torch.randn_like(got)
    got.backward(dy), expected.backward(dy)
    assert same(a.grad, b.grad, 1e-11)
    for p, q in zip(layer.parameters(), want.parameters(), strict=True):
        assert same(p.grad, q.grad, 1e-11)
    for p, q in zip(layer.buffers(), want.buffers(), strict=True):
        assert same(p.double(), q.double())


NORMS = {
    "cumulative": {"momentum": None},
    "momentum 0": {"momentum": 0.0},
    "momentum 0.3": {"momentum": 0.3},
    "no count": {"num_batches_tracked": None},
    "no count, cumulative": {"num_batches_tracked": None, "momentum": None},
    "statistics kept as they are": {"track_running_stats": False},
    "no statistics": {"running_mean": None, "running_var": None},
    "neither statistics nor count": {
        "running_mean": None,
        "running_var": None,
        "num_batches_tracked": None,
        "track_running_stats": False,
    },
    "a large eps": {"eps": 3},
}


@pytest.mark.parametrize(
    "kind", [dict(in_channels=4, out_channels=5), dict(in_channels=4, out_channels=4, kernel_size=3, groups=4)]
)
@pytest.mark.parametrize("norm", NORMS)
def test_the_norm_is_obeyed_in_all_that_batch_norm_accepts(norm, kind):
    layer = ConvNormAct(**kind).double()
    for name, value in NORMS[norm].items():
        setattr(layer.norm, name, value)
    want = plain(layer)
    for seed in range(3):
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert same(layer(x), want(x))
    for p, q in zip(layer.buffers(), want.buffers(), strict=True):
        assert same(p.double(), q.double(), 1e-7)
    assert same(layer.eval()(x), want.eval()(x))


def test_a_frozen_norm_uses_and_keeps_its_running_statistics():
    layer = ConvNormAct(4, 5).double().train()
    layer.norm.eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert same(layer(x), plain(layer)(x))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


class ScaledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "norm",
    [
        nn.Identity(),
        ScaledNorm(8),
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.GroupNorm(2, 8),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_replaced_norm_runs_as_the_module_it_is(norm, training):
    torch.manual_seed(0)
    block = InvertedResidual(8, 8, 8)
    block.block.conv_3x3.block.norm = copy.deepcopy(norm)
    block = block.double().train(training)
    want = nn.Sequential(*(plain(layer) for layer in block.block))
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    assert same(block(x), want(x) + x)


@pytest.mark.parametrize("inputs, outputs, stride, dilation", [(6, 6, 1, 1), (6, 10, 1, 2), (6, 6, 2, 1), (3, 5, 2, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_inverted_residual_is_three_layers(inputs, outputs, stride, dilation, training):
    torch.manual_seed(0)
    block = InvertedResidual(inputs, outputs, 2 * inputs, stride, dilation).double().train(training)
    want = nn.Sequential(*(plain(layer) for layer in block.block))
    x = torch.randn(2, inputs, 7, 9, dtype=torch.float64)
    expected = want(x) + (x if stride == 1 and inputs == outputs else 0)
    assert same(block(x), expected)
    for p, q in zip(block.buffers(), want.buffers(), strict=True):
        assert same(p.double(), q.double())


def test_output_is_channels_last_and_input_layout_does_not_matter():
    layer = ConvNormAct(4, 5).eval()
    x = torch.randn(2, 4, 6, 7)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert same(layer(x.to(memory_format=torch.channels_last)), y, 1e-6)
    assert same(layer(x[:, :, ::2]), y[:, :, ::2], 1e-6)


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"act must be one of .*got 'gelu'"):
        ConvNormAct(4, 4, act="gelu")
