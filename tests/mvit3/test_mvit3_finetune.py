"""`mvit3 finetune` and `mvit3 models`."""

import json

import pytest
import torch
import yaml
from PIL import Image

import mvit3_kernels
from mvit3 import checkpoint, recipes
from mvit3.cli import main
from mvit3.config import TrainConfig
from mvit3.data import load_digits, loaders
from mvit3.distributed import World
from mvit3.listing import describe
from mvit3.options import UsageError
from mvit3.trainer import Trainer
from tests.golden import MODELS

from .conftest import small_config


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint of three steps on digits of 32x32 in ten classes."""
    folder = tmp_path_factory.mktemp("start")
    changes = {"data": {"colors": "bgr", "mean": [0.1, 0.1, 0.1]}, "run": {"output": str(folder), "max_steps": 3}}
    config = small_config(model={"attn_drop_rate": 0.05}, augment={"zoom": 0.1}, **changes)
    Trainer(config, loaders(config), World(torch.device("cpu"))).fit()
    return folder / "last.pt"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Digits below 5 as files: 12 of each for training, 4 for validation."""
    root, digits = tmp_path_factory.mktemp("five"), load_digits()
    for part, count in (("train", 12), ("val", 4)):
        write(root, part, getattr(digits, part), count)
    return root


def write(root, part, split, count):
    """The first so many images of each class as PNG files."""
    for label in range(5):
        folder = root / part / f"digit_{label}"
        folder.mkdir(parents=True)
        for number, image in enumerate(split.images[split.labels == label][:count]):
            pixels = image.permute(1, 2, 0).mul(255).round().byte().numpy()
            Image.fromarray(pixels).save(folder / f"{number:03}.png")


def published(name):
    """What a recipe's file says."""
    return yaml.safe_load(recipes.path(name).read_text())


def printed(capsys, *arguments):
    assert main(["finetune", *map(str, arguments), "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_where_values_come_from(start, images, capsys, tmp_path):
    """Network and images of the checkpoint, the rest of the recipe finetune; files and options of the user over
    them."""
    found = printed(capsys, "--checkpoint", start, "--data", images)
    then, recipe = checkpoint.load(start)["config"], published("finetune")
    assert found["model"] == then["model"] | {"pretrained": str(start), "drop_head": True}
    for key in ("resize", "crop", "colors", "mean", "interpolation", "antialias"):
        assert found["data"][key] == then["data"][key]
    assert (found["data"]["source"], found["data"]["root"], found["data"]["limit_train"]) == ("folder", str(images), 0)
    assert found["augment"] == then["augment"] and found["sampler"]["size"] == 32 and found["sampler"]["sizes"] == []
    for section in ("optimizer", "schedule", "loss"):
        assert {key: found[section][key] for key in recipe[section]} == recipe[section]
    assert found["ema"] == {"enabled": True, "momentum": 5e-4, "warmup": True}
    (tmp_path / "own.yaml").write_text("optimizer: {lr: 0.5, layer_decay: 0.9}\naugment: {flip: 0.25}")
    own = printed(
        capsys, "--checkpoint", start, "--data", images, "--config", tmp_path / "own.yaml", "--optimizer.lr=0.25"
    )
    assert (own["optimizer"]["lr"], own["optimizer"]["layer_decay"], own["augment"]["flip"]) == (0.25, 0.9, 0.25)
    assert own["model"] == found["model"]


def test_weights_of_another_origin(images, capsys, tmp_path):
    """A plain state dict and a recipe's name: network and images of the recipe, optimiser and schedule of finetune."""
    torch.save(mvit3_kernels.create_model("mobilevitv3_050", 3).state_dict(), tmp_path / "plain.pt")
    found = printed(capsys, "--checkpoint", tmp_path / "plain.pt", "--config", "mobilevitv3_050", "--data", images)
    network, recipe = published("mobilevitv3_050"), published("finetune")
    assert found["model"]["name"] == "mobilevitv3_050" and found["model"]["pretrained"] == str(tmp_path / "plain.pt")
    assert (
        found["data"]["interpolation"] == "bicubic"
        and found["augment"]["rand_augment"] == 2
        and found["data"]["batch_size"] == 32
    )
    assert found["schedule"]["epochs"] == recipe["schedule"]["epochs"] != network["schedule"]["epochs"]
    assert (
        found["loss"]["mixup_alpha"] == 0
        and found["ema"] == recipe["ema"]
        and found["run"]["output"] == "runs/finetune"
    )
    assert found["optimizer"] == found["optimizer"] | recipe["optimizer"]
    assert main(["finetune", "--checkpoint", str(tmp_path / "plain.pt"), "--data", str(images)]) == 1
    assert "a checkpoint of another origin needs --config with its recipe" in capsys.readouterr().err
    assert main(["finetune", "--checkpoint", str(tmp_path / "nowhere.pt"), "--data", str(images)]) == 1
    assert "nowhere.pt: there is no such file" in capsys.readouterr().err


def test_finetune(start, images, capsys, tmp_path):
    """From ten classes to five: the backbone is the checkpoint's, the classifier fresh; `evaluate` repeats what is
    recorded."""
    arguments = [
        "--data",
        str(images),
        "--run.output",
        str(tmp_path),
        "--schedule.epochs=2",
        "--data.batch_size=20",
        "--data.workers=0",
    ]
    assert (
        main(
            [
                "finetune",
                "--checkpoint",
                str(start),
                *arguments,
                "--json",
                "--run.threads",
                str(torch.get_num_threads()),
            ]
        )
        == 0
    )
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["num_classes"], result["epochs"], result["steps"]) == (
        5,
        2,
        6,
    ) and "fresh weights" not in captured.err
    content = checkpoint.load(tmp_path / "best.pt")
    assert content["class_names"] == [f"digit_{i}" for i in range(5)]
    assert main(["evaluate", "--checkpoint", str(tmp_path / "best.pt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["accuracy"]
        == result["best_accuracy"]
        == max(row[key] for row in result["history"] for key in ("accuracy", "ema_accuracy"))
    )
    config = TrainConfig.from_dict(content["config"])
    fresh = Trainer(config, loaders(config), World(torch.device("cpu"))).model.state_dict()
    began = checkpoint.load(start)
    began = began[checkpoint.ENTRIES[checkpoint.better_weights(began)]]
    same = {name for name in fresh if fresh[name].shape == began[name].shape and torch.equal(fresh[name], began[name])}
    assert set(fresh) - same == {"classifier.fc.weight", "classifier.fc.bias"}


def test_without_a_checkpoint_it_is_said(images, capsys, tmp_path):
    options = [
        "--config",
        "mobilevitv3_xxs",
        "--data",
        str(images),
        "--run.output",
        str(tmp_path),
        "--sampler.size=32",
        "--data.resize=32",
    ]
    options += [
        "--data.crop=32",
        "--run.max_steps=1",
        "--data.workers=0",
        "--run.threads",
        str(torch.get_num_threads()),
    ]
    assert main(["finetune", *options]) == 0
    assert "no --checkpoint is given: the network starts from fresh weights" in capsys.readouterr().err


@pytest.mark.slow
def test_digits_to_five_classes(capsys, tmp_path):
    """A network of the digits, trained on half of them, learns to tell five of them as files, at 99 %."""
    threads = ["--run.threads", str(torch.get_num_threads()), "--quiet"]
    options = [
        "--config",
        "digits",
        "--schedule.epochs=8",
        "--run.eval_epochs=8",
        "--data.resize=32",
        "--data.crop=32",
        "--sampler.size=32",
    ]
    assert main(["train", *options, "--run.output", str(tmp_path / "digits"), *threads]) == 0
    digits = load_digits()
    for part in ("train", "val"):
        write(tmp_path / "five", part, getattr(digits, part), 10**6)
    capsys.readouterr()
    arguments = [
        "--checkpoint",
        tmp_path / "digits" / "best.pt",
        "--data",
        tmp_path / "five",
        "--run.output",
        tmp_path / "five_run",
    ]
    assert main(["finetune", *map(str, arguments), *threads, "--schedule.epochs=4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best_accuracy"] >= 0.99


# mvit3 models


def test_models(capsys):
    """Every network, with the parameters and multiplications of the published one."""
    manifest = {
        "mobilevit_xxs": (1_272_024, 407_364_096),
        "mobilevitv3_050": (1_429_985, 479_799_296),
        "mobilevitv3_s": (5_763_912, 1_832_711_680),
        "mobilevitv3_xxs_fast": (1_145_288, 300_705_792),
    }
    found = {model["name"]: model for model in describe(list(manifest), 256)}
    assert {name: (model["parameters"], model["macs"]) for name, model in found.items()} == manifest
    assert found["mobilevitv3_s"]["flops"] == 2 * 1_832_711_680 and found["mobilevitv3_s"]["recipes"] == [
        "mobilevitv3_s"
    ]
    assert [found[name]["input"] for name in ("mobilevitv3_xxs_fast", "mobilevitv3_050")] == [
        "3x256x256 BGR, 0 to 1", "3x256x256 RGB, 0 to 1"
    ]  # fmt: skip
    (small,) = describe(["mobilevit_xxs"], 128)
    assert small["parameters"] == 1_272_024 and small["macs"] < 407_364_096 / 3.9
    assert main(["models", "mobilevitv3_s", "mobilevitv2_0*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["mobilevitv2_050", "mobilevitv2_075", "mobilevitv3_s"]
    assert lines[4].split()[1:4] == ["5.76", "M", "1.83"]
    assert main(["models", "--size=32", "--json"]) == 0
    assert {model["name"] for model in json.loads(capsys.readouterr().out)} == set(MODELS.values())
    with pytest.raises(UsageError, match="there is no network 'mobilevitv4'; the nearest is 'mobilevitv"):
        describe(["mobilevitv4"], 256)
    with pytest.raises(UsageError, match="--size must be at least 32, got 16"):
        describe([], 16)


@pytest.mark.parametrize(("arguments", "amp"), [
    (["--amp"], "auto"), (["--amp", "--data=x"], "auto"), (["--amp", "bf16"], "bf16"), (["--amp=fp16"], "fp16"),
])  # fmt: skip
def test_amp_is_the_release(arguments, amp, capsys):
    assert main(["train", *arguments, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["run"]["amp"] == amp
