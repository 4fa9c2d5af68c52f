"""Whole networks: `create_model` by name, and loading of published checkpoints."""

from .network import MobileViT
from .registry import create_model, list_models

__all__ = ["MobileViT", "create_model", "list_models"]
