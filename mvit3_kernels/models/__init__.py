"""Whole networks: `create_model` by name, and loading of published checkpoints."""

from .checkpoint import CheckpointError, LoadReport, load_checkpoint
from .create import create_model
from .detection import SSDNetwork
from .hub import from_pretrained
from .network import MobileViT
from .registry import list_models
from .segmentation import SegmentationNetwork

__all__ = [
    "CheckpointError",
    "LoadReport",
    "MobileViT",
    "SSDNetwork",
    "SegmentationNetwork",
    "create_model",
    "from_pretrained",
    "list_models",
    "load_checkpoint",
]
