"""`mvit3 train` and `mvit3 evaluate` from end to end, on a few digits."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import matplotlib.image
import pytest
import torch

from mvit3 import checkpoint, data, engine
from mvit3.cli import main
from mvit3.config import DemoConfig, UsageError
from mvit3.engine import usable_cores

SMALL = ["--epochs", "1", "--limit-train", "128", "--batch-size", "32", "--warmup-epochs", "0.5"]


@pytest.fixture(scope="module")
def digits():
    return data.load_digits()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder and the JSON output of a small run with both kinds of ops, in a process of its own."""
    output = tmp_path_factory.mktemp("runs") / "digits"
    command = [sys.executable, "-m", "mvit3", "train", *SMALL, "--output", str(output), "--json", "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "img/s" in done.stderr
    return output, json.loads(done.stdout)


def train_runs(digits, **options):
    """Runs of one epoch of three small steps."""
    config = DemoConfig(limit_train=48, batch_size=16, epochs=1, warmup_epochs=0.5, **options)
    runs = engine.start(config, replace(digits, val=digits.val.take(32)))
    engine.train(runs, lambda run: None, lambda runs: None)
    return runs


def test_output(trained):
    output, result = trained
    assert sorted(p.name for p in output.iterdir()) == ["curves.png", "fused.pt", "reference.pt", "report.json"]
    assert json.loads((output / "report.json").read_text()) == result
    assert list(result["runs"]) == ["reference", "fused"]
    for run in result["runs"].values():
        assert len(run["losses"]) == 4
        assert run["accuracy"] == run["correct"] / run["total"] == run["accuracies"][-1]
        assert run["total"] == 360
        assert run["images_per_second"] == pytest.approx(32 / run["step_seconds"])
    assert result["runs"]["reference"]["backend"] == "reference"
    height, width, _ = matplotlib.image.imread(output / "curves.png").shape
    assert height > 300 and width > 900


def test_fused_agrees_with_reference(trained):
    """The first step sees the same weights and the same batch; later steps drift by rounding only."""
    _, result = trained
    reference, fused = (result["runs"][ops]["losses"] for ops in ("reference", "fused"))
    assert fused[0] == pytest.approx(reference[0], rel=1e-5)
    assert fused == pytest.approx(reference, rel=2e-2)


@pytest.mark.parametrize("ops", ["reference", "fused"])
def test_evaluate_reproduces_the_accuracy(trained, ops, capsys):
    output, result = trained
    assert main(["evaluate", "--checkpoint", str(output / f"{ops}.pt"), "--data", "digits", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ops"] == ops
    assert found["accuracy"] == found["recorded_accuracy"] == result["runs"][ops]["accuracy"]
    assert found["reproduced"]


def test_evaluate_table(trained, capsys):
    output, result = trained
    assert main(["evaluate", "--checkpoint", str(output / "fused.pt"), "--ops", "reference"]) == 0
    out = capsys.readouterr().out
    assert f"{result['runs']['fused']['correct']}/360" in out
    assert "The recorded accuracy is reproduced." in out


def test_checkpoint_content(trained):
    output, _ = trained
    content = torch.load(output / "fused.pt", weights_only=True)
    assert {key: type(content[key]) for key in ("model", "num_classes", "epoch", "accuracy")} == {
        "model": str, "num_classes": int, "epoch": int, "accuracy": float}  # fmt: skip
    assert (content["model"], content["num_classes"], content["epoch"]) == ("mobilevitv3_xxs", 10, 1)
    assert content["config"]["ops"] == "fused" and content["config"]["limit_train"] == 128
    model = checkpoint.build_model(output / "fused.pt", content)
    assert all(torch.equal(a, content["state_dict"][name]) for name, a in model.state_dict().items())


def test_quiet_table(tmp_path, capsys):
    output = str(tmp_path / "runs")
    assert main(["train", *SMALL, "--ops", "fused", "--limit-train", "32", "--quiet", "--output", output]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for text in ("val accuracy", "img/s", "fused ops served by", "curves.png", "fused.pt", "/360"):
        assert text in captured.out
    assert "reference.pt" not in captured.out


def test_same_seed_same_losses(digits):
    """Dropout included, and whether a run trains alone or takes turns with another."""
    together = train_runs(digits, proj_drop_rate=0.1, drop_rate=0.1, seed=3)
    for run in together:
        (alone,) = train_runs(digits, ops=run.ops, proj_drop_rate=0.1, drop_rate=0.1, seed=3)
        assert alone.history.losses == run.history.losses
        assert alone.history.evaluations == run.history.evaluations
    (other,) = train_runs(digits, ops="fused", proj_drop_rate=0.1, drop_rate=0.1, seed=4)
    assert other.history.losses[0] != together[1].history.losses[0]


def test_diverging_loss_is_an_error(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "learning_rate", lambda *args: math.inf)
    assert main(["train", *SMALL, "--ops", "reference", "--quiet", "--output", str(tmp_path)]) == 1
    assert "the loss of the reference run is nan at step 2 of 4; try a lower --lr" in capsys.readouterr().err


def test_learning_rate():
    """Against values worked out by hand: warm-up over 4 of 13 steps to 0.8, then half a cosine down to a hundredth of it."""
    rates = [engine.learning_rate(step, 13, 4, 0.8) for step in range(13)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == pytest.approx(0.8)
    assert rates[8] == pytest.approx(0.8 * (0.01 + 0.99 / 2))
    assert rates[12] == pytest.approx(0.008)
    assert engine.learning_rate(0, 1, 0, 0.5) == 0.5


def test_weight_decay_spares_norms_and_biases(digits):
    (run,) = engine.start(DemoConfig(ops="reference", limit_train=64), digits)
    decayed, others = run.optimizer.param_groups
    assert decayed["weight_decay"] == 0.05 and others["weight_decay"] == 0
    assert {p.ndim for p in others["params"]} == {1} and min(p.ndim for p in decayed["params"]) == 2
    assert len(decayed["params"]) + len(others["params"]) == len(list(run.model.parameters()))


def test_digits(digits):
    assert (len(digits.train), len(digits.val), digits.num_classes) == (1437, 360, 10)
    images = digits.train.images
    assert images.shape == (1437, 3, 64, 64) and images.is_contiguous(memory_format=torch.channels_last)
    assert images.min() == 0 and images.max() == 1 and torch.equal(images[:, 0], images[:, 2])
    for split in (digits.train, digits.val):  # stratified: each class within one image of its share
        share = torch.bincount(digits.train.labels).add(torch.bincount(digits.val.labels)) * len(split) / 1797
        assert (torch.bincount(split.labels) - share).abs().max() <= 1
    again = data.load_digits()
    assert torch.equal(again.val.images, digits.val.images) and torch.equal(again.train.labels, digits.train.labels)
    seen = {image.numpy().tobytes() for image in digits.train.images}
    assert not any(image.numpy().tobytes() in seen for image in digits.val.images)


def test_batches(digits):
    split = digits.train.take(100)
    batches = list(data.train_batches(split, 32, 7))
    assert [images.shape[0] for images, _ in batches] == [32, 32, 32]
    assert all(
        torch.equal(a, b) for one, two in zip(batches, data.train_batches(split, 32, 7), strict=True) for a, b in zip(one, two, strict=True)
    )
    assert not torch.equal(batches[0][0], next(data.train_batches(split, 32, 8))[0])
    assert all(images.min() >= 0 and images.max() <= 1 + 1e-6 for images, _ in batches)


def test_augment_without_randomness_is_the_identity(digits, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, 0.5))
    images = digits.train.images[:4]
    torch.testing.assert_close(data.augment(images, torch.Generator()), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"), [({"limit_train": 9999}, "--limit-train .* 1437"), ({"limit_train": 32}, "--batch-size .* 32")]
)
def test_more_images_than_there_are(digits, options, message):
    with pytest.raises(UsageError, match=message):
        engine.start(DemoConfig(**options), digits)


def test_threads():
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
