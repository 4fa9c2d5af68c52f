"""How long a launch takes: the longest of what limits it, and the time from one launch to the next.

The limits of a launch are the bytes that its tensors must move (memory), all bytes that its programs ask for (l2), its
products (tensor cores), the instructions that its warps issue (issue), and, where few blocks run at once, how long one
of them waits and computes by itself (latency).
"""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.gpu_model import cuda_kernels, device, sass, ttir
from benchmarks.gpu_model.trace import Launch


@dataclass
class Code:
    """A compiled kernel: what the budgets and the model read of it."""

    registers: int
    stack: int  # bytes of a thread; above 0 it spills
    shared: int
    warps: int
    loop: sass.Loop

    @property
    def wgmma(self) -> bool:
        return any(loop.counts["wgmma"] for loop in self.loop.walk())


@dataclass
class Prediction:
    """A launch. seconds: with START. instructions: of threads, in total."""

    name: str
    kind: str  # triton, cuda, aten or compiled: what its launch costs the CPU
    seconds: float
    limit: str
    blocks: int = 0
    resident: int = 0
    waves: float = 0.0
    bytes: float = 0.0
    instructions: float = 0.0
    products: float = 0.0
    launches: int = 1
    key: str = ""
    sure: bool = True  # whether each loop of the source was found in the code, with bounds that are known


_codes: dict[str, Code] = {}


def code_of(compiled: Any) -> Code:
    """Reads a kernel that Triton compiled for NVIDIA; each one once."""
    if compiled.hash not in _codes:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [sass.tool("cuobjdump"), "-res-usage", file.name]
            usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            text = subprocess.run(
                [sass.tool("nvdisasm"), "-ndf", "-c", file.name], capture_output=True, text=True
            ).stdout
        registers, stack = (int(re.search(rf"{n}:(\d+)", usage)[1]) for n in ("REG", "STACK"))
        loop = next(iter(sass.kernels(text).values()))
        meta = compiled.metadata
        _codes[compiled.hash] = Code(registers, stack, meta.shared, meta.num_warps, loop)
    return _codes[compiled.hash]


# Which loop of the code is which of the source


Passes = list[tuple[sass.Loop, float, bool]]  # of each loop of the code: how often it runs; whether that is a guess


def passes(source: list[ttir.Loop], code: sass.Loop, times: float = 1.0) -> Passes:
    """How often each loop of the code runs. Loops have one order in both; one of constant length may be missing,
    unrolled, and one that was unrolled in part is two, the second one for what is left over."""
    source = _not_unrolled(source, len(code.inner))
    found: Passes = []
    machine, guess = list(code.inner), False
    while source and machine:
        loop, here = source.pop(0), machine.pop(0)
        trips = (1 if loop.trips is None else loop.trips) if loop.taken else 0
        guess = loop.trips is None
        if len(machine) > len(source) and (factor := _unrolled(here, machine[0])) > 1:
            rest = machine.pop(0)
            found += _of_loop(loop, rest, times * (trips % factor), guess)
            trips //= factor
        found += _of_loop(loop, here, times * trips, guess)
    for here in machine:
        found += [(inner, times, True) for inner in here.walk()]
    return found


def _of_loop(loop: ttir.Loop, here: sass.Loop, times: float, guess: bool) -> Passes:
    return [(here, times, guess), *passes(loop.inner, here, times)]


def _not_unrolled(source: list[ttir.Loop], left: int) -> list[ttir.Loop]:
    """The loops of the source without the shortest ones of constant length, whose loops take their place."""
    source = list(source)
    while len(source) > left:
        constant = [loop for loop in source if loop.constant]
        if not constant:
            break
        shortest = min(constant, key=lambda loop: loop.trips or 0)
        at = source.index(shortest)
        source[at : at + 1] = shortest.inner * max(shortest.trips or 1, 1)
    return source


def _unrolled(here: sass.Loop, rest: sass.Loop) -> int:
    """How many passes of `rest` one of `here` is, judged by what both must do."""
    for kind in ("loads", "copies", "mma", "wgmma", "stores", "special"):
        if here.counts[kind] and rest.counts[kind]:
            return here.counts[kind] // rest.counts[kind]
    return 1


# The time of a launch

SAMPLED = 6  # programs along each axis of a grid whose programs go different ways


@dataclass
class Demand:
    """What a launch asks of a GPU."""

    blocks: int
    warps: int
    resident: int
    instructions: float  # of warps, of one block
    special: float  # of these, on the unit for exponentials and roots
    alone: list[float]  # cycles that a block waits and computes where nothing else runs, of each kind of block
    bytes: float
    cached: float
    products: float
    wgmma: bool


def duration(d: Demand) -> tuple[float, str, float]:
    """Seconds without START, the limit, and waves."""
    waves = d.blocks / (device.MULTIPROCESSORS * d.resident)
    rounds = max(math.ceil(waves) if waves < 4 else waves, 1)
    here = min(d.resident, math.ceil(d.blocks / device.MULTIPROCESSORS))  # blocks of a multiprocessor at once
    issued = device.SCHEDULERS * min(
        device.ISSUED_AT_MOST, d.warps * here / device.SCHEDULERS * device.ISSUED_BY_A_WARP
    )
    work = rounds * here * (d.instructions + device.FOURTH_OF_RATE * d.special)
    limits = {
        "memory": d.bytes / device.MEMORY,
        "l2": d.cached / device.L2,
        "tensor cores": d.products / (device.WGMMA if d.wgmma else device.MMA_SYNC),
        "issue": work / issued / device.CLOCK,
        "latency": max(rounds * sum(d.alone) / len(d.alone), max(d.alone)) / device.CLOCK,
    }
    limit = max(limits, key=limits.get)
    return limits[limit], limit, waves


def _cycles_alone(own: Passes, code: Code, latency: float) -> float:
    """Cycles of a block by itself: its instructions, and the loads that it waits for. A loop whose loads are copied
    ahead waits for what is left of their time after the instructions of a pass."""
    issued = device.SCHEDULERS * min(device.ISSUED_AT_MOST, code.warps / device.SCHEDULERS * device.ISSUED_BY_A_WARP)
    cycles = code.loop.counts["all"] * code.warps / issued + latency
    for loop, times, _ in own:
        each = loop.counts["all"] * code.warps / issued
        waits = 0.0
        if loop.counts["copies"]:
            waits = max(latency - each, 0.0)
        elif loop.counts["loads"]:
            waits = latency
        cycles += times * (each + waits)
    return cycles


def _size(value: Any) -> float:
    if isinstance(value, Tensor):
        return float(value.numel() * value.element_size())
    return sum(_size(part) for part in value) if isinstance(value, tuple) else 0.0


def moved_bytes(launch: Launch, work: ttir.Work, blocks: int) -> tuple[float, float]:
    """Bytes of the tensors that a launch reads and writes, each counted once; and all that its programs ask for."""
    moved = 0.0
    for kind in (work.read, work.written):
        for name, asked in kind.items():
            if name:
                moved += min(_size(launch.values.get(name)), asked * blocks)
    elsewhere = sum(kind.get("", 0.0) for kind in (work.read, work.written)) * blocks
    others = sum(
        _size(v) for n, v in launch.values.items() if n not in work.read and n not in work.written
    )  # reached through a pointer that was chosen
    return moved + min(others, elsewhere), blocks * (sum(work.read.values()) + sum(work.written.values()))


def key_of(launch: Launch) -> str:
    """A kernel with its constants and types, by which it is recorded."""
    parts = []
    for name, value in launch.values.items():
        if isinstance(value, Tensor):
            parts.append(f"{name.removesuffix('_ptr')}:{str(value.dtype).removeprefix('torch.')}")
        elif isinstance(value, (bool, int)) and (name.isupper() or isinstance(value, bool)):
            parts.append(f"{name}={int(value)}")
        elif isinstance(value, tuple):
            parts.append(f"{name}:{len(value)}")
    return f"{launch.name}[{' '.join(parts)}]"


def triton(launch: Launch) -> Prediction:
    code = code_of(launch.compiled)
    blocks = math.prod(launch.grid)
    values = {k: v for k, v in launch.values.items() if v is not None}
    works = works_of(launch.compiled.asm["ttir"], values, launch.grid)
    ways = [passes(work.loops, code.loop) for work in works]
    count = Counter(code.loop.counts)
    for own in ways:
        for loop, times, _ in own:
            for kind, number in loop.counts.items():
                count[kind] += number * times / len(ways)
    work = ttir.mean(works)
    moved, cached = moved_bytes(launch, work, blocks)
    latency = device.L2_LATENCY if moved < device.L2_HOLDS else device.MEMORY_LATENCY
    resident = device.occupancy(code.registers, code.warps, code.shared).blocks
    demand = Demand(
        blocks, code.warps, resident, count["all"] * code.warps, count["special"] * code.warps,
        [_cycles_alone(own, code, latency) for own in ways], moved, cached, work.products * blocks, code.wgmma,
    )  # fmt: skip
    seconds, limit, waves = duration(demand)
    return Prediction(
        launch.name, "triton", seconds + device.START, limit, blocks, resident, waves, moved,
        32.0 * demand.instructions * blocks, work.products * blocks, key=key_of(launch),
        sure=not any(guess for own in ways for *_, guess in own),
    )  # fmt: skip


def works_of(source: str, values: dict[str, Any], grid: tuple[int, ...]) -> list[ttir.Work]:
    """The work of the program in the middle of a launch; where programs go different ways, that of programs all over
    its grid, a few along each axis."""
    at_middle = tuple(size // 2 for size in grid) if math.prod(grid) > 2 else (0,) * len(grid)
    middle = ttir.work(source, values, at_middle, grid)
    if not middle.branches:
        return [middle]
    along = ([at * size // min(size, SAMPLED) for at in range(min(size, SAMPLED))] for size in grid)
    shift = [size // (2 * SAMPLED) for size in grid]
    return [
        ttir.work(source, values, tuple(at + half for at, half in zip(program, shift, strict=True)), grid)
        for program in itertools.product(*along)
    ]


def cuda(launch: cuda_kernels.CudaLaunch, stride: int) -> Prediction:
    """A launch of csrc/cuda: its main loop is the longest of the code, the shorter ones in it run a few times in each
    step."""
    if launch.code is None:
        seconds = launch.bytes / device.MEMORY + 2 * device.L2_LATENCY / device.CLOCK
        name = launch.name
        return Prediction(name, "cuda", seconds + device.START, "start", launch.blocks, 1, 0.0, launch.bytes)
    code = cuda_kernels.find(launch.code, stride)
    instructions, special = cuda_kernels.of_steps(launch, code)
    instructions += code.loop.counts["all"]
    warps = cuda_kernels.WARPS
    resident = device.occupancy(code.registers, warps, launch.shared).blocks
    issued = device.SCHEDULERS * min(device.ISSUED_AT_MOST, warps / device.SCHEDULERS * device.ISSUED_BY_A_WARP)
    demand = Demand(
        launch.blocks, warps, resident, instructions * warps, special * warps,
        [instructions * warps / issued + device.MEMORY_LATENCY],
        launch.bytes, launch.cached, launch.products, False,
    )  # fmt: skip
    seconds, limit, waves = duration(demand)
    return Prediction(
        launch.name, "cuda", seconds + device.START, limit, launch.blocks, resident, waves, launch.bytes,
        32.0 * demand.instructions * launch.blocks, launch.products,
    )  # fmt: skip
