"""`load_checkpoint`: every layout of a file, what it refuses, and that a refused file changes nothing."""

from __future__ import annotations

import argparse
import os
import pickle
import random
import re
import sys
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import mvit3_kernels
from mvit3_kernels import CheckpointError, create_model, load_checkpoint
from tests import golden

SMALL = {"num_classes": 10}


def xxs(seed: int, **options) -> nn.Module:
    """A small network with weights and buffers of its own for each seed."""
    torch.manual_seed(seed)
    model = create_model("mobilevitv3_xxs", **(options or SMALL))
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(seed + 3)
    return model


def copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    different = [name for name in want if got[name].dtype != want[name].dtype or not torch.equal(got[name], want[name])]
    assert not different


def save(path, content) -> str:
    torch.save(content, path)
    return str(path)


def refuse(path, **options) -> str:
    """The message of the error; also holds that the model stays as it is, bit for bit."""
    model = xxs(9)
    before = copy(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, path, **options)
    assert_same(model.state_dict(), before)
    assert str(path) in str(caught.value)
    return str(caught.value)


# Layouts


@pytest.mark.parametrize("name", golden.MODELS.values())
def test_saved_weights_come_back(name, tmp_path):
    model, other = create_model(name, **SMALL), create_model(name, **SMALL)
    report = load_checkpoint(other, save(tmp_path / "model.pt", model.state_dict()))
    assert_same(other.state_dict(), copy(model))
    assert (report.format, report.entry, report.dropped, report.kept) == ("published", None, (), ())
    assert report.loaded == len(model.state_dict())


@pytest.mark.parametrize("old_format", [False, True])
def test_path_object_and_both_formats_of_torch(old_format, tmp_path):
    model, other = xxs(1), xxs(2)
    torch.save(model.state_dict(), tmp_path / "model", _use_new_zipfile_serialization=not old_format)
    load_checkpoint(other, tmp_path / "model")
    assert_same(other.state_dict(), copy(model))


@pytest.mark.parametrize("file", ["model.safetensors", "model.bin"])
def test_safetensors(file, tmp_path):
    model, other = xxs(1), xxs(2)
    save_file(model.state_dict(), tmp_path / file)
    load_checkpoint(other, tmp_path / file)
    assert_same(other.state_dict(), copy(model))


def test_file_without_checksums(tmp_path):
    model, other = xxs(1), xxs(2)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path / "model.pt", model.state_dict())
    finally:
        torch.serialization.set_crc32_options(before)
    load_checkpoint(other, path)
    assert_same(other.state_dict(), copy(model))


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.model.", "m.", "net.module.b."]
)
def test_prefixes_of_wrappers(prefix, tmp_path):
    model, other = xxs(1), xxs(2)
    load_checkpoint(other, save(tmp_path / "model.pt", {prefix + name: t for name, t in model.state_dict().items()}))
    assert_same(other.state_dict(), copy(model))


def test_compiled_parts_and_wrapped_models(tmp_path):
    model, wrapped = xxs(1), nn.ModuleDict({"model": xxs(2)})
    path = save(
        tmp_path / "model.pt",
        {re.sub(r"^(layer_\d)\.", r"\1._orig_mod.", name): t for name, t in model.state_dict().items()},
    )
    load_checkpoint(wrapped, path)
    assert_same(wrapped["model"].state_dict(), copy(model))
    compiled = torch.compile(xxs(3), backend="eager")
    load_checkpoint(compiled, path)
    assert_same(compiled._orig_mod.state_dict(), copy(model))


def test_averaged_model_of_torch(tmp_path):
    model, other = xxs(1), xxs(2)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    report = load_checkpoint(other, save(tmp_path / "model.pt", averaged.state_dict()))
    assert_same(other.state_dict(), copy(model))
    assert report.dropped == ("n_averaged",)


@pytest.mark.parametrize("plain", ["model_state_dict", "state_dict", "model"])
@pytest.mark.parametrize("average", ["ema_model_state_dict", "ema_state_dict", "state_dict_ema", "model_ema"])
def test_training_checkpoint(plain, average, tmp_path):
    raw, ema, model = xxs(1), xxs(2), xxs(3)
    path = save(
        tmp_path / "checkpoint.pt",
        {"epoch": 3, "optimizer": {"state": {}}, plain: raw.state_dict(), average: ema.state_dict()},
    )
    for choice, want, entry in ((None, ema, average), (False, raw, plain), (True, ema, average)):
        assert load_checkpoint(model, path, ema=choice).entry == entry
        assert_same(model.state_dict(), copy(want))


def test_entries_that_are_not_weights_are_passed_over(tmp_path):
    raw, ema, model = xxs(1), xxs(2), xxs(3)
    content = {
        "model": "mobilevitv3_xxs",
        "state_dict": raw.state_dict(),
        "ema": {"decay": 0.9995, "module": ema.state_dict()},
    }
    path = save(tmp_path / "checkpoint.pt", content)
    assert load_checkpoint(model, path).entry == "ema.module"
    assert_same(model.state_dict(), copy(ema))
    assert load_checkpoint(model, path, ema=False).entry == "state_dict"
    assert_same(model.state_dict(), copy(raw))
    path = save(tmp_path / "none.pt", {"state_dict": raw.state_dict(), "state_dict_ema": None})
    assert load_checkpoint(model, path).entry == "state_dict"


def test_asking_for_weights_that_are_not_there(tmp_path):
    state = xxs(1).state_dict()
    assert "no state dict of averaged weights" in refuse(
        save(tmp_path / "raw.pt", {"model": state, "epoch": 3}), ema=True
    )
    assert "model_ema (" in refuse(save(tmp_path / "ema.pt", {"model_ema": state}), ema=False)
    assert "plain state dict" in refuse(save(tmp_path / "plain.pt", state), ema=True)


@pytest.mark.parametrize("options", [{"features_only": True}, {"num_classes": 0}])
def test_model_without_the_head(options, tmp_path):
    model, other = xxs(1), xxs(2, **options)
    report = load_checkpoint(other, save(tmp_path / "model.pt", model.state_dict()))
    head = ("classifier.", "conv_1x1_exp.") if "features_only" in options else ("classifier.",)
    want = {name: t for name, t in copy(model).items() if not name.startswith(head)}
    assert_same(other.state_dict(), want)
    assert set(report.dropped) == set(model.state_dict()) - set(want)
    assert report.loaded == len(want)


@pytest.mark.parametrize(
    "network", ["deeplabv3_mobilevitv3_small_v3", "ssd_mobilevitv3_small_v3", "pspnet_mobilevitv3_1.00"]
)
def test_backbone_of_a_dense_network(network, tmp_path):
    state = {name: torch.full(shape, 0.5) for name, shape in golden.state_dicts()[network]}
    path = save(tmp_path / "model.pt", state)
    name = "mobilevitv3_s" if "small" in network else "mobilevitv3_100"
    backbone = create_model(name, features_only=True)
    report = load_checkpoint(backbone, path)
    assert set(report.dropped) == {name for name in state if not name.startswith("encoder.")}
    assert report.loaded == len(backbone.state_dict()) and not report.kept
    assert all((tensor == 0.5).all() for name, tensor in backbone.state_dict().items() if tensor.is_floating_point())
    # A classifier keeps its fresh head only on request.
    classifier = create_model(name, **SMALL)
    fresh = copy(classifier)
    task = "detection" if network.startswith("ssd") else "segmentation"
    with pytest.raises(CheckpointError, match=rf"missing from the file(.|\n)*of a {task} network: drop_head"):
        load_checkpoint(classifier, path)
    assert_same(classifier.state_dict(), fresh)
    report = load_checkpoint(classifier, path, drop_head=True)
    assert set(report.kept) == {name for name in fresh if name.startswith(("classifier.", "conv_1x1_exp."))}
    assert_same(
        {name: classifier.state_dict()[name] for name in report.kept}, {name: fresh[name] for name in report.kept}
    )


def test_whole_dense_network(tmp_path):
    """Names with "encoder." stay where the model has them, and a classifier's file is told where it fits."""
    dense = nn.ModuleDict(
        {"encoder": create_model("mobilevitv3_xxs", features_only=True), "seg_head": nn.Conv2d(128, 21, 1)}
    )
    want = {name: torch.ones_like(t) for name, t in dense.state_dict().items()}
    load_checkpoint(dense, save(tmp_path / "dense.pt", want))
    assert_same(dense.state_dict(), want)
    path = save(tmp_path / "model.pt", xxs(1).state_dict())
    with pytest.raises(CheckpointError, match=r"load_checkpoint\(network\.encoder, path\)"):
        load_checkpoint(dense, path)
    assert_same(dense.state_dict(), want)
    load_checkpoint(dense.encoder, path)


def test_counters_may_be_absent(tmp_path):
    model, other = xxs(1), xxs(2)
    state = {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    report = load_checkpoint(other, save(tmp_path / "model.pt", state))
    assert set(report.kept) == set(model.state_dict()) - set(state)
    assert all(tensor == 5 for name, tensor in other.state_dict().items() if name in report.kept)
    assert_same({name: other.state_dict()[name] for name in state}, state)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_the_models(stored, dtype, tmp_path):
    model, other = xxs(1), xxs(2).to(dtype)
    state = {name: t.to(stored) if t.is_floating_point() else t for name, t in model.state_dict().items()}
    load_checkpoint(other, save(tmp_path / "model.pt", state))
    assert_same(other.state_dict(), {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()})


def test_parameters_stay_the_same_objects(tmp_path):
    model = xxs(1)
    parameters = list(model.parameters())
    load_checkpoint(model, save(tmp_path / "model.pt", xxs(2).state_dict()))
    assert all(new is old and new.requires_grad for new, old in zip(model.parameters(), parameters, strict=True))


def test_the_file_may_be_replaced_afterwards(tmp_path):
    """Nothing of the model stays mapped to the file."""
    model = xxs(1)
    path = save(tmp_path / "model.pt", xxs(2).state_dict())
    load_checkpoint(model, path)
    before = copy(model)
    with open(path, "r+b") as file:
        file.write(bytes(os.path.getsize(path)))
    assert_same(model.state_dict(), before)


def test_create_model_loads(tmp_path):
    model = xxs(1)
    other = create_model("mobilevitv3_xxs", **SMALL, checkpoint_path=save(tmp_path / "model.pt", model.state_dict()))
    assert_same(other.state_dict(), copy(model))


def test_meta_model(tmp_path):
    path = save(tmp_path / "model.pt", xxs(1).state_dict())
    with torch.device("meta"):
        model = create_model("mobilevitv3_xxs", **SMALL)
    with pytest.raises(ValueError, match="meta"):
        load_checkpoint(model, path)


def test_container_of_two_networks(tmp_path):
    path = save(tmp_path / "model.pt", xxs(1).state_dict())
    with pytest.raises(ValueError, match="several"):
        load_checkpoint(nn.ModuleDict({"model": xxs(1), "module": xxs(2)}), path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_model_on_a_gpu(tmp_path):
    model, other = xxs(1), xxs(2).cuda().half()
    load_checkpoint(other, save(tmp_path / "model.pt", {name: t.cuda() for name, t in model.state_dict().items()}))
    assert all(t.is_cuda for t in other.state_dict().values())
    assert_same({name: t.cpu() for name, t in other.state_dict().items()}, copy(model.half()))


# The head and other differences


def test_other_number_of_classes(tmp_path):
    model, other = xxs(1, num_classes=7), xxs(2)
    path = save(tmp_path / "model.pt", model.state_dict())
    message = refuse(path)
    assert (
        "drop_head=True" in message
        and "classifier.fc.weight (7, 512) float32 in the file, (10, 512) float32 in the model" in message
    )
    fresh = copy(other)
    report = load_checkpoint(other, path, drop_head=True)
    head = ("classifier.fc.weight", "classifier.fc.bias")
    assert report.dropped == head and report.kept == head
    assert_same(other.state_dict(), {**copy(model), **{name: fresh[name] for name in head}})
    assert str(report) == (
        f"loaded {len(fresh) - 2} tensors (published names); "
        "dropped from the file (2): classifier.fc.weight, classifier.fc.bias; "
        "kept in the model (2): classifier.fc.weight, classifier.fc.bias"
    )


def test_missing_classifier_names_the_way_out(tmp_path):
    state = {name: t for name, t in xxs(1).state_dict().items() if not name.startswith("classifier")}
    message = refuse(save(tmp_path / "model.pt", state))
    assert (
        "missing from the file (2): classifier.fc.weight, classifier.fc.bias" in message and "drop_head=True" in message
    )


def test_differences_are_listed_and_counted(tmp_path):
    state = copy(xxs(1))
    del state["layer_1.0.block.exp_1x1.block.conv.weight"], state["layer_5.1.fusion.block.norm.running_var"]
    state["conv_1.block.conv.weight"] = torch.zeros(16, 1, 3, 3)
    state["conv_1.block.norm.weight"] = torch.zeros(16, dtype=torch.int8)
    state.update({f"extra.{i}": torch.zeros(1) for i in range(20)})
    message = refuse(save(tmp_path / "model.pt", state))
    assert (
        "missing from the file (2): layer_1.0.block.exp_1x1.block.conv.weight, "
        "layer_5.1.fusion.block.norm.running_var\n" in message
    )
    assert (
        "unexpected in the file (20): extra.0, extra.1, extra.2" in message
        and "... and 12 more" in message
        and "extra.19" not in message
    )
    assert (
        "unlike (2): conv_1.block.conv.weight (16, 1, 3, 3) float32 in the file, (16, 3, 3, 3) float32 in the model"
        in message
    )
    assert "conv_1.block.norm.weight (16,) int8 in the file" in message


def test_one_missing_tensor_is_enough(tmp_path):
    state = copy(xxs(1))
    del state["layer_3.1.global_rep.0.pre_norm_mha.0.bias"]
    assert "missing from the file (1): layer_3.1.global_rep.0.pre_norm_mha.0.bias" in refuse(
        save(tmp_path / "model.pt", state)
    )


def test_two_names_for_one_tensor(tmp_path):
    state = {**xxs(1).state_dict(), "module.conv_1.block.norm.bias": torch.zeros(16)}
    assert "conv_1.block.norm.bias and module.conv_1.block.norm.bias are the same tensor" in refuse(
        save(tmp_path / "model.pt", state)
    )


def test_another_network_of_the_family_is_named(tmp_path):
    message = refuse(save(tmp_path / "model.pt", create_model("mobilevitv3_xs_fast").state_dict()))
    assert message.endswith("The file fits create_model('mobilevitv3_xs_fast')")


def test_another_family(tmp_path):
    message = refuse(save(tmp_path / "model.pt", nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).state_dict()))
    assert "No name is known" in message


# Files that are no checkpoints


@pytest.mark.parametrize("file", ["model.pt", "old.pt", "model.safetensors"])
def test_truncated(file, tmp_path):
    whole = tmp_path / file
    if file.endswith("safetensors"):
        save_file(xxs(1).state_dict(), whole)
    else:
        torch.save(xxs(1).state_dict(), whole, _use_new_zipfile_serialization=file == "model.pt")
    data = whole.read_bytes()
    cut = tmp_path / f"cut-{file}"
    draw = random.Random(0)
    for size in (0, 1, 4, 9, 100, *(draw.randrange(len(data)) for _ in range(8)), len(data) - 1):
        cut.write_bytes(data[:size])
        message = refuse(cut)
        assert "empty" in message if size == 0 else re.search("truncated|neither a file of|not of torch.save", message)


def test_damaged(tmp_path):
    path = save(tmp_path / "model.pt", xxs(1).state_dict())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    with open(path, "r+b") as file:
        file.seek(largest.header_offset + 1000)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    assert f"wrong checksum of {largest.filename}" in refuse(path)


def test_foreign_files(tmp_path):
    text, archive, pickled, script = (tmp_path / name for name in ("text.pt", "archive.pt", "pickle.pt", "script.pt"))
    text.write_text("hello, world\n")
    assert "neither a file of torch.save nor of safetensors" in refuse(text)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "no tensors")
    assert "a zip archive, but not of torch.save" in refuse(archive)
    pickled.write_bytes(pickle.dumps({"state_dict": 1}))
    assert "a Python pickle, but not of torch.save" in refuse(pickled)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, its files are still about
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), script)
    assert "TorchScript" in refuse(script)
    (tmp_path / "noise.safetensors").write_bytes(random.Random(0).randbytes(200))
    assert "not of safetensors" in refuse(tmp_path / "noise.safetensors")


def test_no_file(tmp_path):
    assert "No such file" in refuse(tmp_path / "missing.pt")
    assert "directory" in refuse(tmp_path)


@pytest.mark.parametrize(
    "content, reason",
    [
        ({}, "empty dict"),
        ([1], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
        ({"epoch": 3, "state_dict": {}}, r"entries \(2\): epoch \(int\), state_dict \(dict\)"),
        ({"state_dict": {"a": 1}}, "no state dict"),
    ],
)
def test_content_without_weights(content, reason, tmp_path):
    assert re.search(reason, refuse(save(tmp_path / "model.pt", content)))


class Code:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("old_format", [False, True])
def test_code_is_not_run(old_format, tmp_path):
    proof = tmp_path / "proof"
    content = {"state_dict": xxs(1).state_dict(), "hook": Code(f"touch {proof}")}
    torch.save(content, tmp_path / "code.pt", _use_new_zipfile_serialization=not old_format)
    message = refuse(tmp_path / "code.pt")
    assert "system" in message and "run code" in message and "weights_only=False" in message
    (tmp_path / "code.pkl").write_bytes(pickle.dumps(Code(f"touch {proof}")))
    refuse(tmp_path / "code.pkl")
    assert not proof.exists()


def test_python_objects_beside_the_weights(tmp_path):
    model, other = xxs(1), xxs(2)
    path = save(tmp_path / "checkpoint.pt", {"args": argparse.Namespace(lr=0.1), "model": model.state_dict()})
    assert "argparse.Namespace" in refuse(path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        load_checkpoint(other, path)
    assert_same(other.state_dict(), copy(model))


def test_safetensors_is_needed_for_its_files_only(tmp_path, monkeypatch):
    model = xxs(1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    path = save(tmp_path / "model.pt", model.state_dict())
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in refuse(tmp_path / "model.safetensors")
    load_checkpoint(xxs(2), path)


def test_errors_and_report_are_public():
    assert mvit3_kernels.CheckpointError is CheckpointError
    assert issubclass(CheckpointError, RuntimeError)
    assert mvit3_kernels.LoadReport.__dataclass_params__.frozen
