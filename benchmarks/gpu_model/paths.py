"""What one pass of a loop of machine code (SASS) runs: of all ways through it the one that computes most, since what
computes or stores less belongs to other activations, to borders of maps and to what is not finite; among these the
shortest, such as a store of 16 bytes where another way has four of 4."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.gpu_model.sass import INSTRUCTION, KINDS, LABEL, TARGET, Loop

WORK = {"HMMA", "HGMMA", "FFMA", "FADD", "FMUL", "HFMA2", "MUFU.TANH", "MUFU.EX2"}
STORED = re.compile(r"STG\S*\.(U8|U16|64|128)\b")  # others store 4 bytes, the work of an instruction
WORK_OF_STORES = {"U8": 0.25, "U16": 0.5, "64": 2, "128": 4}
PREDICATED = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+@!?(\w+)")
VOTE = re.compile(r"VOTE\.ANY\s+(?:R\w+, )?(P\d)")
Trips = Callable[[Loop], float]


class Instruction(NamedTuple):
    name: (
        str  # with its first modifiers where that is in WORK, or where it moves a 16-bit number; with all if it stores
    )
    target: int | None  # of a branch
    conditional: bool
    rare: bool = False  # a branch on what a vote found: to what is made again where something is not finite


@dataclass
class Way:
    """work: instructions in WORK, and what it stores; counts: of all that runs, by kind, `all` among them."""

    work: float
    counts: Counter

    @property
    def rank(self) -> tuple[float, float]:
        return self.work, -self.counts["all"]

    def times(self, n: float) -> Way:
        return Way(self.work * n, Counter({kind: count * n for kind, count in self.counts.items()}))

    def then(self, other: Way) -> Way:
        return Way(self.work + other.work, self.counts + other.counts)


def read(lines: list[str]) -> list[Instruction]:
    """The instructions of a kernel in a disassembly."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str, bool, bool]] = []
    voted = ""  # the predicate of the last vote
    for line in lines:
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := INSTRUCTION.match(line):
            modified = match[1] + ".".join(match[2].split(".")[:2])
            name = modified if modified in WORK or "U16" in match[2] else match[1]
            if match[1] == "STG":
                name += match[2]
            predicate = PREDICATED.match(line)
            if vote := VOTE.search(line):
                voted = vote[1]
            rare = name == "BRA" and predicate is not None and predicate[1] == voted
            if rare:
                voted = ""
            found.append((name, match[3], predicate is not None, rare))
    made = []
    for name, operands, conditional, rare in found:
        target = TARGET.search(operands) if name == "BRA" else None
        made.append(Instruction(name, labels.get(target[1]) if target else None, conditional, rare))
    return made


def one_pass(code: list[Instruction], loop: Loop, trips: Trips) -> Way:
    """A pass of `loop`, with all passes of the loops in it: `trips` says how many one of these has."""
    # From the last instruction on: the best way from each to the end of the pass, or None.
    last = min(loop.end, len(code) - 1)
    best: list[Way | None] = [None] * (last - loop.start + 2)
    inner = {child.start: child for child in loop.inner}
    root = loop.start == 0 and loop.end >= len(code)

    def end(at: int | None) -> Way | None:
        """The best way from what lies at `at` on, where it is in the pass."""
        if at is None:
            return None
        if at == loop.start and not root:
            return Way(0, Counter())
        return best[at - loop.start] if loop.start < at <= last else None

    for i in range(last, loop.start - 1, -1):
        if i in inner:
            best[i - loop.start] = _around(code, inner[i], end, trips)
            continue
        own = code[i]
        ways = [end(own.target)] if own.name == "BRA" else []
        if own.name == "EXIT" and root:
            ways.append(Way(0, Counter()))
        if own.name not in ("BRA", "EXIT") or own.conditional:
            ways.append(end(i + 1))
        ways = [way for way in ways if way is not None]
        if not ways:
            continue
        here = Counter() if own.name == "NOP" else Counter({"all": 1})
        if kind := KINDS.get(own.name.partition(".")[0]):
            here[kind] += 1
        way = min(ways, key=lambda way: way.work) if own.rare else max(ways, key=lambda way: way.rank)
        best[i - loop.start] = Way(_work(own.name), here).then(way)
    return best[0] or Way(0, Counter())


def _work(name: str) -> float:
    if not name.startswith("STG"):
        return name in WORK
    wide = STORED.match(name)
    return WORK_OF_STORES[wide[1]] if wide else 1


def _around(code: list[Instruction], loop: Loop, end: Callable[[int | None], Way | None], trips: Trips) -> Way | None:
    """All passes of an inner loop and the best way from where it is left."""
    leaves = [loop.end + 1]
    for own in code[loop.start : loop.end + 1]:
        if own.name == "BRA" and own.target is not None and not loop.start <= own.target <= loop.end:
            leaves.append(own.target)
    ways = [way for way in map(end, leaves) if way is not None]
    if not ways:
        return None
    passes = one_pass(code, loop, trips).times(trips(loop))
    return passes.then(max(ways, key=lambda way: way.rank))
