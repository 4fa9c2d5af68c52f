"""Runs that are killed, stopped or fed with rubbish: each failure is provoked, nothing is lost, and the message says
what happened."""

import dataclasses
import math
import signal
import time

import pytest
import torch
from PIL import Image

from mvit3 import checkpoint, commands
from mvit3.cli import main
from mvit3.data import loaders

from .conftest import process, small_arguments

LONG = (
    "--schedule.epochs=4",
    "--run.save_steps=1",
    "--optimizer.clip_grad=1.0",
    "--loss.mixup_alpha=0.2",
    "--loss.cutmix_alpha=1.0",
)


def wait_for(path, running, seconds=120):
    """Until the run has written a checkpoint."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)


def equal(a, b):
    """Whether two checkpoints hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_killed_and_stopped_run_ends_as_an_uninterrupted_one(tmp_path):
    """SIGTERM finishes the step, saves and exits 0; SIGKILL at any moment loses the steps since the last checkpoint and
    nothing else."""
    folder, last = tmp_path / "broken", tmp_path / "broken" / "last.pt"
    running = process(*small_arguments(folder, *LONG))
    wait_for(last, running)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 0, err
    assert "stopped before the end; the same command goes on from here" in out
    before = checkpoint.load(last)["progress"]["step"]
    assert 1 <= before < 16

    last.unlink()  # so that the next one to appear is the next process's; the one before it is as good
    running = process(*small_arguments(folder, *LONG))
    wait_for(last, running)
    running.kill()
    assert running.wait(60) == -signal.SIGKILL
    middle = checkpoint.latest(folder, print)["progress"]["step"]
    assert before <= middle < 16

    assert main(small_arguments(folder, *LONG, "--quiet")) == 0
    assert main(small_arguments(tmp_path / "whole", *LONG, "--quiet")) == 0
    broken, whole = checkpoint.load(last), checkpoint.load(tmp_path / "whole" / "last.pt")
    assert broken["progress"]["step"] == whole["progress"]["step"] == 16
    for part in ("state_dict", "ema_state_dict", "optimizer"):
        assert equal(broken[part], whole[part]), part
    for row, other in zip(broken["progress"]["history"], whole["progress"]["history"], strict=True):
        timing = ("seconds", "images_per_second", "data_wait")
        assert {k: v for k, v in row.items() if k not in timing} == {k: v for k, v in other.items() if k not in timing}
    assert not list(folder.glob(".*"))


class Poisoned:
    """A training loader whose images are NaN in some steps of each epoch."""

    def __init__(self, loader, steps):
        self.loader, self.steps = loader, steps

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self):
        return len(self.loader)

    def epoch(self, epoch, start_batch=0):
        for i, (images, labels) in enumerate(self.loader.epoch(epoch, start_batch), start_batch):
            yield (images * math.nan if i in self.steps and epoch == 1 else images), labels


@pytest.fixture
def poison(monkeypatch):
    """Makes images of the second epoch NaN in these steps."""

    def apply(*steps):
        def poisoned(*args, **kwargs):
            made = loaders(*args, **kwargs)
            return dataclasses.replace(made, train=Poisoned(made.train, steps))

        monkeypatch.setattr(commands, "loaders", poisoned)

    return apply


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_bad_step_is_skipped_and_counted(tmp_path, capsys, poison, amp):
    poison(1)
    assert main(small_arguments(tmp_path, f"--run.amp={amp}", "--run.deterministic=false")) == 0
    captured = capsys.readouterr()
    content = checkpoint.load(tmp_path / "last.pt")
    skipped = content["progress"]["skipped"]
    assert skipped == 1 or (amp == "fp16" and skipped < 6)  # where the first scales of the loss are too large
    assert f"step 6: the gradient is not finite, 1 step skipped ({skipped} so far)" in captured.err
    assert f"{skipped} steps skipped, whose gradient was not finite" in captured.out
    assert content["progress"]["step"] == 8
    for part in ("state_dict", "ema_state_dict"):
        assert all(t.isfinite().all() for t in content[part].values())
    assert math.isfinite(content["progress"]["history"][-1]["train_loss"])
    if amp == "fp16":
        assert content["scaler"]["scale"] == 65536 / 2**skipped


def test_bad_step_changes_no_weight(tmp_path, poison):
    poison(0, 1, 2, 3)
    assert main(small_arguments(tmp_path, "--run.save_epochs=1", "--quiet")) == 0
    first, second = (checkpoint.load(tmp_path / f"epoch_000{i}.pt") for i in (1, 2))
    for name, tensor in first["state_dict"].items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, second["state_dict"][name]), name
    assert second["progress"]["skipped"] == 4


def test_lasting_nan_stops_the_run(tmp_path, capsys, poison):
    poison(1, 2, 3)
    assert main(small_arguments(tmp_path, "--run.max_bad_steps=2", "--quiet")) == 1
    message = capsys.readouterr().err
    assert "was not finite in 2 steps in a row, up to step 7 of 8; try a lower optimizer.lr" in message
    assert f"the last good checkpoint is {tmp_path / 'last.pt'}" in message
    content = checkpoint.load(tmp_path / "last.pt")
    assert content["progress"]["epoch"] == 1 and all(t.isfinite().all() for t in content["state_dict"].values())


def test_stopped_while_evaluating(tmp_path, monkeypatch):
    """The epoch's steps are not done again: what is missing is its evaluation."""
    from mvit3 import trainer

    original, calls = trainer.evaluate, []

    def interrupted(*args):
        calls.append(len(calls))
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(trainer, "evaluate", interrupted)
    assert main(small_arguments(tmp_path, "--quiet")) == 0
    progress = checkpoint.load(tmp_path / "last.pt")["progress"]
    assert (progress["epoch"], progress["batch"], progress["step"], progress["history"]) == (0, 4, 4, [])
    assert main(small_arguments(tmp_path, "--quiet")) == 0
    progress = checkpoint.load(tmp_path / "last.pt")["progress"]
    assert progress["step"] == 8 and [row["epoch"] for row in progress["history"]] == [1, 2]


def test_class_folder_missing_on_validation(tmp_path, capsys):
    for part, classes in (("train", "abc"), ("val", "ac")):
        for name in classes:
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (40, 36), (80 * ord(name) % 256, 20 * i, 0)).save(tmp_path / part / name / f"{i}.jpg")
    options = (
        "--data.source=folder",
        f"--data.root={tmp_path}",
        "--data.batch_size=4",
        "--data.workers=0",
        "--data.limit_train=0",
    )
    assert main(small_arguments(tmp_path / "run", *options, "--schedule.epochs=1")) == 0
    assert "val has no folder for class 'b'; no image of this class is seen there" in capsys.readouterr().err
    assert main(["evaluate", f"--checkpoint={tmp_path / 'run' / 'last.pt'}", "--json"]) == 0
    captured = capsys.readouterr()
    assert "no folder for class 'b'" in captured.err and '"total": 8' in captured.out

    (tmp_path / "val" / "d").mkdir()
    assert main(small_arguments(tmp_path / "other", *options, "--quiet")) == 1
    assert "val/d is a class that training does not know" in capsys.readouterr().err
