"""Weights of timm and transformers: every tensor is taken, and the network computes what theirs does."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from mvit3_kernels import CheckpointError, create_model, load_checkpoint
from tests import golden

V1 = {  # neck_hidden_sizes, hidden_sizes, expand_ratio of transformers' configuration
    "xxs": ([16, 16, 24, 48, 64, 80, 320], [64, 80, 96], 2.0),
    "xs": ([16, 32, 48, 64, 80, 96, 384], [96, 120, 144], 4.0),
    "s": ([16, 32, 64, 96, 128, 160, 640], [144, 192, 240], 4.0),
}
NAMES = [name for name in golden.MODELS.values() if "v3" not in name]
SMALLEST = ["mobilevit_xxs", "mobilevitv2_050"]


def config(name: str) -> transformers.PreTrainedConfig:
    size = name.rpartition("_")[2]
    if size in V1:
        neck, hidden, expand = V1[size]
        return transformers.MobileViTConfig(
            neck_hidden_sizes=neck, hidden_sizes=hidden, expand_ratio=expand, num_labels=10
        )
    return transformers.MobileViTV2Config(width_multiplier=int(size) / 100, num_labels=10)


def build(host: str, name: str, kind: str = "ForImageClassification") -> nn.Module:
    if host == "timm":
        model = timm.create_model(name, num_classes=10)
    else:
        family = "MobileViT" if name.startswith("mobilevit_") else "MobileViTV2"
        model = getattr(transformers, family + kind)(config(name))
    return number(golden.fill(model)).double().eval()


def number(model: nn.Module) -> nn.Module:
    """Gives every counter a value of its own."""
    counters = [t for name, t in model.state_dict().items() if name.endswith("num_batches_tracked")]
    for value, counter in enumerate(counters, start=1):
        counter.fill_(value)
    return model


def ours(name: str, classes: int = 10, features_only: bool = False) -> nn.Module:
    options = {"features_only": True} if features_only else {"num_classes": classes}
    return create_model(name, **options).double().eval()


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = model(x)
    return getattr(y, "logits", y)


def counters(model: nn.Module) -> list[int]:
    return sorted(t.item() for name, t in model.state_dict().items() if name.endswith("num_batches_tracked"))


def image(*size: int) -> Tensor:
    return golden.image(0, 1, 3, *size).double()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("host", ["timm", "transformers"])
def test_network_computes_what_the_hosts_does(host, name, tmp_path):
    theirs, model = build(host, name), ours(name)
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    report = load_checkpoint(model, tmp_path / "model.pt")
    family = "v2" if "v2" in name else ""
    assert report.format.lower() == f"{host} mobilevit{family}"
    assert report.loaded == len(model.state_dict()) and not report.dropped and not report.kept
    assert counters(model) == counters(theirs)
    sizes = [(64, 64)]
    if name in SMALLEST:
        # Odd maps in two stages; transformers' MobileViTV2 cuts maps that patches do not divide.
        sizes = [(256, 256)] if host == "transformers" and family else [(256, 256), (100, 116)]
    for size in sizes:
        want = logits(theirs, image(*size))
        assert golden.relative(logits(model, image(*size)), want) < 1e-10


@pytest.mark.parametrize("name", SMALLEST)
def test_transformers_base_model_and_segmentation_model(name, tmp_path):
    """Without classifier and, in the base model, without the prefix "mobilevit."."""
    for kind, dropped in (("Model", {"conv_1x1_exp"}), ("ForSemanticSegmentation", {"segmentation_head"})):
        theirs, model = build("transformers", name, kind), ours(name, features_only=True)
        save_file(theirs.state_dict(), tmp_path / "model.safetensors")
        report = load_checkpoint(model, tmp_path / "model.safetensors")
        assert report.loaded == len(model.state_dict()) and not report.kept
        assert {key.split(".")[0] for key in report.dropped} == (
            dropped if kind != "Model" or name == "mobilevit_xxs" else set()
        )
        backbone = getattr(theirs, theirs.base_model_prefix, theirs)
        with torch.inference_mode():
            want = backbone.encoder(backbone.conv_stem(image(64, 64)), output_hidden_states=True).hidden_states
            # With the segmentation model's output stride of 16 the last stage is another network.
            maps = list(zip(model(image(64, 64)), want, strict=True))[: 5 if kind == "Model" else 4]
        assert all(golden.relative(got, expected) < 1e-10 for got, expected in maps)


def test_query_key_value_in_any_order(tmp_path):
    theirs = build("transformers", "mobilevit_xxs").state_dict()
    torch.save(dict(sorted(theirs.items(), reverse=True)), tmp_path / "model.pt")
    model = ours("mobilevit_xxs")
    load_checkpoint(model, tmp_path / "model.pt")
    source = "mobilevit.encoder.layer.3.transformer.layer.2.attention.attention."
    want = torch.cat([theirs[f"{source}{part}.weight"] for part in ("query", "key", "value")])
    assert torch.equal(model.layer_4[1].global_rep[2].pre_norm_mha[1].qkv_proj.weight, want)


@pytest.mark.parametrize("name", SMALLEST)
def test_timm_features_only(name, tmp_path):
    theirs = golden.fill(timm.create_model(name, features_only=True)).double().eval()
    model = ours(name, features_only=True)
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    report = load_checkpoint(model, tmp_path / "model.pt")
    assert report.loaded == len(model.state_dict())
    assert all(key.startswith("final_conv.") for key in report.dropped)
    with torch.inference_mode():
        maps, want = model(image(64, 64)), theirs(image(64, 64))
    # The last map of timm's mobilevit is that of its final_conv.
    same = list(zip(maps, want, strict=True))[: 4 if name == "mobilevit_xxs" else 5]
    assert all(golden.relative(got, expected) < 1e-10 for got, expected in same)


@pytest.mark.parametrize("host", ["timm", "transformers"])
@pytest.mark.parametrize("name", SMALLEST)
def test_other_number_of_classes(host, name, tmp_path):
    theirs = build(host, name)
    torch.save({"state_dict": {f"module.{key}": t for key, t in theirs.state_dict().items()}}, tmp_path / "model.pt")
    model = ours(name, classes=5)
    with pytest.raises(CheckpointError, match="drop_head=True"):
        load_checkpoint(model, tmp_path / "model.pt")
    report = load_checkpoint(model, tmp_path / "model.pt", drop_head=True)
    assert [key.rpartition(".")[2] for key in report.dropped] == ["weight", "bias"]
    assert all(key.startswith(("module.classifier.", "module.head.fc.")) for key in report.dropped)
    assert all(key.startswith("classifier.") for key in report.kept)


def test_another_size_is_named_and_names_are_the_files(tmp_path):
    state = build("timm", "mobilevit_xs").state_dict()
    torch.save(state, tmp_path / "model.pt")
    model = ours("mobilevit_xxs")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"The file fits create_model\('mobilevit_xs'\)"):
        load_checkpoint(model, tmp_path / "model.pt")
    torch.save({**state, "stages.2.1.gamma": torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"unexpected in the file \(1\): stages\.2\.1\.gamma"):
        load_checkpoint(model, tmp_path / "model.pt")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_incomplete_query_key_value(tmp_path):
    state = build("transformers", "mobilevit_xxs").state_dict()
    prefix = "mobilevit.encoder.layer.2.transformer.layer.0.attention.attention."
    del state[prefix + "key.weight"]
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(
        CheckpointError, match=r"unlike \(1\): layer_3\.1\.global_rep\.0\.pre_norm_mha\.1\.qkv_proj\.weight \(128, 64\)"
    ):
        load_checkpoint(ours("mobilevit_xxs"), tmp_path / "model.pt")
    state[prefix + "key.weight"] = torch.zeros(64, 63)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="do not fit together"):
        load_checkpoint(ours("mobilevit_xxs"), tmp_path / "model.pt")
