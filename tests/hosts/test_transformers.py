"""Networks of transformers with swapped blocks: the host's results, gradients and buffers, or a reason."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from mvit3_kernels import explain, fuse, fuse_report, unfuse
from mvit3_kernels.hosts import Swapped
from tests.bounds import assert_bound

from .transformers_models import FAMILIES, KINDS, distance, images, network, outputs, results


def pair(name: str, **options: object) -> tuple[nn.Module, nn.Module]:
    """A host in float64, and the same with swapped blocks."""
    host = network(name, **options).double()
    return host, fuse(copy.deepcopy(host), mode="training")


def layers(model: nn.Module) -> list[nn.Module]:
    """The three blocks with attention."""
    return [module for module in model.modules() if type(module).__name__ in ("MobileViTLayer", "MobileViTV2Layer")]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ["v1 classes", "v2 classes", "v1 masks", "v2 masks"])
def test_results_are_the_hosts(name, training):
    """At 97 pixels the maps are odd: MobileViT resizes them for attention, MobileViTV2 leaves pixels out."""
    options = {"output_stride": 16} if name.endswith("masks") else {}
    host, fused = pair(name, **options)
    assert fuse_report(fused).left() == []
    for size in (64, 97) if training else (97,):
        x = images(2, 3, size, size, dtype=torch.float64)
        want, found = (results(model.train(training), x) for model in (host, fused))
        assert distance(found, want) <= 1e-12, size
        for model in (host, fused):
            model.zero_grad()
    assert all(block.why_modules() is None for block in fused.modules() if isinstance(block, Swapped))


@pytest.mark.parametrize("name", ["v1 masks", "v2 classes"])
def test_kernels_err_no_more_than_the_host(name):
    """In float32, both against the host in float64."""
    x = images(2, 3, 97, 97)
    host = network(name).train()
    fused, exact = fuse(copy.deepcopy(host), mode="training"), copy.deepcopy(host).double()
    want = results(exact, x.double())
    # a bias before a norm of the batch has no gradient but noise
    size = max(t.norm() for name, t in want.items() if name.startswith("d ")).item() * 1e-3
    peers = (results(fused, x), results(host, x), want)
    names = [name for name, t in want.items() if t.is_floating_point() and (t.norm() >= size or name[:2] != "d ")]
    assert_bound(*({name: of[name] for name in names} for of in peers), 1e-6, least=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_stays_with_the_host(name):
    """20 steps of AdamW."""
    models = pair(name, output_stride=16)
    for model in models:
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
        for step in range(20):
            x = images(2, 3, 32, 40 + step % 2, dtype=torch.float64)
            optimizer.zero_grad()
            model(x, labels=torch.tensor([step % 5, 3])).loss.backward()
            optimizer.step()
    want, found = ({f"d {name}": t for name, t in model.state_dict().items()} for model in models)  # all together
    assert distance(found, want) <= 1e-9


@pytest.mark.parametrize("name", ["v1 masks", "v2 classes"])
def test_parameters_keys_and_classes_stay(name):
    host = network(name)
    tensors = {key: id(t) for key, t in host.state_dict(keep_vars=True).items()}
    classes, attributes = [type(m) for m in host.modules()], [set(vars(m)) for m in host.modules()]
    for mode in ("training", "inference"):
        fused = fuse(host, mode=mode)
        rows = fuse_report(fused)
        assert len(rows) > 40 and all(row.became == f"mvit3_kernels.hosts.transformers.{row.kind}" for row in rows)
        assert fused is host and {key: id(t) for key, t in host.state_dict(keep_vars=True).items()} == tensors
        with torch.no_grad():
            want = outputs(host, images(1, 3, 64, 64))
            for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
                assert [type(m) for m in copied.modules()] == [type(m) for m in fused.modules()]
                assert distance(outputs(copied, images(1, 3, 64, 64)), want) == 0
        unfuse(host)
        assert [type(m) for m in host.modules()] == classes
        assert [set(vars(m)) for m in host.modules()] == attributes


def test_what_was_made_before_goes_on():
    """An optimizer and an average of the weights know nothing of fuse and unfuse."""
    models = [network("v2 classes").double().train() for _ in range(2)]
    for model, fused in zip(models, (False, True), strict=True):
        optimizer, average = torch.optim.AdamW(model.parameters(), lr=1e-3), AveragedModel(model)
        for step in range(3):
            if fused:
                (fuse if step != 1 else unfuse)(model)
            optimizer.zero_grad()
            model(images(2, 3, 64, 64, dtype=torch.float64)).logits.square().sum().backward()
            optimizer.step()
            average.update_parameters(model)
        model.average = average.state_dict()
    want, found = ({f"d {name}": t for name, t in model.average.items()} for model in models)
    assert distance(found, want) <= 1e-9


def test_a_fused_network_is_saved_as_the_hosts(tmp_path):
    host = network("v1 classes")
    fuse(host).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is KINDS["v1 classes"]
    torch.testing.assert_close(loaded.state_dict(), unfuse(host).state_dict(), rtol=0, atol=0)
    made = type(fuse(host)).from_pretrained(tmp_path)  # asked of a class that fuse made
    assert type(made) is type(loaded)
    with torch.no_grad():  # products of weights that lie elsewhere in memory are rounded in another order
        assert distance(outputs(made, images(1, 3, 64, 64)), outputs(unfuse(host), images(1, 3, 64, 64))) <= 1e-6
    base = fuse(network("v2"))
    base.save_pretrained(tmp_path / "base")
    assert base.config.architectures == ["MobileViTV2Model"]


class Pictures(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": images(1, 3, 64, 64 + i)[0, ..., :64].double(), "labels": torch.tensor(i % 5)}


def test_the_trainer_of_transformers(tmp_path):
    """It trains, evaluates, writes and loads a fused network as the host."""
    found = []
    for model in pair("v1 classes"):
        options = {"max_steps": 3, "per_device_train_batch_size": 4, "load_best_model_at_end": True, "seed": 0}
        every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        arguments = TrainingArguments(
            tmp_path / "runs", use_cpu=True, report_to=[], disable_tqdm=True, **options, **every
        )
        trainer = Trainer(model, arguments, train_dataset=Pictures(), eval_dataset=Pictures())
        trainer.train()
        trainer.save_model(tmp_path / "mine")
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "mine", dtype=torch.float64)
        losses = {"loss": torch.tensor([trainer.evaluate()["eval_loss"]])}
        found.append({**losses, **{f"d {name}": t for name, t in loaded.state_dict().items()}})
    assert distance(*found) <= 1e-9


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda _, inputs, y: 1.5 * y)


def other_forward(module: nn.Module) -> None:
    module.forward = lambda x: 2 * type(module).forward(module, x)


def replace(parent: nn.Module, name: str, other: nn.Module) -> None:
    setattr(parent, name, other.double())


def attention(layer: nn.Module) -> nn.Module:
    return layer.transformer.layer[-1].attention


# What someone may do to a block, with the family and the reason that is given.
CHANGES = {
    "hook": ("v1 classes", lambda b: hook(attention(b).attention.query), "has a hook"),
    "hook on a norm": ("v2 classes", lambda b: hook(b.conv_kxk.normalization), "has a hook"),
    "Linear of its own": (
        "v1 classes",
        lambda b: replace(attention(b).attention, "value", Doubled(24, 24)),
        "which only its own forward",
    ),
    "pruned": ("v1 classes", lambda b: prune.l1_unstructured(attention(b).output.dense, "weight", 0.5), "has a hook"),
    "forward": ("v2 classes", lambda b: other_forward(attention(b).out_proj), "a forward of its own"),
    "unfolding": ("v1 classes", lambda b: setattr(b, "unfolding", b.unfolding), "a unfolding of its own"),
    "activation": ("v1 classes", lambda b: setattr(b.fusion, "activation", nn.Tanh()), "Tanh"),
    "activation of ffn": (
        "v1 classes",
        lambda b: setattr(b.transformer.layer[0].intermediate, "intermediate_act_fn", nn.ReLU()),
        "feed-forward network is relu",
    ),
    "ffn without one": ("v2 classes", lambda b: setattr(b.transformer.layer[0].ffn.conv1, "activation", None), "conv1"),
    "Identity": ("v2 classes", lambda b: replace(b.transformer.layer[0], "layernorm_after", nn.Identity()), "Identity"),
    "groups": ("v2 classes", lambda b: replace(b, "layernorm", nn.GroupNorm(2, b.layernorm.num_channels)), "2 groups"),
    "heads": (
        "v1 classes",
        lambda b: (
            setattr(attention(b).attention, "num_attention_heads", 2),
            setattr(attention(b).attention, "attention_head_size", 12),
        ),
        "differ in heads",
    ),
    "padding": ("v1 classes", lambda b: setattr(b.conv_kxk.convolution, "padding_mode", "reflect"), "'reflect'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_block_runs_its_modules(change):
    name, alter, reason = CHANGES[change]
    host, fused = pair(name)
    for model in (host, fused):
        torch.manual_seed(0)
        alter(layers(model)[-1])
    x = images(2, 3, 64, 64, dtype=torch.float64)
    assert distance(outputs(fused, x), outputs(host, x)) <= 1e-12
    rows = [row for row in explain(fused, x) if row.kind == "block" and row.ran == "modules"]
    assert any(row.what.endswith("layer.4") and reason in row.reason for row in rows), rows
    assert reason in next(row.reason for row in fuse_report(fused) if row.name.endswith("encoder.layer.4"))


@pytest.mark.parametrize("method", ["forward", "unfolding", "folding"])
@pytest.mark.parametrize("name", ["v1 classes", "v2 classes"])
def test_a_method_replaced_in_the_class_is_called(name, method, monkeypatch):
    host, fused = pair(name)
    x = images(1, 3, 64, 64, dtype=torch.float64)
    before = outputs(host, x)
    assert layers(fused)[0].why_modules() is None
    kind = type(layers(host)[0])
    own, calls = getattr(kind, method), []

    def replaced(self: nn.Module, *args: object) -> object:
        calls.append(type(self))
        return own(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(kind, method, replaced)
        assert distance(outputs(fused, x), before) <= 1e-12
        assert calls == [type(layer) for layer in layers(fused)]
        assert f"whose {method} has been replaced" in str(fuse_report(fused))
        late = fuse(copy.deepcopy(host), mode="training")
        assert f"whose {method} has been replaced" in next(r.reason for r in fuse_report(late).left())
    calls.clear()
    assert distance(outputs(fused, x), before) <= 1e-12 and not calls


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v1 classes", {"hidden_act": "gelu"}),
        ("v2 classes", {"hidden_act": "gelu"}),
        ("v1 classes", {"patch_size": 3, "qkv_bias": False}),
        ("v2 classes", {"patch_size": 3}),
        ("v2 classes", {"conv_kernel_size": 5, "hidden_act": "swish"}),
        ("v1 classes", {"output_stride": 8, "hidden_act": "relu"}),
        ("v2 classes", {"output_stride": 8}),
    ],
)
def test_configurations(name, options):
    host, fused = pair(name, **options)
    x = images(2, 3, 96, 96, dtype=torch.float64)
    want, found = (results(model.train(), x) for model in (host, fused))
    assert distance(found, want) <= 1e-12
    left = fuse_report(fused).left()
    assert ("gelu" in options.values()) == any("GELU" in row.reason for row in left)


def test_subclasses_are_left():
    host = network("v1 classes").double()
    layers(host)[0].__class__ = type("Mine", (type(layers(host)[0]),), {})
    fused = fuse(copy.deepcopy(host), mode="training")
    left = [(row.kind, row.reason) for row in fuse_report(fused).left()]
    assert len(left) == 1 and left[0][0] == "Mine" and "is a subclass of transformers" in left[0][1]
    x = images(1, 3, 64, 64, dtype=torch.float64)
    assert distance(outputs(fused, x), outputs(host, x)) <= 1e-12


def test_dropouts_are_where_the_host_has_them():
    v1 = fuse(
        network("v1 classes", hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.5), mode="training"
    ).train()
    v2 = fuse(network("v2 classes", ffn_dropout=0.25, attn_dropout=0.5), mode="training").train()
    rates = [layers(model)[0].describe().block.tokens for model in (v1, v2)]
    assert rates[0].tokens.dropouts == {"attention_dropout": 0.5, "output_dropout": 0.25, "ffn_output_dropout": 0.25}
    assert rates[1].dropouts == {"attention_dropout": 0.5, "hidden_dropout": 0.25, "ffn_output_dropout": 0.25}
    for model in (v1, v2):
        x = images(2, 3, 64, 64)
        block = layers(model)[0]
        assert block.why_modules() is None

        def run(seed, model=model, x=x):
            torch.manual_seed(seed)
            return model(x).logits

        assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
        next(m for m in block.transformer.modules() if isinstance(m, nn.Dropout) and m.p == 0.25).p = 0.125
        assert "different probabilities" in block.why_modules()
        block.eval()
        assert block.why_modules() is None


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing(name, reentrant):
    """Running statistics are updated as often as in the host: twice for each layer that is computed twice."""
    host, fused = pair(name)
    for model in (host, fused):
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    x = images(2, 3, 64, 64, dtype=torch.float64)
    want, found = (results(model, x) for model in (host, fused))
    assert max(t.item() for name, t in want.items() if name.endswith("tracked")) == 2
    assert distance(found, want) <= 1e-12 and layers(fused)[0].why_modules() is None


@pytest.mark.parametrize("name", ["v1 masks", "v2 masks"])
def test_hooks_fire_as_often_as_in_the_host(name):
    counts = []
    for model in pair(name):
        calls: dict[str, int] = {}
        for key, module in model.named_modules():
            module.register_forward_hook(lambda *_, key=key, calls=calls: calls.update({key: calls.get(key, 0) + 1}))
        model(images(1, 3, 64, 64, dtype=torch.float64))
        counts.append(calls)
    assert counts[0] == counts[1] and len(counts[0]) > 100


def test_heads_are_replaced_and_removed():
    for name in FAMILIES:
        host, fused = pair(name)
        x = images(2, 3, 64, 64, dtype=torch.float64)
        for head in (nn.Sequential(nn.Linear(host.classifier.in_features, 7), nn.Tanh()).double(), nn.Identity()):
            host.classifier, fused.classifier = head, copy.deepcopy(head)
            assert distance(results(fused.train(), x), results(host.train(), x)) <= 1e-12
            host.zero_grad()
            fused.zero_grad()


def test_a_map_smaller_than_a_patch_is_named():
    with pytest.raises(ValueError, match="1 x 1 pixels has no whole patch of 2 x 2"):
        fuse(network("v2"), mode="training")(images(1, 3, 32, 32))
