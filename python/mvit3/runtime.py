"""Where and how a run computes: threads, device, ops, precision."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

import mvit3_kernels

from .config import RunConfig


def usable_cpus() -> int:
    """Logical CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores() -> int:
    """Physical cores that this process may run on; two hyper-threads of a core share its vector units and count
    once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    try:
        cores = {Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in cpus}
    except OSError:
        cores = cpus
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        limit = math.ceil(int(quota) / int(period)) if quota != "max" else len(cores)
    except (OSError, ValueError):
        limit = len(cores)
    return max(1, min(len(cores), limit))


def prepare(config: RunConfig) -> torch.device:
    """Sets the number of CPU threads and the kind of arithmetic, and resolves the device."""
    torch.set_num_threads(config.threads or max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of this machine or of its GPU is what lacked; PyTorch has no type of its own for the former."""
    texts = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in texts)


def use_ops(ops: str) -> AbstractContextManager:
    """Inside it every op is plain PyTorch ("reference"), or the best kernel that can take the call ("fused")."""
    return mvit3_kernels.backend("reference") if ops == "reference" else nullcontext()


def precision(config: RunConfig, device: torch.device) -> torch.dtype | None:
    """What forward passes compute in beside float32. `auto`: as published on a GPU, float16; on a CPU bfloat16, which
    is not slow there."""
    if config.amp == "auto":
        return torch.float16 if device.type == "cuda" else torch.bfloat16
    return {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.amp]


def autocast(config: RunConfig, device: torch.device) -> AbstractContextManager:
    """The precision of forward passes."""
    dtype = precision(config, device)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
