"""Networks as folders, in the form of the Hugging Face Hub, and through torch.hub."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mvit3_kernels
from mvit3_kernels import CheckpointError, create_model, from_pretrained, fuse, list_models, unfuse
from tests.golden import fill

ROOT = Path(__file__).parents[2]
NETWORKS = {
    "mobilevit_xxs": {"num_classes": 5, "in_chans": 4, "drop_rate": 0.3},
    "mobilevitv3_050": {"output_stride": 16, "num_classes": 0},
    "mobilevitv3_xxs": {"features_only": True, "out_indices": (1, -1)},
    "deeplabv3_mobilevitv3_xxs": {"num_classes": 4},
    "ssdlite_mobilevitv2_050": {"num_classes": 4},
}


def outputs(model: nn.Module) -> list[torch.Tensor]:
    channels = getattr(model, "encoder", model).in_chans
    with torch.no_grad():
        found = model(torch.randn(1, channels, 64, 64, generator=torch.Generator().manual_seed(0)))
    return [found] if isinstance(found, torch.Tensor) else list(found)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert all(torch.equal(x, y) for x, y in zip(outputs(a), outputs(b), strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folder_holds_the_network(name, tmp_path):
    model = fill(create_model(name, **NETWORKS[name])).eval().to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path / "a" / "b")
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"config.json", "model.safetensors"}
    again = from_pretrained(tmp_path / "a" / "b")
    assert type(again) is type(model) and not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    assert again._created.keywords == {**model._created.keywords, **NETWORKS[name]} or name == "mobilevitv3_xxs"
    assert_same(again, model)


def test_changed_networks(tmp_path):
    """Other classes are saved as they are; what `create_model` would not make is refused."""
    model = fill(create_model("mobilevitv3_xxs", num_classes=5)).eval()
    fuse(model).reset_classifier(3)
    model.save_pretrained(tmp_path)
    assert_same(from_pretrained(tmp_path), unfuse(model))
    other = from_pretrained(tmp_path, num_classes=9)
    assert other.num_classes == 9 and torch.equal(
        other.layer_5[0].block[0].block[0].weight,
        load_file(tmp_path / "model.safetensors")["layer_5.0.block.exp_1x1.block.conv.weight"],
    )
    assert from_pretrained(tmp_path, num_classes=0).num_classes == 0
    before = (tmp_path / "config.json").read_bytes()
    model.layer_2[1] = nn.Identity()
    with pytest.raises(ValueError, match=r"one that was changed: layer_2\.1\.block"):
        model.save_pretrained(tmp_path)
    bare = create_model("mobilevitv3_xxs")
    bare.reset_classifier(0, "")
    with pytest.raises(ValueError, match="one that was changed: global_pool ''"):
        bare.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be made by create_model"):
        create_model("deeplabv3_mobilevitv3_xxs").encoder.save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(ValueError, match="meta device"):
        create_model("mobilevitv3_xxs").save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_damaged_folders_are_refused(tmp_path):
    create_model("mobilevitv3_xxs", num_classes=5).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    for wrong, message in (("{", "not JSON"), ("[]", "no entry 'architecture'"), ("{}", "no entry 'architecture'")):
        config.write_text(wrong)
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(tmp_path)
    config.write_text(text.replace("mobilevitv3_xxs", "mobilevitv3_xs"))
    with pytest.raises(CheckpointError, match=r"fits create_model\('mobilevitv3_xxs'\)"):
        from_pretrained(tmp_path)
    config.write_text(text.replace("mvit3_mobilevitv3_xxs", "resnet50"))
    with pytest.raises(ValueError, match="got 'resnet50'"):
        from_pretrained(tmp_path)
    config.write_text(text)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        from_pretrained(tmp_path)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        from_pretrained(tmp_path)


def test_the_hub_is_asked_for_what_is_no_folder(tmp_path, monkeypatch):
    model = fill(create_model("mobilevitv3_xxs", num_classes=5)).eval()
    asked, uploaded = [], []

    class Api:
        def __init__(self, token=None):
            assert token == "secret"

        def create_repo(self, repo_id, private, exist_ok):
            assert private and exist_ok
            return type("Url", (), {"repo_id": f"owner/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, revision, commit_message):
            uploaded.append((repo_id, revision, commit_message))
            for path in Path(folder_path).iterdir():
                (tmp_path / path.name).write_bytes(path.read_bytes())
            return "https://address"

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options["revision"], options["local_files_only"]))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert model.push_to_hub("net", token="secret", private=True, commit_message="Add it") == "https://address"
    assert uploaded == [("owner/net", None, "Add it")]
    assert_same(from_pretrained("owner/net", revision="v1", local_files_only=True), model)
    assert asked == [("owner/net", name, "v1", True) for name in ("config.json", "model.safetensors")]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("mvit3_mobilevitv3_xxs", 5)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="'owner/net' is no folder; a download needs the package huggingface_hub"):
        from_pretrained("owner/net")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="save_pretrained needs the package safetensors"):
        model.save_pretrained(tmp_path)


def test_torch_hub():
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    public = {name for name in vars(hubconf) if not name.startswith("_")}
    assert public == {*list_models("*"), "from_pretrained", "dependencies"}
    model = torch.hub.load(str(ROOT), "mobilevitv3_xxs", source="local", num_classes=3)
    assert type(model) is type(mvit3_kernels.create_model("mobilevitv3_xxs")) and model.num_classes == 3
    assert "features_only" in hubconf.mobilevitv3_xxs.__doc__
