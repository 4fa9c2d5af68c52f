"""`mvit3 export`: files that other programs run."""

import json

import onnx
import onnxruntime
import pytest
import torch

from mvit3 import export
from mvit3.cli import main
from tests.mvit3.test_mvit3_pictures_predict import NAMES, NETWORKS, Saved


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    return {kind: Saved(folder, *NETWORKS[kind]) for kind in ("classes", "boxes")}


def run(capsys, one, *arguments):
    status = main(["export", "--checkpoint", str(one.path), "--json", "--quiet", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, json.loads(printed.out) if status == 0 else printed.err


def images(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(5))


def test_onnx(saved, tmp_path, capsys):
    """Any batch, outputs by name, what a program must know in the metadata."""
    one, target = saved["classes"], tmp_path / "here" / "network.onnx"
    status, told = run(capsys, one, "--to", target)
    assert status == 0 and told["file"] == str(target) and 0 <= told["difference"] <= export.TOLERANCE
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["images"]
    assert [entry.name for entry in session.get_outputs()] == told["outputs"] == ["logits"]
    x = images(5, 3, 64, 64)
    with torch.no_grad():
        want = one.model(x)
    [got] = session.run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=0, atol=1e-5 * want.abs().max().item())
    facts = {entry.key: entry.value for entry in onnx.load(target).metadata_props}
    assert json.loads(facts["classes"]) == one.names and facts["network"] == NETWORKS["classes"][0]
    preprocessing = json.loads(facts["preprocessing"])
    assert preprocessing["channels"] == "bgr" and preprocessing["mean"] == [0.4, 0.5, 0.6]
    assert [path.name for path in target.parent.iterdir()] == ["network.onnx"]


def test_torchscript_of_a_detector_beside_its_checkpoint(saved, tmp_path, capsys):
    """Probabilities and boxes, under the name of the checkpoint."""
    one, path = saved["boxes"], tmp_path / "last.ckpt"
    one.save(path)
    assert main(["export", "--checkpoint", str(path), "--format=torchscript"]) == 0
    printed, facts = capsys.readouterr().out, {export.METADATA: ""}
    traced = torch.jit.load(tmp_path / "last.pt", _extra_files=facts)
    told = json.loads(facts[export.METADATA])
    assert "last.pt" in printed and "ssdlite_mobilevitv3_xxs" in printed
    assert told["sizes"] == "64x64" and told["outputs"] == ["probabilities", "boxes"]
    x = images(5, 3, 64, 64)
    with torch.no_grad():
        for got, want in zip(traced(x), one.model.predict(x), strict=True):
            torch.testing.assert_close(got, want)


def test_open_sizes_and_pytorch(saved, tmp_path, capsys):
    target = tmp_path / "network.pt2"
    status, told = run(capsys, saved["classes"], "--format=torch_export", "--open_size", "--size=128", "--to", target)
    assert status == 0 and told["sizes"].startswith(("any", "multiples"))
    facts = {export.METADATA: ""}
    program = torch.export.load(target, extra_files=facts).module()
    assert json.loads(facts[export.METADATA])["classes"] == NAMES
    with torch.no_grad():
        for shape in ((1, 3, 96, 160), (4, 3, 128, 128)):
            torch.testing.assert_close(program(images(*shape)), saved["classes"].model(images(*shape)))


@pytest.mark.parametrize(
    "kind, arguments, message",
    [
        ("boxes", ["--open_size"], "--open_size: the anchors of a detector"),
        (
            "classes",
            ["--open_size", "--format=torchscript", "--to=x.ts"],
            "--open_size: torchscript records the sizes of one call",
        ),
        ("classes", ["--format=tflite"], "--format must be one of onnx, torch_export, torchscript; got 'tflite'"),
        ("classes", ["--size=16"], "--size must be at least 32, got 16"),
        ("classes", ["--to=."], "--to . is a folder"),
    ],
)
def test_refusals(saved, capsys, kind, arguments, message):
    before = sorted(saved[kind].path.parent.iterdir())
    status = 0
    try:
        status = main(["export", "--checkpoint", str(saved[kind].path), *arguments])
    except SystemExit as stopped:
        status = stopped.code
    assert status and message in capsys.readouterr().err
    assert sorted(saved[kind].path.parent.iterdir()) == before


def test_a_wrong_file_is_not_kept(saved, tmp_path, capsys, monkeypatch):
    """What was written is run, and does not stay where it computes something else."""

    def write(model, form, side, open_size, file, facts):
        file.write_text("a network")
        return "64x64", None

    monkeypatch.setattr(export, "_write", write)
    monkeypatch.setattr(export, "_load", lambda form, file: lambda x: [1.001 * saved["classes"].model(x)])
    status, told = run(capsys, saved["classes"], "--to", tmp_path / "network.onnx")
    assert status == 1 and "differs from mobilevitv3_xxs by 1.0e-03" in told and not list(tmp_path.iterdir())
