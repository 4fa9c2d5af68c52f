"""Fused models of timm are timm's models: what they compute, what they keep, and what is left as it is."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import timm
import torch
from timm.layers import ConvNormAct
from timm.models.byobnet import BottleneckBlock
from timm.models.mobilevit import MobileVitBlock
from torch import nn
from torch.nn.utils import prune

import mvit3_kernels
from mvit3_kernels import _native, explain, fuse, fuse_report, hosts, inference, unfuse
from mvit3_kernels.nn import guard
from tests.bounds import assert_bound, each

from .compare import distances, flat, images, pickled, prepare, results

NAMES = ("mobilevit_xxs", "mobilevitv2_050")
EXACT = 1e-12
built = pytest.mark.skipif(_native.why_not() is not None, reason="the compiled kernels are not built")


def create(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return prepare(timm.create_model(name, **{"num_classes": 5, **options}))


def reasons(model: nn.Module, x: torch.Tensor) -> str:
    """Why blocks of a call ran their modules."""
    return " ".join(row.reason for row in explain(model, x) if row.kind == "block" and row.reason)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("pixels", [64, 97])
@pytest.mark.parametrize("name", NAMES)
def test_exact(name, pixels, training):
    found = distances(create(name), images(2, 3, pixels, pixels), training)
    assert all(distance <= EXACT for distance in found.values()), found


OPTIONS = {
    "drop-path": ({"drop_path_rate": 0.2}, "its layers drop paths"),
    "gelu": ({"act_layer": "gelu"}, "act 'GELU'"),
    "relu": ({"act_layer": "relu"}, "has act 'relu', the op has 'silu'"),
    "se": ({"attn_layer": "se"}, "attn is a SEModule"),
    "output-stride": ({"output_stride": 8}, ""),
    "pool": ({"global_pool": "catavgmax"}, ""),
    "features": ({"features_only": True, "out_indices": (1, 3)}, ""),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", OPTIONS)
def test_options_are_exact_or_left_with_a_reason(name, option):
    options, reason = OPTIONS[option]
    if "features_only" in options:
        options = {**options, "num_classes": 1000}
    model, x = create(name, **options).train(), images(2, 3, 64, 64)
    found = distances(model, x, training=True)
    assert all(distance <= EXACT for distance in found.values()), found
    rows = [row.reason for row in fuse_report(fuse(model, "training")) if row.reason]
    assert (reason in " ".join(rows)) if reason else not rows


def test_checkpoints_count_every_batch_as_the_host_does():
    model = create("mobilevit_xxs")
    model.set_grad_checkpointing()
    found = distances(model, images(2, 3, 64, 64), training=True)
    assert all(distance <= EXACT for distance in found.values()), found


def test_dropout_is_that_of_the_ops():
    """Other random numbers than timm's, the same expectation: the rates are in the places where timm has them."""
    model = create("mobilevitv2_050").train()
    layer = fuse(model, "training").stages[2][1].transformer[0]
    layer.attn.out_drop.p = 0.3
    assert "drop with different probabilities" in reasons(model, images(2, 3, 64, 64))
    for other in model.stages[2][1].transformer:
        other.attn.out_drop.p, other.mlp.drop.p = 0.3, 0.2
    plan = model.stages[2][1].describe()
    assert plan.tokens.dropouts == {
        "attention_dropout": 0.0,
        "hidden_dropout": 0.2,
        "output_dropout": 0.3,
        "ffn_output_dropout": 0.0,
    }
    assert not model(images(2, 3, 64, 64)).equal(model(images(2, 3, 64, 64)))


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on(name):
    """An optimizer made before `fuse` goes on, as one on timm's model, and the weights stay the same for 20 steps."""
    model, x, classes = create(name).train(), images(4, 3, 64, 64), torch.arange(4)
    host = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-3) for m in (host, model)]
    ids, keys = [id(p) for p in model.parameters()], list(model.state_dict())
    fuse(model, "training")
    for step in range(20):
        for optimizer, m in zip(optimizers, (host, model), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(m(x.roll(step, 3)), classes).backward()
            optimizer.step()
    state, want = model.state_dict(), host.state_dict()
    error = flat(state.values()) - flat(want.values())
    assert error.norm() / flat(want.values()).norm() <= 1e-9
    assert [id(p) for p in model.parameters()] == ids and list(state) == keys
    unfuse(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in host.modules()]
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in host.modules()]


@built
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_err_at_most_twice_as_much_as_the_host(name, training):
    model, x = create(name), images(4, 3, 64, 64)
    exact = results(copy.deepcopy(model), x, training)
    if name == "mobilevitv2_050":  # a ReLU on the other side of zero shows in all gradients below it
        del exact["gradients"]
    host, fused = copy.deepcopy(model).float(), fuse(copy.deepcopy(model).float(), "training")
    reference, found = (results(m, x.float(), training) for m in (host, fused))
    named = ({n: of[n] for n in exact} for of in (found, reference, exact))
    assert_bound(*named, 1e-6, group=each, least=0)
    assert not reasons(fused, x.float())


def set_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: 1.25 * output)


class Adapted(nn.Module):
    """What an adapter puts in the place of a layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.tensor(1.25, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.base(x)


def adapt(attention: nn.Module) -> None:
    attention.qkv = Adapted(attention.qkv)


CHANGES = {
    "hook": lambda m: set_hook(m.stages[1][0].conv2_kxk.bn.act),
    "forward": lambda m: setattr(m.stages[2][1], "forward", lambda x: 2 * x),
    "qkv": lambda m: setattr(
        m.stages[2][1].transformer[1].attn, "qkv", Adapted(m.stages[2][1].transformer[1].attn.qkv)
    ),
    "norm": lambda m: setattr(m.stages[2][1].transformer[0], "norm1", nn.Identity()),
    "scale": lambda m: vars(m.stages[2][1].transformer[0].attn).update(scale=4.0, fused_attn=False),
    "frozen": lambda m: m.stages[1][1].conv3_1x1.bn.eval(),
    "dropped": lambda m: setattr(m.stages[1][1].conv2_kxk.bn, "drop", nn.Dropout(0.5).eval()),
    "pruned": lambda m: prune.l1_unstructured(m.stages[1][0].conv1_1x1.conv, "weight", 0.5),
    "attention": lambda m: m.stages[2][1].transformer[0].attn.attn_drop.eval(),
    "skip": lambda m: setattr(m.stages[1][1], "shortcut", None),
}
NO_REASON, CHANGES_NOTHING = ("forward", "frozen", "skip"), ("dropped", "attention")


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_a_fused_model_take_effect(change):
    host, x = create("mobilevit_xxs").train(), images(2, 3, 64, 64)
    model = fuse(copy.deepcopy(host), "training")
    before = [m(x) for m in (host, model)][1]
    for m in (host, model):
        CHANGES[change](m)
    torch.manual_seed(3)
    want = host(x)
    torch.manual_seed(3)
    got = model(x)
    assert (got - want).norm() / want.norm() <= EXACT
    assert ((got - before).norm() > 1e-6 * before.norm()) == (change not in CHANGES_NOTHING)
    assert (reasons(model, x) == "") == (change in NO_REASON)


def test_every_hook_fires_and_every_adapter_learns():
    host, x = create("mobilevit_xxs").eval(), images(1, 3, 64, 64)
    model = fuse(copy.deepcopy(host), "training")
    counts = {}
    for name, m in (("host", host), ("fused", model)):
        for module in m.modules():
            module.register_forward_hook(lambda *_, name=name: counts.update({name: counts.get(name, 0) + 1}))
        m(x)
    assert counts["fused"] == counts["host"] > 200
    model = create("mobilevit_xxs").eval()
    for block in (m for m in model.modules() if isinstance(m, nn.Sequential) and len(m) and hasattr(m[0], "attn")):
        for layer in (layer for layer in block if hasattr(layer, "mlp")):
            adapt(layer.attn)
    found = distances(model, x, training=False)
    assert all(distance <= EXACT for distance in found.values()), found


class Own(ConvNormAct):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_what_is_left():
    model = nn.Sequential(Own(3, 4), ConvNormAct(4, 4))
    report = fuse_report(fuse(model, "training"))
    assert [row.name for row in report.left()] == ["0"] and "is a subclass of timm" in report.left()[0].reason
    assert "FusedConvNormAct" in str(report) and type(model[0]) is Own
    with pytest.raises(ValueError, match=r"got Sequential without one .0, a Own: is a subclass of timm"):
        fuse(nn.Sequential(Own(3, 4)))
    with pytest.raises(ValueError, match=r"got EfficientNet without one \(.*Conv2d"):
        fuse(timm.create_model("test_efficientnet"))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        fuse_report("mobilevit_xxs")


def test_a_failure_half_way_changes_nothing(monkeypatch):
    class Stubborn(BottleneckBlock):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "__class__":
                raise RuntimeError("no")
            super().__setattr__(name, value)

    model = create("mobilevit_xxs")
    kinds = [type(m) for m in model.modules()]
    fuse(create("mobilevit_xxs"), "training")
    swapped = mvit3_kernels.hosts.swapped.SWAPPED
    model.stages[3][0].__class__ = Stubborn
    monkeypatch.setitem(swapped, Stubborn, swapped[BottleneckBlock])
    with pytest.raises(RuntimeError, match="no"):
        fuse(model, "training")
    assert sum(a is not type(m) for a, m in zip(kinds, model.modules(), strict=True)) == 1


def test_a_failure_keeps_what_was_fused_before(monkeypatch):
    model = fuse(create("mobilevit_xxs"), "training")
    kinds = [type(m) for m in model.modules()]

    def refuse(self: object, *_: object) -> None:
        raise MemoryError("no")

    monkeypatch.setattr(inference.Fused, "__init__", refuse)
    with pytest.raises(MemoryError):
        fuse(model)
    assert [type(m) for m in model.modules()] == kinds
    plain = create("mobilevit_xxs")
    kinds = [type(m) for m in plain.modules()]
    with pytest.raises(MemoryError):
        fuse(plain)
    assert [type(m) for m in plain.modules()] == kinds


def test_a_subclass_of_a_network_is_reported():
    model = create("mobilevit_xxs")
    model.__class__ = type("Mine", (type(model),), {})
    row = next(row for row in fuse_report(fuse(model)) if row.name == "")
    assert (row.kind, row.became) == ("Mine", "") and "is a subclass of ByobNet" in row.reason


def test_a_forward_that_was_replaced_before_is_not_known(monkeypatch):
    fuse(create("mobilevit_xxs"), "training")
    monkeypatch.setattr(guard, "KNOWN", guard.KNOWN - {MobileVitBlock})
    monkeypatch.setattr(mvit3_kernels.hosts.swapped, "KNOWN", guard.KNOWN)
    monkeypatch.setattr(MobileVitBlock, "forward", lambda self, x: x)
    mvit3_kernels.hosts.swapped.known_of_host(MobileVitBlock)
    assert MobileVitBlock not in guard.KNOWN


@built
@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_classes": 0},
        {"global_pool": "max"},
        {"features_only": True},
        {"output_stride": 8, "drop_path_rate": 0.2},
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_one_program(name, options):
    if "features_only" in options:
        options = {**options, "num_classes": 1000}
    model, x = create(name, **options).eval(), images(2, 3, 97, 97)
    want = model(x)
    host = model.float()
    reference = host(x.float())
    found = fuse(copy.deepcopy(host))(x.float())
    lists = (t if isinstance(t, list) else [t] for t in (found, reference, want))
    assert_bound(*({str(i): t for i, t in enumerate(of)} for of in lists), 1e-6, group=each, least=0)
    for dtype in (torch.float32, torch.float16):
        fused = fuse(copy.deepcopy(host).to(dtype))
        rows, y = list(explain(fused, x.to(dtype))), fused(x.to(dtype))
        assert rows[0].kind == "network" and rows[0].ran == "fused"
        assert {t.dtype for t in (y if isinstance(y, list) else [y])} == {dtype}


@built
def test_a_program_serves_what_it_can():
    model, x = create("mobilevit_xxs").float().eval(), images(2, 3, 64, 64).float()
    host = copy.deepcopy(model)
    model = pickled(fuse(model))
    with torch.no_grad():
        for m in (host, model):
            m.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(320, 3, bias=False))
            nn.init.ones_(m.head[2].weight)
        assert "FusedByobNet" in str(fuse_report(model))
        assert torch.allclose(model(x), host(x), rtol=1e-3, atol=1e-3)
        assert explain(model, x).rows[0].ran == "fused"
        assert torch.allclose(model.forward_features(x), host.forward_features(x), rtol=1e-3, atol=1e-3)
        model.train()
        assert "training mode" in explain(model, x).rows[0].reason
    model.eval()(x).sum().backward()  # blocks, with gradients
    assert all(p.grad is not None for p in model.parameters())


def test_torchscript_gets_the_host(caplog):
    model, x = create("mobilevitv2_050").eval(), images(1, 3, 64, 64)
    want = model(x)
    scripted = torch.jit.script(fuse(model, "training"))
    assert torch.allclose(scripted(x), want) and "takes back what fuse did" in caplog.text
    assert not [row for row in fuse_report(model) if row.became]


def test_torch_fx_gets_the_host():
    """A block that is traced by itself gives its modules, as one that is traced inside of another module does."""
    model = fuse(create("mobilevit_xxs").eval(), "training")
    for block, x in ((model.stem, images(2, 3, 32, 32)), (model.stages[0][0], images(2, 16, 8, 8))):
        for traced in (block, nn.Sequential(block)):
            graph = torch.fx.symbolic_trace(traced)
            assert torch.allclose(graph(x), block(x), rtol=EXACT)
            assert any("conv" in str(node.target) for node in graph.graph.nodes if node.op == "call_module")


def test_an_unknown_version_of_a_host_is_left_alone(monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "mvit3_kernels.hosts.timm", raising=False)
    monkeypatch.delattr("timm.models.mobilevit.MobileVitV2Block")
    hosts.load_adapters(nn.Sequential(ConvNormAct(3, 4)))
    assert "modules of timm run as they are: this version of it is not known" in caplog.text


def test_hosts_are_imported_by_models_alone():
    code = "import sys, mvit3_kernels as m; m.fuse(m.create_model('mobilevit_xxs')); print({'timm'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
