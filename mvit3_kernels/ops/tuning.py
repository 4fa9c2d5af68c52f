"""Which of its configurations a Triton kernel runs with.

A kernel offers a short list, best guess first. `benchmarks/tune.py` times the list on a GPU and records the fastest in tuned.json, by
architecture, kernel, dtype and numbers of channels; whatever is not recorded runs with the first. Nothing is timed in a user's process,
and nothing depends on batch, height or width, so multi-scale training never waits for a choice or a compiler.
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
# An architecture without records of its own takes those of another one, with the same matrix units and shared memory.
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
    """How a choice is called in the file: `feed_forward_fwd bfloat16 144x288`."""
    return f"{kernel} {dtype} {'x'.join(map(str, channels))}"


@cache
def recorded() -> dict[str, dict[str, Configuration]]:
    """The file: architecture, key, configuration."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def architecture(x: Tensor) -> str:
    """Of the GPU of `x`: sm_90, gfx942; of the GPU compiled for where `x` is on none."""
    if x.is_cuda:
        properties = torch.cuda.get_device_properties(x.device)
        return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    if triton.knobs.runtime.interpret:
        return "interpreted"
    arch = triton.runtime.driver.active.get_current_target().arch
    return f"sm_{arch}" if isinstance(arch, int) else arch


def choose(kernel: str, x: Tensor, channels: tuple[int, ...], configurations: Callable[[], list[Configuration]]) -> Configuration:
    """The configuration of `kernel` for maps like `x` and these numbers of channels, out of those that `configurations()` lists."""
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
    if x.is_cuda:  # elsewhere a call plays another GPU each time
        _chosen[at] = config
    return config


@contextmanager
def watch() -> Iterator[list[Choice]]:
    """Inside, every kernel that asks is added to the list."""
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
    """Reads the file again at the next call."""
    recorded.cache_clear()
    _chosen.clear()
