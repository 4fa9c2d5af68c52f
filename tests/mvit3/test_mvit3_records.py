"""Records that a run keeps: the best checkpoints, Weights & Biases."""

import json
import sys
import types

import pytest

from mvit3 import checkpoint
from mvit3.cli import main
from mvit3.config import RunConfig
from mvit3.options import UsageError

from .conftest import small_arguments


def test_best_checkpoints(tmp_path):
    """As many as were asked for, the best ones, each of its epoch; best.pt is the first of them."""
    assert main(small_arguments(tmp_path, "--quiet", "--schedule.epochs=4", "--run.keep_best=2")) == 0
    history = json.loads((tmp_path / "report.json").read_text())["history"]
    accuracy = {row["epoch"]: row["accuracy" if row["weights"] == "trained" else "ema_accuracy"] for row in history}
    expected = sorted(accuracy, key=lambda epoch: (-accuracy[epoch], epoch))[:2]
    assert sorted(path.name for path in tmp_path.glob("best_*.pt")) == sorted(
        f"best_{epoch:04}.pt" for epoch in expected
    )
    for epoch in expected:
        assert checkpoint.load(tmp_path / f"best_{epoch:04}.pt")["progress"]["epoch"] == epoch
    assert checkpoint.load(tmp_path / "best.pt")["progress"]["epoch"] == expected[0]


def test_weights_and_biases(tmp_path, monkeypatch):
    """Where it is installed it gets losses and rows by the step, and a run that goes on is one run there."""
    seen, started = [], []

    class Run:
        def log(self, values, step):
            seen.append((step, values))

        def finish(self):
            seen.append("finished")

    def init(**settings):
        started.append(settings)
        return Run()

    module = types.ModuleType("wandb")
    module.init, module.__spec__ = init, types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    arguments = small_arguments(tmp_path, "--quiet", "--run.wandb=digits", "--run.log_steps=2")
    assert main([*arguments, "--run.max_steps=4"]) == 0
    assert main(arguments) == 0
    history = json.loads((tmp_path / "report.json").read_text())["history"]
    assert [s["project"] for s in started] == ["digits", "digits"] and started[0]["id"] == started[1]["id"]
    assert started[0]["config"]["data"]["batch_size"] == 16
    rows = [(entry[0], entry[1]["accuracy"]) for entry in seen if entry != "finished" and "accuracy" in entry[1]]
    assert rows == [(row["step"], row["accuracy"]) for row in history]
    losses = [entry[1]["loss"] for entry in seen if entry != "finished" and "loss" in entry[1] and entry[0] > 4]
    # means of two steps each, none left out
    assert sum(losses) / len(losses) == pytest.approx(history[1]["train_loss"])
    assert seen.count("finished") == 2


def test_weights_and_biases_that_cannot_be_reached(tmp_path, monkeypatch, capsys):
    def init(**settings):
        raise ConnectionError("no route to it")

    module = types.ModuleType("wandb")
    module.init, module.__spec__ = init, types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert main(small_arguments(tmp_path, "--quiet", "--run.wandb=digits")) == 1
    said = capsys.readouterr().err
    assert said == "mvit3 train: error: run.wandb digits: Weights & Biases cannot be logged to: no route to it\n"


def test_weights_and_biases_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UsageError, match=r"run\.wandb digits needs Weights & Biases, which is not installed: pip install wandb"
    ):
        RunConfig(wandb="digits")
