"""Mistakes are answered soon, in plain words, with what is valid."""

import subprocess
import sys

import pytest

from mvit3 import names
from mvit3.cli import main


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["trian"],
        ["train", "--help"],
        ["train", "--lr", "1"],
        ["train", "--config", "digts"],
        ["train", "--model.name=mobilevit"],
        ["train", "--sampler.sizes=1"],
        ["train", "--data=nowhere"],
        ["evaluate", "--checkpoint=nowhere"],
        ["train", "--config=digits", "--print_config"],
    ],
)
def test_help_and_mistakes_do_not_wait_for_libraries(arguments, tmp_path):
    """They take seconds to load. Counting modules is not a matter of how busy the machine is."""
    code = f"import sys\nfrom mvit3.cli import main\ntry: main({arguments})\nexcept SystemExit: pass\n"
    libraries = ("torch", "timm", "torchvision", "torchmetrics", "mvit3_kernels", "sklearn")
    code += f"print([name for name in {libraries} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_names_are_those_of_the_libraries():
    from timm.optim import list_optimizers

    import mvit3_kernels

    assert list(names.NETWORKS) == mvit3_kernels.list_models("*")
    for task in ("classification", "segmentation", "detection"):
        assert [name for name in names.NETWORKS if names.task_of(name) == task] == mvit3_kernels.list_models(task=task)
    assert set(names.OPTIMIZERS) <= set(list_optimizers())


def refused(arguments, capsys, monkeypatch, folder):
    """The one line that these arguments are answered with, and the exit status."""
    monkeypatch.chdir(folder)
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and list(folder.iterdir()) == []
    for word in ("int,", "tuple", "float", "bool", "None", "<class", "Errno", "Traceback"):
        assert word not in captured.err
    return status, captured.err


@pytest.mark.parametrize(("arguments", "message"), [
    (["--lrs", "1"], "there is no option '--lrs'; the nearest is --optimizer.lr "),
    (["--batch-sizes=64"], "there is no option '--batch-sizes'; the nearest is --data.batch_size "),
    (["--epoch", "3"], "the nearest is --schedule.epochs "),
    (["--momentums", "0.9"], "the nearest are --optimizer.momentum and --ema.momentum "),
    (["--ema.momentun", "0.9"], "the nearest is --ema.momentum "),
    (["--optimizer.epochs", "3"], "the nearest is --schedule.epochs "),
    (["--quite"], "the nearest is --quiet "),
    (["-x", "64"], "there is no option '-x'"),
    (["--layer-decay", "0.8"], "timm's --layer-decay is not to be had here: timm's goes from block to block"),
    (["--sampler.sizes", "160,192"], "sampler.sizes must be a list of whole numbers such as [160,192], got '160,192'"),
    (["--sampler.sizes", "160", "192"],
     "sampler.sizes must be a list of whole numbers such as [160,192], got '160 192'"),
    (["--optimizer.betas", "0.9"], "optimizer.betas must be a list of numbers such as [0.9,0.999], got '0.9'"),
    (["--optimizer.betas=[0.9]"], "write them as [0.9,0.999]"),
    (["--data.mean=[0.5]"], "write them as [0.5,0.5,0.5]"),
    (["--optimizer.lr="], "optimizer.lr must be a number, got ''"),
    (["--optimizer.lr=-inf"], "optimizer.lr must be a number, got '-inf'"),
    (["--optimizer.lr"], "--optimizer.lr: expected one argument, a number"),
    (["--run.deterministic", "maybe"], "run.deterministic must be true or false, got 'maybe'"),
    (["--model.num_classes", "ten"], "model.num_classes must be a whole number or null, got 'ten'"),
    (["--optimizer.name", "adamww"], "optimizer.name must be one of 101 names; got 'adamww', the nearest is 'adamw'"),
    (["digits"], "'digits' is no option; a recipe is chosen with --config digits"),
    (["--quiet=yes"], "--quiet takes no value, got 'yes'"),
    (["--json", "yes"], "'yes' after --json is no option; options begin with --"),
    ([], "data.root must name the folder of the images for data.source folder: --data FOLDER"),
    (["--data", "nowhere"], "--data nowhere: there is no such folder"),
    (["--data.root", "nowhere"], "--data nowhere: there is no such folder"),
])  # fmt: skip
def test_mistakes_are_answered_in_plain_words(arguments, message, capsys, monkeypatch, tmp_path):
    status, said = refused(["train", *arguments], capsys, monkeypatch, tmp_path)
    assert message in said and said.startswith("mvit3 train: error: ") and status == (1 if "nowhere" in said else 2)


@pytest.mark.parametrize(("arguments", "message"), [
    (["evaluate"], "--checkpoint must be given"),
    (["evaluate", "--checkpoint", "nowhere.pt"], "--checkpoint nowhere.pt: there is no such file"),
    (["evaluate", "--checkpoint", "nowhere.pt", "--config", "digits"],
     "--checkpoint nowhere.pt: there is no such file"),
    (["evaluate", "--checkpoint", "x", "--weights", "best"], "--weights must be one of auto, ema, raw; got 'best'"),
    (["predict", "--checkpoint", "x"], "images must be given"),
    (["predict", "--checkpoint", "x", "y.png", "--top", "five"], "--top must be a whole number, got 'five'"),
])  # fmt: skip
def test_mistakes_with_a_checkpoint(arguments, message, capsys, monkeypatch, tmp_path):
    assert message in refused(arguments, capsys, monkeypatch, tmp_path)[1]


def test_file_that_is_no_checkpoint(tmp_path, capsys):
    path = tmp_path / "notes.pt"
    for content in (b"some words", b"PK\x03\x04 and no more", b""):
        path.write_bytes(content)
        assert main(["evaluate", "--checkpoint", str(path)]) == 1
        said = capsys.readouterr().err
        told = f"{path} is truncated, or no checkpoint; a checkpoint of another origin needs --config"
        assert said.splitlines()[-1].startswith(f"mvit3 evaluate: error: {told}")


@pytest.mark.parametrize("name", ["train", "evaluate", "predict"])
def test_help_is_in_plain_words(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"usage: mvit3 {name} ") and "[--config RECIPE] [--section.key VALUE ...]" in text
    for word in ("type:", "None", "True", "False", "tuple", "==SUPPRESS=="):
        assert word not in text
    assert (
        "(a list of numbers such as [0,0,0]; default: [0,0,0])" in text
        and "(a whole number or null; default: null)" in text
    )


def test_folder_without_the_parts_is_named_with_what_it_holds(tmp_path, capsys):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
    assert main(["train", "--data", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"--data {tmp_path} has no folder 'train', which --data.train names; it has cats, dogs" in said
    assert main(["train", "--data", str(tmp_path / "cats")]) == 1
    assert "it has no folders" in capsys.readouterr().err


def test_list_may_be_written_with_spaces(capsys):
    assert main(["train", "--sampler.sizes", "[160,", "192]", "--print_config"]) == 0
    assert "sizes:\n  - 160\n  - 192\n" in capsys.readouterr().out


def test_what_takes_time_is_said(tmp_path):
    """A line before PyTorch is loaded, one before folders are searched, each at once; none with --quiet."""
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
    arguments = [sys.executable, "-m", "mvit3", "train", "--data", str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    first, second, third = done.stderr.splitlines()[:3]
    assert (first, second) == ("loading PyTorch", f"looking for images in {tmp_path}") and third.startswith(
        "mvit3 train: error: "
    )
