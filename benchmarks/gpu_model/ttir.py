"""What a Triton kernel does in one launch, read off its intermediate language (TTIR) and the launch's arguments: how
often each loop runs, bytes read and written, operations of its products.

TTIR keeps a program's scalars apart from its tensors, and bounds of loops are scalars of the arguments and of the
program's position: so they can be computed without running anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

SIZES = {"f32": 4, "i32": 4, "f64": 8, "i64": 8, "bf16": 2, "f16": 2, "i16": 2, "i8": 1, "i1": 1}
VALUE = r"%[\w#]+"
CONSTANT = re.compile(r"(%\w+) = arith\.constant (-?\d[\d.eE+-]*|true|false)\b")
BINARY = re.compile(rf"(%\w+) = arith\.(\w+) ({VALUE}), ({VALUE})")
COMPARE = re.compile(rf"(%\w+) = arith\.cmpi (\w+), ({VALUE}), ({VALUE})")
SELECT = re.compile(rf"(%\w+) = arith\.select ({VALUE}), ({VALUE}), ({VALUE})")
CAST = re.compile(rf"(%\w+) = arith\.(?:ext\w+|trunci|index_cast) ({VALUE})")
PROGRAM = re.compile(r"(%\w+) = tt\.get_(program_id|num_programs) (\w)")
POINTER = re.compile(rf"(%\w+) = tt\.(?:splat|broadcast|expand_dims|addptr|bitcast|reshape) ({VALUE})")
FOR = re.compile(rf"scf\.for (%\w+) = ({VALUE}) to ({VALUE}) step ({VALUE})")
IF = re.compile(rf"scf\.if ({VALUE})")
CARRIED = re.compile(rf"(%\w+) = ({VALUE})")
ACCESS = re.compile(rf"tt\.(load|store) ({VALUE})\b.*: tensor<([\dx]+)x!tt\.ptr<(\w+)>>")
DOT = re.compile(r"tt\.dot .*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>")

INTEGERS = {
    "addi": lambda a, b: a + b,
    "subi": lambda a, b: a - b,
    "muli": lambda a, b: a * b,
    "divsi": lambda a, b: int(a / b) if b else None,
    "remsi": lambda a, b: a - b * int(a / b) if b else None,
    "divui": lambda a, b: a // b if b else None,
    "remui": lambda a, b: a % b if b else None,
    "minsi": min,
    "maxsi": max,
    "andi": lambda a, b: a & b,
    "ori": lambda a, b: a | b,
}
COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "slt": lambda a, b: a < b,
    "sle": lambda a, b: a <= b,
    "sgt": lambda a, b: a > b,
    "sge": lambda a, b: a >= b,
}


@dataclass
class Loop:
    """A loop of the source. trips: of one pass through it, None where its bounds come from memory; constant: known to
    the compiler, which may have unrolled it; taken: whether the program comes to it."""

    trips: int | None
    constant: bool
    inner: list[Loop] = field(default_factory=list)
    taken: bool = True


@dataclass
class Work:
    """What one program does."""

    loops: list[Loop] = field(default_factory=list)
    read: dict[str, float] = field(default_factory=dict)  # bytes by argument, masked ones included
    written: dict[str, float] = field(default_factory=dict)
    products: float = 0.0  # operations of products in 16 bits or TF32
    exact_products: float = 0.0  # of products in float32, which are made by ordinary instructions
    branches: bool = False  # whether it went one way of several, by its position or an argument


@dataclass
class Region:
    """Lines in braces. taken: whether the program comes here; condition: of the `if` that it is a branch of, None where
    that is not known or this is none."""

    loop: Loop | None = None
    taken: bool = True
    condition: bool | None = None


def work(
    ttir: str, values: Mapping[str, object], program: tuple[int, ...], grid: tuple[int, ...] | None = None
) -> Work:
    """The work of one program of a launch with these values of the kernel's parameters; `grid`: how many there are."""
    reader = _Reader(values, program, grid or tuple(at + 1 for at in program))
    for line in ttir[ttir.index("tt.func public") :].splitlines()[1:]:
        reader.take(line.partition(" loc(")[0].rstrip())
    return reader.work


def mean(works: list[Work]) -> Work:
    """The work of one program of several, on average; the loops are those of the first."""

    def bytes_of(parts: list[dict[str, float]]) -> dict[str, float]:
        return {name: sum(p.get(name, 0.0) for p in parts) / len(parts) for name in set().union(*parts)}

    read, written = bytes_of([w.read for w in works]), bytes_of([w.written for w in works])
    products, exact = (sum(getattr(w, kind) for w in works) / len(works) for kind in ("products", "exact_products"))
    return Work(works[0].loops, read, written, products, exact, works[0].branches)


class _Reader:
    def __init__(self, values: Mapping[str, object], program: tuple[int, ...], grid: tuple[int, ...]) -> None:
        self.work = Work()
        self.known = {f"%{name}": v for name, v in values.items() if isinstance(v, (int, bool))}
        self.constants: set[str] = set()
        self.base = {f"%{name}": name for name in values}  # the argument that a pointer comes from
        self.program = {"program_id": dict(zip("xyz", program, strict=False))}
        self.program["num_programs"] = {"x": 1, "y": 1, "z": 1} | dict(zip("xyz", grid, strict=False))
        self.open: list[Region] = []  # around the line

    def take(self, line: str) -> None:
        text = line.strip()
        closed = self.open.pop() if text.startswith("}") and self.open else Region()
        if text.endswith(("{", "({")):
            self.open.append(self.region(text, closed))
        elif not self.scalar(text):
            self.tensor(text)

    def region(self, text: str, closed: Region) -> Region:
        """What begins with a line; `closed`: what ends with it."""
        condition = None
        if found := IF.search(text):
            condition = self.known.get(found[1])
        elif text.startswith("} else") and closed.condition is not None:
            condition = not closed.condition
        self.work.branches |= condition is not None
        around = all(region.taken for region in self.open)
        return Region(self.loop(text, around), around and condition in (None, True), condition)

    def loop(self, text: str, taken: bool) -> Loop | None:
        found = FOR.search(text)
        if not found:
            return None
        index, *bounds = found.groups()
        low, high, step = (self.known.get(name) for name in bounds)
        trips = None if None in (low, high, step) else max(math.ceil((high - low) / step), 0)
        loop = Loop(trips, all(name in self.constants for name in bounds), taken=taken)
        around = [region.loop for region in self.open if region.loop is not None]
        (around[-1].inner if around else self.work.loops).append(loop)
        self.known[index] = low
        for name, first in CARRIED.findall(text.partition("iter_args(")[2]):
            if first in self.base:
                self.base[name] = self.base[first]
        return loop

    def scalar(self, text: str) -> bool:
        """Computes a scalar, if the line is one whose operands are known."""
        if "tensor<" in text:
            return False
        if found := CONSTANT.search(text):
            name, value = found.groups()
            self.constants.add(name)
            self.known[name] = {"true": True, "false": False}.get(value, float(value) if "." in value else None)
            if self.known[name] is None:
                self.known[name] = int(value)
        elif found := PROGRAM.search(text):
            self.known[found[1]] = self.program[found[2]].get(found[3], 0)
        elif found := COMPARE.search(text):
            self.compute(found[1], COMPARISONS.get(found[2]), found[3], found[4])
        elif found := SELECT.search(text):
            chosen = self.known.get(found[2])
            if chosen is not None:
                self.known[found[1]] = self.known.get(found[3 if chosen else 4])
        elif found := BINARY.search(text):
            self.compute(found[1], INTEGERS.get(found[2]), found[3], found[4])
        elif found := CAST.search(text):
            self.known[found[1]] = self.known.get(found[2])
        elif found := POINTER.search(text):
            self.base[found[1]] = self.base.get(found[2])
        return True

    def compute(self, name: str, function: object, *operands: str) -> None:
        numbers = [self.known.get(operand) for operand in operands]
        self.known[name] = None if function is None or None in numbers else function(*numbers)

    def tensor(self, text: str) -> None:
        loops = [region.loop for region in self.open if region.loop is not None]
        times = math.prod(1 if loop.trips is None else loop.trips for loop in loops)
        if not all(region.taken for region in self.open):
            times = 0
        if found := ACCESS.search(text):
            kind, pointer, shape, element = found.groups()
            size = math.prod(map(int, shape.split("x"))) * SIZES.get(element, 4) * times
            to = self.work.read if kind == "load" else self.work.written
            name = self.base.get(pointer) or ""
            to[name] = to.get(name, 0.0) + size
        elif found := DOT.search(text):
            m, k, element, n = found.groups()
            count = 2.0 * int(m) * int(k) * int(n) * times
            if element == "f32" and "tf32" not in text:
                self.work.exact_products += count
            else:
                self.work.products += count
        elif found := POINTER.search(text):
            self.base[found[1]] = self.base.get(found[2])
