"""Our networks by timm's names and conventions."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import FeatureInfo, group_parameters
from torch import Tensor, nn

import mvit3_kernels.timm
from mvit3_kernels import create_model, explain, fuse, list_models, load_checkpoint, unfuse
from mvit3_kernels.timm import TimmMobileViT
from tests.golden import fill
from tests.networks import DISTINCT
from tests.nn.networks import FAMILIES

OURS = [f"mvit3_{name}" for name in list_models()]


def images(batch: int = 2, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def network(name: str, **options) -> TimmMobileViT:
    return fill(timm.create_model(f"mvit3_{name}", **options)).eval()


def test_names_that_timm_lacks_are_registered_and_its_own_are_not_replaced():
    names = set(timm.list_models("*mobilevit*"))
    assert set(OURS) | {name for name in list_models() if name.startswith("mobilevitv3")} <= names
    assert len(OURS) == 20
    assert type(timm.create_model("mobilevitv3_xxs")) is TimmMobileViT
    for name in ("mobilevit_s", "mobilevitv2_050"):
        assert timm.models.model_entrypoint(name).__module__ == "timm.models.mobilevit"


@pytest.mark.parametrize("name", [f"mvit3_{name}" for name in DISTINCT])
def test_conventions(name):
    """What timm's tests look at, on tensors without memory."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7, device="meta", dtype=torch.float32)
        plain = create_model(name.removeprefix("mvit3_"), num_classes=7)
    state, cfg = model.state_dict(), model.pretrained_cfg
    assert list(state) == list(plain.state_dict())
    assert all(f"{cfg[key]}.weight" in state for key in ("first_conv", "classifier"))
    assert (model.in_chans, model.num_classes, model.global_pool, cfg["input_size"]) == (3, 7, "avg", (3, 256, 256))
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert len(set(groups.values())) > 5 and groups.keys() == dict(model.named_parameters()).keys()
    assert model.get_classifier() is model.classifier[-1] and not model.no_weight_decay()
    x = torch.randn(2, 3, 256, 256, device="meta")
    features = model.eval().forward_features(x)
    assert features.shape == (2, model.num_features, *cfg["pool_size"])
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    with pytest.raises(ValueError, match="global_pool '' needs num_classes 0"):
        model.reset_classifier(2, "")
    model.reset_classifier(2, "avg")
    assert model(x).shape == (2, 2) and not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_is_the_network_of_create_model(name):
    """Outputs, gradients and buffers, with gradient checkpointing too; weights go from one to the other."""
    model, plain = network(name, num_classes=5), create_model(name, num_classes=5).eval()
    plain.load_state_dict(model.state_dict())
    x = images()
    want = plain(x)
    want.square().sum().backward()
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        got = model(x)
        assert torch.equal(got, want)
        got.square().sum().backward()
        for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=key)


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv3_050"])
def test_intermediates(name):
    model, x = network(name, num_classes=5), images()
    assert isinstance(model.feature_info, FeatureInfo)
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        assert torch.equal(last, model.forward_features(x))
        assert [t.shape[1] for t in maps] == model.feature_info.channels()
        [one] = model.forward_intermediates(x, indices=[-2], stop_early=True, intermediates_only=True)
        assert torch.equal(one, maps[3])
        features = timm.create_model(f"mvit3_{name}", features_only=True, out_indices=(1, -1)).eval()
        features.load_state_dict(model.state_dict(), strict=False)
        assert features.feature_info.channels() == [maps[1].shape[1], maps[4].shape[1]]
        assert all(torch.equal(a, b) for a, b in zip(features(x), (maps[1], maps[4]), strict=True))
        for kind in ("list", "getter"):
            other = timm.create_model(f"mvit3_{name}", features_only=True, out_indices=(0, 2), feature_cls=kind)
            other.eval().load_state_dict({f"model.{k}": t for k, t in model.state_dict().items()}, strict=False)
            if kind == "list":
                other.load_state_dict(model.state_dict(), strict=False)
            torch.testing.assert_close(other(x), [maps[0], maps[2]])
        assert model.prune_intermediate_layers([1, 2]) == [1, 2]
        assert torch.equal(model.forward_intermediates(x, indices=[2], intermediates_only=True)[0], maps[2])
        assert torch.equal(model(x), maps[2]) and not list(model.layer_4.parameters())
    with pytest.raises(ValueError, match="indices must name some of 3 stages"):
        model.forward_intermediates(x, indices=[4])


def test_wrong_arguments_are_refused():
    for options, message in (
        ({"act_layer": "gelu"}, "act_layer must be 'silu'"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be at least 0 and below 1"),
        ({"global_pool": "max"}, "global_pool must be 'avg' or ''"),
        ({"features_only": True, "out_indices": (5,)}, "indices must name some of 5 stages"),
    ):
        with pytest.raises(ValueError, match=message):
            timm.create_model("mobilevitv3_xxs", **options)
    with pytest.raises(TypeError, match="no_such_argument"):
        timm.create_model("mobilevitv3_xxs", no_such_argument=1)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW'"):
        timm.create_model("mobilevitv3_xxs").forward_intermediates(images(), output_fmt="NLC")
    for model in (timm.create_model("mobilevitv3_xxs", act_layer=nn.SiLU), create_model("ssdlite_mobilevitv3_xxs")):
        with pytest.raises(NotImplementedError, match=r"torch\.export"):
            torch.jit.script(model)


def test_stochastic_depth_drops_in_training_alone():
    model, x = network("mobilevitv3_xxs", num_classes=5, drop_path_rate=0.5), images()
    plain = network("mobilevitv3_xxs", num_classes=5)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x)) and not explain(model, x).reasons()
    torch.manual_seed(0)
    for each in (model, plain):
        for module in each.train().modules():
            if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
                module.eval()
    assert torch.equal(plain(x), plain(x)) and not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), plain(x))


def test_fused_and_traced():
    model, x = network("mobilevitv3_xxs", num_classes=5), images()
    with torch.inference_mode():
        want = model(x)
        assert "fused" in str(explain(fuse(model), x))
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
        model.reset_classifier(0, "")
        assert torch.equal(model(x), unfuse(model)(x)) and type(model) is TimmMobileViT
    features = fuse(timm.create_model("mobilevitv3_xxs", features_only=True, out_indices=(2, 4)).eval())
    with torch.inference_mode():
        assert [row.ran for row in explain(features, x) if row.kind == "network"] == ["fused"]
        assert [t.shape[1] for t in features(x)] == features.feature_info.channels()
    graph = timm.create_model("mobilevitv3_xxs", features_only=True, feature_cls="fx", out_indices=(1, 2)).eval()
    assert len(graph(x)) == 2


def test_weights_come_from_folders_and_files(tmp_path):
    model, x = network("mobilevitv3_xxs", num_classes=5), images()
    model.save_pretrained(tmp_path / "own")
    again = timm.create_model(f"local-dir:{tmp_path / 'own'}", pretrained=True).eval()
    ours = mvit3_kernels.from_pretrained(tmp_path / "own")
    assert torch.equal(again(x), model(x)) and torch.equal(ours(x), model(x))
    timm.models.save_for_hf(model, tmp_path / "theirs", safe_serialization=True)
    assert torch.equal(mvit3_kernels.from_pretrained(tmp_path / "theirs")(x), model(x))
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["architecture"] == "mvit3_mobilevitv3_xxs"
    torch.save({"state_dict": {f"m.{k}": t for k, t in model.state_dict().items()}}, tmp_path / "lightning.ckpt")
    other = timm.create_model("mobilevitv3_xxs", num_classes=5).eval()
    load_checkpoint(other, tmp_path / "lightning.ckpt")
    assert torch.equal(other(x), model(x))
    features = timm.create_model("mobilevitv3_xxs", features_only=True, out_indices=2, num_classes=3).eval()
    features.save_pretrained(tmp_path / "features")
    again = mvit3_kernels.from_pretrained(tmp_path / "features")
    assert all(torch.equal(a, b) for a, b in zip(again(x), features(x), strict=True)) and len(again(x)) == 2
    with pytest.raises(RuntimeError, match="No pretrained weights exist for mobilevitv3_xxs"):
        timm.create_model("mobilevitv3_xxs", pretrained=True)


def test_images_are_read_as_published():
    for name, interpolation, colors in (("mobilevitv3_s", "bilinear", "BGR"), ("mobilevitv3_100", "bicubic", "RGB")):
        with torch.device("meta"):
            model = create_model(name)
        config = resolve_data_config(model=model)
        assert (config["input_size"], config["interpolation"]) == ((3, 256, 256), interpolation)
        assert (config["crop_pct"], config["mean"], config["std"]) == (0.888, (0, 0, 0), (1, 1, 1))
        assert colors in model.pretrained_cfg["notes"][0]
