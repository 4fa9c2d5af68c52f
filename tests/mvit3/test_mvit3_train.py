"""`mvit3 train`, `evaluate` and `predict` from end to end, on a few digits."""

import copy
import csv
import json
import re

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import mvit3_kernels
from mvit3 import checkpoint
from mvit3.cli import main
from mvit3.config import LossConfig, OptimizerConfig
from mvit3.data import evaluation_transform, loaders
from mvit3.distributed import World
from mvit3.errors import Stopped
from mvit3.loss import Criterion
from mvit3.optimizer import build_optimizer
from mvit3.options import UsageError
from mvit3.runtime import usable_cores
from mvit3.trainer import Trainer

from ..replay import FakeRecorder
from .conftest import process, small_arguments, small_config

CPU = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder and the JSON output of a small run."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    running = process(*small_arguments(folder, "--json", "--run.tensorboard=true", "--run.save_epochs=1"))
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    return folder, json.loads(out), err


def trainer(**changes):
    config = small_config(**changes)
    return Trainer(config, loaders(config, seed=config.run.seed), CPU)


def test_output(trained):
    folder, result, said = trained
    files = {p.name for p in folder.iterdir()}
    assert files == {"last.pt", "previous.pt", "best.pt", "epoch_0001.pt", "epoch_0002.pt", "history.csv",
                     "report.json", "report.html", "tensorboard"}  # fmt: skip
    assert json.loads((folder / "report.json").read_text()) == result
    assert (result["epochs"], result["steps"], result["effective_batch"], result["finished"]) == (2, 8, 16, True)
    assert [row["epoch"] for row in result["history"]] == [1, 2]
    last = result["history"][-1]
    assert last["ema_accuracy"] == last["ema_correct"] / 40 and last["total"] == 40
    assert result["accuracy"] == max(last["accuracy"], last["ema_accuracy"])
    assert last["accuracy"] <= last["accuracy5"] <= 1 and 0 <= last["data_wait"] < 1
    assert last["lr"] == pytest.approx(
        1e-4 + (3e-3 - 1e-4) * (1 + torch.cos(torch.tensor(7 / 8 * torch.pi)).item()) / 2
    )
    assert result["backend"].startswith("cpu ")
    with open(folder / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train_loss"]) for row in rows] == [row["train_loss"] for row in result["history"]]
    assert list((folder / "tensorboard").iterdir())
    for text in (
        "16 images x 1 process x 1 batches = 16 images per step; learning rate 0.003",
        "img/s",
        "lr ",
        "loss ",
        "waiting for data",
    ):
        assert text in said
    assert len(re.findall(r"^epoch +\d/2  loss", said, re.MULTILINE)) == 2


def test_report_stands_alone(trained):
    folder, result, _ = trained
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 5 and "Which class is taken for which" in page  # four charts and the confusion matrix
    assert not re.search(r'(src|href)="(?!#|data:)', page) and "<script" not in page
    assert f"{result['history'][-1]['ema_accuracy']:.2%}" in page


@pytest.mark.parametrize(("weights", "key"), [("auto", None), ("ema", "ema_"), ("raw", "")])
def test_evaluate_repeats_the_accuracy(trained, weights, key, capsys):
    """Of the weights that were asked for, or that were the better ones and are named in the file."""
    folder, result, _ = trained
    for name, row in (("epoch_0001.pt", 0), ("last.pt", 1)):
        assert main(["evaluate", "--checkpoint", str(folder / name), "--weights", weights, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        recorded = result["history"][row]
        if weights == "auto":
            key = (
                "ema_"
                if (recorded["ema_correct"], -recorded["ema_val_loss"]) > (recorded["correct"], -recorded["val_loss"])
                else ""
            )
            assert found["weights"] == recorded["weights"] == ("average" if key else "trained")
        assert found["reproduced"] and found["recorded_accuracy"] == found["accuracy"] == recorded[f"{key}accuracy"]
        assert (found["val_loss"], found["correct"]) == (recorded[f"{key}val_loss"], recorded[f"{key}correct"])


def test_evaluate_table_and_other_data(trained, capsys):
    folder, result, _ = trained
    arguments = ["evaluate", "--checkpoint", str(folder / "last.pt"), "--data", "digits"]
    assert main([*arguments, "--run.ops", "reference"]) == 0
    out = capsys.readouterr().out
    assert (
        f"{max(result['history'][-1][key] for key in ('correct', 'ema_correct'))}/40" in out
        and "reference ops served by reference" in out
    )
    assert main([*arguments, "--data.limit_val=0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] == 360
    assert (
        main(
            [
                "evaluate",
                "--checkpoint",
                str(folder / "last.pt"),
                "--data.source=folder",
                "--data",
                str(folder / "nowhere"),
            ]
        )
        == 1
    )
    assert "nowhere" in capsys.readouterr().err


def test_evaluate_official_file(trained, tmp_path, capsys):
    """A plain state dict, as the releases publish them, with the recipe that it was trained with."""
    folder, result, _ = trained
    content = checkpoint.load(folder / "last.pt")
    path = tmp_path / "checkpoint_ema_best.pt"
    torch.save(content["ema_state_dict"], path)
    options = ["--config", "digits", "--data.limit_val=40", "--data.resize=32", "--data.crop=32"]
    assert main(["evaluate", "--checkpoint", str(path), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["correct"] == result["history"][-1]["ema_correct"] and found["recorded_accuracy"] is None
    with pytest.raises(SystemExit):
        main(["evaluate", "--checkpoint", str(folder / "last.pt"), "--config", "digts"])


def test_predict(trained, tmp_path, capsys):
    folder, _, _ = trained
    from sklearn import datasets

    pixels = datasets.load_digits().images[3]
    (tmp_path / "images").mkdir()
    Image.fromarray((pixels * 15.9).astype("uint8")).resize((64, 64), Image.BICUBIC).save(
        tmp_path / "images" / "three.png"
    )
    (tmp_path / "images" / "torn.png").write_bytes(b"no image")
    arguments = ["predict", "--checkpoint", str(folder / "last.pt"), "--dtype=float32"]
    assert main([*arguments, str(tmp_path / "images"), "--json"]) == 0
    three, torn = json.loads(capsys.readouterr().out)
    assert torn["error"].startswith("cannot be read")
    content = checkpoint.load(folder / "last.pt")
    model = mvit3_kernels.create_model("mobilevitv3_xxs", 10).eval()
    model.load_state_dict(content[checkpoint.ENTRIES[content["weights"]]])
    config = small_config()
    with torch.no_grad():
        expected = model(evaluation_transform(config)(tmp_path / "images" / "three.png")[None])[0].softmax(0)
    assert [guess["index"] for guess in three["classes"]] == expected.topk(5).indices.tolist()
    assert [guess["probability"] for guess in three["classes"]] == pytest.approx(
        expected.topk(5).values.tolist(), rel=1e-4
    )
    assert main([*arguments, str(tmp_path / "images" / "three.png"), "--top=2"]) == 0
    out = capsys.readouterr().out
    assert out.count("%") == 2 and str(three["classes"][0]["name"]) in out
    assert main([*arguments, str(tmp_path / "images" / "torn.png")]) == 1
    assert main([*arguments, str(tmp_path / "nowhere")]) == 1
    assert "there is no such file" in capsys.readouterr().err


def test_two_processes(tmp_path, capsys):
    """Under torchrun, with half the batch: as many steps, and one process repeats the accuracy."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mvit3")
    arguments = small_arguments(tmp_path, "--data.batch_size=8", "--run.threads=1", "--json", "--schedule.epochs=1")
    out, err = (running := process(*arguments, launcher=launcher)).communicate(timeout=300)
    assert running.returncode == 0, err
    result = json.loads(out)
    assert (result["processes"], result["effective_batch"], result["steps"]) == (2, 16, 4)
    assert "8 images x 2 processes x 1 batches = 16 images per step" in err
    assert result["history"][-1]["total"] == 40
    assert main(["evaluate", "--checkpoint", str(tmp_path / "last.pt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    loss = result["history"][-1][{"trained": "val_loss", "average": "ema_val_loss"}[result["weights"]]]
    assert found["accuracy"] == result["accuracy"] and found["val_loss"] == pytest.approx(loss, rel=1e-5)


def test_step_against_plain_pytorch():
    """Accumulation, smoothing, clipping and the update of two batches, written out."""
    plain = {"name": "momentum", "lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "clip_grad": 0.3}
    changes = {
        "model": {"drop_rate": 0.0, "proj_drop_rate": 0.0},
        "optimizer": plain,
        "data": {"batch_size": 8},
        "schedule": {"warmup_iterations": 0, "update": "epoch"},
        "run": {"accumulate": 2, "max_steps": 1},
    }
    ours = trainer(**changes)
    assert ours.steps_per_epoch == 4 and ours.effective_batch == 16
    model = copy.deepcopy(ours.model).train()
    batches = list(ours.loaders.train.epoch(0))[:2]
    loss = sum(F.cross_entropy(model(images), labels, label_smoothing=0.1) for images, labels in batches) / 2
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert norm > 0.3
    expected = {name: p - 0.5 * p.grad * (0.3 / norm) for name, p in model.named_parameters()}
    with pytest.raises(Stopped):
        ours.train_epoch()
    assert ours.last_loss == pytest.approx(float(loss), rel=1e-5)
    for name, p in ours.model.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-4, atol=1e-5)


def test_fused_agrees_with_reference():
    """The first step sees the same weights and the same batch; later steps drift by rounding only."""
    losses = {}
    for ops in ("reference", "fused"):
        one, seen = trainer(run={"ops": ops, "log_steps": 1, "max_steps": 3}), []
        one.listener.on_loss = lambda trainer, loss, lr, seen=seen: seen.append(loss)
        with pytest.raises(Stopped):
            one.train_epoch()
        losses[ops] = seen
    assert losses["fused"][0] == pytest.approx(losses["reference"][0], rel=1e-5)
    assert losses["fused"] == pytest.approx(losses["reference"], rel=2e-2)


def test_step_as_a_graph():
    """What a recorded step computes, and its place in the loop; the recorder plays the part of CUDA graphs."""
    changes = {"model": {"drop_rate": 0.0, "proj_drop_rate": 0.0}, "run": {"ops": "reference"},
               "optimizer": {"name": "momentum", "lr": 0.1, "clip_grad": 1.0}}  # fmt: skip
    plain, graphed = trainer(**changes), trainer(**changes)
    graphed._wrap()
    recorder = FakeRecorder()
    graphed._graph = mvit3_kernels.cuda_graph_step(
        graphed.network, graphed.criterion, graphed.optimizer, max_norm=1.0, warmup=1, recorder=recorder
    )
    for one in (plain, graphed):
        one.train_epoch()
    assert (recorder.records, recorder.replays) == (1, 3)
    assert graphed.progress.loss_sum == pytest.approx(plain.progress.loss_sum, rel=1e-5)
    for name, tensor in plain.ema.module.state_dict().items():
        torch.testing.assert_close(graphed.ema.module.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    again = trainer(**changes)
    again.load(graphed.content())  # a checkpoint of graphed steps, in a run without
    again.progress.epoch, again.progress.batch = 1, 0
    again.train_epoch()
    assert again.progress.step == 8


def test_seed_decides_everything():
    """Dropout and mixing included."""

    def losses(seed):
        one, seen = (
            trainer(run={"seed": seed, "log_steps": 1, "max_steps": 2}, loss={"mixup_alpha": 0.2, "cutmix_alpha": 1.0}),
            [],
        )
        one.listener.on_loss = lambda trainer, loss, lr: seen.append(loss)
        with pytest.raises(Stopped):
            one.train_epoch()
        return seen

    first = losses(3)
    torch.rand(5)  # what else draws from torch's generator does not matter
    assert losses(3) == first and losses(4)[0] != first[0]


def test_mixed_targets():
    """Weights of two images in the picture are those in the target, with smoothing; an odd one out stays as it is."""
    criterion = Criterion(LossConfig(mixup_alpha=0.2, label_smoothing=0.1), 5)
    labels = torch.tensor([0, 1, 2, 3, 4])
    images = F.one_hot(labels, 5).float().view(5, 5, 1, 1).repeat(1, 1, 4, 4)  # each image says its label
    mixed, targets = criterion.mix(images.clone(), labels)
    torch.testing.assert_close(targets, 0.9 * mixed[:, :, 0, 0] + 0.1 / 5)
    assert torch.equal(mixed[4], images[4]) and 0 < mixed[0, 0, 0, 0] < 1
    logits = torch.randn(5, 5)
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(criterion(logits, targets), expected)


def test_optimizer():
    """Norms and biases do not decay where the recipe says so; the update is one fused call; eps and betas arrive."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    options = {"lr": 0.1, "weight_decay": 0.05, "betas": (0.8, 0.9), "eps": 1e-6}
    optimizer = build_optimizer(model, OptimizerConfig(**options, no_decay_1d=True), factor=2.0)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [0.05, 0, 0, 0]
    for group in optimizer.param_groups:
        assert group["fused"] and (group["lr"], group["betas"], group["eps"]) == (0.2, (0.8, 0.9), 1e-6)
    optimizer = build_optimizer(model, OptimizerConfig(**options, no_decay_1d=False))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.05}
    assert isinstance(build_optimizer(model, OptimizerConfig(name="lamb")), torch.optim.Optimizer)


@pytest.mark.parametrize(("changes", "message"), [
    ({"run": {"accumulate": 5}}, "run.accumulate must be at most the batches of an epoch, 4, got 5"),
    ({"model": {"num_classes": 9}}, "model.num_classes must be at least 10"),
])  # fmt: skip
def test_what_the_data_does_not_allow(changes, message):
    with pytest.raises(UsageError, match=message):
        trainer(**changes)


def test_pretrained(trained, tmp_path):
    """Training starts from the weights of a checkpoint, the averaged ones where these are its better ones."""
    folder, _, _ = trained
    content = checkpoint.load(folder / "last.pt")
    weights = content[checkpoint.ENTRIES[content["weights"]]]
    ours = trainer(model={"pretrained": str(folder / "last.pt"), "num_classes": 12, "drop_head": True})
    state = ours.model.state_dict()
    same = [name for name in state if torch.equal(state[name], weights.get(name, torch.empty(0)))]
    assert set(state) - set(same) == {"classifier.fc.weight", "classifier.fc.bias"}


def test_demo(tmp_path, capsys):
    # Without dropout: that of PyTorch's modules draws other numbers.
    same = ["--schedule.warmup_epochs=0", "--model.drop_rate=0", "--model.proj_drop_rate=0"]
    assert main(["demo", *small_arguments(tmp_path)[1:], *same]) == 0
    captured = capsys.readouterr()
    assert {p.name for p in tmp_path.iterdir()} == {"curves.png", "report.json", "reference", "stock", "fused"}
    result = json.loads((tmp_path / "report.json").read_text())
    reference, stock, fused = (result["runs"][ops] for ops in ("reference", "stock", "fused"))
    for run in (stock, fused):
        assert len(run["losses"]) == 8 and run["losses"] == pytest.approx(reference["losses"], rel=5e-2)
        assert run["images_per_second"] == pytest.approx(16 / run["step_seconds"])
    for ops, other in (("reference", reference), ("stock", stock)):
        ratio = fused["images_per_second"] / other["images_per_second"]
        assert result["speed_ratio"][ops] == pytest.approx(ratio) and f"fused / {ops} = {ratio:.2f}" in captured.out
    assert "which is faster here" in stock["backend"] and "img/s" in captured.err
    assert main(["evaluate", "--checkpoint", fused["checkpoint"], "--quiet"]) == 0
    assert f"{fused['correct']}/40" in capsys.readouterr().out


def test_threads():
    import os

    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
