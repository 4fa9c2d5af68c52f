"""Wrong options are refused before any work, with the nearest valid name."""

import subprocess
import sys

import pytest

from mvit3.cli import main
from mvit3.config import DemoConfig, EvaluateConfig, UsageError, options


@pytest.mark.parametrize(("arguments", "message"), [
    (["--modle", "mobilevitv3_xxs"], "no option '--modle'; the nearest is --model"),
    (["--batchsize=32"], "no option '--batchsize=32'; the nearest is --batch-size"),
    (["--epoch", "3"], "no option '--epoch'; the nearest is --epochs"),
    (["digits"], "no option 'digits'"),
    (["--model", "mobilevitv3-xxs"], "the nearest is 'mobilevitv3_xxs'"),
    (["--model", "resnet50"], "--model must be one of mobilevit_s"),
    (["--ops", "fusd"], "--ops must be one of fused, reference, both; got 'fusd', the nearest is 'fused'"),
    (["--data", "digit"], "the nearest is 'digits'"),
    (["--device", "cdua"], "the nearest is 'cuda'"),
    (["--device", "cuda:"], "--device must be auto, cpu, cuda or cuda:N"),
    (["--device", "cuda:99"], "--device cuda:99 does not exist here; there is cpu"),
    (["--epochs", "0"], "--epochs must be at least 1"),
    (["--epochs", "2.5"], "argument --epochs: invalid int value: '2.5'"),
    (["--batch-size", "1"], "--batch-size must be at least 2"),
    (["--batch-size", "5000"], "--batch-size must be at most the number of training images, 1437"),
    (["--limit-train", "5000"], "--limit-train must be at most the number of training images, 1437"),
    (["--lr", "nan"], "--lr must be at least 1e-07 and below 1"),
    (["--lr=-1e-3"], "--lr must be at least 1e-07 and below 1"),
    (["--weight-decay", "inf"], "--weight-decay must be at least 0 and finite"),
    (["--label-smoothing", "1"], "--label-smoothing must be at least 0 and below 1"),
    (["--seed", "-1"], "--seed must be at least 0"),
    (["--threads", "-2"], "--threads must be at least 0"),
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


def test_output_that_cannot_be_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit) as stop:
            main(["train", "--output", str(output)])
        assert stop.value.code == 2
        assert "is not a folder that can be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("arguments", [[], ["evaluate"], ["trian"], ["evaluate", "--checkpoint", "x", "--data", "mnist"]])
def test_commands(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(("command", "config"), [("train", DemoConfig), ("evaluate", EvaluateConfig)])
def test_help_documents_every_option(command, config, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag, _, _, option in options(config):
        assert f"{flag} " in text and option.help in text


def test_configuration_checks_itself():
    with pytest.raises(UsageError, match="--epochs must be at least 1 and finite, got 0"):
        DemoConfig(epochs=0)


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "mvit3", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "train" in done.stdout and "evaluate" in done.stdout
