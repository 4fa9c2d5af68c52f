"""Weights that are rounded together, by Triton's interpreter: the very results of ops that round their own."""

import importlib
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mvit3_kernels import ops
from mvit3_kernels.ops.pointwise_conv import product_for_two
from mvit3_kernels.ops.rounded_weights import find_rounded, rounded_together
from mvit3_kernels.ops.types import BatchNorm, ConvNorm, Layer, LayerNorm, Linear

from ..triton_tools import compute_like_a_gpu

compute_like_a_gpu()
X = (1, 4, 8, 16)


class Called(TorchDispatchMode, dict):
    """The first call of each op, by its name: what was called, and with what."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.setdefault(func._schema.name, (func, args))
        return func(*args, **(kwargs or {}))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).requires_grad_()


def norm(channels, training=True):
    return BatchNorm(draw(channels), draw(channels, seed=1), torch.zeros(channels), torch.ones(channels), training)


def layer(seed):
    def linear(outputs, inputs):
        return Linear(draw(outputs, inputs, seed=seed), draw(outputs, seed=seed))

    def layer_norm(seed):
        return LayerNorm(draw(16, seed=seed), draw(16, seed=seed + 1))

    return Layer(layer_norm(seed), linear(48, 16), linear(16, 16), layer_norm(seed + 9), linear(16, 16), linear(16, 16))


def linears(layers):
    return [t.weight for one in layers for t in one if isinstance(t, Linear)]


def point(training=True, **options):
    conv, after = Linear(draw(24, 16, 1, 1), draw(24)), norm(24, training)
    return [conv.weight], [*conv, *after[:2]], lambda x: ops.pointwise_conv(x, conv, after, "silu", **options)[0]


def fusion():
    weight, after = draw(24, 32), norm(24)
    return [weight], [weight, *after[:2]], lambda x: ops.pointwise_fusion(x, x, weight, after, "silu")[0]


def two_readers():
    conv = Linear(draw(24, 16, 1, 1), None)
    return [conv.weight], [conv.weight], lambda x: torch.cat(product_for_two(x, conv), -1)


def residual():
    shapes = (80, 80), (80, 1, 3, 3), (144, 80)  # beyond what a program holds
    parts = tuple(ConvNorm(draw(*shape), norm(shape[0])) for shape in shapes)
    weights = [parts[0].weight, parts[2].weight]
    learned = [t for weight, after in parts for t in (weight, *after[:2])]
    return (
        weights,
        learned,
        lambda x: ops.inverted_residual(
            x,
            *parts,
        )[0],
    )


def layers(**dropouts):
    both = [layer(0)]
    learned = [t for one in both for part in one for t in part[:2]]
    return linears(both), learned, lambda x: ops.global_representation(x, both, None, 4, **dropouts)


CASES = {
    "pointwise_conv": point,
    "pointwise_conv, dropout": lambda: point(dropout=0.5, seed=torch.tensor(7)),
    "pointwise_conv, evaluation": lambda: point(False),
    "pointwise_conv, fusion": fusion,
    "pointwise_conv_twice": two_readers,
    "inverted_residual": residual,
    "global_representation, dropout": lambda: layers(output_dropout=0.5, seed=torch.tensor(7)),
}


FORMS = {  # that take a rounded weight or None
    "global_representation": "global_representation_layer_forward",
    "pointwise_conv_twice": "pointwise_conv_twice_forward",
}


def step(run, learned, context):
    """y, all gradients, and what was called forward."""
    x = draw(*X[:3], 80 if learned[0].shape == (80, 80) else 16).detach().bfloat16().requires_grad_()
    with Called() as called, context:
        y = run(x)
    return [y, *torch.autograd.grad(y, (x, *learned), torch.ones_like(y))], called


@pytest.mark.parametrize("case", CASES)
def test_results_are_the_same(case):
    weights, learned, run = CASES[case]()
    asked, launchers = [], importlib.import_module("mvit3_kernels.ops.global_representation.triton")
    wanted, called = step(run, learned, nullcontext())
    assert "aten::_foreach_copy_" not in called
    with mock.patch.object(launchers, "_pack", side_effect=AssertionError("a layer rounds its own")):
        found, called = step(run, learned, rounded_together(lambda: asked.append(1) or weights))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert asked == [1] and "aten::_foreach_copy_" in called
    name, (op, args) = next((name, call) for name, call in called.items() if name.startswith("mvit3::"))
    op_name = case.partition(",")[0]
    assert name == "mvit3::" + FORMS.get(op_name, f"{op_name}_forward_rounded")
    given = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    torch.library.opcheck(op, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("many", [False, True])
def test_inference(many, monkeypatch):
    """Few rows read a weight as it is; of more a stage and a convolution find theirs."""
    for module in (ops.pointwise_conv, ops.global_representation):
        monkeypatch.setitem(module.__globals__, "MOST_FEW_ROWS", 4 if many else 1024)
    (first, _, stage), (second, _, conv) = layers(), point(False)
    x = draw(*X).detach().bfloat16()
    with torch.no_grad():
        wanted = conv(x), stage(x)
        with rounded_together(lambda: [*first, *second]), Called() as called:
            found = conv(x), stage(x)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert ("aten::_foreach_copy_" in called) is many


def test_a_weight_that_changes_is_seen_at_once():
    weights, _, run = point()
    x = draw(*X).detach().bfloat16()
    with rounded_together(lambda: weights):
        before = run(x)
        assert find_rounded(x, *weights) is not None
        with torch.no_grad():
            weights[0].mul_(2).add_(1)
        assert find_rounded(x, *weights) is None
        after = run(x)
    assert not torch.equal(before, after) and torch.equal(after, run(x))


def test_backward_reads_what_forward_did():
    """As with PyTorch's autocast."""
    weights, _, run = point()
    x = draw(*X).detach().bfloat16().requires_grad_()
    wanted = torch.autograd.grad(run(x).sum(), x)[0]
    with rounded_together(lambda: weights):
        y = run(x)
    with rounded_together(lambda: weights):
        run(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], wanted)


@pytest.mark.parametrize("whole", [False, True])
def test_checkpoints_save_as_many_tensors_twice(whole):
    """One inside of a pass runs again when that has ended, one around it with a pass of its own."""
    weights, _, run = point()
    x = draw(*X).detach().bfloat16().requires_grad_()

    def again(x):
        with rounded_together(lambda: weights):
            return run(run_inside(x))

    def run_inside(x):
        return x if whole else checkpoint(lambda x: run(x)[..., :16].contiguous(), x, use_reentrant=False)

    wanted = torch.autograd.grad(again(x).float().square().sum(), x)[0]
    y = checkpoint(again, x, use_reentrant=False) if whole else again(x)
    assert torch.equal(torch.autograd.grad(y.float().square().sum(), x)[0], wanted)
