"""What dense prediction needs around a network: targets, losses, detections, label maps and their scores."""

from .detection import Detections, Targets, assign, choose, detections, ssd_loss
from .segmentation import confusion_matrix, intersection_over_union, segmentation_loss

__all__ = [
    "Detections",
    "Targets",
    "assign",
    "choose",
    "confusion_matrix",
    "detections",
    "intersection_over_union",
    "segmentation_loss",
    "ssd_loss",
]
