"""The right weights and the right figures: which average, which of two sets of weights, which classes, which images."""

import json
import math

import pytest
import torch
import yaml
from timm.data import ImageNetInfo
from timm.utils.model_ema import ModelEmaV3
from torch import nn

import mvit3_kernels
from mvit3 import checkpoint, recipes, trainer
from mvit3.cli import main
from mvit3.ema import Ema
from mvit3.tasks import evaluate
from mvit3.tasks.classification import Accuracy

from .conftest import small_arguments, small_config
from .test_mvit3_resume import images


@pytest.mark.parametrize("warmup", [True, False])
def test_average_is_timms(warmup):
    """With the warm-up each step's average is timm's; without, the published one, which timm has from its second step
    on."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    initial = model.weight.detach().clone()
    ours, timms = Ema(model, 0.01, warmup), ModelEmaV3(model, decay=0.99, use_warmup=warmup)
    decays = []
    for step in range(1, 41):
        with torch.no_grad():
            model.weight += torch.randn_like(model.weight)
        decays.append(timms.get_decay(step))
        assert ours.share == pytest.approx(1 - decays[-1], rel=1e-6) or (not warmup and step == 1)
        ours.update()
        timms.update(model, step)
        if warmup:
            torch.testing.assert_close(ours.module.weight, timms.module.weight)
    # How much of the first weights is left, by the same updates of a network that is 0 after them.
    ones = nn.Linear(1, 1, bias=False)
    nn.init.ones_(ones.weight)
    left = Ema(ones, 0.01, warmup)
    nn.init.zeros_(ones.weight)
    for _ in range(40):
        left.update()
    assert float(left.module.weight) == pytest.approx(left.initial_share(40), abs=1e-7)
    assert left.initial_share(40) == (0 if warmup else pytest.approx(0.99**40)) and initial is not None


@pytest.mark.parametrize("name", recipes.names())
def test_published_recipes_average_as_published(name):
    ema = yaml.safe_load(recipes.path(name).read_text()).get("ema", {})
    unpublished = name == "finetune" or name.startswith("digits_")
    assert unpublished or not ema.get("enabled") or ema["warmup"] is False


def test_better_weights_are_used(tmp_path, capsys):
    """Without a warm-up the average of a short run is its beginning: the trained weights are judged, kept, named,
    evaluated and used."""
    options = ("--ema.momentum=1e-4", "--ema.warmup=false", "--schedule.epochs=6", "--data.limit_train=256",
               "--data.limit_val=60", "--optimizer.lr=0.004")  # fmt: skip
    assert main(small_arguments(tmp_path, *options, "--json")) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    last = result["history"][-1]
    assert last["accuracy"] > last["ema_accuracy"] + 0.2
    assert (
        result["weights"] == last["weights"] == result["best_weights"] == "trained"
        and result["accuracy"] == last["accuracy"]
    )
    assert result["best_accuracy"] == max(row["accuracy"] for row in result["history"])
    steps = result["steps"]
    assert last["ema_initial_share"] == pytest.approx((1 - 1e-4) ** steps)
    assert "of the average are still initial weights" in captured.err
    assert checkpoint.load(tmp_path / "best.pt")["weights"] == "trained"
    assert main(["evaluate", f"--checkpoint={tmp_path / 'best.pt'}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == result["best_accuracy"] and found["weights"] == "trained" and found["reproduced"]
    # What a training starts from, and what the library loads.
    state = checkpoint.load(tmp_path / "best.pt")["state_dict"]
    model = mvit3_kernels.create_model("mobilevitv3_xxs", 10)
    assert mvit3_kernels.load_checkpoint(model, tmp_path / "best.pt").entry == "state_dict"
    begun = trainer.build_model(small_config(model={"pretrained": str(tmp_path / "best.pt")}), 10, torch.device("cpu"))
    for network in (model, begun):
        assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())


class Outputs(nn.Module):
    """Right for every image but for NaN in some."""

    def __init__(self, bad):
        super().__init__()
        self.bad = bad

    def forward(self, images):
        logits = 10 * nn.functional.one_hot(images[:, 0, 0, 0].long(), 3).float()
        logits[self.bad] = math.nan
        return logits


@pytest.mark.parametrize("bad", [[], [0], [0, 1, 2, 3, 4, 5]])
def test_outputs_that_are_not_finite_are_misses(bad):
    """Class 0 too, which is where a NaN would be found as the largest."""
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    pictures = labels.view(6, 1, 1, 1).float().expand(6, 3, 4, 4)
    cpu = torch.device("cpu")
    found = evaluate(Outputs(bad), iter([(pictures, labels)]), small_config().run, Accuracy(3, cpu), cpu)
    hits, loss = 6 - len(bad), found.values["val_loss"]
    assert (found.values["correct"], found.values["accuracy5"] * 6, found.total, found.not_finite) == (
        hits, hits, 6, len(bad)
    )  # fmt: skip
    assert loss is None if len(bad) == 6 else math.isfinite(loss)
    assert sum(map(sum, found.kept["confusion"])) == hits


def test_such_weights_are_never_the_best(tmp_path, capsys, monkeypatch):
    original = trainer.evaluate

    def spoilt(model, *args):
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "classifier" in name).fill_(math.nan)
        return original(model, *args)

    monkeypatch.setattr(trainer, "evaluate", spoilt)
    assert main(small_arguments(tmp_path, "--schedule.epochs=1")) == 0
    said = capsys.readouterr().err
    assert (
        "the trained weights give no finite output for 40 of 40 validation images" in said and "average weights" in said
    )
    assert not (tmp_path / "best.pt").exists() and checkpoint.load(tmp_path / "last.pt")["progress"]["best_epoch"] == 0
    assert main(["evaluate", f"--checkpoint={tmp_path / 'last.pt'}"]) == 1
    captured = capsys.readouterr()
    assert "output is not finite for 40 of 40 images" in captured.err and "%" not in captured.out


def test_command_line_wins_over_files(tmp_path, capsys):
    """In any order, for every option; and a folder that is named is what is read."""
    options = ["--run.output=mine", "--optimizer.lr", "0.5", "--data", "pictures", "--schedule.epochs", "7"]
    orders = (
        ["--config", "digits", *options],
        [*options, "--config", "digits"],
        [*options[:3], "--config=digits", *options[3:]],
    )
    printed = []
    for arguments in orders:
        assert main(["train", *arguments, "--print_config"]) == 0
        printed.append(yaml.safe_load(capsys.readouterr().out))
    config = printed[0]
    assert (config["run"]["output"], config["optimizer"]["lr"], config["schedule"]["epochs"]) == ("mine", 0.5, 7)
    assert (config["data"]["source"], config["data"]["root"]) == ("folder", "pictures")
    assert printed[1:] == printed[:1] * 2
    assert main(["train", "--data=digits", "--config=mobilevitv3_s", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["source"] == "digits"


def test_other_data_are_evaluated_whole(tmp_path, capsys):
    """The training's data.limit_val is not theirs, and its accuracy is not what they should repeat."""
    data = images(tmp_path / "images")
    options = (
        "--data.source=folder",
        "--data.limit_train=0",
        "--data.limit_val=6",
        "--data.batch_size=4",
        "--schedule.epochs=1",
    )
    assert main(small_arguments(tmp_path / "run", data, *options, "--quiet")) == 0
    evaluation = ["evaluate", f"--checkpoint={tmp_path / 'run' / 'last.pt'}", "--json"]
    assert main(evaluation) == 0
    capsys.readouterr()
    assert main([*evaluation, images(tmp_path / "other", seed=3)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["total"], found["recorded_accuracy"]) == (16, None)


def test_some_classes_of_imagenet(tmp_path, capsys):
    """A network of 1000 classes is judged by the synsets that the folders are named by; other names are refused."""
    synsets = ImageNetInfo("imagenet-1k").label_names()
    chosen = [synsets[i] for i in (7, 300, 999)]
    torch.manual_seed(0)
    model = mvit3_kernels.create_model("mobilevitv3_xxs", 1000)
    for parameter in model.classifier.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        # the answer to everything
        next(p for name, p in model.classifier.named_parameters() if name.endswith("bias"))[300] = 1.0
    torch.save(model.state_dict(), tmp_path / "published.pt")
    evaluation = ["evaluate", f"--checkpoint={tmp_path / 'published.pt'}", "--config=mobilevitv3_xxs",
                  "--data.resize=40", "--data.crop=32", "--data.workers=0", "--json"]  # fmt: skip
    assert main([*evaluation, images(tmp_path / "named", chosen, 4)]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["correct"], found["total"]) == (4, 12)
    assert "has no folder for 997 of 1000 classes" in captured.err
    assert main([*evaluation, images(tmp_path / "others", ["cat", "dog"], 4)]) == 1
    said = capsys.readouterr().err
    assert "has 1000 classes and does not tell their names" in said and "has 2 (cat, dog)" in said and "synsets" in said
