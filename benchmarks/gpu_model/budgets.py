"""What a shipped kernel may use, and why some use more.

A kernel over a budget without a reason fails the tests; so does a reason that no kernel needs any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any, NamedTuple

REGISTERS = 32768  # of a block: half of a multiprocessor's
LEAST_BLOCKS, MOST_MICROSECONDS = 64, 5.0  # of a launch that leaves most of the GPU idle


class Excess(NamedTuple):
    """A kernel over a budget."""

    budget: str
    kernel: str
    found: str


def excesses(kernels: Mapping[str, Mapping[str, Any]]) -> Iterator[Excess]:
    for name, k in kernels.items():
        registers = k["registers"] * k["warps"] * 32
        if registers > REGISTERS:
            yield Excess("registers", name, f"{registers} registers a block, {REGISTERS} allowed")
        if k["stack"]:
            yield Excess("spill", name, f"{k['stack']} bytes of stack a thread")
        waiting = [loop for loop in k["loops"] if loop.get("loads", 0) and not loop.get("copies", 0)]
        if waiting:
            sizes = ", ".join(f"{loop['loads']} of {loop['all']}" for loop in waiting)
            yield Excess("pipeline", name, f"loads that a loop waits for, of its instructions: {sizes}")
        if few := k.get("few"):
            yield Excess("blocks", name, f"{few['us']} us in {few['blocks']} blocks ({few['where']})")


def unexplained(kernels: Mapping[str, Mapping[str, Any]]) -> list[Excess]:
    return [excess for excess in excesses(kernels) if reason(excess) is None]


def reason(excess: Excess) -> str | None:
    for (budget, pattern), sentence in REASONS.items():
        if budget == excess.budget and fnmatch(excess.kernel.partition("[")[0], pattern):
            return sentence
    return None


def unused(kernels: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Reasons that no kernel needs."""
    found = {(e.budget, e.kernel.partition("[")[0]) for e in excesses(kernels)}
    return [
        (budget, pattern)
        for budget, pattern in REASONS
        if not any(other == budget and fnmatch(kernel, pattern) for other, kernel in found)
    ]


REASONS: dict[tuple[str, str], str] = {}
