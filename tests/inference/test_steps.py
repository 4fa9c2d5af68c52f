"""Steps of the engine that no op has: the dense 3x3 convolution, on every layout of its input."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import mvit3_kernels
from mvit3_kernels import _native
from mvit3_kernels.inference.program import IMAGE, Program, Refused, emit
from mvit3_kernels.nn import ConvNormAct
from mvit3_kernels.ops.types import ACTIVATIONS
from tests.bounds import assert_bound, largest

pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason="the compiled kernels are not built")

# up to 7: read as an image is
CHANNELS = [(3, 16), (3, 32), (1, 8), (2, 5), (7, 33), (16, 16), (23, 40), (96, 96), (160, 97)]


def convolution(inputs: int, outputs: int, stride: int = 1, act: str = "silu", dilation: int = 1) -> ConvNormAct:
    torch.manual_seed(inputs + outputs)
    module = ConvNormAct(inputs, outputs, 3, stride, dilation, act=act).eval()
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
    assert_bound({"y": found}, {"y": reference}, {"y": exact}, 1e-6, size=largest, least=0)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 6), (2, 3), (1, 40)])
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_conv3x3(channels, stride, dilation):
    module = convolution(*channels, stride, dilation=dilation)
    run = program(channels[0], module)
    for height, width in [(1, 1), (1, 9), (2, 2), (7, 5), (13, 30), (32, 33)]:
        x = images(2, channels[0], height, width)
        check(run(x), module, x)


@pytest.mark.parametrize("act", ACTIVATIONS)
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
@pytest.mark.parametrize(("dilation", "channels"), [(1, (17, 23, 24)), (2, (17, 23, 24)), (1, (37, 30, 50))], ids=str)
def test_two_inputs(dilation, channels):
    a, b, outputs = channels
    module, one = convolution(a + b, outputs, dilation=dilation), convolution(3, a)
    two = convolution(3, b)
    program_ = Program(3)
    maps = [emit(conv, program_, IMAGE) for conv in (one, two)]
    conv = module.block.conv.weight.permute(0, 2, 3, 1).contiguous()
    scale = module.norm.weight / (module.norm.running_var + module.norm.eps).sqrt()
    shift = module.norm.bias - module.norm.running_mean * scale
    y = program_.add("conv3x3", maps, [conv, scale, shift], [1, dilation, 1])
    program_.finish([y], lambda results: results[0].permute(0, 3, 1, 2))
    x = images(3, 3, 10, 13)
    check(program_(x), module, torch.cat([one(x), two(x)], 1))


@pytest.mark.parametrize(
    ("channels", "stride", "dilation", "size", "products"),
    [
        ((64, 96), 1, 1, (32, 18), 4),
        ((48, 48), 1, 1, (6, 6), 4),
        ((64, 96), 1, 1, (32, 5), 9),  # outputs at a border, which cancel most, would be too many
        ((64, 96), 2, 1, (32, 18), 9),
        ((64, 96), 1, 2, (32, 18), 9),
        ((47, 64), 1, 1, (32, 18), 9),
        ((64, 47), 1, 1, (32, 18), 9),
    ],
    ids=str,
)
def test_products_of_an_output(channels, stride, dilation, size, products):
    """The four outputs of a tile share 16 products where that pays and errs little; elsewhere each has its nine."""
    run, x = program(channels[0], convolution(*channels, stride, dilation=dilation)), images(2, channels[0], *size)
    lanes = -(-channels[1] // 16) * 16
    outputs = run(x).shape[2:].numel() * len(x) * lanes
    table = torch.ops.mvit3.engine_regions(run._engine, x)
    assert table[:, 1:].sum() == products * channels[0] * outputs


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tiles_spread_no_further_than_taps(value):
    """Nor do they reach another image; an infinity may come out as NaN."""
    run, x = program(64, convolution(64, 64)), images(3, 64, 9, 12)
    want = run(x)
    for row, column in ((4, 6), (4, 7), (5, 6), (5, 7)):  # each place of a tile
        broken = x.clone()
        broken[1, 7, row, column] = value
        found = run(broken)
        reached = torch.zeros(9, 12, dtype=torch.bool)
        reached[row - 1 : row + 2, column - 1 : column + 2] = True
        assert torch.equal(found[::2], want[::2])
        assert torch.equal(found[1].isfinite().all(0), ~reached)
        assert torch.equal(found[1][:, ~reached], want[1][:, ~reached])


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


def test_a_grouped_convolution_has_no_step():
    with pytest.raises(Refused, match="no step for"):
        program(4, ConvNormAct(4, 8, 3, groups=2).eval())


@torch.no_grad()
def test_an_output_asked_for_twice_is_one_tensor():
    """As from the network itself, whose features are in a list twice then."""
    first, second, x = convolution(3, 16), convolution(16, 8), images(2, 3, 12, 10)
    run, a = Program(3), IMAGE
    a = emit(first, run, a)
    b = emit(second, run, a)
    run.finish([b, a, b, a], lambda results: [t.permute(0, 3, 1, 2) for t in results])
    found = run(x)
    check(found[0], nn.Sequential(first, second), x)
    check(found[1], first, x)
    assert found[2].data_ptr() == found[0].data_ptr() and found[3].data_ptr() == found[1].data_ptr()
    assert torch.equal(found[2], found[0]) and torch.equal(found[3], found[1])


NETWORKS = ("mobilevit_xxs", "mobilevitv2_050", "mobilevitv3_xxs", "mobilevitv3_050")


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_images_without_pixels_or_of_no_number(name):
    network = mvit3_kernels.create_model(name).eval()
    fused = mvit3_kernels.fuse(mvit3_kernels.create_model(name).eval())
    for height, width in ((0, 64), (64, 0), (0, 0)):
        for batch in (0, 2):
            x = torch.zeros(batch, 3, height, width)
            with pytest.raises((RuntimeError, ValueError)):
                network(x)
            with pytest.raises(
                (RuntimeError, ValueError),
                match=r"must have at least one row and one column|Kernel size can't be greater",
            ):
                fused(x)
    none = torch.zeros(0, 3, 64, 64)
    assert fused(none).shape == network(none).shape == (0, 1000)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_features_asked_for_twice(name):
    plain = mvit3_kernels.create_model(name, features_only=True, out_indices=(2, 2, 4, 0)).eval()
    fused = mvit3_kernels.fuse(mvit3_kernels.create_model(name, features_only=True, out_indices=(2, 2, 4, 0)).eval())
    fused.load_state_dict(plain.state_dict())
    x = images(5, 3, 64, 96)
    for found, want in zip(fused(x), plain(x), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_outputs_are_ordinary_tensors():
    """They can be resized, and their memory freed, like any other."""
    fused = mvit3_kernels.fuse(mvit3_kernels.create_model("mobilevitv3_xxs", features_only=True).eval())
    for t in fused(images(1, 3, 512, 512)):
        assert t.untyped_storage().resizable()
        t.resize_(2 * t.numel())
        t.untyped_storage().resize_(0)
        assert t.untyped_storage().nbytes() == 0


@torch.no_grad()
def test_memory_between_calls_is_released():
    """Also while other threads call: what a call works in is not idle."""
    fused, x = mvit3_kernels.fuse(mvit3_kernels.create_model("mobilevitv3_xxs").eval()), images(2, 3, 256, 256)
    mvit3_kernels.release_memory()
    want = fused(x)
    largest = 2 * 256 * 256 * 16 * 4 // 4  # one map of the stem
    assert mvit3_kernels.release_memory() >= largest
    first = mvit3_kernels.release_memory()
    assert torch.equal(fused(x), want)
    assert mvit3_kernels.release_memory() >= largest  # the memory was taken again
    wrong: list[str] = []

    @torch.no_grad()  # a thread has a mode of its own
    def work() -> None:
        for _ in range(5):
            if not torch.equal(fused(x), want):
                wrong.append("another result")

    workers = [threading.Thread(target=work) for _ in range(3)]
    [worker.start() for worker in workers]
    while any(worker.is_alive() for worker in workers):
        mvit3_kernels.release_memory()
        workers[0].join(0.01)
    assert not wrong and first >= 0


@pytest.mark.parametrize(("height", "width"), [(8, 6), (7, 6), (8, 5), (7, 5), (2, 3)])
def test_crop_to_patches_and_pad_back(height, width):
    """Without the pixels behind the last whole patch, and with zeros in their place."""
    x, patch = images(3, 5, height, width), (2, 3)
    run = Program(5)
    cropped = run.add("crop_to_patches", [IMAGE], (), patch)
    run.finish(
        [cropped, run.add("pad_back", [cropped, IMAGE])], lambda results: [t.permute(0, 3, 1, 2) for t in results]
    )
    whole, padded = run(x)
    rows, columns = height // 2 * 2, width // 3 * 3
    assert torch.equal(whole, x[:, :, :rows, :columns])
    want = torch.zeros_like(x)
    want[:, :, :rows, :columns] = whole
    assert torch.equal(padded, want)


def test_a_map_without_a_whole_patch_is_named():
    run = Program(5)
    run.finish([run.add("crop_to_patches", [IMAGE], (), (2, 3))], lambda results: results)
    with pytest.raises(RuntimeError, match="takes maps of at least 2 x 3 pixels, got 1 x 9"):
        run(images(1, 5, 1, 9))
