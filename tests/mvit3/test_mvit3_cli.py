"""Wrong options are refused before any work, with the nearest valid name."""

import subprocess
import sys

import pytest
import torch
import yaml

from mvit3 import recipes
from mvit3.cli import COMMANDS, main
from mvit3.config import RunConfig, TrainConfig, section_options
from mvit3.options import UsageError

from .conftest import small_arguments


@pytest.mark.parametrize(("arguments", "message"), [
    (["--modle.name", "mobilevitv3_xxs"], "there is no option '--modle.name'; the nearest is --model.name"),
    (["--data.batchsize=32"], "there is no option '--data.batchsize'; the nearest is --data.batch_size"),
    (["--schedule.epoch", "3"], "there is no option '--schedule.epoch'; the nearest is --schedule.epochs"),
    (["digits"], "digits"),
    (["--model.name", "mobilevitv3-xxs"], "the nearest is 'mobilevitv3_xxs'"),
    (["--model.name", "resnet50"], "model.name must be one of 80 names; got 'resnet50'"),
    (["--run.ops", "fusd"], "run.ops must be one of fused, reference; got 'fusd', the nearest is 'fused'"),
    (["--data.source", "digit"], "the nearest is 'digits'"),
    (["--optimizer.name", "adamww"], "the nearest is 'adamw'"),
    (["--run.device", "cdua"], "the nearest is 'cuda'"),
    (["--run.device", "cuda:"], "run.device must be auto, cpu, cuda or cuda:N"),
    (["--run.device", "cuda:99"], "run.device cuda:99 does not exist here; there is cpu"),
    (["--schedule.epochs", "0"], "schedule.epochs must be at least 1"),
    (["--schedule.epochs", "2.5"], "schedule.epochs must be a whole number, got '2.5'"),
    (["--schedule.warmup_epochs=1", "--schedule.warmup_iterations=1"], "exclude each other"),
    (["--optimizer.lr", ".nan"], "optimizer.lr must be at least 0 and below 100"),
    (["--optimizer.lr"], "--optimizer.lr: expected one argument"),
    (["--optimizer.betas=[0.9]"], "optimizer.betas must be two numbers, got [0.9]"),
    (["--loss.label_smoothing", "1"], "loss.label_smoothing must be at least 0 and below 1"),
    (["--run.seed", "-1"], "run.seed must be at least 0"),
    (["--run.amp", "int8"], "run.amp must be one of none, bf16, fp16, auto"),
    (["--sampler.sizes", "[160,x]"], "sampler.sizes must be a list of whole numbers such as [160,192], got 'x'"),
    (["--config", "mobilevit3_s"], "there is no recipe 'mobilevit3_s', the nearest is 'mobilevitv3_s'"),
    (["--config", "nothing.yaml"], "--config nothing.yaml cannot be read: No such file or directory"),
    (["--config", "digits", "--data.batch_size", "5000"],
     "data.batch_size must be at most the number of training images, 1437"),
    (["--data.root", ""], "data.root must name the folder of the images"),
])  # fmt: skip
def test_refused_before_any_work(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("mvit3 train: error: ") and captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="they are possible here")
@pytest.mark.parametrize("option", ["cuda_graph", "sync_bn"])
def test_options_that_need_a_gpu(option):
    with pytest.raises(UsageError, match=f"run.{option} needs a GPU"):
        RunConfig(**{option: True})


@pytest.mark.parametrize(("text", "message"), [
    ("optimizer: {lrr: 1}", "there is no option 'optimizer.lrr'; the nearest is 'optimizer.lr'"),
    ("optimiser: {lr: 1}", "there is no section 'optimiser'; the nearest is 'optimizer'"),
    ("optimizer: 3", "optimizer must map options to values, got 3"),
    ("- 1", "a configuration maps sections"),
    ("optimizer: {lr: fast}", "optimizer.lr must be a number, got 'fast'"),
    ("optimizer: {lr: -1}", "optimizer.lr must be at least 0"),
    ("optimizer: {", "is not YAML"),
])  # fmt: skip
def test_wrong_file(tmp_path, capsys, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(path)])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and message in captured.err and captured.err.count("\n") == 1


def test_files_then_command_line(tmp_path, capsys):
    """Later ones win; what is printed can be read back and is the same."""
    (tmp_path / "own.yaml").write_text("optimizer: {lr: 1e-4, weight_decay: 0.2}\nsampler: {sizes: []}")
    arguments = [
        "train",
        "--config=mobilevitv3_s",
        f"--config={tmp_path / 'own.yaml'}",
        "--optimizer.lr",
        "5e-4",
        "--data",
        "images",
    ]
    assert main([*arguments, "--print_config"]) == 0
    printed = capsys.readouterr().out
    config = TrainConfig.from_dict(yaml.safe_load(printed))
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.sampler.sizes) == (5e-4, 0.2, ())
    assert config.data.colors == "bgr" and config.data.root == "images"
    (tmp_path / "printed.yaml").write_text(printed)
    assert main(["train", "--config", str(tmp_path / "printed.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_are_found_by_name(name, capsys):
    assert main(["train", "--config", name, "--print_config"]) == 0
    printed, written = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(recipes.path(name).read_text())
    assert all(printed[section][key] == value for section, values in written.items() for key, value in values.items())


def test_output_that_cannot_be_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit) as stop:
            main(small_arguments(output))
        assert stop.value.code == 2
        assert "is not a folder that can be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "a command is needed: train, finetune, evaluate, predict, export, models, bench, report, demo"),
    (["trian"], "the nearest is train"),
    (["evaluate"], "checkpoint"),
    (["predict", "--checkpoint", "x"], "images"),
    (["evaluate", "--checkpoint", "x", "--weights", "best"], "best"),
])  # fmt: skip
def test_commands(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and message in captured.err and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_documents_every_option(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = "".join(capsys.readouterr().out.split())
    for section, key, _, _, option in section_options():
        shown = section in COMMANDS[name].sections
        assert (f"--{section}.{key}" in text) == shown
        assert not shown or "".join(option.help.split()) in text
    for flag in (*COMMANDS[name].extra, "--quiet", "--json"):
        assert flag in text
    for flag in ("--config", "--print_config"):
        assert (flag in text) == bool(COMMANDS[name].sections)


@pytest.mark.parametrize("arguments", [["models", "--run.amp=bf16"], ["report", "r.json", "--batch", "3"],
                                       ["report", "r.json", "--amp"]])  # fmt: skip
def test_commands_without_a_configuration(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "there is no option" in said
    assert not any(f"--{section}." in said.partition("nearest")[2] for section in COMMANDS["train"].sections)


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "mvit3", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and all(name in done.stdout for name in (*COMMANDS, *recipes.names()))
