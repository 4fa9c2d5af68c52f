"""Whole networks: `create_model` by name, and loading of published checkpoints."""

from .checkpoint import CheckpointError, LoadReport, load_checkpoint
from .network import MobileViT
from .registry import create_model, list_models

__all__ = ["CheckpointError", "LoadReport", "MobileViT", "create_model", "list_models", "load_checkpoint"]
