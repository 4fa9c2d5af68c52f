"""What a trainer asks of a task: its loss, what is trained, its evaluation."""

from __future__ import annotations

from ..names import task_of
from .base import Evaluation, Meter, Task, evaluate

__all__ = ["Evaluation", "Meter", "Task", "evaluate", "open_task"]


def open_task(network: str) -> Task:
    """The task that a network is for, which its name tells."""
    from .classification import Classification
    from .detection import Detection
    from .segmentation import Segmentation

    return {"classification": Classification, "segmentation": Segmentation, "detection": Detection}[task_of(network)]()
