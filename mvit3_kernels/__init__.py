"""Fused kernels, drop-in modules and whole networks for the MobileViT family (v1, v2, v3)."""

from . import models, nn, ops, tasks
from ._native import release_memory
from .explain import Explanation, explain
from .fuse import FuseReport, fuse, fuse_report, unfuse
from .graphs import CudaGraphError, cuda_graph, cuda_graph_step
from .inference import refresh
from .models import CheckpointError, LoadReport, create_model, from_pretrained, list_models, load_checkpoint
from .ops.dispatch import BackendError, backend

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "CheckpointError",
    "CudaGraphError",
    "Explanation",
    "FuseReport",
    "LoadReport",
    "backend",
    "create_model",
    "cuda_graph",
    "cuda_graph_step",
    "explain",
    "from_pretrained",
    "fuse",
    "fuse_report",
    "list_models",
    "load_checkpoint",
    "models",
    "nn",
    "ops",
    "refresh",
    "release_memory",
    "tasks",
    "unfuse",
]
