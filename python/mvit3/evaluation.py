"""`mvit3 evaluate`: the scores of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset

from mvit3_kernels.models.checkpoint import count_outputs

from . import checkpoint
from .backends import served
from .config import TrainConfig
from .data import DataConfig, validation
from .data.identity import difference, identity
from .distributed import World
from .inference import Network
from .names import task_of
from .progress import Progress
from .scores import Scores, scores_of
from .screen import Bar
from .tasks import Evaluation, evaluate, open_task

TOLD = 5e-5  # half of the last digit of a score in percent


def evaluate_checkpoint(path: Path, config: TrainConfig, weights: str, world: World, bar: Bar) -> dict[str, object]:
    """The scores on the validation images of a configuration, as plain values."""
    content = checkpoint.read(path)
    scores, task = scores_of(config.model.name), open_task(config.model.name)
    names = tuple(content["class_names"]) if content else ()
    classifier = task_of(config.model.name) == "classification"
    if classifier and names == tuple(map(str, range(len(names)))):  # none, or the numbers that shards have
        names = imagenet_names(len(names) or config.model.num_classes or count_outputs(path), config.data) or names
    batches = validation(config, names, rank=world.rank, world_size=world.size, device=world.device)
    present, data = len(batches.source.class_names) + task.background, config.data.root or config.data.source
    network = Network.open(path, config, weights, world.device, present)
    if not names and config.data.source != "shards" and present < network.num_classes:
        raise checkpoint.CheckpointError(
            f"{path} has {network.num_classes} classes and does not tell their names, {data} has {present} "
            f"({', '.join(batches.source.class_names[:3])}{', ...' if present > 3 else ''}), so which is which is not "
            "known: name the "
            "folders by ImageNet's synsets (n01440764) where these are the classes, or make one folder for each of the "
            f"{network.num_classes} classes, empty where there is no image"
        )
    if present > network.num_classes:
        raise checkpoint.CheckpointError(f"{path} has {network.num_classes} classes, the data in {data} has {present}")
    batches.say = bar.line
    for note in batches.source.notes:
        bar.line(note)
    if config.data.limit_val:
        bar.line(
            f"data.limit_val: the {scores.name} is that of {len(batches.source.labels)} images, spread over all; 0 "
            "takes all"
        )
    watched = bar.over(batches, len(batches), "batches evaluated")
    told = names or network.class_names or batches.source.class_names
    meter = task.meter(config, network.num_classes, told, batches.source, world, gallery=False)
    found = evaluate(network.model, watched, config.run, meter, world.device)
    if found.not_finite:
        raise checkpoint.CheckpointError(
            f"{path}: the network's output is not finite for {found.not_finite} of {found.total} images, so there is "
            f"no {scores.name} to tell; "
            + (
                "its weights are spoilt"
                if config.run.amp == "none"
                else f"run.amp none computes without {config.run.amp}"
            )
        )
    same = content is None or "data" not in content or not difference(content["data"]["val"], identity(batches.source))
    recorded = network.recorded if same and _as_in_training(content, config) else None
    for remark in found.remarks:
        bar.line(remark)
    for name, reason in batches.unreadable.items():
        bar.line(f"unreadable: {name}: {reason}")
    sample = torch.zeros(2, 3, config.data.crop, config.data.crop, device=world.device)
    return {
        "checkpoint": str(path),
        "model": config.model.name,
        "weights": network.weights,
        "data": data,
        "ops": config.run.ops,
        "precision": config.run.amp,
        "backend": served(task.network(network.model), sample, config, training=False),
        **_told(found, scores, task.classes(Progress(**found.kept), told)),
        "unreadable": batches.unreadable,
        f"recorded_{scores.best}": recorded,
        "reproduced": None if recorded is None else _same(found.values[scores.best], recorded, classifier),
    }


# What of the evaluation of dense prediction is counted.
COUNTED = {
    "data": ("native_labels", "keep_aspect"),
    "detection": ("score_threshold", "iou_threshold", "candidates", "per_class", "per_image"),
}


def _as_in_training(content: dict[str, object] | None, config: TrainConfig) -> bool:
    """Whether the same pixels and boxes are counted as in the training that a checkpoint is of."""
    then, now = content["config"] if content else {}, config.to_dict()
    return all(
        then.get(section, {}).get(key, now[section][key]) == now[section][key]
        for section, keys in COUNTED.items()
        for key in keys
    )


def _told(found: Evaluation, scores: Scores, classes: list[dict[str, object]]) -> dict[str, object]:
    """The scores of an evaluation and of its classes."""
    values = found.values
    keys = [key for key in scores.row if key not in ("val_loss", "correct")]
    counts = {"correct": values["correct"]} if "correct" in values else {}
    if scores.counted != "images":
        counts[scores.counted] = sum(one[scores.counted] for one in classes)
    rest = {"total": found.total, "val_loss": values["val_loss"], "classes": classes}
    return {key: values[key] for key in keys} | counts | rest


def _same(score: float | None, recorded: float, exact: bool) -> bool:
    """Whether a score is the recorded one: a count of images exactly; of pixels and boxes, of which some change sides
    with the last bit of an output, to the digits that are told."""
    return score == recorded if exact else score is not None and abs(score - recorded) < TOLD


def imagenet_names(num_classes: int | None, data: DataConfig) -> tuple[str, ...]:
    """The synsets of ImageNet with so many classes, in the order of the outputs that are trained on it, where the
    folders of the validation images are named by them; else nothing."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    folder = Path(data.root) / data.val
    if subset is None or data.source != "folder" or not folder.is_dir():
        return ()
    synsets = tuple(ImageNetInfo(subset).label_names())
    found = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    return synsets if found and found <= set(synsets) else ()
