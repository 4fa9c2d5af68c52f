"""`mvit3 evaluate` and `mvit3 predict` as a person sees them."""

import csv
import io
import json
import re

import pytest
from PIL import Image

from mvit3.cli import main
from mvit3.report import class_rows
from mvit3.screen import table
from mvit3_kernels import _native
from mvit3_kernels.inference import bfloat16_why_not


def test_evaluate_by_class(run, capsys):
    arguments = ["evaluate", "--checkpoint", str(run.folder / "last.pt")]
    assert main([*arguments, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["class"] for row in rows] == [*"0123456789", "all"]
    for row, expected in zip(rows, run.result["classes"], strict=False):
        assert (int(row["images"]), int(row["correct"])) == (expected["images"], expected["correct"])
    assert float(rows[-1]["accuracy"]) == run.result["accuracy"]
    assert main([*arguments, "--per_class"]) == 0
    captured = capsys.readouterr()
    assert table(class_rows(run.result["classes"])) in captured.out
    told = f"{run.result['weights']} weights of {run.folder / 'last.pt'}, mobilevitv3_xxs, on 40 validation images of "
    assert f"{told}digits" in captured.out
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--csv", "--json"])
    assert stop.value.code == 2 and "--json and --csv exclude each other" in capsys.readouterr().err


def test_evaluate_names_weights_data_images_and_what_was_skipped(run, tmp_path, capsys):
    for name in "0123456789":
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "val" / name / "a.png")
    (tmp_path / "val" / "3" / "torn.png").write_bytes(b"no image")
    last = str(run.folder / "last.pt")
    arguments = ["evaluate", "--checkpoint", last, "--weights=raw", "--data", str(tmp_path), "--data.max_corrupt=0.5"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    told = f"trained weights of {last}, mobilevitv3_xxs, on 10 validation images of {tmp_path}"
    assert f"{told}, 1 image skipped as unreadable" in captured.out
    assert "torn.png" in captured.err
    assert main([*arguments, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.count("\n") == 3


@pytest.mark.parametrize("command", [["evaluate"], ["predict", "x.png"]])
def test_checkpoint_of_another_network(run, command, capsys):
    """What differs first, and how much does, in plain words."""
    last = str(run.folder / "last.pt")
    assert main([*command, "--checkpoint", last, "--model.name=mobilevitv3_xs"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        f"{last} does not fit mobilevitv3_xs: layer_1.0.block.exp_1x1.block.conv.weight is 32x16x1x1 there and "
        "64x16x1x1 in the" in said
    )
    assert re.search(r"\(\d+ differ in all\)", said) and "state_dict" not in said and "torch.Size" not in said


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, level in (("a.png", 10), ("b.png", 200)):
        Image.new("RGB", (40, 40), (level, level, level)).save(folder / name)
    (folder / "torn.png").write_bytes(b"no image")
    (folder / "._a.png").write_bytes(b"of another system")
    return folder


def test_predict_goes_on_after_what_cannot_be_read(run, pictures, capsys):
    """A file that was named counts; a stranger in a folder is said."""
    arguments = ["predict", "--checkpoint", str(run.folder / "last.pt"), "--json"]
    missing = str(pictures / "missing.png")
    assert main([*arguments, missing, str(pictures / "a.png"), str(pictures)]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [image["image"].rpartition("/")[2] for image in found] == [
        "missing.png",
        "a.png",
        "a.png",
        "b.png",
        "torn.png",
    ]
    assert [image.get("error", "")[:22] for image in found] == [
        "there is no such file",
        "",
        "",
        "",
        "cannot be read: cannot",
    ]
    assert ("2 of 5 images could not be read" in captured.err and "5/5" in captured.err) or "1/5" in captured.err
    assert main([*arguments, str(pictures)]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 3 and "1 of 3 images could not be read" in captured.err
    assert main([*arguments, str(pictures), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_predict_says_what_its_program_multiplies(run, pictures, capsys, dtype):
    arguments = ["predict", "--checkpoint", str(run.folder / "last.pt"), str(pictures / "a.png"), "--json"]
    reason, told = bfloat16_why_not(), "the network runs as one program, in"
    if dtype == "bfloat16" and reason is not None:
        with pytest.raises(SystemExit):
            main([*arguments, f"--dtype={dtype}"])
        assert f"--dtype {reason}; auto takes float32 here" in capsys.readouterr().err
        return
    assert main([*arguments, f"--dtype={dtype}"]) == 0
    captured = capsys.readouterr()
    exact = dtype == "float32" or reason is not None or (not _native.prefers_bfloat16() and dtype == "auto")
    assert f"{told} {'float32' if exact else 'bfloat16'}" in captured.err
    (found,) = json.loads(captured.out)
    assert main([*arguments, "--run.ops=reference"]) == 0
    captured = capsys.readouterr()
    (plain,) = json.loads(captured.out)
    assert told not in captured.err
    scores = [{row["index"]: row["probability"] for row in image["classes"]} for image in (found, plain)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5 if exact else 2e-2)
    assert exact or scores[0] != pytest.approx(scores[1], abs=1e-7)


def test_predict_multiplies_nothing_apart_from_a_program(run, pictures, capsys):
    arguments = ["predict", "--checkpoint", str(run.folder / "last.pt"), str(pictures), "--dtype=float32"]
    for setting, got in (("--run.ops=reference", "cpu, reference, none"), ("--run.amp=bf16", "cpu, fused, bf16")):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, setting])
        assert stop.value.code == 2
        assert f"--run.ops fused and --run.amp none; got {got}" in capsys.readouterr().err


def test_predict_as_csv_and_as_a_table(run, pictures, capsys):
    arguments = ["predict", "--checkpoint", str(run.folder / "last.pt"), str(pictures), "--top=2"]
    assert main([*arguments, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["place"], bool(row["error"])) for row in rows] == [("1", False), ("2", False)] * 2 + [("", True)]
    assert main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("image ") and len(out) == 7
    assert len({line.index("%") for line in out if "%" in line}) == 1
    assert f"{float(rows[0]['probability']):.2%}" in out[2]


def test_predict_writes_as_it_goes(run, pictures, capsys, monkeypatch):
    """What was found before an interruption is there, and is whole."""
    from mvit3 import prediction

    monkeypatch.setattr(prediction, "BATCH", 1)
    read, opened = prediction.evaluation_transform, []

    def transform(config):
        whole = read(config)

        def one(path):
            opened.append(path)
            if len(opened) == 2:
                raise KeyboardInterrupt
            return whole(path)

        one.decoder = whole.decoder
        return one

    monkeypatch.setattr(prediction, "evaluation_transform", transform)
    assert main(["predict", "--checkpoint", str(run.folder / "last.pt"), str(pictures), "--json"]) == 130
    assert [image["image"].rpartition("/")[2] for image in json.loads(capsys.readouterr().out)] == ["a.png"]


def test_predict_takes_class_names_from_a_side_file(run, pictures, tmp_path, capsys):
    side = tmp_path / "classes.txt"
    side.write_text("".join(f"digit {i}\n" for i in range(10)))
    arguments = [
        "predict",
        "--checkpoint",
        str(run.folder / "last.pt"),
        str(pictures / "a.png"),
        "--json",
        "--data.class_map",
        str(side),
    ]
    assert main(arguments) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert all(guess["name"] == f"digit {guess['index']}" for guess in found["classes"])
    side.write_text("one\ntwo\n")
    assert main(arguments) == 1
    assert "names 2 classes, the network has 10" in capsys.readouterr().err


def test_top_is_refused_before_the_checkpoint_is_read(capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--checkpoint", __file__, "x.png", "--top", "0", "--config", "digits"])
    assert "--top must be at least 1, got 0" in capsys.readouterr().err


def test_predict_finds_files_by_wildcards(run, pictures, capsys):
    """Where no shell has done it; without a match it is said. An empty name is not the present folder."""
    arguments = ["predict", "--checkpoint", str(run.folder / "last.pt"), "--json", "--quiet"]
    assert main([*arguments, str(pictures / "[ab].p*")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [image["image"] for image in found] == [str(pictures / "a.png"), str(pictures / "b.png")]
    (pictures / "[x].png").write_bytes((pictures / "a.png").read_bytes())
    assert main([*arguments, str(pictures / "[x].png"), str(pictures / "*.jpg")]) == 1
    captured = capsys.readouterr()
    assert [image.get("error") for image in json.loads(captured.out)] == [None, "no file matches"]
    assert f"1 of 2 images could not be read: {pictures / '*.jpg'}: no file matches" in captured.err
    with pytest.raises(SystemExit):
        main([*arguments, ""])
    assert "the name of an image is empty" in capsys.readouterr().err


def test_names_with_control_characters_keep_to_their_line(run, pictures, capsys):
    """In tables and messages; CSV quotes them."""
    image = pictures / "new\nline, tab\t.png"
    (pictures / "a.png").rename(image)
    arguments = ["predict", "--checkpoint", str(run.folder / "last.pt"), "--top=1", str(image), str(pictures / "x\n")]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 4 and "new\\nline, tab\\t.png" in captured.out and "\t" not in captured.out
    assert captured.err.splitlines()[-1].endswith("x\\n: there is no such file")
    assert main([*arguments, "--csv"]) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["image"] for row in rows] == [str(image), str(pictures / "x\n")]


def test_a_folder_is_no_checkpoint(run, tmp_path, capsys):
    for folder, said in (
        (run.folder, f"is a folder; its checkpoint is {run.folder / 'best.pt'}"),
        (tmp_path, "is a folder"),
    ):
        for command in (["evaluate"], ["predict", "x.png"], ["finetune"]):
            assert main([*command, "--checkpoint", str(folder)]) == 1
            assert capsys.readouterr().err.endswith(f"error: --checkpoint {folder} {said}\n")
