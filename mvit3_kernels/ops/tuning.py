"""Which of its configurations a Triton kernel runs with.

A kernel offers a short list of configurations, the best guess first. `benchmarks/tune.py` times all of them on a GPU
and records the fastest in tuned.json, by architecture, kernel, dtype and numbers of channels. A kernel without a record
runs with the first one. Nothing is timed in a user's process, and no choice depends on batch, height or width, but
for whether a map has few rows or many, so multi-scale training never waits for a choice or for a compiler.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

FILE = Path(__file__).with_name("tuned.json")
# An architecture without records of its own, and the one with the same matrix units and shared memory that it copies.
SIMILAR = {"sm_89": "sm_86"}

Configuration = dict[str, int | bool]


class Choice(NamedTuple):
    """A kernel that asked for its configuration, and what it offered."""

    kernel: str
    dtype: str
    channels: tuple[int, ...]
    offered: tuple[Configuration, ...]

    @property
    def key(self) -> str:
        return key(self.kernel, self.dtype, self.channels)


_chosen: dict[tuple, Configuration] = {}
_trials: dict[str, Configuration] = {}
_watchers: list[list[Choice]] = []


def key(kernel: str, dtype: str, channels: tuple[int, ...]) -> str:
    """The name of a choice in the file, such as `feed_forward_fwd bfloat16 144x288`."""
    return f"{kernel} {dtype} {'x'.join(map(str, channels))}"


@cache
def recorded() -> dict[str, dict[str, Configuration]]:
    """What the file holds: for each architecture, by key, the configuration."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def architecture(x: Tensor) -> str:
    """The architecture of the GPU of `x`, such as sm_90 or gfx942. Where `x` is not on a GPU, it is that of the GPU for
    which kernels are compiled."""
    if x.is_cuda:
        properties = torch.cuda.get_device_properties(x.device)
        return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    if triton.knobs.runtime.interpret:
        return "interpreted"
    arch = triton.runtime.driver.active.get_current_target().arch
    return f"sm_{arch}" if isinstance(arch, int) else arch


def choose(
    kernel: str, x: Tensor, channels: tuple[int, ...], configurations: Callable[[], list[Configuration]]
) -> Configuration:
    """One of the configurations that `configurations()` lists: what was recorded for `kernel`, the dtype of `x` and
    these numbers of channels, else the first."""
    at = (kernel, x.get_device(), x.dtype, channels)
    if at in _chosen and not _trials and not _watchers:
        return _chosen[at]
    offered, dtype = configurations(), str(x.dtype).removeprefix("torch.")
    for watcher in _watchers:
        watcher.append(Choice(kernel, dtype, channels, tuple(offered)))
    name, where = key(kernel, dtype, channels), architecture(x)
    if name in _trials:
        return _trials[name]
    known = recorded()
    found = known.get(where, {}).get(name) or known.get(SIMILAR.get(where), {}).get(name)
    config = found if found in offered else offered[0]
    if x.is_cuda:  # elsewhere each call may compile for another GPU
        _chosen[at] = config
    return config


@contextmanager
def watch() -> Iterator[list[Choice]]:
    """Inside, the choice of every kernel that asks for a configuration is added to the list."""
    seen: list[Choice] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)


@contextmanager
def trial(choice: Choice, config: Configuration) -> Iterator[None]:
    """Inside, the kernel of `choice` runs with `config`."""
    _trials[choice.key] = config
    try:
        yield
    finally:
        del _trials[choice.key]


def forget() -> None:
    """Forgets all choices; the next one reads the file again."""
    recorded.cache_clear()
    _chosen.clear()
