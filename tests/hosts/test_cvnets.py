"""Blocks of ml-cvnets and of the MobileViTv3 release: what they compute, what they keep, what is left.

No copy of either is here: the stand-ins of `cvnets_like.py` take their place, under the same module path."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mvit3_kernels import _native, backend, explain, fuse, fuse_report, hosts, unfuse
from mvit3_kernels import nn as blocks
from mvit3_kernels.nn import guard
from tests.bounds import assert_bound, each

from .compare import distances, flat, images, prepare, results

EXACT = 1e-12
SOURCE = Path(__file__).with_name("cvnets_like.py")
NAME, NETWORK = "cvnets.modules.mobilevit_block", "cvnets.models.classification.mobilevit"
BLOCKS = ("MobileViTBlock", "MobileViTBlockv2", "MobileViTBlockv3", "MobileViTv3Block")
built = pytest.mark.skipif(_native.why_not() is not None, reason="the compiled kernels are not built")
V1_STYLE = ("MobileViTBlock", "MobileViTBlockv3")


def load_cvnets(name: str = NAME, **options: object) -> ModuleType:
    """The stand-ins as a module of cvnets, anew."""
    spec = importlib.util.spec_from_file_location(name, SOURCE)
    module = importlib.util.module_from_spec(spec)
    vars(module).update(options)
    spec.loader.exec_module(module)
    return module


once = cache(load_cvnets)


def register(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> ModuleType:
    for name in ("cvnets", "cvnets.modules", "cvnets.models", "cvnets.models.classification"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, NETWORK, once(NETWORK))
    monkeypatch.setitem(sys.modules, NAME, module)
    return module


@pytest.fixture
def cvnets(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A copy of cvnets before 0.3."""
    return register(monkeypatch, once())


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A copy from 0.3 on."""
    return register(monkeypatch, once(LATE=True))


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A copy that a test may change."""
    return register(monkeypatch, load_cvnets())


def network(cvnets: ModuleType, block: str, **options: object) -> nn.Module:
    """A stem, two inverted residuals and a block: the map is half as large as the images, and a quarter."""
    torch.manual_seed(0)
    return prepare(
        nn.Sequential(
            cvnets.ConvLayer(3, 8, 3, stride=2),
            cvnets.InvertedResidual(8, 8),
            cvnets.InvertedResidual(8, 12, stride=2),
            getattr(cvnets, block)(12, 16, **options),
        )
    )


def classifier(cvnets: ModuleType, block: str) -> nn.Module:
    torch.manual_seed(0)
    return prepare(sys.modules[NETWORK].MobileViT(cvnets, block)).eval()


def reasons(model: nn.Module, x: Tensor) -> str:
    """Why blocks of a call ran their modules."""
    return " ".join(row.reason for row in explain(model, x) if row.kind == "block" and row.reason)


def left(model: nn.Module) -> dict[str, str]:
    return {row.name: row.reason for row in fuse_report(model).left()}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", [(32, 48), (29, 37)], ids=["even", "odd"])
@pytest.mark.parametrize("block", BLOCKS)
def test_exact(cvnets, block, size, training):
    model, x = network(cvnets, block), images(2, 3, *size)
    found = distances(model, x, training)
    assert all(distance <= EXACT for distance in found.values()), found
    fuse(model, "training")
    assert not left(model) and not reasons(model, x)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_stand_ins_are_the_published_blocks(cvnets, block):
    """Ours are held to golden values of those, and have their keys."""
    ours = {
        "MobileViTBlock": blocks.MobileViTBlock,
        "MobileViTBlockv2": blocks.MobileViTV2Block,
        "MobileViTBlockv3": blocks.MobileViTV3Block,
        "MobileViTv3Block": blocks.MobileViTV3SeparableBlock,
    }[block](12, 16, 32, 2)
    host, x = prepare(getattr(cvnets, block)(12, 16)), images(2, 12, 7, 10)
    ours.double().load_state_dict(host.state_dict())
    want = ours(x)
    assert (host(x) - want).norm() <= EXACT * want.norm()


@pytest.mark.parametrize("block", BLOCKS)
def test_a_large_patch_on_images_of_256(cvnets, block):
    model, x = network(cvnets, block, patch=8, depth=1), images(1, 3, 256, 256)
    found = distances(model, x, training=False)
    assert all(distance <= EXACT for distance in found.values()), found
    assert not reasons(fuse(model, "training"), x)


@pytest.mark.parametrize("block", V1_STYLE)
def test_the_layer_norm_of_later_versions(late, block):
    """It normalises over patches where there are as many as channels: 8 x 8 pixels of 2 x 2, 16 channels. In float64
    the host rounds probabilities to float32; the op would not."""
    exact, host = network(late, block), network(late, block).float()
    for pixels, reason in ((32, "16 patches for 16 channels"), (40, "")):
        x = images(2, 3, pixels, pixels)
        assert max(distances(exact, x, training=True).values()) <= EXACT
        assert "rounds probabilities" in reasons(fuse(copy.deepcopy(exact), "training"), x)
        fused = fuse(copy.deepcopy(host), "training")
        why = reasons(fused, x.float())
        assert (reason in why) if reason else not why
        want, reference = results(copy.deepcopy(exact), x, True), results(copy.deepcopy(host), x.float(), True)
        found = results(fuse(copy.deepcopy(host), "training"), x.float(), True)
        assert_bound(found, reference, want, 1e-6, group=each, least=0)


def test_the_layer_norm_of_the_first_versions_normalises_channels(cvnets):
    x = images(2, 3, 32, 32)
    model = fuse(network(cvnets, "MobileViTBlock"), "training")
    assert not reasons(model, x)


@pytest.mark.parametrize("block", BLOCKS)
def test_optimizers_go_on_and_unfuse_restores(cvnets, block):
    model, x = network(cvnets, block), images(2, 3, 33, 33)
    host = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-3) for m in (host, model)]
    ids, keys = [id(p) for p in model.parameters()], list(model.state_dict())
    fuse(model, "training")
    for _ in range(20):
        for optimizer, m in zip(optimizers, (host, model), strict=True):
            results(m, x, training=True)
            optimizer.step()
    error = flat(model.state_dict().values()) - flat(host.state_dict().values())
    assert error.norm() <= 1e-9 * flat(host.state_dict().values()).norm()
    assert [id(p) for p in model.parameters()] == ids and list(model.state_dict()) == keys
    assert all(isinstance(m, cvnets.ConvLayer) for m in model[3].local_rep)
    unfuse(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in host.modules()]
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in host.modules()]


def test_copies_and_pickles_are_fused(cvnets):
    model, x = fuse(network(cvnets, "MobileViTBlockv2"), "training").eval(), images(1, 3, 32, 32)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert other(x).equal(model(x)) and not reasons(other, x)
        unfuse(other)
        assert type(other[3]) is cvnets.MobileViTBlockv2


def test_a_pickle_is_the_hosts_own_where_its_version_is_not_known(cvnets, monkeypatch):
    model = fuse(network(cvnets, "MobileViTBlockv2"), "training")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = register(monkeypatch, load_cvnets())
    other.MobileViTBlockv2.forward = lambda self, x: self.surprise(x)
    found = torch.load(file, weights_only=False)
    assert type(found[3]) is other.MobileViTBlockv2 and isinstance(found[1], hosts.Swapped)


def test_every_hook_fires(cvnets):
    host, x = network(cvnets, "MobileViTBlock"), images(1, 3, 32, 32)
    counts = []
    for model in (host, fuse(copy.deepcopy(host), "training")):
        counts.append(0)

        def count(*_: object) -> None:
            counts[-1] += 1

        for module in model.modules():
            module.register_forward_hook(count)
        model(x)
    assert counts[0] == counts[1] > 60


CHANGES = {
    "scaling": lambda m: vars(m[3].global_rep[0].pre_norm_mha[1]).update(scaling=4.0),
    "patch": lambda m: vars(m[3]).update(patch_h=4, patch_w=4, patch_area=16),
    "area": lambda m: vars(m[3].global_rep[0].pre_norm_mha[1].softmax).update(dim=-2),
    "skip": lambda m: vars(m[1]).update(use_res_connect=False),
    "act": lambda m: setattr(m[1].block.exp_1x1.block, "act", nn.GELU()),
    "eps": lambda m: vars(m[3].global_rep[2]).update(eps=0.1),
    "norm": lambda m: setattr(m[3].global_rep[0].pre_norm_ffn, "0", nn.Identity()),
}
FUSED = ("patch", "skip", "eps")


@pytest.mark.parametrize("change", CHANGES)
def test_changes_take_effect(cvnets, change):
    host, x = network(cvnets, "MobileViTBlock").eval(), images(2, 3, 32, 48)
    model = fuse(copy.deepcopy(host), "training")
    before = model(x)
    for m in (host, model):
        CHANGES[change](m)
    assert (model(x) - before).norm() > 1e-6 * before.norm()
    want, found = results(host, x, training=True), results(model, x, training=True)
    assert all((found[n] - t).norm() <= EXACT * t.norm() for n, t in want.items())
    assert (reasons(model, x) == "") == (change in FUSED)


def test_dropouts_of_layers(cvnets):
    model = fuse(network(cvnets, "MobileViTBlockv3", dropout=0.25), "training").train()
    block, x = model[3], images(2, 3, 32, 32)
    assert block.describe().tokens.dropouts == {
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "output_dropout": 0.25,
        "ffn_output_dropout": 0.25,
    }
    assert not reasons(model, x) and not model(x).equal(model(x))
    block.global_rep[1].pre_norm_mha[2].p = 0.5
    assert "drop with different probabilities" in reasons(model, x)


def _swaps_concat(cvnets: ModuleType) -> None:
    def forward(self, x: Tensor) -> Tensor:
        local = self.local_rep(x)
        tokens, sizes = self.unfolding(local)
        projected = self.conv_proj(self.folding(self.global_rep(tokens), sizes))
        return self.fusion(torch.cat((projected, x), 1))

    _write(cvnets.MobileViTBlock, forward)


def _other_corners(cvnets: ModuleType) -> None:
    def resize_input_if_needed(self, x: Tensor) -> Tensor:
        sides = [cvnets.math.ceil(side / self.patch_h) * self.patch_h for side in x.shape[2:]]
        return cvnets.F.interpolate(x, sides, mode="bilinear", align_corners=False)

    _write(cvnets.MobileViTBlockv2, resize_input_if_needed)


def _gated(cvnets: ModuleType) -> None:
    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.pre_norm_ffn(x + self.pre_norm_attn(x))

    _write(cvnets.LinearAttnFFN, forward)


def _subtracts(cvnets: ModuleType) -> None:
    def forward(self, x: Tensor) -> Tensor:
        return x - self.block(x) if self.use_res_connect else self.block(x)

    _write(cvnets.InvertedResidual, forward)


def _returns_more(cvnets: ModuleType) -> None:
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, _, y = self.forward_spatial(x)
        return self.conv_proj(y), y

    _write(cvnets.MobileViTBlockv2, forward)


def _write(kind: type[nn.Module], method: object) -> None:
    """As if it stood in the file."""
    method.__module__, method.__qualname__ = kind.__module__, f"{kind.__qualname__}.{method.__name__}"
    setattr(kind, method.__name__, method)


ALTERED = {
    "order": (_swaps_concat, "MobileViTBlock", "3", "something else"),
    "corners": (_other_corners, "MobileViTBlockv2", "3", "something else"),
    "name": (
        _gated,
        "MobileViTBlockv2",
        "3",
        "an unknown version of cvnets.modules.mobilevit_block.LinearAttnFFN: its",
    ),
    "sign": (_subtracts, "MobileViTBlock", "1", "something else"),
    "returns": (_returns_more, "MobileViTBlockv2", "3", "returns a tuple"),
}


@pytest.mark.parametrize("alteration", ALTERED)
def test_an_altered_version_is_left(own, alteration):
    alter, block, name, reason = ALTERED[alteration]
    alter(own)
    model = fuse(network(own, block), "training")
    found = left(model)
    assert list(found) == [name] and reason in found[name], found
    assert type(model.get_submodule(name)).__module__ == NAME


def test_what_else_is_left(cvnets):
    class Own(cvnets.ConvLayer):
        pass

    parts = nn.Sequential(Own(3, 4), cvnets.InvertedResidual(4, 4, ratio=1), cvnets.MobileViTBlockv2(4, 8))
    parts[2].global_rep[0].pre_norm_attn[0] = cvnets.LayerNorm(8)
    parts += nn.Sequential(*(cvnets.MobileViTBlock(8, 8) for _ in range(4)), cvnets.MobileViTBlockv2(4, 8))
    parts[3].global_rep[0].drop_path = nn.Dropout()
    parts[4].global_rep[1].pre_norm_ffn[2] = nn.GELU()
    parts[5].fusion = cvnets.ConvLayer(16, 8)
    del parts[6].patch_area, parts[6].patch_h
    parts[7].enable_coreml_compatible_fn = True
    found = left(fuse(parts, "training"))
    assert "is a subclass of cvnets" in found["0"]
    assert "exp_1x1" in found["1"]
    assert "a norm is a LayerNorm" in found["2"]
    assert "drop_path is a" in found["3"]
    assert "act 'GELU', the op has 'silu'" in found["4"]
    assert "something else" in found["5"]  # for all that the widths say it could be MobileViTv3's
    assert "no attribute 'patch_h'" in found["6"]
    assert "Core ML" in found["7"]


def test_code_that_ends_the_process_is_left(own):
    """The logger of ml-cvnets does, where something is wrong."""
    logger = SimpleNamespace(error=sys.exit)

    def forward(self, x: Tensor) -> Tensor:
        logger.error(self.in_features)
        return x

    _write(own.LinearLayer, forward)
    found = left(fuse(network(own, "MobileViTBlock"), "training"))
    assert list(found) == ["3"] and "cannot be tried on small maps: SystemExit" in found["3"]


def test_a_forced_backend_is_not_probed(own):
    with backend("triton"):
        assert not left(fuse(network(own, "MobileViTBlock"), "training"))


def test_one_graph(late):
    model, x = network(late, "MobileViTBlockv3").float().eval(), images(1, 3, 40, 40).float()
    want = model(x)
    found = torch.compile(fuse(model, "training"), backend="eager", fullgraph=True)(x)
    assert torch.allclose(found, want, rtol=1e-4, atol=1e-4)


def test_a_class_whose_forward_was_replaced_is_left(own):
    own.ConvLayer.forward = lambda self, x: self.block(x)
    model = network(own, "MobileViTBlockv2")
    assert "a method has been replaced" in left(model)["0"]
    with pytest.raises(ValueError, match="an op stands for, got Sequential without one"):
        fuse(model)


def test_probing_changes_nothing(cvnets):
    """Neither the model nor the random numbers around it, and hooks do not see the probe."""
    model, calls = network(cvnets, "MobileViTBlock", dropout=0.5).train(), []
    model[3].conv_proj.register_forward_hook(lambda *_: calls.append(1))
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fuse(model, "training")
    assert all(t.equal(state[name]) for name, t in model.state_dict().items()) and not calls
    assert torch.get_rng_state().equal(random) and model[3].training
    assert model[3].global_rep[0].pre_norm_mha[2].p == 0.5
    assert guard.examine(model[3]) is not None


@built
@torch.no_grad()
@pytest.mark.parametrize("block", BLOCKS)
def test_a_network_is_one_program(cvnets, block):
    model = classifier(cvnets, block)
    x = images(2, 3, 75, 50)
    want, host = model(x), model.float()(x.float())
    found = fuse(model)(x.float())
    assert_bound(*({"logits": t} for t in (found, host, want)), 1e-6, group=each, least=0)
    assert [(row.kind, row.ran) for row in explain(model, x.float())] == [("network", "fused")]


@built
@torch.no_grad()
def test_a_program_knows_where_the_later_layer_norm_differs(late):
    model = fuse(classifier(late, "MobileViTBlockv3").float())
    rows = [explain(model, images(1, 3, n, n).float()).rows[0] for n in (48, 32)]
    assert rows[0].ran == "fused"
    assert rows[1].ran == "ordinary path" and "16 patches for 16 channels" in rows[1].reason
    host, x = unfuse(copy.deepcopy(model)), images(1, 3, 32, 32).float()
    assert torch.allclose(model(x), host(x), rtol=1e-4, atol=1e-5)


@built
@torch.no_grad()
def test_networks_that_are_no_program(cvnets, monkeypatch):
    x = images(1, 3, 32, 32).float()

    def why(change: Callable[[nn.Module], object]) -> str:
        monkeypatch.setitem(sys.modules, NETWORK, load_cvnets(NETWORK))
        model = classifier(cvnets, "MobileViTBlockv2").float()
        change(model)
        want, model = model(x), fuse(model)
        assert torch.allclose(model(x), want, rtol=1e-4, atol=1e-5)
        row = explain(model, x).rows[0]
        return row.reason if row.kind == "network" else "none"

    assert why(lambda m: None) == ""
    assert "pools by rms" in why(lambda m: setattr(m.classifier[0], "pool_type", "rms"))
    assert "something else" in why(lambda m: _write(type(m), _residual_features))
    assert why(lambda m: _write(type(m), _surprising_forward)) == "none"


def _residual_features(self, x: Tensor) -> Tensor:
    x = self.layer_3(self.layer_2(self.layer_1(self.conv_1(x))))
    return self.conv_1x1_exp(self.layer_5(self.layer_5(self.layer_4(x))))


_residual_features.__name__ = "extract_features"


def _surprising_forward(self, x: Tensor) -> Tensor:
    return self.classifier(self.extract_features(x)).neg()


_surprising_forward.__name__ = "forward"


@torch.no_grad()
def test_a_pickled_network_is_fused(cvnets):
    model, x = fuse(classifier(cvnets, "MobileViTBlock").float()), images(1, 3, 32, 32).float()
    found = pickle.loads(pickle.dumps(model))
    assert type(found) is type(model) and torch.equal(found(x), model(x))
    assert type(unfuse(found)).__module__ == NETWORK
