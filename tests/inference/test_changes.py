"""A fused network follows every change of its weights, of its structure and of the mode that it is called in."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torchvision.ops import FrozenBatchNorm2d

import mvit3_kernels
from mvit3_kernels import _native, fuse, refresh, unfuse
from tests.golden import fill
from tests.inference.test_fuse import images

pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason="the compiled kernels are not built")


def network(name: str, **options) -> nn.Module:
    """Weights under which a network listens to its images: every part of it shows in the logits."""
    return fill(mvit3_kernels.create_model(name, **options)).eval()


def same_as_unfused(model: nn.Module, x: Tensor) -> None:
    got = model(x)
    want = unfuse(copy.deepcopy(model))(x)
    for a, b in zip(got, want, strict=True) if isinstance(got, list) else [(got, want)]:
        assert a.shape == b.shape and (a - b).norm() <= 1e-4 * b.norm()


def served(model: nn.Module, x: Tensor) -> bool:
    return model._fused.why_not(model, x) is None


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, 1e-2, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, 1e-5, momentum=0.9, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_of_an_optimizer(name):
    """Also where norms are frozen, so that nothing but parameters changes and no mode does."""
    model, x = fuse(network("mobilevitv3_xxs", num_classes=10)), images(2, 3, 64, 64)
    optimizer = OPTIMIZERS[name](model.parameters())
    seen = []
    for _ in range(3):
        with torch.no_grad():
            assert served(model, x)
            seen.append(model(x))
            same_as_unfused(model, x)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in itertools.pairwise(seen))


def through_numpy(t: Tensor) -> None:
    t.detach().numpy()[...] *= 1.5


WRITES: dict[str, Callable[[Tensor], None]] = {
    "data": lambda t: t.data.copy_(1.5 * t.detach()),
    "new data": lambda t: setattr(t, "data", 1.5 * t.detach()),
    "numpy": through_numpy,
    "in place": lambda t: t.detach().mul_(1.5),
    "swap_tensors": lambda t: torch.utils.swap_tensors(
        t, type(t)(1.5 * t.detach()) if isinstance(t, nn.Parameter) else 1.5 * t
    ),
    "set_": lambda t: t.set_(1.5 * t.detach()),
}


@pytest.mark.parametrize(
    "tensor",
    [
        "conv_1.block.conv.weight",
        "layer_3.1.global_rep.0.pre_norm_mha.0.bias",
        "layer_2.0.block.conv_3x3.block.norm.running_var",
    ],
)
@pytest.mark.parametrize("way", WRITES)
@torch.no_grad()
def test_a_tensor_that_is_written_as_a_whole(way, tensor):
    model, x = fuse(network("mobilevitv3_xxs", num_classes=10)), images(2, 3, 64, 64)
    model(x)
    before = model(x)
    WRITES[way](model.state_dict(keep_vars=True)[tensor])
    assert not torch.equal(model(x), before)
    same_as_unfused(model, x)
    assert served(model, x)


def test_tensors_of_inference_mode():
    """They count no versions at all."""
    with torch.inference_mode():
        model, x = network("mobilevitv3_xxs", num_classes=10), images(2, 3, 64, 64)
        fuse(model)
        before = model(x)
        model.layer_1[0].block.exp_1x1.block.conv.weight.mul_(1.5)
        assert not torch.equal(model(x), before)
        same_as_unfused(model, x)


@torch.no_grad()
def test_a_single_element_is_noticed_within_128_calls_or_by_refresh():
    model, x = fuse(network("mobilevitv3_xxs", num_classes=10)), images(1, 3, 32, 32)
    model(x)
    for weight in (model.layer_5[1].global_rep[1].pre_norm_ffn[1].weight, model.conv_1.block.norm.bias):
        for index in (0, weight.numel() // 3, weight.numel() - 1):
            weight.detach().numpy().reshape(-1)[index] += 100
            for _ in range(128):
                got = model(x)
            assert torch.allclose(got, unfuse(copy.deepcopy(model))(x), rtol=1e-3, atol=1e-4)
    before = model(x)
    model.conv_1.block.norm.bias.detach().numpy()[3] += 100
    assert refresh(model) is model and not torch.equal(model(x), before)
    same_as_unfused(model, x)


@torch.no_grad()
def test_a_single_element_is_noticed_at_once_where_pytorch_counts_the_write():
    model, x = fuse(network("mobilevitv3_xxs", num_classes=10)), images(1, 3, 32, 32)
    model(x)
    model.conv_1.block.norm.bias[3] += 1
    same_as_unfused(model, x)


def attributes(model: nn.Module) -> dict[str, Callable[[], None]]:
    stage = model.layer_3
    return {
        "eps of a batch norm": lambda: setattr(stage[0].block.exp_1x1.block.norm, "eps", 0.5),
        "eps of a layer norm": lambda: setattr(stage[1].global_rep[0].pre_norm_ffn[0], "eps", 50.0),
        "act": lambda: setattr(stage[1].conv_proj, "act", "relu"),
        "patch_size": lambda: [setattr(m, "patch_size", (4, 4)) for m in stage.modules() if hasattr(m, "patch_size")],
        "num_heads": lambda: [
            setattr(m, "num_heads", 2) for m in stage.modules() if type(m).__name__ == "MultiHeadAttention"
        ],
        "training of one batch norm": lambda: stage[0].block.exp_1x1.block.norm.train(),
        "an appended module": lambda: model.classifier.append(nn.Linear(10, 3)),
        "an appended block": lambda: model.layer_1.append(copy.deepcopy(model.layer_1[0])),
        "a stage that is gone": lambda: setattr(
            model, "layer_1", nn.Sequential(mvit3_kernels.nn.InvertedResidual(16, 16, 32))
        ),
        "a removed module": lambda: model.layer_2.pop(-1),
        "a new head": lambda: model.reset_classifier(7),
        "a hook": lambda: stage[1].register_forward_hook(lambda m, i, y: 2 * y),
        "a method": lambda: setattr(model, "forward_features", lambda x: 2 * type(model).forward_features(model, x)),
    }


@pytest.mark.parametrize("change", list(attributes(network("mobilevitv3_xxs"))))
@torch.no_grad()
def test_structure_and_attributes(change):
    model, x = fuse(network("mobilevitv3_xxs", num_classes=10)), images(2, 3, 64, 64)
    before = model(x)
    attributes(model)[change]()
    got = model(x)
    assert got.shape != before.shape or not torch.allclose(got, before, rtol=1e-3)
    if change == "a method":
        return  # a copy would call the original's
    same_as_unfused(model, x)


@torch.no_grad()
def test_heads_that_come_and_go():
    """A new module may lie where an old one lay, with the same id()."""
    model, x = fuse(network("mobilevitv3_xxs", num_classes=10)), images(1, 3, 32, 32)
    for seed in range(20):
        torch.manual_seed(seed)
        model.classifier.fc = nn.Linear(model.num_features, 10)
        same_as_unfused(model, x)


class MLP(nn.Sequential):
    pass


HEADS = {
    "MLP": lambda n: nn.Sequential(nn.Linear(n, 8), nn.ReLU(), nn.Linear(8, 5)),
    "two linear": lambda n: nn.Sequential(nn.Linear(n, 8), nn.Dropout(0.5), nn.Linear(8, 5)),
    "LayerNorm": lambda n: nn.Sequential(nn.LayerNorm(n), nn.Linear(n, 5)),
    "subclass": lambda n: MLP(nn.Linear(n, 5)),
    "lazy": lambda n: nn.LazyLinear(5),
    "no bias": lambda n: nn.Linear(n, 5, bias=False),
}


@pytest.mark.parametrize("name", ["mobilevitv3_xxs", "mobilevitv3_050"])
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_other_heads(name, head):
    model, x = network(name), images(2, 3, 64, 64)
    setattr(model.classifier, "1" if "050" in name else "fc", HEADS[head](model.num_features))
    same_as_unfused(fuse(model.eval()), x)


NORMS = {
    "frozen": lambda n: FrozenBatchNorm2d(n),
    "GroupNorm": lambda n: nn.GroupNorm(1, n),
    "no statistics": lambda n: nn.BatchNorm2d(n, track_running_stats=False),
    "not affine": lambda n: nn.BatchNorm2d(n, affine=False),
    "SyncBatchNorm": lambda n: nn.SyncBatchNorm(n),
    "Identity": lambda n: nn.Identity(),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "place", ["conv_1", "layer_1.0.block.conv_3x3", "layer_3.1.local_rep.conv_3x3", "layer_3.1.fusion", "conv_1x1_exp"]
)
@torch.no_grad()
def test_other_norms(place, norm):
    model, x = network("mobilevitv3_xxs", num_classes=10), images(2, 3, 64, 64)
    layer = model.get_submodule(place)
    layer.block.norm = NORMS[norm](layer.block.conv.out_channels)
    same_as_unfused(fuse(model.eval()), x)


STEMS = {
    "7x7": lambda: nn.Conv2d(3, 16, 7, 2, 3, bias=False),
    "no padding": lambda: nn.Conv2d(3, 16, 3, 2, 0, bias=False),
    "padding in a mode": lambda: nn.Conv2d(3, 16, 3, 2, 1, bias=False, padding_mode="reflect"),
    "patchify": lambda: nn.Conv2d(3, 16, 4, 4),
    "bias": lambda: nn.Conv2d(3, 16, 3, 2, 1),
    "dilation": lambda: nn.Conv2d(3, 16, 3, 2, 2, dilation=2, bias=False),
    "stride 3": lambda: nn.Conv2d(3, 16, 3, 3, 1, bias=False),
    "stride in one direction": lambda: nn.Conv2d(3, 16, 3, (2, 1), 1, bias=False),
    "same": lambda: nn.Conv2d(3, 16, 3, 1, "same", bias=False),
}


@pytest.mark.parametrize("stem", STEMS)
@torch.no_grad()
def test_other_stems(stem):
    model, x = network("mobilevitv3_xxs", num_classes=10), images(2, 3, 64, 64)
    model.conv_1.block.conv = STEMS[stem]()
    same_as_unfused(fuse(model.eval()), x)
    model.conv_1 = nn.Sequential(model.conv_1, nn.Identity())
    same_as_unfused(model, x)


@torch.no_grad()
def test_repeated_and_other_feature_maps():
    model, x = network("mobilevitv3_xxs", features_only=True, out_indices=(3, 1, 3, -1, 4)), images(2, 3, 64, 64)
    same_as_unfused(fuse(model), x)
    model.feature_info.out_indices = (0, 2)
    same_as_unfused(model, x)
    assert served(model, x) and len(model(x)) == 2


def test_gradients_flow_wherever_something_is_trained():
    model, x = fuse(network("mobilevitv3_xxs", num_classes=10)), images(2, 3, 64, 64)
    model(x).sum().backward()
    assert model.conv_1.block.conv.weight.grad.norm() > 0
    model.requires_grad_(False)
    assert served(model, x)
    assert not model(x).requires_grad
    for one in (model.classifier.fc.weight, model.conv_1.block.norm.bias):
        one.requires_grad_()
        model(x).sum().backward()
        assert one.grad.norm() > 0
        one.requires_grad_(False)
    with torch.inference_mode():
        assert served(model.requires_grad_(), x)


@torch.no_grad()
def test_casts_and_moves_and_back():
    model, x = fuse(network("mobilevitv3_xxs", num_classes=10)), images(2, 3, 64, 64)
    want = model(x)
    assert torch.allclose(model.double()(x.double()).float(), want, rtol=1e-3, atol=1e-4)
    assert "float64" in model._fused.why_not(model, x)
    assert torch.allclose(model.float()(x), want, rtol=1e-3, atol=1e-4) and served(model, x)
    model.layer_3.double()
    assert "float64" in model._fused.why_not(model, x)
    model.layer_3.float()
    assert served(model, x)


@torch.no_grad()
def test_transforms_and_modes_take_the_ordinary_path():
    model, x = fuse(network("mobilevitv3_xxs", num_classes=10)), images(3, 3, 64, 64)
    want = model(x)
    assert torch.allclose(torch.func.vmap(lambda image: model(image[None])[0])(x), want, rtol=1e-3, atol=1e-4)
    plain = unfuse(copy.deepcopy(model)).double()
    _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    _, wanted = torch.func.jvp(plain, (x.double(),), (torch.ones_like(x).double(),))
    assert (tangent - wanted).norm() <= 1e-3 * wanted.norm() and wanted.norm() > 0
    found = torch.func.grad(lambda image: model(image).sum())(x)
    assert (found - torch.func.grad(lambda image: plain(image).sum())(x.double())).norm() <= 1e-3 * found.norm()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 10)
    assert served(model, x)


@torch.no_grad()
def test_parameters_given_for_one_call():
    model, x = fuse(network("mobilevitv3_xxs", num_classes=10)), images(2, 3, 64, 64)
    before = model(x)
    other = {key: 1.1 * t if t.is_floating_point() else t for key, t in model.state_dict().items()}
    got = torch.func.functional_call(model, other, (x,))
    twin = unfuse(copy.deepcopy(model))
    twin.load_state_dict(other)
    assert (got - twin(x)).norm() <= 1e-4 * got.norm()
    assert torch.allclose(model(x), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", ["conv_1.block.conv", "layer_3.1.local_rep.conv_1x1.block.conv", "classifier.fc"])
def test_gradients_of_a_weight_that_was_computed(place):
    """By another network, or by a mask: a tensor in the place of a parameter, with a gradient function."""
    model, x = fuse(network("mobilevitv3_xxs")).requires_grad_(False), images(1, 3, 64, 64)
    layer, factor = model.get_submodule(place), torch.ones((), requires_grad=True)
    weight = layer.weight.detach()
    assert served(model, x)
    del layer.weight
    layer.weight = weight * factor
    assert not served(model, x)
    model(x).square().sum().backward(retain_graph=True)
    got, factor.grad = factor.grad, None
    unfuse(model)(x).square().sum().backward()
    assert got.abs() > 0 and torch.allclose(got, factor.grad, rtol=1e-3)


@torch.no_grad()
def test_a_mode_of_functions_sees_the_modules():
    class Doubles(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            y = function(*args, **(kwargs or {}))
            return 2 * y if function is nn.functional.linear else y

    model, x = fuse(network("mobilevitv3_xxs")), images(1, 3, 64, 64)
    with Doubles():
        same_as_unfused(model, x)
        assert "torch.overrides" in model._fused.why_not(model, x)
    with torch.device("cpu"):
        assert served(model, x)
