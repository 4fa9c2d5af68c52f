"""Fused kernels, drop-in modules and whole networks for the MobileViT family (v1, v2, v3)."""

from . import models, nn, ops
from ._native import release_memory
from .explain import Explanation, explain
from .graphs import CudaGraphError, cuda_graph, cuda_graph_step
from .models import CheckpointError, LoadReport, create_model, list_models, load_checkpoint
from .ops.dispatch import BackendError, backend
from .patching import fuse, refresh, unfuse

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "CheckpointError",
    "CudaGraphError",
    "Explanation",
    "LoadReport",
    "backend",
    "create_model",
    "cuda_graph",
    "cuda_graph_step",
    "explain",
    "fuse",
    "list_models",
    "load_checkpoint",
    "models",
    "nn",
    "ops",
    "refresh",
    "release_memory",
    "unfuse",
]
