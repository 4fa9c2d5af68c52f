"""The Triton kernel of conv3x3 on CPU tensors, step by step; run by test_conv3x3_triton.py."""

import importlib

import pytest
import torch

import mvit3_kernels
from mvit3_kernels import ops
from mvit3_kernels.nn import ConvNormAct
from tests.bounds import assert_bound, half_a_rounding
from tests.ops.batch_norm_act_cases import poison
from tests.ops.inputs import Draw, mapped
from tests.ops.test_conv3x3 import TestConv3x3 as Reference
from tests.triton_tools import compute_like_a_gpu

poison()
compute_like_a_gpu()
OP = importlib.import_module("mvit3_kernels.ops.conv3x3")


def given(dtype, **options):
    return mapped(Reference.arguments(Draw(), training=False, **options), lambda _, t: t.to(dtype))


@pytest.mark.parametrize("image", [torch.float32, None], ids=["autocast", "half"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"act": "silu", "stride": 2, "height": 9, "width": 133, "channels": 3, "outputs": 16},
        {"act": "relu", "height": 4, "width": 6, "channels": 1, "outputs": 5},
        {"norm": False, "stride": 2, "height": 1, "width": 1, "channels": 4, "outputs": 64},
    ],
    ids=str,
)
def test_bound(options, dtype, image):
    """Rows of several blocks and of less than one; images as they are, cast in the kernel, and in 16 bits; weights in
    both layouts."""
    arguments = given(dtype, **options)
    truth, _ = ops.conv3x3(**mapped(arguments, lambda _, t: t.double()))
    found = {}
    for backend in ("reference", "triton"):
        own = arguments | {"x": arguments["x"].to(image or dtype)}
        if image is None:
            own["weight"] = own["weight"].to(memory_format=torch.channels_last)
        with mvit3_kernels.backend(backend), torch.autocast("cpu", dtype, enabled=image is not None), torch.no_grad():
            y, moments = ops.conv3x3(**own)
        assert y.dtype is dtype and moments is None
        found[backend] = {"y": y}
    assert_bound(found["triton"], found["reference"], {"y": truth}, half_a_rounding(dtype), least=0)


def test_hostile_values_reach_their_neighbours_alone():
    arguments = given(torch.bfloat16, act="silu", height=6, width=70, channels=3, outputs=7)
    arguments["x"][0, 2, 64, 1] = float("nan")
    with mvit3_kernels.backend("triton"):
        y, _ = ops.conv3x3(**arguments)
    spoiled = torch.zeros(2, 6, 70, dtype=torch.bool)
    spoiled[0, 1:4, 63:66] = True
    assert torch.equal(y.isnan().all(-1), spoiled) and torch.equal(y.isnan().any(-1), spoiled)


def test_what_the_kernel_leaves_to_the_library():
    """Training, gradients and many channels: the module computes what it did, where its op would refuse."""
    x = torch.randn(1, 3, 8, 8)
    for module, training, grad, said in (
        (ConvNormAct(3, 8, 3, stride=2), True, False, "of evaluation"),
        (ConvNormAct(3, 8, 3, stride=2), False, True, "of evaluation"),
        (ConvNormAct(5, 8, 3, stride=2), False, False, "up to 4 channels"),
        (ConvNormAct(3, 8, 3, dilation=2), False, False, "not dilated"),
    ):
        module.train(training)
        image = torch.randn(1, module.block.conv.in_channels, 8, 8) if module.block.conv.in_channels != 3 else x
        weight, norm = module.block.conv.weight, module.block.norm
        wants = [
            image.permute(0, 2, 3, 1).bfloat16(), weight, *module.block.conv.stride[:1], module.block.conv.dilation[0],
            training or grad,
        ]  # fmt: skip
        assert said in OP._image_why_not(*wants)
        with mvit3_kernels.backend("triton"), torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            y = module(image)
        with torch.autocast("cpu", torch.bfloat16):
            z = module.block.conv(image)
        want = torch.nn.functional.silu(
            torch.nn.functional.batch_norm(
                z.float(), norm.running_mean, norm.running_var, norm.weight, norm.bias, training, 0.0, norm.eps
            )
        )
        torch.testing.assert_close(y.float(), want, rtol=0.02, atol=0.02)


def test_a_module_of_an_image_is_one_op():
    module = ConvNormAct(3, 16, 3, stride=2).eval()
    said = mvit3_kernels.explain(module, torch.randn(1, 3, 8, 8))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        said = str(mvit3_kernels.explain(module, torch.randn(1, 3, 8, 8)))
    assert "conv3x3" in said and "triton" in said and "batch_norm_act" not in said, said
