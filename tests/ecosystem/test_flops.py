"""torch.utils.flop_counter counts our ops as it counts what they stand in for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mvit3_kernels
from mvit3_kernels import create_model, fuse, ops
from mvit3_kernels import nn as blocks
from mvit3_kernels.ops import BatchNorm, ConvNorm, LayerNorm, Linear
from mvit3_kernels.ops.flops import FORMULAS, formula_of
from mvit3_kernels.ops.registry import FORMS


def count(function) -> dict[str, int]:
    """Operations of a call, by operator."""
    with FlopCounterMode(display=False) as counter:
        function()
    return {str(op): flops for op, flops in counter.get_flop_counts().get("Global", {}).items()}


def plain(function) -> int:
    with mvit3_kernels.backend("reference"), sdpa_kernel(SDPBackend.MATH):
        found = count(function)
    assert not any("mvit3" in op for op in found)
    return sum(found.values())


def test_every_kernel_has_a_formula():
    kernels = [form for form in FORMS if form not in ops.__all__]
    assert len(kernels) > 20 and all(formula_of(form) for form in kernels)
    assert all(any(form.startswith(name) for form in kernels) for name in FORMULAS)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def norm(channels: int) -> BatchNorm:
    return BatchNorm(draw(channels), draw(channels), torch.zeros(channels), torch.ones(channels), True)


def layer_norm(per_sample: bool = False) -> LayerNorm:
    return LayerNorm(draw(16), draw(16), 1e-5, per_sample)


# The op, its arguments, and what PyTorch counts too much of in backward: its formula takes each depth-wise convolution
# for one of all channels.
X = (2, 8, 12, 16)
CALLS = {
    "pointwise_conv": lambda x: ops.pointwise_conv(x, Linear(draw(24, 16), None), norm(24), "silu")[0],
    "pointwise_fusion": lambda x: ops.pointwise_fusion(x, x, draw(24, 32), norm(24), "silu")[0],
    "norm_linear": lambda x: ops.norm_linear(x, layer_norm(), Linear(draw(24, 16), draw(24))),
    "feed_forward": lambda x: ops.feed_forward(
        x, layer_norm(), Linear(draw(32, 16), draw(32)), Linear(draw(16, 32), draw(16))
    ),
    "separable_attention": lambda x: ops.separable_attention(
        x, layer_norm(True), Linear(draw(33, 16), draw(33)), Linear(draw(16, 16), draw(16))
    ),
    "patch_attention": lambda x: ops.patch_attention(torch.cat((x, x, x), -1), 4, (2, 2)),
    "depthwise_conv": lambda x: ops.depthwise_conv(x, draw(16, 1, 3, 3), norm(16), "silu", 2)[0],
    "inverted_residual": lambda x: ops.inverted_residual(
        x, ConvNorm(draw(32, 16), norm(32)), ConvNorm(draw(32, 1, 3, 3), norm(32)), ConvNorm(draw(24, 32), norm(24)), 2
    )[0],
    "batch_norm_act": lambda x: ops.batch_norm_act(x, norm(16), "silu")[0],
}


@pytest.mark.skipif(mvit3_kernels._native.why_not() is not None, reason="the compiled kernels are not built")
@pytest.mark.parametrize("name", CALLS)
def test_ops_count_what_their_references_do(name):
    torch.manual_seed(0)
    op = CALLS[name]

    def forward() -> Tensor:
        return op(draw(*X))

    found = count(forward)
    assert not any("aten" in key for key in found) and sum(found.values()) == plain(forward)
    with mvit3_kernels.backend("cpu"):
        both = count(lambda: forward().sum().backward())
    assert sum(both.values()) == 3 * sum(found.values())
    if name not in ("depthwise_conv", "inverted_residual"):  # PyTorch takes depth-wise ones for dense in backward
        assert sum(both.values()) == plain(lambda: forward().sum().backward())


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv3_050"])
def test_networks_count_what_their_modules_do(name):
    model, x = create_model(name).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = plain(lambda: model(x))
        assert abs(sum(count(lambda: fuse(model)(x)).values()) / want - 1) < 0.01
    model.train()
    step = lambda: model(torch.cat((x, x))).sum().backward()  # noqa: E731
    assert abs(sum(count(step).values()) / plain(step) - 1) < 0.01


def test_a_stage_in_inference_counts_its_layers():
    """The op that is a whole stage on a GPU, by what it is asked with."""
    stage = blocks.GlobalRepresentation([blocks.TransformerLayer(16, 32, 4) for _ in range(2)], nn.LayerNorm(16))
    layers = [t for layer in list(stage)[:2] for part in layer.layer() for t in part[:2]]
    form = FORMS["global_representation_inference"]
    call = form.call(torch.randn(*X), layers, None, None, 1e-5, False, 4, 2, 2)
    assert formula_of("global_representation_inference")(call) == plain(lambda: stage.eval()(torch.randn(2, 16, 8, 12)))
