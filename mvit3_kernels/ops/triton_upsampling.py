"""What the Triton kernels of bilinear up-sampling share: which inputs an output mixes, how a label map is divided among
programs, and the classes of one as tiles.

A map (B, h, w, C) is up-sampled to (B, H, W, C), which never exists. Output rows that mix the same two rows of the map
are a band. A program owns COLUMNS neighbouring columns and a split of the rows of one band. Mixed along x once, the two
rows of the map stay in registers, two values for each column and class, and the program walks down its rows: an output
is then one product and one addition from them, and what differs from row to row is a scalar.

Coordinates are fractions of whole numbers, so that they are exact: output y reads at max(y * step - offset, 0) / whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .sizes import cdiv, next_power_of_2
from .triton_common import multiprocessors

# Whose compiler divides the first of several axes that are alike to it among threads, where later ones take the last.
FIRST_AXIS = tl.constexpr(triton.__version__.startswith("3.6."))
LARGEST = tl.constexpr(3.4028234663852886e38)
MOST_BLOCKS = 5
MOST_LANES = 16
# Programs for each multiprocessor: its registers hold 20 to 30 warps of them.
PROGRAMS_PER_SM = 16
MIN_ROWS = 4  # of a program: its start costs about as much as one row

# one binary for every batch and map size
SIZES = [f"{name}_{axis}" for axis in "yx" for name in ("inputs", "outputs", "step", "offset", "whole")]
NOT_SPECIALIZED = [*SIZES, "splits", "blocks"]


class Axis(NamedTuple):
    """One axis of an up-sampling, as torch.nn.functional.interpolate maps coordinates."""

    inputs: int
    outputs: int
    step: int
    offset: int
    whole: int

    @staticmethod
    def of(inputs: int, outputs: int, align_corners: bool) -> Axis:
        if not align_corners:
            return Axis(inputs, outputs, 2 * inputs, outputs - inputs, 2 * outputs)
        if inputs == 1 or outputs == 1:
            return Axis(inputs, outputs, 1, outputs, outputs)  # every output reads input 0
        return Axis(inputs, outputs, inputs - 1, 0, outputs - 1)

    @property
    def most_outputs(self) -> int:
        """No fewer than the outputs that one input is the lower one of."""
        return min(self.outputs, -(-3 * self.whole // (2 * self.step)) + 1)

    def most_inputs(self, outputs: int) -> int:
        """No fewer than the inputs that so many neighbouring outputs read."""
        return min(self.inputs, (min(outputs, self.outputs) - 1) * self.step // self.whole + 3)


def configurations(classes: int) -> list[tuning.Configuration]:
    """Columns of a program, threads that share a column's classes, and a thread's classes of a block, the ones that are
    used first. A thread has one column and up to 20 of its classes, of each of which it holds five values: sums over
    classes and what a column costs by itself are then a quarter of the instructions. With 10 they are a third, but
    twice as many warps fit."""
    chosen = []
    for depth in (4, 2):
        lanes = next_power_of_2(cdiv(classes, depth * MOST_BLOCKS))
        if lanes > MOST_LANES:  # many, in groups: programs of 4 warps, which the assembler gives all their registers
            lanes = MOST_LANES // 2
        columns = max(32 // lanes, 16)
        chosen.append({"COLUMNS": columns, "DEPTH": depth, "LANES": lanes, "num_warps": columns * lanes // 32})
    return chosen


class Upsampling:
    """A launch: the two axes, and how the label map is divided."""

    def __init__(self, logits: Tensor, size: Sequence[int], align_corners: bool, kernel: str):
        self.batch, height, width, self.classes = logits.shape
        self.rows, self.columns = (Axis.of(n, m, align_corners) for n, m in zip((height, width), size, strict=True))
        self.config = tuning.choose(kernel, logits, (self.classes,), lambda: configurations(self.classes))
        block = self.config["DEPTH"] * self.config["LANES"]
        self.many = self.classes > block * MOST_BLOCKS  # classes than a program holds
        self.class_blocks = MOST_BLOCKS - 1 if self.many else cdiv(self.classes, block)
        self.groups = cdiv(self.classes, block * self.class_blocks)
        self.blocks = cdiv(self.columns.outputs, self.config["COLUMNS"])
        wanted = cdiv(PROGRAMS_PER_SM * multiprocessors(logits), max(self.batch * height * self.blocks, 1))
        self.splits = min(wanted, cdiv(self.rows.most_outputs, MIN_ROWS))
        self.programs = self.batch * height * self.splits * self.blocks

    @property
    def slots(self) -> int:
        """Inputs of a row of the map that the columns of a program read, at most."""
        return self.columns.most_inputs(self.config["COLUMNS"])

    @property
    def sizes(self) -> tuple[int, ...]:
        return *self.rows, *self.columns, self.splits, self.blocks

    @property
    def flags(self) -> dict[str, int]:
        return {"C": self.classes, "BLOCKS": self.class_blocks, "MANY": self.many, **self.config}


# An axis in a kernel is the tuple of the fields of `Axis`.


@triton.jit
def _position(output, axis):
    """Where an output reads, times `whole`."""
    return tl.maximum(output * axis[2] - axis[3], 0)


@triton.jit
def first_output(low, axis):
    """The first output whose lower input is `low` or a later one."""
    inputs, outputs, step, offset, whole = axis
    first = tl.minimum((low * whole + offset + step - 1) // step, outputs)
    return tl.where(low <= 0, 0, tl.where(low >= inputs, outputs, first))


@triton.jit
def lower_input(output, axis):
    return _position(output, axis) // axis[4]


@triton.jit
def upper_input(low, axis):
    """The other input of outputs with this lower one. An axis that keeps its size meets no neighbour, as in PyTorch: 0
    times an infinite one would be NaN."""
    return tl.where(axis[0] == axis[1], low, tl.minimum(low + 1, axis[0] - 1))


@triton.jit
def share_of_upper(output, low, axis):
    whole = low * 0 + axis[4]
    return (_position(output, axis) - low * whole).to(tl.float32) / whole.to(tl.float32)


@triton.jit
def place_of_program(program, rows, splits, blocks):
    """Image (int64), band, block of columns, and first and end row of a program."""
    block = program % blocks
    split = program // blocks % splits
    band = program // (blocks * splits)
    image, band = (band // rows[0]).to(tl.int64), band % rows[0]
    begin, end = first_output(band, rows), first_output(band + 1, rows)
    per_split = tl.cdiv(end - begin, splits)
    begin += split * per_split
    return image, band, block, begin, tl.minimum(begin + per_split, end)


@triton.jit
def columns_of_block(block, columns, COLUMNS: tl.constexpr):
    """The columns of a block, those behind the last one as the last; which there are; their inputs and shares."""
    x = block * COLUMNS + tl.arange(0, COLUMNS)
    valid = x < columns[1]
    x = tl.minimum(x, columns[1] - 1)
    low = lower_input(x, columns)
    return x, valid, low, upper_input(low, columns), share_of_upper(x, low, columns)


@triton.jit
def classes_of_block(first, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """The classes of a block, (DEPTH, 1, LANES). That lanes are neighbours is kept from the compiler: it would load
    several at once, and for that divide columns and classes among threads in another way."""
    depth, lane = tl.arange(0, DEPTH)[:, None, None], tl.arange(0, LANES)[None, None, :]
    return tl.max_contiguous(first + depth * LANES + lane, (1, 1, 1))


@triton.jit
def mix(low, high, share):
    """Both products are made, as in PyTorch, so that infinite values have its results."""
    return tl.fma(high, share, low * (1 - share))


@triton.jit
def _load(row_ptr, c, tokens, C: tl.constexpr):
    """Classes of pixels of a row of the map, (DEPTH, COLUMNS, LANES), of which lanes and then columns are divided among
    threads: the axes are alike to the compiler."""
    valid = c < C
    if FIRST_AXIS:
        at = tl.trans(tokens[None, :, None] * C + c, 2, 1, 0)
        tile = tl.trans(tl.load(row_ptr + at, mask=tl.trans(valid, 2, 1, 0), other=0.0), 2, 1, 0)
    else:
        tile = tl.load(row_ptr + tokens[None, :, None] * C + c, mask=valid, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def load_mixed(row_ptr, c, low, high, across, C: tl.constexpr):
    """A row of the map at `row_ptr`, (w, C), mixed for columns: (DEPTH, COLUMNS, LANES) in float32."""
    share = tl.broadcast_to(across[None, :, None], c.shape[0], across.shape[0], c.shape[2])
    return mix(_load(row_ptr, c, low, C=C), _load(row_ptr, c, high, C=C), share)


@triton.jit
def load_bands(
    logits_ptr, image, band, group, low, high, across, rows, columns,
    C: tl.constexpr, BLOCKS: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The two rows of the map that a band mixes, each mixed for columns: tuples of a tile for each block of classes
    from `group` on."""
    upper = ()
    lower = ()
    logits_ptr += image * rows[0] * columns[0] * C
    for k in tl.static_range(BLOCKS):
        c = classes_of_block(group + k * DEPTH * LANES, DEPTH, LANES)
        upper += (load_mixed(logits_ptr + band * columns[0] * C, c, low, high, across, C),)
        row_ptr = logits_ptr + upper_input(band, rows) * columns[0] * C
        lower += (load_mixed(row_ptr, c, low, high, across, C),)
    return upper, lower


@triton.jit
def logits_of_row(
    upper, lower, down, group, C: tl.constexpr, BLOCKS: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
    MANY: tl.constexpr,
):  # fmt: skip
    """A row's logits, a tile of each block of classes; -inf behind the classes."""
    z = ()
    for k in tl.static_range(BLOCKS):
        mixed = mix(upper[k], lower[k], down)
        if MANY or (k + 1) * DEPTH * LANES > C:
            mixed = tl.where(classes_of_block(group + k * DEPTH * LANES, DEPTH, LANES) < C, mixed, float("-inf"))
        z += (mixed,)
    return z


@triton.jit
def largest_of_row(z, BLOCKS: tl.constexpr):
    """The largest of a row's logits, (COLUMNS,)."""
    peak = tl.max(z[0], 0)
    for k in tl.static_range(1, BLOCKS):
        peak = tl.maximum(peak, tl.max(z[k], 0))
    return tl.max(peak, 1)


@triton.jit
def exponential(x):
    return tl.exp2(x * 1.4426950408889634)  # exp(x) minds results below 2^-126, which costs three instructions more
