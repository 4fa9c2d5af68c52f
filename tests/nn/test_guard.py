"""Blocks run as one op only where that is what their modules do: whatever is changed, hooked, replaced or re-flagged
takes effect."""

from __future__ import annotations

import copy
import gc
import logging
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import mvit3_kernels
from mvit3_kernels import _native, create_model, explain, fuse
from mvit3_kernels.nn import (
    ConvNormAct,
    GlobalRepresentation,
    InvertedResidual,
    SeparableLayer,
    TransformerLayer,
    guard,
)
from mvit3_kernels.nn.attention import MultiHeadAttention
from tests.inference.test_fuse import images
from tests.networks import DISTINCT

from .networks import FAMILIES, by_modules, network


class Wrapped(nn.Module):
    """What libraries of adapters put in the place of a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 1.25 * self.inner(x)


def set_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: 1.25 * output)


def set_pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, inputs: (1.25 * inputs[0],))


def set_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda x: 1.25 * forward(x)


def swap_class(module: nn.Module) -> None:
    kind = type(module)
    module.__class__ = type(f"Other{kind.__name__}", (kind,), {"forward": lambda self, x: 1.25 * kind.forward(self, x)})


ANY = {"hook": set_hook, "pre-hook": set_pre_hook, "forward": set_forward, "class": swap_class}


def set_attribute(name: str, value: object) -> Callable[[nn.Module], None]:
    return lambda module: setattr(module, name, value)


def flip(module: nn.Module) -> None:
    module.train(not module.training)


def circular(module: nn.Module) -> None:
    module.padding_mode = "circular"


def dilate(module: nn.Module) -> None:
    if module.kernel_size == (3, 3):
        module.dilation = module.padding = (2, 2)


OF_KIND: dict[type, dict[str, Callable[[nn.Module], None]]] = {
    nn.BatchNorm2d: {
        "flag": flip,
        "eps": set_attribute("eps", 5.0),
        "no statistics": lambda m: (setattr(m, "running_mean", None), setattr(m, "running_var", None)),
    },
    nn.Dropout: {
        "drops all": lambda m: (m.train(), setattr(m, "p", 1.0)),
        "is off": lambda m: (m.eval(), setattr(m, "p", 0.5)),
    },
    nn.LayerNorm: {"eps": set_attribute("eps", 5.0), "no bias": set_attribute("bias", None)},
    nn.GroupNorm: {"eps": set_attribute("eps", 5.0), "groups": set_attribute("num_groups", 2)},
    nn.Conv2d: {"padding": circular, "dilation": dilate},
    ConvNormAct: {"act": set_attribute("act", "relu"), "module for act": set_attribute("act", nn.Tanh())},
    InvertedResidual: {"skip": lambda m: setattr(m, "has_skip", False)},
    MultiHeadAttention: {"heads": set_attribute("num_heads", 2)},
    nn.Linear: {
        "weight": lambda m: setattr(m, "weight", nn.Parameter(1.25 * m.weight.detach())),
        "bias": set_attribute("bias", None),
    },
}


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if name and not isinstance(module, nn.Tanh))


def changes(module: nn.Module) -> dict[str, Callable[[nn.Module], None]]:
    return ANY | next((of for kind, of in OF_KIND.items() if type(module) is kind), {})


def close(got: Tensor, want: Tensor) -> bool:
    return (got - want).norm().item() <= 1e-3 * max(want.norm().item(), 1e-3)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", DISTINCT)
def test_a_hook_on_every_module_is_called(name, training):
    model = network(name, drop_rate=0.1, num_classes=10).train(training)
    for fused in (False, True):
        if fused:
            fuse(model)
        called = set()
        hooks = [
            m.register_forward_hook(lambda m, *_, key=key, called=called: called.add(key))
            for key, m in model.named_modules()
        ]
        with torch.no_grad():
            model(images(2, 3, 32, 32))
        assert called == {key for key, _ in model.named_modules()}
        [hook.remove() for hook in hooks]


@pytest.mark.parametrize("name", DISTINCT)
def test_modules_are_what_the_ops_compute(name):
    """The two ways agree in float64, in training too, with all buffers."""
    for training in (False, True):
        model = network(name, num_classes=10, drop_rate=0.0, proj_drop_rate=0.0).double().train(training)
        twin, x = copy.deepcopy(model), images(2, 3, 64, 96).double()
        hooks = [m.register_forward_hook(lambda *_: None) for m in twin.modules()]
        got, want = model(x), twin(x)
        assert len(hooks) > 100 and torch.allclose(got, want, rtol=1e-9, atol=1e-11)
        for (key, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11), key
        if training:
            got.square().sum().backward(), want.square().sum().backward()
            total = torch.stack([p.grad.norm() for p in twin.parameters()]).norm()
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                assert (p.grad - q.grad).norm() <= 1e-8 * total


def enclosing_blocks(model: nn.Module, name: str) -> list[guard.Block]:
    """The blocks around a module, not itself: they must call it."""
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts)))
    return [module for module in around if isinstance(module, guard.Block)]


@pytest.mark.parametrize("name", DISTINCT)
def test_every_change_of_every_module_is_noticed(name):
    model = network(name, num_classes=10, drop_rate=0.1)
    fused, x = fuse(copy.deepcopy(model)), images(1, 3, 32, 32)
    with torch.no_grad():
        assert fused._fused.why_not(fused, x) is None
        for number, (key, module) in enumerate(list(modules_of(fused))):
            parent, _, last = key.rpartition(".")
            blocks = enclosing_blocks(fused, key)
            for block in blocks:
                assert block.why_modules() is None, key
            # A hook stays apart from the module's __dict__; a replacement shows in its parent alone. Every other module
            # has the one.
            handle = module.register_forward_hook(lambda *_: None) if number % 2 else None
            if handle is None:
                setattr(fused.get_submodule(parent), last, Wrapped(module))
            assert fused._fused.why_not(fused, x) and all(block.why_modules() for block in blocks), key
            if handle is None:
                setattr(fused.get_submodule(parent), last, module)
            else:
                handle.remove()
        assert all(block.why_modules() is None for block in fused.modules() if isinstance(block, guard.Block))
        assert fused._fused.why_not(fused, x) is None


# One of each kind: the stem, an inverted residual, a MobileViT block with the last of its layers, the head.
PARTS = re.compile(r"conv_1($|\.)|layer_1|layer_3\.1(?!\.global_rep\.0)|conv_1x1_exp|classifier")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_change_takes_effect(name, training):
    """Each module of a network changed in turn: plain and fused equal the modules called one by one. The modules of a
    kind take turns with the ways for any module, and with the two modes."""
    original = network(name, num_classes=10, drop_rate=0.1, proj_drop_rate=0.0).train(training)
    for module in original.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # masks of modules and of ops come from different generators
    x, kinds, effective = images(2, 3, 64, 64), 0, 0
    unchanged = by_modules(copy.deepcopy(original), x)
    parts = [(key, module) for key, module in modules_of(original) if PARTS.match(key)]
    of_kind, seen = Counter(type(module) for _, module in parts), Counter()
    for key, module in parts:
        number = seen[type(module)]
        seen[type(module)] += 1
        if number % 2 == training and of_kind[type(module)] > 1:
            continue
        ways = changes(module)
        general = list(ANY)[number // 2 % len(ANY)]  # the ways for any module in turn, those of its class all
        for way in [general, *(way for way in ways if way not in ANY)]:
            model = copy.deepcopy(original)
            ways[way](model.get_submodule(key))
            if way == general and number % 5 == 0:
                parent, _, last = key.rpartition(".")
                setattr(model.get_submodule(parent), last, Wrapped(model.get_submodule(key)))
            statistics = [(buffer, buffer.clone()) for buffer in model.buffers()]
            want = by_modules(model, x)
            for as_it_is_used in (lambda model: model, fuse):
                with torch.no_grad():
                    [buffer.copy_(kept) for buffer, kept in statistics]  # training moved them
                    assert close(as_it_is_used(model)(x), want), (key, way, as_it_is_used.__name__)
            kinds, effective = kinds + 1, effective + (not close(want, unchanged))
    assert effective > 0.6 * kinds  # or the comparison would prove nothing


def unchanged_by_contents(root: nn.Module, snapshot: guard.Snapshot) -> bool:
    """As where Python keeps no versions of dictionaries: the fifth number of a packed snapshot says whether it does."""
    packed = bytearray(snapshot[-1])
    packed[32:40] = bytes(8)
    return guard.unchanged(root, (*snapshot[:-1], bytes(packed)))


WAYS = {"used": guard.unchanged, "contents": unchanged_by_contents, "python": guard.unchanged_python}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_snapshot_sees_every_change(way):
    model = TransformerLayer(8, 12)
    snapshot = guard.take_snapshot(model)
    assert (
        way(model, snapshot) and not way(copy.deepcopy(model), snapshot) and not way(TransformerLayer(8, 12), snapshot)
    )
    mha = model.pre_norm_mha[1]

    def undone(change: Callable[[], Callable[[], object]]) -> None:
        undo = change()
        assert not way(model, snapshot), change
        undo()

    def attribute(module: nn.Module, name: str, value: object) -> Callable:
        before = vars(module).get(name)

        def change():
            vars(module)[name] = value
            return lambda: vars(module).__setitem__(name, before) if before is not None else vars(module).pop(name)

        return change

    def entry(group: dict, name: str, value: object) -> Callable:
        def change():
            before, group[name] = group.get(name), value
            return lambda: group.pop(name) if before is None else group.__setitem__(name, before)

        return change

    for change in (
        attribute(mha, "num_heads", 2),
        attribute(mha, "forward", lambda x: x),
        attribute(mha.dropout, "training", False),
        attribute(model, "patch_size", (1, 1)),
        entry(mha._modules, "out_proj", nn.Linear(8, 8)),
        entry(mha._modules, "more", nn.Identity()),
        entry(mha.qkv_proj._parameters, "weight", nn.Parameter(torch.zeros(24, 8))),
        entry(mha.qkv_proj._parameters, "bias", nn.Parameter(torch.zeros(24))),
        entry(mha.qkv_proj._forward_hooks, 0, print),
        entry(mha.qkv_proj._backward_pre_hooks, 0, print),
        entry(guard.GLOBAL_HOOKS[0], 0, print),
    ):
        undone(change)
        snapshot = guard.take_snapshot(model)
        assert way(model, snapshot)

    def patched(kind: type, name: str) -> Callable:
        before = getattr(kind, name)

        def change():
            setattr(kind, name, lambda *arguments: before(*arguments))
            return lambda: setattr(kind, name, before)

        return change

    undone(patched(nn.Linear, "forward"))
    undone(patched(MultiHeadAttention, "forward"))
    undone(patched(nn.Module, "__call__"))
    assert way(model, snapshot)
    mha.qkv_proj.__class__ = type("Other", (nn.Linear,), {})
    assert not way(model, snapshot)


def same_as_modules(module: nn.Module, x: Tensor, reason: str) -> None:
    want = by_modules(module, x)
    with torch.no_grad():
        assert torch.allclose(module(x), want, rtol=1e-4, atol=1e-5)
        assert reason in " ".join(explain(module, x).reasons()), explain(module, x).reasons()


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        (lambda b: prune.l1_unstructured(b.block.exp_1x1.block.conv, "weight", 0.5), "has a hook"),
        (lambda b: nn.utils.weight_norm(b.block.red_1x1.block.conv), "has a hook"),
        (lambda b: parametrizations.weight_norm(b.block.red_1x1.block.conv), "which only its own forward"),
        (lambda b: setattr(b.block.conv_3x3.block.conv, "bias", nn.Parameter(torch.ones(16))), "a bias beside it"),
        (lambda b: setattr(b.block.conv_3x3, "act", "relu"), "its activations are"),
        (lambda b: setattr(b.block.red_1x1, "act", "silu"), "its activations are"),
        (lambda b: setattr(b.block.conv_3x3.block.conv, "padding_mode", "reflect"), "in mode 'reflect'"),
        (lambda b: b.block.append(nn.Tanh()), "which only its own forward"),
        (lambda b: b.block.append(nn.SiLU()), "block is not made of"),
        (lambda b: setattr(b.block.exp_1x1.block, "norm", nn.SyncBatchNorm(16)), "SyncBatchNorm"),
    ],
)
def test_an_inverted_residual_that_is_none_runs_its_modules(way, reason):
    torch.manual_seed(0)
    block = InvertedResidual(8, 8, 16).eval()
    way(block)
    same_as_modules(block.eval(), torch.randn(2, 8, 6, 5), reason)


@pytest.mark.parametrize("training", [False, True])
def test_an_inverted_residual_without_its_skip_is_one_op(training):
    torch.manual_seed(0)
    block, x = InvertedResidual(8, 8, 16).train(training), torch.randn(2, 8, 6, 5)
    with_skip = block(x)
    block.has_skip = False
    assert torch.allclose(block(x), with_skip - x, rtol=1e-4, atol=1e-5)
    assert not [row for row in explain(block, x) if row.kind == "block" and row.reason]


@pytest.mark.parametrize("layer", [TransformerLayer, SeparableLayer])
def test_dropouts_of_one_kind_run_as_one_op_and_others_as_modules(layer):
    torch.manual_seed(0)
    stack = GlobalRepresentation([layer(8, 12, dropout=0.5), layer(8, 12, dropout=0.5)], nn.LayerNorm(8)).train()
    x = torch.randn(2, 8, 4, 4)
    assert stack.why_modules() is None
    dropouts = [m for m in stack.modules() if isinstance(m, nn.Dropout)]
    last = next(m for m in reversed(dropouts) if m.p > 0)
    last.p = 0.25
    assert "different probabilities" in stack.why_modules()
    assert stack[1].why_modules() is None  # one rate for each place is what the op knows
    for m in dropouts:
        m.eval()
    assert stack.why_modules() is None  # nothing drops, whatever the rates
    assert torch.equal(stack(x), stack(x))
    last.train()
    assert stack.why_modules() is not None and not torch.equal(stack(x), stack(x))
    assert torch.equal(stack[0](x), stack[0](x))  # the other layer does not drop


def test_monte_carlo_dropout_has_spread():
    model = network("mobilevitv3_xxs", num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.train()
    fused, x = fuse(copy.deepcopy(model)), images(2, 3, 64, 64)
    with torch.no_grad():
        for candidate in (model, fused):
            assert (candidate(x) - candidate(x)).norm() > 1e-3


@pytest.mark.parametrize("kind", [nn.Identity, nn.Dropout2d, nn.AlphaDropout])
def test_what_stands_for_a_dropout_is_called_or_does_nothing(kind):
    layer = TransformerLayer(8, 12).eval()
    layer.pre_norm_mha[2] = kind()
    layer.pre_norm_mha[1].dropout = kind()
    layer.eval()
    x = torch.randn(2, 8, 4, 4)
    assert torch.allclose(layer(x), by_modules(layer, x), rtol=1e-4, atol=1e-5)


def test_an_rms_norm_takes_the_place_of_a_norm():
    stack = GlobalRepresentation([TransformerLayer(8, 12), TransformerLayer(8, 12)], nn.RMSNorm(8)).eval()
    stack[0].pre_norm_ffn[0] = nn.RMSNorm(8)
    same_as_modules(stack, torch.randn(2, 8, 4, 4), "RMSNorm")


def test_the_log_and_explain_say_why(caplog):
    model, x = network("mobilevitv3_xxs", num_classes=10), images(1, 3, 64, 64)
    model.layer_3[1].global_rep[1].pre_norm_ffn[2] = nn.ReLU()
    with torch.no_grad(), caplog.at_level(logging.DEBUG, "mvit3_kernels"):
        found = explain(model, x)
        model(x)
    lines = [record.message for record in caplog.records if "TransformerLayer" in record.message]
    assert len(lines) == 1 and "pre_norm_ffn is made of LayerNorm, Linear, ReLU, Dropout" in lines[0]
    rows = {row.what: row for row in found if row.kind == "block"}
    assert rows["layer_3.1.global_rep"].ran == rows["layer_3.1.global_rep.1"].ran == "modules"
    assert rows["layer_3.1.global_rep.0"].ran == rows["layer_1.0"].ran == "fused"
    assert "layer_3.1.global_rep.1" in str(found) and "ReLU" in str(found)
    with torch.no_grad(), mvit3_kernels.backend("reference"):
        assert "it is forced" in explain(model, x).reasons()


def test_explain_a_fused_network():
    model, x = fuse(network("mobilevitv3_xxs", num_classes=10)), images(1, 3, 64, 64)
    assert "require grad" in explain(model, x).reasons()[0]
    if _native.why_not() is None:
        with torch.no_grad():
            assert [(row.kind, row.ran) for row in explain(model, x)] == [("network", "fused")]
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        explain(3)


def test_compiled_blocks_follow_changes_made_before_compiling():
    for way in (set_hook, set_forward, swap_class):
        torch._dynamo.reset()
        block = InvertedResidual(8, 8, 16).eval()
        way(block.block.conv_3x3.block.norm)
        x = torch.randn(2, 8, 6, 5)
        with torch.no_grad():
            want = block(x)
            assert torch.allclose(torch.compile(block, backend="eager", fullgraph=True)(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_have_guards_of_their_own(name):
    model, x = network(name, num_classes=10), images(1, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        twin = copy.deepcopy(model)
        set_hook(twin.layer_1[0].block.exp_1x1.block.conv)
        assert torch.equal(model(x), want) and not torch.equal(twin(x), want)
        assert create_model(name).layer_1[0]._guard is None


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_without_users_is_freed_at_once(fused):
    """No cycle of references waits for the garbage collector: weights may be gigabytes on a GPU."""
    model, x = network("mobilevitv3_xxs", num_classes=10), images(1, 3, 32, 32)
    if fused:
        fuse(model)
    with torch.no_grad():
        model(x)
    seen = [weakref.ref(module) for module in model.modules()] + [weakref.ref(p) for p in model.parameters()]
    gc.disable()
    try:
        del model
        assert not any(ref() is not None for ref in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", FAMILIES)
def test_no_images_for_the_modules(name):
    model = network(name, num_classes=5)
    assert by_modules(model, images(0, 3, 64, 64)).shape == (0, 5)


@pytest.mark.parametrize("training", [False, True])
def test_explain_counts_a_block_once(training):
    """Blocks that another asks ahead of their call are not counted for it."""
    network = create_model("mobilevitv3_050", num_classes=4).train(training)
    rows = [row for row in explain(network, torch.randn(2, 3, 64, 64)) if row.kind == "block"]
    assert len(rows) > 10
    assert [row.what for row in rows if row.count != 1] == []
