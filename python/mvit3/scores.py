"""What each task is judged by: the columns of a history, of a table and of a CSV file, and what people call them.
Nothing heavy is imported here."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .names import task_of
from .screen import percent


@dataclass(frozen=True)
class Scores:
    """The scores of a task, by their keys in a row of the history; all are shares of 1.

    Attributes:
        best: the one that chooses the best epoch; name: what it is called.
        heads: what each is called at the head of a column.
        row: keys of an evaluation in the history, in their order.
        classes: of a class, key and head of what is counted and of what is scored; of_class: the key that ranks them.
        together: the same of all classes, keys of an evaluation.
        missing: what stands for the score of a class without any.
    """

    best: str
    name: str
    heads: Mapping[str, str]
    row: tuple[str, ...]
    classes: Mapping[str, str]
    of_class: str
    together: tuple[str, ...]
    missing: str

    @property
    def counted(self) -> str:
        """Key of what a class is counted by: images, pixels or boxes."""
        return next(iter(self.classes))


SCORES = {
    "classification": Scores(
        "accuracy",
        "accuracy",
        {"accuracy": "accuracy", "accuracy5": "top 5"},
        ("accuracy", "accuracy5", "val_loss", "correct"),
        {"images": "images", "correct": "correct", "accuracy": "accuracy"},
        "accuracy",
        ("total", "correct", "accuracy"),
        "no images",
    ),
    "segmentation": Scores(
        "miou",
        "mIoU",
        {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"},
        ("miou", "pixel_accuracy", "val_loss"),
        {"pixels": "pixels", "iou": "IoU"},
        "iou",
        ("pixels", "miou"),
        "never seen",
    ),
    "detection": Scores(
        "map",
        "mAP",
        {
            "map": "mAP",
            "map50": "AP50",
            "map75": "AP75",
            "map_small": "small",
            "map_medium": "medium",
            "map_large": "large",
        },
        ("map", "map50", "map75", "map_small", "map_medium", "map_large", "val_loss"),
        {"boxes": "boxes", "ap": "AP", "ap50": "AP50"},
        "ap",
        ("boxes", "map", "map50"),
        "no boxes",
    ),
}


def scores_of(network: str) -> Scores:
    """What the task of a network, which its name tells, is judged by."""
    return SCORES[task_of(network)]


def class_rows(classes: Sequence[Mapping[str, object]], scores: Scores = SCORES["classification"]) -> list[list[str]]:
    """Cells of a table of the classes."""
    rows = [["class", *scores.classes.values()]]
    for one in classes:
        cells = [str(value) if isinstance(value := one[key], int) else percent(value) for key in scores.classes]
        rows.append([str(one["name"]), *(cell or scores.missing for cell in cells)])
    return rows


def class_csv(result: Mapping[str, object], scores: Scores = SCORES["classification"]) -> str:
    """The classes of an evaluation as CSV, and all of them together in the last row."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["class", *scores.classes])
    classes = result["classes"]
    rows.writerows([one["name"], *("" if one[key] is None else one[key] for key in scores.classes)] for one in classes)
    rows.writerow(["all", *("" if result[key] is None else result[key] for key in scores.together)])
    return text.getvalue()


def lowest(classes: Sequence[Mapping[str, object]], scores: Scores, number: int) -> list[Mapping[str, object]]:
    """The classes with the lowest scores, of those that have one."""
    found = [one for one in classes if one[scores.of_class] is not None]
    return sorted(found, key=lambda one: one[scores.of_class])[:number]
