"""What a person sees: how soon, in which words, and that it is the truth."""

import subprocess
import sys

import pytest

from mvit3 import names
from mvit3.cli import main
from mvit3.config import section_options


@pytest.mark.parametrize("arguments", [["--help"], ["trian"], ["train", "--help"], ["train", "--lr", "1"], ["train", "--config", "digts"],
                                       ["train", "--model.name=mobilevit"], ["train", "--sampler.sizes=1"], ["train", "--data=nowhere"],
                                       ["evaluate", "--checkpoint=nowhere"], ["train", "--config=digits", "--print_config"]])  # fmt: skip
def test_help_and_mistakes_do_not_wait_for_libraries(arguments, tmp_path):
    """They take seconds to load. Counting modules is not a matter of how busy the machine is."""
    code = f"import sys\nfrom mvit3.cli import main\ntry: main({arguments})\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'timm', 'torchvision', 'torchmetrics', 'mvit3_kernels', 'sklearn') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_names_are_those_of_the_libraries():
    from timm.optim import list_optimizers

    import mvit3_kernels

    assert list(names.NETWORKS) == mvit3_kernels.list_models()
    assert set(names.OPTIMIZERS) <= set(list_optimizers())
    assert set(names.TIMM.values()) <= {f"{section}.{key}" for section, key, *_ in section_options()}


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
    (["--lr", "1"], "there is no option '--lr'; the nearest is --optimizer.lr "),
    (["--batch-size=64"], "there is no option '--batch-size'; the nearest is --data.batch_size "),
    (["--epochs", "3"], "the nearest is --schedule.epochs "),
    (["--momentum", "0.9"], "the nearest are --optimizer.momentum and --ema.momentum "),
    (["--ema.momentun", "0.9"], "the nearest is --ema.momentum "),
    (["--optimizer.epochs", "3"], "the nearest is --schedule.epochs "),
    (["--quite"], "the nearest is --quiet "),
    (["-b", "64"], "there is no option '-b'; timm's -b is --data.batch_size here"),
    (["--opt", "adamw"], "timm's --opt is --optimizer.name here"),
    (["--sampler.sizes", "160,192"], "sampler.sizes must be a list of whole numbers such as [160,192], got '160,192'"),
    (["--sampler.sizes", "160", "192"], "sampler.sizes must be a list of whole numbers such as [160,192], got '160 192'"),
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
    (["evaluate", "--checkpoint", "nowhere.pt", "--config", "digits"], "--checkpoint nowhere.pt: there is no such file"),
    (["evaluate", "--checkpoint", "x", "--weights", "best"], "--weights must be one of auto, ema, raw; got 'best'"),
    (["predict", "--checkpoint", "x"], "images must be given"),
    (["predict", "--checkpoint", "x", "y.png", "--top", "five"], "--top must be a whole number, got 'five'"),
])  # fmt: skip
def test_mistakes_with_a_checkpoint(arguments, message, capsys, monkeypatch, tmp_path):
    assert message in refused(arguments, capsys, monkeypatch, tmp_path)[1]


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
