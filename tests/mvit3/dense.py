"""Small trainings of networks for dense prediction, on embedded scenes at 64x64."""

import torch

from mvit3.config import TrainConfig
from mvit3.data import loaders
from mvit3.distributed import World
from mvit3.trainer import Trainer

CPU = World(torch.device("cpu"))
# One network of each task; of segmentation one with an auxiliary head.
NETWORKS = {"segmentation": "pspnet_mobilevitv2_050", "detection": "ssdlite_mobilevitv3_xxs"}
TASKS = list(NETWORKS)
SIZE = 64

# 24 scenes: three steps of 8 in each of two epochs.
OPTIONS = {
    "model": {"drop_rate": 0.0, "proj_drop_rate": 0.0},
    "data": {
        "source": "digits",
        "limit_train": 24,
        "limit_val": 10,
        "batch_size": 8,
        "eval_batch_size": 4,
        "resize": SIZE,
        "crop": SIZE,
    },
    "augment": {"flip": 0.0},
    "sampler": {"size": SIZE},
    "optimizer": {"lr": 0.003, "no_decay_1d": True, "clip_grad": 10.0},
    "schedule": {"epochs": 2, "warmup_iterations": 0, "min_lr": 0.0001, "update": "iteration"},
    "loss": {"label_smoothing": 0.0},
    "ema": {"momentum": 0.1},
    "run": {"deterministic": True},
}


def options(task, **changes):
    """Nested plain values, with some of them replaced."""
    found = {section: {**OPTIONS.get(section, {}), **changes.get(section, {})} for section in {**OPTIONS, **changes}}
    found["model"].setdefault("name", NETWORKS[task])
    return found


def config(task, **changes):
    return TrainConfig.from_dict(options(task, **changes))


def trainer(task, **changes):
    found = config(task, **changes)
    return Trainer(found, loaders(found, seed=found.run.seed), CPU)


def arguments(task, output, *more, **changes):
    """As a command line."""
    text = [
        f"--{section}.{key}={str(value).lower() if isinstance(value, bool) else value}"
        for section, values in options(task, **changes).items()
        for key, value in values.items()
    ]
    return ["train", *text, f"--run.output={output}", f"--run.threads={torch.get_num_threads()}", *more]
