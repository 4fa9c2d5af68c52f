"""Going on from a checkpoint: with the same data and classes only, in steps of another size, in another folder."""

import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from mvit3 import checkpoint, trainer
from mvit3.cli import main
from mvit3.config import ScheduleConfig

from .conftest import small_arguments

FOLDER = ("--data.source=folder", "--data.batch_size=4", "--data.eval_batch_size=4", "--data.workers=0",
          "--data.limit_train=0", "--data.limit_val=0", "--schedule.warmup_iterations=0", "--quiet")  # fmt: skip


def images(root, classes="ab", count=8, seed=0):
    """Images of noise in a folder per class."""
    draw = np.random.default_rng(seed)
    for part in ("train", "val"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw.integers(0, 255, (36, 36, 3), np.uint8)).save(root / part / name / f"{i}.png")
    return f"--data={root}"


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run on two classes, and its images."""
    root = tmp_path_factory.mktemp("finished")
    assert main(small_arguments(root / "run", images(root / "images"), *FOLDER)) == 0
    return root


@pytest.mark.parametrize(("classes", "count", "seed", "message"), [
    ("ab", 8, 1, "hold"),
    ("ab", 9, 0, "training images: 16 images were there, 18 are; validation images: 16 images were there, 18 are"),
    ("cd", 8, 0, "with 2 classes (a, b); "),
    ("abc", 8, 0, "has 3 classes (a, b, c)"),
])  # fmt: skip
def test_other_data(finished, tmp_path, capsys, classes, count, seed, message):
    """A folder of a run is not used with other images, whatever their names; both are named."""
    data = images(tmp_path / "other", classes, count, seed)
    before = (finished / "run" / "last.pt").read_bytes()
    said = refused(capsys, *small_arguments(finished / "run", data, *FOLDER))
    assert (
        message in said
        and str(finished / "images") in said
        and str(tmp_path / "other") in said
        and said.count("\n") == 1
    )
    assert (finished / "run" / "last.pt").read_bytes() == before
    if classes != "ab":  # named or not
        resume = f"--run.resume={finished / 'run' / 'last.pt'}"
        assert message in refused(capsys, *small_arguments(tmp_path / "new", data, *FOLDER, resume))
        assert not (tmp_path / "new").exists()


def test_moved_data(finished, tmp_path, capsys):
    """The same images elsewhere are the same images."""
    shutil.copytree(finished / "images", tmp_path / "moved")
    shutil.copytree(finished / "run", tmp_path / "run")
    assert main(small_arguments(tmp_path / "run", f"--data={tmp_path / 'moved'}", *FOLDER)) == 0


def rates(arguments):
    """Steps and learning rates of a run."""
    seen = []
    original = trainer.Trainer._step

    def step(self, batches):
        seen.append((self.progress.step, self.optimizer.param_groups[0]["lr"]))
        return original(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_step", step)
        assert main(arguments) == 0
    return seen


HALF = ("--quiet", "--schedule.epochs=4", "--schedule.warmup_iterations=5", "--run.save_steps=1")


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The checkpoint of a run that was stopped half through its second of four epochs, and its rates."""
    folder = tmp_path_factory.mktemp("half")
    return folder / "last.pt", rates(small_arguments(folder, *HALF, "--run.max_steps=6"))


@pytest.mark.parametrize("change", [("--data.batch_size=32",), ("--data.batch_size=4",), ("--run.accumulate=4",),
                                    ("--data.batch_size=4", "--run.accumulate=2")])  # fmt: skip
def test_steps_of_another_size(half, tmp_path, change):
    """Half of the second epoch is left, whatever the steps are; the warm-up is not begun again and the rate never
    rises."""
    last, before = half
    after = rates(small_arguments(tmp_path / "new", *HALF, f"--run.resume={last}", *change))
    content = checkpoint.load(tmp_path / "new" / "last.pt")
    per_epoch, progress = content["steps_per_epoch"], content["progress"]
    assert per_epoch != 4 and (progress["epoch"], progress["step"]) == (4, 4 * per_epoch)
    assert [step for step, _ in after] == list(range(int(1.5 * per_epoch), 4 * per_epoch))
    assert all(later <= earlier for (_, earlier), (_, later) in pairwise(after))
    assert after[0][1] <= before[-1][1] * 1.001
    # The cosine of the old steps, at the same share of the training.
    old = ScheduleConfig(epochs=4, warmup_iterations=5, warmup_lr=0.001, min_lr=0.0001, update="iteration")
    expected = [
        old.min_lr + (0.003 - old.min_lr) * (1 + np.cos(np.pi * max(step / (4 * per_epoch), 6 / 16))) / 2
        for step, _ in after
    ]
    assert [rate for _, rate in after] == pytest.approx(expected, rel=1e-6)
    # A run that goes on again keeps the schedule's unit.
    assert content["schedule_steps_per_epoch"] == 4


def test_fewer_epochs_than_are_done(half, tmp_path, capsys):
    resume = f"--run.resume={half[0]}"
    said = refused(capsys, *small_arguments(tmp_path / "new", "--quiet", "--schedule.epochs=1", resume))
    assert "schedule.epochs must be at least 2, where the checkpoint" in said


def test_named_checkpoint_in_a_new_folder(finished, tmp_path, capsys):
    """It has the checkpoint and the best one at once; the best of the old folder stays the best until it is beaten."""
    data, last = f"--data={finished / 'images'}", finished / "run" / "last.pt"
    new = tmp_path / "a" / "new"
    assert main(small_arguments(new, data, *FOLDER, f"--run.resume={last}")) == 0
    old = checkpoint.load(last)["progress"]
    best = checkpoint.load(new / "best.pt")["progress"]
    assert (best["epoch"], best["best"]) == (old["best_epoch"], old["best"])
    assert {"last.pt", "report.html", "report.json"} <= {p.name for p in new.iterdir()}
    # Where the best one is lost, the best from here on is kept.
    alone = tmp_path / "alone.pt"
    content = checkpoint.load(last)
    content["progress"] |= {"best": 2.0, "best_epoch": 1}
    torch.save(content, alone)
    assert (
        main(small_arguments(tmp_path / "third", data, *FOLDER[:-1], "--schedule.epochs=3", f"--run.resume={alone}"))
        == 0
    )
    assert "best.pt of epoch 1 is not beside" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "third" / "best.pt")["progress"]["best_epoch"] == 3


def test_pretrained_is_not_needed_again(finished, tmp_path, capsys):
    pretrained = shutil.copyfile(finished / "run" / "best.pt", tmp_path / "begin.pt")
    arguments = small_arguments(
        tmp_path / "run", f"--data={finished / 'images'}", *FOLDER, f"--model.pretrained={pretrained}"
    )
    assert main([*arguments, "--run.max_steps=2"]) == 0
    pretrained.unlink()
    assert main(arguments) == 0
    assert main([*arguments, f"--run.output={tmp_path / 'new'}"]) == 1
    assert "begin.pt: there is no such file" in capsys.readouterr().err


def test_one_class(tmp_path, capsys):
    said = refused(capsys, *small_arguments(tmp_path / "run", images(tmp_path / "images", "a"), *FOLDER))
    assert "a classifier needs two classes" in said and "has one, 'a'" in said


def test_one_value_per_channel(tmp_path, capsys):
    said = refused(capsys, *small_arguments(tmp_path / "run", "--data.batch_size=1", "--quiet"))
    assert "data.batch_size must be at least 2 for images of 32 pixels" in said and not (tmp_path / "run").exists()
