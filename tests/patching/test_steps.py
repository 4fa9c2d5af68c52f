"""Steps of the engine that no op has: the dense 3x3 convolution, on every layout of its input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mvit3_kernels import _native
from mvit3_kernels.nn import ConvNormAct
from mvit3_kernels.patching.program import IMAGE, Program, Refused, emit

pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason="the compiled kernels are not built")

CHANNELS = [(3, 16), (3, 32), (1, 8), (2, 5), (7, 33), (16, 16), (23, 40), (96, 96), (160, 97)]  # up to 7: read as an image is


def convolution(inputs: int, outputs: int, stride: int = 1, act: str = "silu") -> ConvNormAct:
    torch.manual_seed(inputs + outputs)
    module = ConvNormAct(inputs, outputs, 3, stride, act=act).eval()
    module.norm.running_mean.normal_()
    module.norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(module.norm.weight, 0.5, 2)
    nn.init.normal_(module.norm.bias)
    return module


def program(channels: int, *modules: nn.Module) -> Program:
    """The modules one after the other, as a program."""
    program, x = Program(channels), IMAGE
    for module in modules:
        x = emit(module, program, x)
    program.finish([x], lambda results: results[0].permute(0, 3, 1, 2))
    return program


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@torch.no_grad()
def check(found: torch.Tensor, module: nn.Module, x: torch.Tensor) -> None:
    """Errs at most twice as much as the module in float32, both against float64."""
    reference = module(x)
    exact = module.double()(x.double())
    module.float()
    assert found.shape == exact.shape
    error, allowed = ((t.double() - exact).abs().max() for t in (found, reference))
    assert error <= 2 * allowed + 1e-6 * exact.abs().max(), (error, allowed)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_conv3x3(channels, stride):
    module = convolution(*channels, stride)
    run = program(channels[0], module)
    for height, width in [(1, 1), (1, 9), (2, 2), (7, 5), (13, 30), (32, 33)]:
        x = images(2, channels[0], height, width)
        check(run(x), module, x)


@pytest.mark.parametrize("act", ["identity", "silu", "relu"])
def test_activations(act):
    module, x = convolution(24, 20, act=act), images(1, 24, 9, 11)
    check(program(24, module)(x), module, x)


@pytest.mark.parametrize("inputs", [3, 24])
def test_layouts(inputs):
    module, x = convolution(inputs, 16, 2), images(5, inputs, 18, 14)
    run = program(inputs, module)
    wide = torch.zeros(5, inputs, 18, 28)
    wide[..., ::2] = x
    upright = x.transpose(2, 3).contiguous().transpose(2, 3)
    for same in (x, x.to(memory_format=torch.channels_last), wide[..., ::2], upright):
        assert torch.equal(run(same), run(x)) or inputs == 3  # few channels have a loop for each of two layouts
        check(run(same), module, x)


@torch.no_grad()
def test_two_inputs():
    module, one = convolution(40, 24), convolution(3, 17)
    two = convolution(3, 23)
    program_ = Program(3)
    a, b = emit(one, program_, IMAGE), emit(two, program_, IMAGE)
    conv = module.block.conv.weight.permute(0, 2, 3, 1).contiguous()
    scale = module.norm.weight / (module.norm.running_var + module.norm.eps).sqrt()
    shift = module.norm.bias - module.norm.running_mean * scale
    program_.finish([program_.add("conv3x3", [a, b], [conv, scale, shift], [1, 1])], lambda results: results[0].permute(0, 3, 1, 2))
    x = images(3, 3, 10, 13)
    check(program_(x), module, torch.cat([one(x), two(x)], 1))


def test_not_a_number_spreads_as_far_as_the_taps():
    module, x = convolution(3, 16), images(1, 3, 12, 12)
    x[0, 1, 5, 7] = float("nan")
    found = program(3, module)(x).isnan().any(1)[0]
    wanted = torch.zeros(12, 12, dtype=torch.bool)
    wanted[4:7, 6:9] = True
    assert torch.equal(found, wanted)


def test_wrong_channels_are_named():
    with pytest.raises(RuntimeError, match="conv3x3 takes 24 channels, got 3"):
        program(3, convolution(24, 8))(images(1, 3, 8, 8))


def test_a_dilated_or_grouped_convolution_has_no_step():
    for options in ({"dilation": 2}, {"groups": 2}):
        with pytest.raises(Refused, match="no step for"):
            program(4, ConvNormAct(4, 8, 3, **options).eval())
