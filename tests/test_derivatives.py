"""Derivatives of whole networks beyond the first one in reverse, and what kernels say when they are asked for them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

import mvit3_kernels
from mvit3_kernels import _native, create_model
from mvit3_kernels.ops import dispatch
from tests.bounds import assert_bound, each

FAMILIES = ("mobilevit_xxs", "mobilevitv2_050", "mobilevitv3_xxs", "mobilevitv3_050")
SIZE = (2, 3, 64, 96)


def network(name: str, training: bool = False, dtype: torch.dtype = torch.float64, **options: float) -> nn.Module:
    torch.manual_seed(0)
    return (
        create_model(name, num_classes=5, **{"drop_rate": 0.0, "proj_drop_rate": 0.0, **options})
        .to(dtype)
        .train(training)
    )


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def energy(model: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    """The sum of the squared logits as a function of the parameters. Batch norm in training writes its buffers, and a
    transform allows that to those alone that are made inside of it."""

    def function(parameters: dict[str, Tensor]) -> Tensor:
        buffers = {name: t.clone() for name, t in model.named_buffers()}
        return functional_call(model, (parameters, buffers), (x,)).square().sum()

    return function


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By torch.autograd, on the reference."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with mvit3_kernels.backend("reference"):
        found = torch.autograd.grad(energy(model, x)(parameters), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest relative error of a tensor, of those that are not nearly zero."""
    scale = max(t.norm() for t in want.values())
    return max(((got[name].double() - t).norm() / t.norm().clamp(min=1e-3 * scale)).item() for name, t in want.items())


def tangents(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_and_tangent(name, training):
    """torch.func.grad and jvp in float32 err no more than twice as much as torch.autograd on the reference; in float64
    they agree."""
    model, x = network(name, training), images(*SIZE)
    want, directions = gradients(model, x), tangents(model)
    product = sum((want[name] * t).sum() for name, t in directions.items())
    parameters = dict(model.named_parameters())
    assert error(grad(energy(model, x))(parameters), want) < 1e-9
    assert torch.isclose(jvp(energy(model, x), (parameters,), (directions,))[1], product, rtol=1e-9)
    model, x = model.float(), x.float()
    parameters = dict(model.named_parameters())
    least = 1e-3 * max(t.norm().item() for t in want.values())
    found = grad(energy(model, x))(parameters)
    assert_bound(found, gradients(model, x), want, 1e-5, group=each, least=least, size=Tensor.norm)
    single = {name: t.float() for name, t in directions.items()}
    assert torch.isclose(jvp(energy(model, x), (parameters,), (single,))[1].double(), product, rtol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_tangent_of_the_images(name):
    """Nothing requires grad, so that a kernel would drop the tangent: the difference of two calls tells what it must
    be."""
    model, x, direction = network(name).requires_grad_(False), images(*SIZE), images(*SIZE).flip(0)
    step = 1e-5
    want = (model(x + step * direction) - model(x - step * direction)) / (2 * step)
    model, x, direction = model.float(), x.float(), direction.float()
    for candidate in (model, mvit3_kernels.fuse(copy.deepcopy(model))):
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(candidate(forward_ad.make_dual(x, direction))).tangent
        found = [jvp(candidate, (x,), (direction,))[1], dual]
        if candidate is not model:  # it takes ten seconds to trace, and a fused network takes the plain one's path
            found.append(torch.func.linearize(candidate, x)[1](direction))
        for got in found:
            assert torch.allclose(got.double(), want, rtol=0, atol=1e-4 * want.abs().max())


@pytest.mark.parametrize("statistics", ["eval", "train"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_of_each_sample(name, statistics):
    """vmap(grad) equals a loop. In training each sample, here a batch of two images, has statistics of its own, and no
    running ones."""
    model, x = network(name, statistics == "train"), images(2, *SIZE)
    if statistics == "train":
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    parameters = dict(model.named_parameters())
    got = vmap(grad(lambda p, x: functional_call(model, p, (x,)).square().sum()), (None, 0))(parameters, x)
    for i in range(2):
        assert error({name: t[i] for name, t in got.items()}, gradients(model, x[i])) < 1e-8


def test_dropout_of_each_sample():
    """Every site draws for itself with randomness="different", alike with "same", and the default of vmap is a clear
    error."""
    model = network("mobilevitv3_xxs", proj_drop_rate=0.2, attn_drop_rate=0.1, ffn_drop_rate=0.1)
    for module in model.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)  # its running statistics are no one sample's
    x = images(1, 3, 64, 64).expand(3, 1, 3, 64, 64)

    def logits(randomness: str) -> Tensor:
        return vmap(model, randomness=randomness)(x)[:, 0]

    first, second, third = logits("different")
    assert not torch.allclose(first, second) and not torch.allclose(second, third)
    first, second, third = logits("same")
    assert torch.allclose(first, second) and torch.allclose(second, third)
    with pytest.raises(RuntimeError, match="randomness"):
        logits("error")
    parameters = dict(model.named_parameters())
    found = vmap(grad(lambda p, x: functional_call(model, p, (x,)).square().sum()), (None, 0), randomness="different")(
        parameters, x
    )
    assert not any(torch.allclose(t[0], t[1]) for name, t in found.items() if name.endswith("qkv_proj.weight"))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_penalty(name, training):
    """A loss on the gradient of the images, and a product with the Hessian, twice in reverse by what the refusal
    advises: against forward over reverse, which has other formulas."""
    model, x = network(name, training), images(*SIZE)
    parameters, directions = dict(model.named_parameters()), tangents(model)

    def logits(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, (parameters, {name: t.clone() for name, t in model.named_buffers()}), (image,))

    def penalty(parameters: dict[str, Tensor]) -> Tensor:
        return grad(lambda image: logits(parameters, image).square().sum())(x).square().sum()

    with mvit3_kernels.backend("reference"):
        image = x.clone().requires_grad_()
        slope = torch.autograd.grad(logits(parameters, image).square().sum(), image, create_graph=True)[0]
        found = torch.autograd.grad(slope.square().sum(), list(parameters.values()), allow_unused=True)
    products = torch.stack([(g * t).sum() for g, t in zip(found, directions.values(), strict=True) if g is not None])
    want = jvp(penalty, (parameters,), (directions,))[1]
    assert abs(products.sum() - want) <= 1e-7 * products.abs().sum()

    with mvit3_kernels.backend("reference"):
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        first = torch.autograd.grad(energy(model, x)(leaves), list(leaves.values()), create_graph=True)
        inner = sum((g * t).sum() for g, t in zip(first, directions.values(), strict=True))
        twice = torch.autograd.grad(inner, list(leaves.values()), allow_unused=True)
    hessian = {
        name: torch.zeros_like(p) if h is None else h for (name, p), h in zip(leaves.items(), twice, strict=True)
    }
    assert error(jvp(grad(energy(model, x)), (parameters,), (directions,))[1], hessian) < 1e-5


@pytest.mark.skipif(_native.why_not() is not None, reason="the compiled kernels are not built")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_refusal_of_a_second_derivative(name):
    model, x = network(name, dtype=torch.float32), images(*SIZE, dtype=torch.float32).requires_grad_()
    first = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(
        NotImplementedError, match=r'second derivatives on the reference only: use mvit3_kernels.backend\("reference"\)'
    ):
        first.square().sum().backward()
    with mvit3_kernels.backend("reference"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0].square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_the_reference_of_attention_costs_what_the_fused_one_costs():
    """Second derivatives are not paid for by those who take the first: nothing of the size of the scores is kept."""
    tokens, kept = 1024, []
    qkv = torch.randn(1, 32, 32, 48, requires_grad=True)
    with (
        mvit3_kernels.backend("reference"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
    ):
        out = mvit3_kernels.ops.patch_attention(qkv, 4, (1, 1))
    assert kept and max(kept) < tokens**2
    assert torch.autograd.grad(out.sum(), qkv)[0].any()


def test_transform():
    seen = []
    for enter in (
        lambda f: f(torch.zeros(2)),
        lambda f: grad(lambda x: f(x).sum())(torch.zeros(2)),
        lambda f: vmap(f)(torch.zeros(2)),
        lambda f: jvp(f, (torch.zeros(2),), (torch.zeros(2),)),
    ):
        enter(lambda x: seen.append(dispatch.transform()) or x)
    assert seen[0] is None and all("torch.func" in reason for reason in seen[1:])
    with forward_ad.dual_level():
        assert "forward-mode AD" in dispatch.transform()
    assert dispatch.transform() is None


@pytest.mark.skipif(_native.why_not() is not None, reason="the compiled kernels are not built")
@pytest.mark.parametrize("kernel", ["inference", "forward"])
def test_kernels_refuse_what_they_would_drop(kernel):
    """Called as torch.ops.mvit3.<kernel>, past the public function."""
    x, weight = torch.randn(2, 3, 5, 4), torch.randn(6, 4)

    def call(x: Tensor) -> Tensor:
        inputs = (x, None, weight, None, None, None, None, None)
        if kernel == "inference":
            return torch.ops.mvit3.pointwise_conv_inference(*inputs, 0.0, 0, None)
        return torch.ops.mvit3.pointwise_conv_forward(*inputs, False, 0.0, 0, 0.0, None, None)[0]

    def dual(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return call(forward_ad.make_dual(x, x))

    for attempt in (
        lambda: jvp(call, (x,), (x,)),
        lambda: grad(lambda x: call(x).sum())(x),
        lambda: vmap(grad(lambda x: call(x).sum()))(x[None]),
        lambda: dual(x),
        lambda: dual(x.clone().requires_grad_()),
    ):
        with pytest.raises(NotImplementedError, match=f"pointwise_conv_{kernel}: .* call the public function"):
            attempt()
    assert torch.allclose(vmap(call)(x[None])[0], call(x), rtol=1e-5, atol=1e-5)
    with forward_ad.dual_level():
        assert torch.equal(call(x), call(x))  # no tangent, nothing to drop
    if kernel == "inference":
        with pytest.raises(NotImplementedError, match="without gradient"):
            call(x.requires_grad_()).sum().backward()


def test_registered_batch_norm_act_has_every_derivative():
    """Through torch.ops as through the public function."""
    x, ones, zeros = torch.randn(2, 3, 5, 4), torch.ones(4), torch.zeros(4)

    def call(x: Tensor) -> Tensor:
        return torch.ops.mvit3.batch_norm_act(x, ones, zeros, zeros, ones, False, 0.0, 1, None)[0]

    want = torch.autograd.functional.jacobian(torch.nn.functional.silu, x).sum((0, 1, 2, 3))
    assert torch.allclose(jvp(call, (x,), (torch.ones_like(x),))[1], want, rtol=1e-4, atol=1e-5)
    assert torch.allclose(grad(lambda x: call(x).sum())(x), want, rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    assert torch.allclose(tangent, want, rtol=1e-4, atol=1e-5)
