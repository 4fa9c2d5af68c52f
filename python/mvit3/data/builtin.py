"""Data sets that torchvision brings, and those of Hugging Face's `datasets` where it is installed."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torchvision.datasets

from ..options import UsageError, nearest
from .config import DataConfig
from .decode import Encoded
from .errors import DataError

# names of a split, in this order
PARTS = {"train": ("train", "training", "trainval"), "val": ("val", "validation", "valid", "test")}


class _Indexed(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> object: ...


@dataclass(frozen=True)
class Items:
    """Images of a data set that is read by index: `dataset[i]` is a PIL image and a label, or a row with a column of
    encoded images."""

    dataset: _Indexed
    labels: np.ndarray
    class_names: tuple[str, ...]
    name: str
    column: str = ""
    notes: tuple[str, ...] = ()

    def read(self, index: int) -> Encoded:
        item = self.dataset[index]
        if not self.column:
            return item[0]
        image = item[self.column]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()

    def image_name(self, index: int) -> str:
        return f"{self.name}, image {index}"


def _splits(config: DataConfig, part: str) -> tuple[str, ...]:
    """Names that a part may have: what data.train or data.val says, else the usual ones."""
    said = getattr(config, part)
    return PARTS[part] if said == part else (said,)


def _check_labels(name: str, labels: np.ndarray, class_names: Sequence[str]) -> None:
    if labels.size == 0:
        raise DataError(f"{name} holds no image")
    if not 0 <= labels.min() <= labels.max() < len(class_names):
        raise DataError(f"labels of {name} are {labels.min()} to {labels.max()}, there are {len(class_names)} classes")


def _torchvision_classes() -> dict[str, type]:
    """Data sets of torchvision that have images and labels, by name."""
    found = {name: getattr(torchvision.datasets, name) for name in torchvision.datasets.__all__}
    return {
        name: kind
        for name, kind in found.items()
        if isinstance(kind, type) and {"train", "split"} & set(inspect.signature(kind.__init__).parameters)
    }


def open_torchvision(config: DataConfig, part: str) -> Items:
    """A part of a data set of torchvision, by the name of its class in any spelling (CIFAR10, cifar10,
    fashion_mnist)."""
    kinds = _torchvision_classes()
    plain = {name.lower(): name for name in kinds}
    wanted = config.name.lower().replace("_", "").replace("-", "")
    if wanted not in plain:
        close = nearest(config.name, kinds)
        raise UsageError(
            f"data.name must be a data set of torchvision with a part to train on; got {config.name!r}, the nearest "
            f"is {close!r}"
        )
    if not config.root:
        raise UsageError(f"data.root must name the folder of the data for data.source {config.source}")
    name = plain[wanted]
    parameters = inspect.signature(kinds[name].__init__).parameters
    options: dict[str, object] = {"root": config.root}
    if config.download and "download" in parameters:
        options["download"] = True
    tries = (
        [{"train": part == "train"}] if "train" in parameters else [{"split": split} for split in _splits(config, part)]
    )
    problem: Exception | None = None
    with _alone(config.root) if config.download else nullcontext():
        for split in tries:
            try:
                dataset = kinds[name](**options, **split)
                break
            except ValueError as error:  # a split that it does not have
                problem = error
            except (RuntimeError, OSError, TypeError, ImportError) as error:
                hint = "" if config.download else "; --data.download true fetches it, where torchvision can"
                raise DataError(
                    f"{name} cannot be read from {config.root}: {' '.join(str(error).split())}{hint}"
                ) from None
        else:
            raise UsageError(
                f"data.{part}: {name} has no split {', '.join(_splits(config, part))}: {' '.join(str(problem).split())}"
            )
    labels = next((getattr(dataset, key) for key in ("targets", "labels", "_labels") if hasattr(dataset, key)), None)
    try:
        if labels is None:
            labels = [label for _, label in (dataset[i] for i in range(len(dataset)))]
        labels = np.asarray(labels, np.int64)
    except (TypeError, ValueError):
        raise UsageError(f"data.name {name} is no data set of images with one label each") from None
    names = tuple(getattr(dataset, "classes", ())) or tuple(map(str, range(int(labels.max()) + 1)))
    _check_labels(name, labels, names)
    return Items(dataset, labels, tuple(map(str, names)), f"{name} {part}")


def _alone(root: str):
    """Lets one process at a time fetch into a folder."""
    import fcntl

    os.makedirs(root, exist_ok=True)
    lock = open(os.path.join(root, ".mvit3.lock"), "w")  # noqa: SIM115 -- closed, and so released, by the caller's with
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def open_huggingface(config: DataConfig, part: str) -> Items:
    """A part of a data set of the `datasets` package: its name on the hub, or a folder that `save_to_disk` wrote."""
    try:
        import datasets
    except ImportError:
        raise UsageError(
            "data.source huggingface needs the package datasets, which is not installed: pip install datasets"
        ) from None
    name = config.name or config.root
    if not name:
        raise UsageError("data.name must name the data set for data.source huggingface, or a folder of save_to_disk")
    try:
        if os.path.exists(os.path.join(name, "dataset_dict.json")):
            whole = datasets.load_from_disk(name)
        else:
            whole = datasets.load_dataset(name, cache_dir=config.cache or None)
    except Exception as error:  # the hub, the network, scripts: anything
        raise DataError(f"{name} cannot be loaded by datasets: {' '.join(str(error).split())}") from None
    split = next((split for split in _splits(config, part) if split in whole), None)
    if split is None:
        raise UsageError(
            f"data.{part} must be one of the splits of {name}, {', '.join(whole)}; got "
            f"{', '.join(_splits(config, part))}"
        )
    rows = whole[split]
    images = [key for key, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise DataError(f"{name} has no column of images, there are {', '.join(rows.features)}")
    labelled = [key for key, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
    labelled += [key for key in ("label", "labels", "class", "target") if key in rows.features and key not in labelled]
    if not labelled:
        raise DataError(f"{name} has no column of labels, there are {', '.join(rows.features)}")
    image, label = images[0], labelled[0]
    kind, values = rows.features[label], rows[label]
    notes = []
    if len(images) > 1 or len(labelled) > 1:
        notes.append(f"{name}: images are read from its column {image!r}, labels from {label!r}")
    if isinstance(kind, datasets.ClassLabel):
        names, labels = tuple(kind.names), np.asarray(values, np.int64)
    elif values and isinstance(values[0], str):
        names = tuple(sorted(set(whole[next(split for split in whole)][label]) | set(values)))
        numbers = {name: number for number, name in enumerate(names)}
        labels = np.array([numbers[value] for value in values], np.int64)
    else:
        labels = np.asarray(values, np.int64)
        names = tuple(map(str, range(int(labels.max()) + 1)))
    _check_labels(name, labels, names)
    return Items(
        rows.cast_column(image, datasets.Image(decode=False)), labels, names, f"{name} {split}", image, tuple(notes)
    )
