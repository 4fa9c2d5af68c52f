"""The machine code (SASS) of a kernel: its loops, and what instructions they are made of."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

LABEL = re.compile(r"\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\S*)\s*(.*)")
TARGET = re.compile(r"(\.L_x_\d+)")
# What the model counts: everything, tensor-core instructions of both kinds, loads, copies that do not wait (those of
# runs of bytes, by one thread, apart), stores,
# shared memory, exponentials and roots, barriers.
KINDS = {
    "HMMA": "mma",
    "IMMA": "mma",
    "HGMMA": "wgmma",
    "LDG": "loads",
    "LDGSTS": "copies",
    "UTMALDG": "copies",
    "UBLKCP": "runs",
    "STG": "stores",
    "LDS": "shared",
    "LDSM": "shared",
    "STS": "shared",
    "STSM": "shared",
    "MUFU": "special",
    "BAR": "barriers",
}


@dataclass
class Loop:
    """A loop of the code, or the code around all loops. counts: of instructions in it but not in its inner loops,
    `all` and by kind."""

    start: int
    end: int
    counts: Counter = field(default_factory=Counter)
    inner: list[Loop] = field(default_factory=list)

    def walk(self) -> list[Loop]:
        return [self, *(loop for child in self.inner for loop in child.walk())]


def tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def sections(text: str) -> dict[str, list[str]]:
    """The lines of each kernel of a disassembly, by its name."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if name := re.match(r"\.text\.(\S+):", line):
            current = found.setdefault(name[1], [])
        elif line.startswith("$"):  # a subroutine for rare cases
            current = []
        else:
            current.append(line)
    return found


def kernels(text: str) -> dict[str, Loop]:
    """The loops of each kernel of a disassembly, by its name."""
    return {name: _loops(lines) for name, lines in sections(text).items()}


def _back_from_a_wait(code: list[tuple[str, str]], labels: dict[str, int], at: int) -> bool:
    """Whether a branch leads back to the code from a loop behind its end, in which it waits for what is not there at
    once."""
    if at < 2 or [name for name, _ in code[at - 2 : at]] != ["SYNCS", "BRA"]:
        return False
    again = TARGET.search(code[at - 1][1])
    return again is not None and labels.get(again[1], at) < at


def _loops(lines: list[str]) -> Loop:
    labels: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    for line in lines:
        if found := LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := INSTRUCTION.match(line):
            code.append((found[1], found[3]))
    ends: dict[int, int] = {}  # of loops, by their first instruction
    for i, (name, operands) in enumerate(code):
        target = TARGET.search(operands) if name == "BRA" else None
        start = labels.get(target[1], i) if target else i
        if start < i and not _back_from_a_wait(code, labels, i):
            ends[start] = max(i, ends.get(start, 0))
    root = Loop(0, len(code))
    path = [root]
    opens = dict(sorted(ends.items()))
    for i, (name, _) in enumerate(code):
        while i > path[-1].end:
            path.pop()
        if i in opens:
            loop = Loop(i, min(opens[i], path[-1].end))
            path[-1].inner.append(loop)
            path.append(loop)
        if name != "NOP":
            path[-1].counts["all"] += 1
            if name in KINDS:
                path[-1].counts[KINDS[name]] += 1
    return root
