"""Tensor names of other libraries, as tables towards the published names: one file per library."""

from . import timm, transformers
from .key_map import KeyMap

KEY_MAPS = (*timm.KEY_MAPS, *transformers.KEY_MAPS)

__all__ = ["KEY_MAPS", "KeyMap"]
