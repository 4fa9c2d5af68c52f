import io
import json
import subprocess
import sys
import types

import pytest
import torch

from benchmarks import make_images
from mvit3 import runtime
from mvit3.cli import main
from mvit3.config import TrainConfig

# A network in training on 64 digits at 32x32: four steps of 16 images in each of two epochs.
SMALL = {
    "model": {"name": "mobilevitv3_xxs", "drop_rate": 0.1, "proj_drop_rate": 0.1},
    "data": {
        "source": "digits",
        "limit_train": 64,
        "limit_val": 40,
        "batch_size": 16,
        "eval_batch_size": 16,
        "resize": 32,
        "crop": 32,
    },
    "augment": {"crop": False, "flip": 0.0, "rotate": 10.0},
    "sampler": {"size": 32},
    "optimizer": {"lr": 0.003, "weight_decay": 0.05, "no_decay_1d": True},
    "schedule": {"epochs": 2, "warmup_iterations": 2, "warmup_lr": 0.001, "min_lr": 0.0001, "update": "iteration"},
    "ema": {"momentum": 0.1},
    "run": {"deterministic": True},
}


@pytest.fixture(autouse=True)
def _keep_process(monkeypatch):
    """Commands run inside a test use the threads that the test process has (workers of pytest-xdist share the cores),
    and leave nothing."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(runtime, "usable_cores", lambda: threads)
    yield
    torch.use_deterministic_algorithms(False)


def small_config(**changes):
    """SMALL with some options of its sections replaced."""
    return TrainConfig.from_dict(
        {section: {**SMALL.get(section, {}), **changes.get(section, {})} for section in {**SMALL, **changes}}
    )


def small_arguments(output, *more):
    """SMALL as a command line."""
    options = [
        f"--{section}.{key}={_text(value)}" for section, values in SMALL.items() for key, value in values.items()
    ]
    return ["train", *options, f"--run.output={output}", f"--run.threads={torch.get_num_threads()}", *more]


def _text(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


def process(*arguments, launcher=("-m", "mvit3")):
    """A command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a run that was stopped within its second epoch and went on, and what either start said."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    said = []
    for more in (["--run.max_steps=6"], ["--json"], []):
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            assert main(small_arguments(folder, *more)) == 0
        said.append((out.getvalue(), err.getvalue()))
        if len(said) == 1:
            stopped = (folder / "report.html").read_text()
    return types.SimpleNamespace(folder=folder, said=said, stopped=stopped, result=json.loads(said[1][0]))


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """60 JPEGs of 3 classes, 48 of them for training."""
    root = tmp_path_factory.mktemp("images")
    make_images.main(["--output", str(root), "--images", "60", "--classes", "3", "--width", "72", "--height", "54"])
    return root


@pytest.fixture
def own(images, tmp_path):
    """A copy of them, to break."""
    subprocess.run(["cp", "-r", str(images), str(tmp_path / "images")], check=True)
    return tmp_path / "images"
