"""Programs with products of bfloat16: steps and networks against float64, held to what eager autocast errs; where there
are none; and the two dtypes side by side."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mvit3_kernels
from mvit3_kernels import _native, create_model, explain, fuse, refresh, unfuse
from mvit3_kernels.inference.program import IMAGE, Program, emit
from mvit3_kernels.nn import ConvNormAct, GlobalRepresentation, InvertedResidual, SeparableLayer, TransformerLayer
from mvit3_kernels.ops.types import ACTIVATIONS
from tests import golden
from tests.bounds import assert_bound, largest
from tests.inference.test_fuse import images, network

HALF = torch.bfloat16
multiplied = pytest.mark.skipif(_native.isa() != "avx512_bf16", reason="no kernels that multiply bfloat16")
PUBLISHED = (
    "mobilevitv3_small_v3",
    "mobilevitv3_1.00",
    "mobilevitv3_xx_small_v3",
    "mobilevitv2_1.00",
    "mobilevitv1_small",
)


def eager(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """In plain PyTorch under autocast."""
    with mvit3_kernels.backend("reference"), torch.autocast("cpu", HALF):
        return function(x)


@torch.no_grad()
def check(found: Tensor, module: nn.Module, x: Tensor) -> None:
    """Errs at most twice as much as eager autocast, both against float64."""
    exact = copy.deepcopy(module).double()(x.double())
    assert found.dtype == torch.float32
    assert_bound({"y": found}, {"y": eager(module, x)}, {"y": exact}, 0, least=0)


def with_statistics(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 2)
        if isinstance(layer, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.3)
    return module.eval()


def program(channels: int, module: nn.Module, dtype: torch.dtype = HALF) -> Program:
    made = Program(channels, dtype)
    made.finish([emit(module, made, IMAGE)], lambda results: results[0].permute(0, 3, 1, 2))
    return made


def tokens(dim: int, layer: nn.Module) -> GlobalRepresentation:
    """A layer of attention and the norm behind it."""
    return GlobalRepresentation([layer], nn.LayerNorm(dim) if type(layer) is TransformerLayer else nn.GroupNorm(1, dim))


STEPS = {
    "1x1": (24, lambda: ConvNormAct(24, 40, 1)),
    "1x1, odd": (17, lambda: ConvNormAct(17, 33, 1, act="relu")),
    "1x1, one channel": (1, lambda: ConvNormAct(1, 5, 1)),
    "1x1, long": (1100, lambda: ConvNormAct(1100, 70, 1)),
    "3x3": (16, lambda: ConvNormAct(16, 48, 3)),
    "3x3, odd": (23, lambda: ConvNormAct(23, 17, 3, 2)),
    "3x3, tiles": (67, lambda: ConvNormAct(67, 50, 3)),
    "3x3, image": (3, lambda: ConvNormAct(3, 16, 3, 2)),
    "3x3, dilated": (21, lambda: ConvNormAct(21, 40, 3, dilation=3)),
    "inverted residual": (32, lambda: InvertedResidual(32, 32, 128)),
    "inverted residual, odd, stride 2": (19, lambda: InvertedResidual(19, 27, 57, 2)),
    "attention": (36, lambda: tokens(36, TransformerLayer(36, 72, 4))),
    "attention, odd heads": (21, lambda: tokens(21, TransformerLayer(21, 50, 3))),
    "separable attention": (48, lambda: tokens(48, SeparableLayer(48, 100))),
    "separable attention, odd": (27, lambda: tokens(27, SeparableLayer(27, 33))),
}


@multiplied
@pytest.mark.parametrize("name", STEPS)
def test_steps(name):
    channels, make = STEPS[name]
    module = with_statistics(make())
    run = program(channels, module)
    sizes = [(2, 2), (14, 10), (34, 32)] if "attention" in name else [(1, 1), (7, 5), (13, 30), (40, 33)]
    for batch, size in enumerate(sizes, 1):
        x = images(batch, channels, *size)
        check(run(x), module, x)


@multiplied
@pytest.mark.parametrize(("dilation", "channels"), [(1, (17, 23, 24)), (2, (17, 23, 24)), (1, (37, 31, 50))], ids=str)
@torch.no_grad()
def test_a_convolution_of_two_maps(dilation, channels):
    """Of odd numbers of channels: pairs of inputs would reach from one map into the other."""
    a, b, outputs = channels
    module = with_statistics(ConvNormAct(a + b, outputs, 3, dilation=dilation))
    made, (one, two) = Program(3, HALF), (with_statistics(ConvNormAct(3, n, 3)) for n in (a, b))
    maps = [emit(conv, made, IMAGE) for conv in (one, two)]  # of few channels: exact
    scale = module.norm.weight / (module.norm.running_var + module.norm.eps).sqrt()
    shift = module.norm.bias - module.norm.running_mean * scale
    weight = module.block.conv.weight.permute(0, 2, 3, 1).contiguous()
    y = made.add("conv3x3", maps, [weight, scale, shift], [1, dilation, ACTIVATIONS.index(module.act)])
    made.finish([y], lambda results: results[0].permute(0, 3, 1, 2))
    x = images(3, 3, 10, 13)
    check(made(x), module, torch.cat([one(x), two(x)], 1))


@multiplied
def test_products_are_of_bfloat16():
    """Of numbers that bfloat16 has, they are exact; of others they are as of these rounded."""
    module = ConvNormAct(64, 32, 1, act="identity", norm=False).eval()
    x = images(2, 64, 9, 7)
    rounded = copy.deepcopy(module)
    with torch.no_grad():
        rounded.block.conv.weight.copy_(module.block.conv.weight.to(HALF))
        want = rounded.double()(x.to(HALF).double())
        found = program(64, module)(x)
    assert (found - want).abs().max() <= 1e-6 * want.abs().max()
    assert (program(64, module, torch.float32)(x) - want).abs().max() > 1e-4 * want.abs().max()


@multiplied
@pytest.mark.parametrize("published", PUBLISHED)
@torch.no_grad()
def test_golden_logits(published):
    """Against the published networks' logits in float64."""
    want = torch.from_numpy(golden.load(published)["logits_256x256"])
    model = golden.fill(create_model(golden.MODELS[published])).eval()
    x = golden.image(0, 2, 3, 256, 256)
    reference = eager(model, x)
    assert_bound({"y": fuse(model, dtype=HALF)(x)}, {"y": reference}, {"y": want}, 0, least=0)
    assert model._fused.why_not(model, x) is None


@multiplied
@pytest.mark.parametrize(("name", "shape"), [("mobilevit_xxs", (5, 3, 72, 104)), ("mobilevitv3_050", (3, 3, 33, 65))])
@torch.no_grad()
def test_networks_of_odd_sizes(name, shape):
    model, x = network(name), images(*shape)
    check(fuse(copy.deepcopy(model), dtype=HALF)(x), model, x)


@multiplied
@pytest.mark.parametrize("name", ["deeplabv3_mobilevitv3_050", "pspnet_mobilevitv3_xxs"])
@torch.no_grad()
def test_dense_prediction(name):
    model = golden.fill(create_model(name)).eval()
    x, fused = images(1, 3, 96, 128), fuse(copy.deepcopy(model), dtype=HALF)
    found, exact = fused.small_logits(x)[0], copy.deepcopy(model).double().small_logits(x.double())[0]
    assert fused._fused.why_not(fused, x) is None
    assert_bound({"y": found}, {"y": eager(lambda x: model.small_logits(x)[0], x)}, {"y": exact}, 0, least=0)


@multiplied
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-40])
@pytest.mark.parametrize("name", ["mobilevitv3_xxs", "mobilevitv3_050"])
@torch.no_grad()
def test_numbers_that_are_not_finite(name, value):
    """They leave the other images of a batch alone, and reach the logits where they do in the network itself."""
    model, x = network(name), images(5, 3, 64, 64)
    fused = fuse(copy.deepcopy(model), dtype=HALF)
    want = fused(x)
    x[2, 1, 20, 30] = value
    found, wanted = fused(x), model(x)
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], want[others])
    assert torch.equal(found[2].isfinite(), wanted[2].isfinite())


@multiplied
@torch.no_grad()
def test_dtypes_side_by_side():
    model, x = network("mobilevitv3_xxs"), images(2, 3, 64, 64)
    plain = model(x)
    single, half = fuse(copy.deepcopy(model)), fuse(copy.deepcopy(model), dtype=HALF)
    for _ in range(2):
        assert torch.allclose(single(x), plain, rtol=1e-4, atol=1e-4)
        assert not torch.equal(half(x), single(x))
    auto = half if _native.prefers_bfloat16() else single
    assert torch.equal(fuse(copy.deepcopy(model), dtype="auto")(x), auto(x))
    assert [[row.ran for row in explain(m, x)] for m in (single, half)] == [["fused"], ["fused, bfloat16"]]
    want = half(x)
    assert torch.equal(refresh(half)(x), want)
    assert torch.equal(fuse(half)(x), single(x)), "the dtype of the last call of fuse"
    assert torch.equal(fuse(half, dtype=HALF)(x), want)
    assert torch.equal(unfuse(half)(x), plain)


@multiplied
@torch.no_grad()
def test_changed_weights_are_packed_again():
    model, x = fuse(network("mobilevitv3_xxs"), dtype=HALF), images(1, 3, 64, 64)
    model(x)
    other = network("mobilevitv3_xxs", seed=5)
    model.load_state_dict(other.state_dict())
    want = fuse(other, dtype=HALF)(x)
    assert torch.equal(model(x), want)
    model.classifier.fc.bias.add_(1)
    assert torch.allclose(model(x), want + 1, rtol=1e-5, atol=1e-5)


@multiplied
@torch.no_grad()
def test_copies_and_pickles_keep_the_dtype():
    model, x = fuse(network("mobilevitv3_xxs"), dtype=HALF), images(1, 3, 64, 64)
    want, file = model(x), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), want) and other._fused.dtype is HALF


@torch.no_grad()
def test_a_cpu_that_does_not_multiply_it(monkeypatch):
    model, x = network("mobilevitv3_xxs"), images(1, 3, 64, 64)
    single = fuse(copy.deepcopy(model))(x)
    unpickled = copy.deepcopy(model)
    if _native.isa() == "avx512_bf16":
        fuse(unpickled, dtype=HALF)
        monkeypatch.setattr(_native, "_isa", "avx2")
        reason = "torch.bfloat16 needs the compiled kernels for a CPU with AVX512_BF16: those for avx2 are loaded"
        assert reason in explain(unpickled, x).reasons()
        assert torch.equal(unpickled(x), model(x))
    with pytest.raises(ValueError, match=r'dtype torch.bfloat16 needs the compiled kernels .*; "auto" takes'):
        fuse(model, dtype=HALF)
    assert torch.equal(fuse(model, dtype="auto")(x), single)


@pytest.mark.skipif(_native.why_not() is not None, reason="the compiled kernels are not built")
def test_kernels_of_another_cpu_refuse():
    if _native.isa() != "avx512_bf16":
        with pytest.raises(RuntimeError, match="bfloat16 must be false"):
            Program(3, HALF)
        return
    code = "from mvit3_kernels.inference.program import *; Program(3, torch.bfloat16)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"MVIT3_ISA": "avx2"}, capture_output=True, text=True
    )
    assert "RuntimeError: bfloat16 must be false for kernels of a CPU that does not multiply it" in done.stderr


@multiplied
@torch.no_grad()
def test_a_map_of_bfloat16_is_read_by_attention_alone():
    vectors, weight = [torch.ones(6), torch.zeros(6)], torch.ones(18, 6)
    qkv = [*vectors, weight, torch.zeros(18)]
    for readers, words in (([], "outputs must be maps of float32, got 1"), ([0, 0], "step 2 takes no bfloat16")):
        made = Program(6, HALF)
        y = made.add("norm_qkv", [IMAGE], qkv, [0], [1e-5])
        if readers:
            y = made.add("pointwise_conv", [y], [torch.ones(4, 18), torch.ones(4), torch.zeros(4)], readers)
        made.finish([y], lambda results: results)
        with pytest.raises(RuntimeError, match=words):
            made(images(1, 6, 4, 4))
    for dtype, kind in ((HALF, "norm_linear"), (torch.float32, "norm_qkv")):
        made = Program(6, dtype)
        attended = made.add("patch_attention", [made.add(kind, [IMAGE], qkv, [0], [1e-5])], (), [2, 2, 2])
        made.finish([attended], lambda results: results)
        if dtype is HALF:
            with pytest.raises(RuntimeError, match="patch_attention takes a map of norm_qkv"):
                made(images(1, 6, 4, 4))
        else:
            assert made(images(1, 6, 4, 4))[0].shape == (1, 4, 4, 6)


def tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [y for y in result if y is not None]


CALLS = {
    "logits": ("mobilevitv3_xxs", {}, "forward"),
    "features": ("mobilevitv2_050", {"features_only": True}, "forward"),
    "segmentation": ("deeplabv3_mobilevitv3_xxs", {}, "small_logits"),
    "boxes": ("ssdlite_mobilevitv3_xxs", {}, "predict"),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options", "method"), CALLS.values(), ids=CALLS)
@torch.no_grad()
def test_networks_of_half_precision(name, options, method, dtype):
    """Results have the dtype of the modules', and err no more against the float64 network of the same weights."""
    model = with_statistics(create_model(name, **options).eval()).to(dtype)
    x = images(2, 3, 64, 64).to(dtype)
    with mvit3_kernels.backend("reference"):
        exact = tensors(getattr(copy.deepcopy(model).double(), method)(x.double()))
        want = tensors(getattr(model, method)(x))
    fused = fuse(model)
    assert model._fused.why_not(model, x) is None
    found = tensors(getattr(fused, method)(x))
    assert [y.dtype for y in found] == [y.dtype for y in want]
    for mine, theirs, true in zip(found, want, exact, strict=True):
        assert (mine.double() - true).norm() <= (theirs.double() - true).norm()
    assert f"x is torch.float32, the network's weights are {dtype}" in model._fused.why_not(model, x.float())
    *_, last = model.parameters()
    last.data = last.data.float()
    assert f"is torch.float32, others are {dtype}" in model._fused.why_not(model, x)


PRODUCTS = """
import torch
from mvit3_kernels import fuse
from tests.inference.test_bfloat16 import HALF, STEPS, images, network, program, with_statistics
torch.set_num_threads(2)
print(torch.ops.mvit3.amx())
results = []
for channels, make in STEPS.values():
    torch.manual_seed(0)
    run = program(channels, with_statistics(make()))
    results += [run(images(1, channels, *size)) for size in ((10, 12), (6, 2))]
torch.save(results, PATH)
"""


@multiplied
def test_matrix_registers(tmp_path):
    """The walk over matrix registers, on a model of them that ends the process where a CPU would, gives what vectors
    give, but for the order of sums; so do the registers themselves where this machine has them."""
    found = {}
    for use in ("0", "model", ""):
        code = PRODUCTS.replace("PATH", repr(str(tmp_path / "results")))
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"MVIT3_AMX": use}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found[done.stdout.strip()] = torch.load(tmp_path / "results")
    assert {"none", "model"} <= found.keys() <= {"none", "model", "registers"}
    for use, results in found.items():
        for name, ours, theirs in zip([n for n in STEPS for _ in range(2)], results, found["none"], strict=True):
            assert largest(ours - theirs) <= 2e-3 * largest(theirs), (use, name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": torch.float16}, "dtype must be one of torch.float32, torch.bfloat16, auto, got torch.float16"),
        ({"dtype": "bf16"}, "dtype must be one of .*, got 'bf16'"),
        ({"dtype": "auto", "mode": "training"}, 'dtype must be torch.float32 where mode is "training"'),
    ],
)
def test_errors(options, words):
    model = create_model("mobilevitv3_xxs")
    with pytest.raises(ValueError, match=words):
        fuse(model, **options)
    assert type(model) is type(create_model("mobilevitv3_xxs"))
