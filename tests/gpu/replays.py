"""What a CUDA C++ kernel is held to beside its results: the same bits again, on another stream and in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def check_repeats(run: Callable[[], dict[str, Tensor]]) -> None:
    """The same call gives the same bits, on another stream too."""
    first, again = run(), run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = run()
    torch.cuda.synchronize()
    for key, value in first.items():
        assert torch.equal(value, again[key]) and torch.equal(value, other[key]), key


def check_graph(run: Callable[[], dict[str, Tensor]]) -> None:
    """The call replayed as a CUDA graph gives what it gives by itself."""
    want, graph = run(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(value, want[key]) for key, value in found.items())
