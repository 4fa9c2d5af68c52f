"""The launches of an op of csrc/cuda: blocks, steps of the main loop, bytes and operations, from the geometry that its
sources describe; instructions from the loops of the built extension."""

from __future__ import annotations

import math
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.gpu_model import paths
from benchmarks.gpu_model.device import MULTIPROCESSORS, occupancy
from benchmarks.gpu_model.sass import Loop, kernels, sections, tool
from mvit3_kernels import _native
from mvit3_kernels.ops.inverted_residual.cost import MOST_INPUTS_IN_BACKWARD

WARPS, THREADS, CHUNK = 8, 256, 32  # of a block; expanded channels of a group
# Of a step of the main loop: the share of its instructions that run (the others belong to other activations, to borders
# of maps, to odd numbers of channels), and passes through each small loop in it (copies of a tile, sums of warps).
RUN, SMALL_LOOPS = 0.75, 1.0
# Of the depth-wise kernels, by kernel and stride: columns of a thread, and rows of the filtered map in a pass of its
# loop down the map, as the compiler unrolled it.
WALKS = {("filter", 1): (2, 2), ("filter", 2): (2, 1), ("filter_backward", 1): (2, 6), ("filter_backward", 2): (1, 1)}
# Of the gradient of the fused inverted residual, instructions of a warp that the way through its loop does not show,
# counted on code without other activations, odd and unaligned maps, and maps in parts: for a copy of 16 bytes of a map,
# of parameters, around these; once a tile, and there for 16 inputs; for a pass of its loop over dp.
BACKWARD_COPY, BACKWARD_PARAMETERS, BACKWARD_AROUND, BACKWARD_TILE, BACKWARD_INPUTS, BACKWARD_DP = 8, 2, 12, 175, 32, 14
WIDE_TILE = 235  # of more than 64 inputs
PACKING = 45  # instructions for a word of packed parameters, by the code that float32 weights run


@dataclass
class CudaLaunch:
    """A launch: `steps` of the main loop in each of `blocks`, bytes in memory and in the second-level cache.
    way: what a step runs, where that is known."""

    name: str
    code: str | None  # part of the mangled name, None for the small kernels around
    blocks: int
    steps: float
    shared: int = 0
    bytes: float = 0.0
    cached: float = 0.0
    products: float = 0.0
    way: paths.Way | None = None


@dataclass
class Code:
    """A kernel of the built extension."""

    registers: int
    stack: int
    loop: Loop
    lines: list[str]


def available() -> bool:
    return next(Path(_native.__file__).parent.glob("_cuda.*"), None) is not None


@cache
def codes() -> dict[str, Code]:
    """The kernels of the extension for sm_90, by their mangled names."""
    file = next(Path(_native.__file__).parent.glob("_cuda.*"))
    usage = subprocess.run([tool("cuobjdump"), "-res-usage", "-arch", "sm_90", file], capture_output=True, text=True)
    found = re.findall(r"Function (\w+):\s*REG:(\d+) STACK:(\d+)", usage.stdout)
    text = subprocess.run([tool("cuobjdump"), "-sass", "-arch", "sm_90", file], capture_output=True, text=True).stdout
    text = _as_nvdisasm(text)
    loops, lines = kernels(text), sections(text)
    return {name: Code(int(r), int(s), loops[name], lines[name]) for name, r, s in found if name in loops}


def _as_nvdisasm(text: str) -> str:
    """What cuobjdump prints, which writes addresses where nvdisasm writes labels."""
    lines: list[str] = []
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        name, _, body = part.partition("\n")
        targets = {int(t, 16) for t in re.findall(r"BRA\S*\s+(?:\S+, )?0x([0-9a-f]+)", body)}
        lines.append(f".text.{name.strip()}:")
        for line in body.splitlines():
            at = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+\S", line)
            if at and int(at[1], 16) in targets:
                lines.append(f".L_x_{int(at[1], 16)}:")
            lines.append(re.sub(r"(BRA\S*\s+(?:\S+, )?)0x([0-9a-f]+)", lambda m: f"{m[1]}.L_x_{int(m[2], 16)}", line))
    return "\n".join(lines)


def find(code: str, stride: int, bfloat16: bool = True) -> Code:
    """The kernel whose mangled name has this part, for a stride."""
    number = "BFloat16" if bfloat16 else "Float16"
    matches = [c for name, c in codes().items() if code in name and number in name and f"Li{stride}E" in name]
    if not matches:
        raise LookupError(f"the extension has no kernel {code} of stride {stride}")
    return max(matches, key=lambda c: c.loop.counts["all"])


def main_loop(code: Code) -> Loop:
    """The loop that a kernel spends its time in: over tiles and channels, or that down a map inside of one over
    strips."""
    inner = [loop for outer in code.loop.inner for loop in outer.inner]
    largest = max(code.loop.inner, key=lambda loop: loop.counts["all"])
    if not inner:
        return largest
    deepest = max(inner, key=lambda loop: loop.counts["all"])
    return deepest if largest.counts["loads"] == 0 or deepest.counts["all"] > largest.counts["all"] else largest


def short_name(mangled: str) -> str:
    """Such as cuda.Filter[BFloat16 1] of a kernel's mangled name."""
    name = re.search(r"kernelINS_\d+([A-Za-z]+?)(?:I|E)", mangled)
    parts = re.findall(r"BFloat16|Float16|(?<=I)f(?=[LE])|(?<=L[ib])\d+", mangled)
    return f"cuda.{name[1]}[{' '.join('Float32' if part == 'f' else part for part in parts)}]"


def of_steps(launch: CudaLaunch, code: Code) -> tuple[float, float]:
    """Instructions of a warp in all steps of a block, and those of them for exponentials and the like."""
    if launch.way:
        return launch.steps * launch.way.counts["all"], launch.steps * launch.way.counts["special"]
    main = main_loop(code)
    small = sum(SMALL_LOOPS * loop.counts["all"] for loop in main.walk()[1:])
    return launch.steps * (RUN * main.counts["all"] + small), launch.steps * main.counts["special"]


def launches(op: str, call: Any) -> list[CudaLaunch]:
    """The launches of an op of csrc/cuda, in their order."""
    return _LAUNCHES[op](call)


def _resident(code: Code, shared: int) -> int:
    return MULTIPROCESSORS * occupancy(code.registers, WARPS, shared).blocks


def _blocks(code: str, stride: int, shared: int, most: int) -> int:
    return min(_resident(find(code, stride), shared), most)


def _over_tiles(code: Code) -> Loop:
    """The loop of a kernel that has most of its code."""
    return max(code.loop.inner, key=lambda loop: sum(inner.counts["all"] for inner in loop.walk()))


def _small(name: str, count: float) -> CudaLaunch:
    """Packing of parameters, or sums over blocks: `count` numbers are moved."""
    return CudaLaunch(name, None, max(math.ceil(count / 256), 1), 1.0, bytes=8.0 * count)


def _ceil(n: int, by: int) -> int:
    return -(-n // by)


def _tiles(x: Any, stride: int, tile: tuple[int, int]) -> int:
    batch, height, width = x.shape[0], _ceil(x.shape[1], stride), _ceil(x.shape[2], stride)
    return batch * _ceil(height, tile[0]) * _ceil(width, tile[1])


def _slice(inputs: int) -> int:
    parts = _ceil(inputs, 128)
    return _ceil(_ceil(inputs, parts), 16) * 16


TILE = {1: (8, 16), 2: (4, 8)}  # outputs of a tile, by stride; pixels of x that it is made of, and the same rounded up
PIXELS = {1: (180, 192), 2: (153, 160)}
# Blocks of 16 pixels and of 8 channels of a warp in the expansion, by stride and by channels of a step.
FRONT = {(1, 64): (3, 4), (1, 32): (3, 2), (2, 64): (5, 2), (2, 32): (3, 2)}
TAPS = 2 * 9 * 8  # operations of an output's taps, which are products with diagonal matrices


def _most(inputs: int) -> int:
    """Inputs in shared memory at a time, for which a kernel is compiled."""
    return 64 if inputs <= 64 else 128


def _front_shared(most: int, stride: int, channels: int) -> int:
    pixels, rounded = PIXELS[stride]
    expanded = 80 * channels // CHUNK * (rounded if most == 64 else pixels)
    return 2 * (pixels + channels) * (most + 8) + expanded + 8 * (rounded + channels) + 176 + 48 * channels + 192


def _copying(loop: Loop) -> list[float]:
    """Instructions for a copy of 16 bytes, in the loops in `loop` that copy: least first."""
    return sorted(i.counts["all"] / i.counts["copies"] for i in loop.walk()[1:] if i.counts["copies"] and not i.inner)


def _copying_x(loop: Loop) -> float:
    """The same of the tile of x: its loops copy several pixels at a time, then what is left one by one."""
    each = _copying(loop)
    return (each[0] + each[-1]) / 2


def _step(code: Code, inputs: int, most: int, blocks: tuple[int, int], chunks: int, copied: float) -> paths.Way:
    """What a pass of the loop over tiles runs: `chunks` passes of the loop over channels in it, if it has one, and
    `copied` copies of 16 bytes of x. The code has all steps of 16 of `most` inputs one behind the other, each of them
    for `blocks` of 16 pixels and of 8 channels; those that are not there are taken off."""
    loop = _over_tiles(code)
    slices, products = _ceil(inputs, _slice(inputs)), _slice(inputs) // 16
    with_barriers = [inner for inner in loop.inner if any(deep.counts["barriers"] for deep in inner.walk())]
    over_channels = {id(inner) for inner in with_barriers if chunks > 0}
    over_slices = {id(deep) for i in with_barriers for deep in (i.walk()[1:] if chunks > 0 else [i])}

    def trips(inner: Loop) -> float:
        if id(inner) in over_channels:
            return chunks
        return slices if id(inner) in over_slices and inner.counts["barriers"] else 1

    way = paths.one_pass(paths.read(code.lines), loop, trips)
    rows, columns = blocks
    missing = (most // 16 - products) * slices * max(chunks, 1)
    way = way.then(paths.Way(0, Counter(all=-missing * (rows * (1 + columns) + columns / 2 + 2))))
    return way.then(paths.Way(0, Counter(all=_copying_x(loop) * copied)))


def _filter(call: Any) -> list[CudaLaunch]:
    x, expanded, stride = call.x, call.expand.shape[0], call.stride
    inputs, channels = x.shape[-1], 2 * CHUNK
    most = _most(inputs)
    shared, name = _front_shared(most, stride, channels), f"6FilterINS_8BFloat16ELi{stride}ELi{most}E"
    tiles, slices, (pixels, rounded) = _tiles(x, stride, TILE[stride]), _ceil(expanded, channels), PIXELS[stride]
    code = find(name, stride)
    parts = call.parts
    out = x.shape[0] * _ceil(x.shape[1], stride) * _ceil(x.shape[2], stride)
    read = 2.0 * tiles * slices * pixels * inputs
    if inputs > _slice(inputs):
        read += 2.0 * tiles * slices * channels * inputs
    way = _step(code, inputs, most, FRONT[stride, channels], 0, read / tiles / slices / 16 / THREADS)
    before = []
    if inputs > _slice(inputs):
        before = [_small("inverted_residual.pack", expanded * (inputs + 20))]
    else:  # each block packs its parameters, two numbers at a time
        packed = channels * (most + 8) / 2 + 4 * channels + 16 * 48
        way = way.then(paths.Way(0, Counter(all=PACKING * packed / THREADS * parts / tiles)))
    return [
        *before,
        CudaLaunch(
            "inverted_residual.filter", name, parts * slices, tiles / parts, shared,
            bytes=2.0 * x.numel() + 2.0 * out * expanded, cached=read + 2.0 * out * expanded,
            products=tiles * slices * channels * (2.0 * rounded * inputs + math.prod(TILE[stride]) * TAPS), way=way,
        ),
    ]  # fmt: skip


def _inference(call: Any) -> list[CudaLaunch]:
    x, expanded, outputs, stride = call.x, call.expand.shape[0], call.project.shape[0], call.stride
    inputs, (pixels, rounded), made = x.shape[-1], PIXELS[stride], math.prod(TILE[stride])

    def shared_of(channels: int, widest: int) -> int:
        columns = min(_ceil(outputs, 16) * 16, widest)
        front = _front_shared(64 if channels > CHUNK else 128, stride, channels)
        return front + 2 * (made + columns) * (channels + 8) + 8 * (channels + columns) + 16

    channels, widest = 2 * CHUNK, 64 * stride
    if inputs > 64 or expanded <= CHUNK or outputs > widest or shared_of(channels, widest) > 99 * 1024:
        channels, widest = CHUNK, 128 if stride == 1 else 384
    most = 64 if channels > CHUNK else 128
    shared, name = shared_of(channels, widest), f"9InferenceINS_8BFloat16ELi{stride}ELi{channels}E"
    tiles, slices, chunks = _tiles(x, stride, TILE[stride]), _ceil(outputs, widest), _ceil(expanded, channels)
    code = find(name, stride)
    blocks = min(_resident(code, shared), tiles)
    columns = min(_ceil(outputs, 16) * 16, widest)
    weights, tile = chunks * channels * 2.0 * (inputs + columns), 2.0 * pixels * inputs
    if inputs > _slice(inputs):
        tile *= chunks
    way = _step(code, inputs, most, FRONT[stride, channels], chunks, tile / 16 / THREADS)
    # Weights of the projection are copied by one thread, but where registers are few by all (the way has one copy);
    # slices of those of the expansion always.
    more = columns * (channels + 8) / 8 / THREADS - 1 if (stride, channels) == (1, CHUNK) else 0
    if inputs > _slice(inputs):
        more += _ceil(inputs, _slice(inputs)) * channels * (most + 8) / 8 / THREADS
    # The way has all pairs of blocks of outputs that a warp can have, and a residual.
    pairs = widest // 16 // (2 if stride == 1 else 4)
    missing = pairs - _ceil(_ceil(outputs, 16), 2 if stride == 1 else 4) if slices == 1 else 0
    blocks_of_rows = 2 if stride == 1 else 1
    less = chunks * channels / 16 * missing * (1 + 2 * blocks_of_rows)
    if stride == 1 and channels > CHUNK and inputs != outputs:
        less += pairs * blocks_of_rows * 3
    way = way.then(paths.Way(0, Counter(all=chunks * more * _copying(_over_tiles(code))[0] - less)))
    out = x.shape[0] * _ceil(x.shape[1], stride) * _ceil(x.shape[2], stride) * outputs
    return [
        _small("inverted_residual.pack", expanded * (inputs + outputs + 20)),
        CudaLaunch(
            "inverted_residual.inference", name, blocks * slices, tiles / blocks, shared,
            bytes=2.0 * x.numel() + 2.0 * out, cached=slices * tiles * (tile + weights) + 2.0 * out,
            products=tiles * chunks * channels
            * (slices * (2.0 * rounded * inputs + made * TAPS) + 2.0 * made * outputs), way=way,
        ),
    ]  # fmt: skip


def _backward_step(
    code: Code, stride: int, inputs16: int, width: int, parameters: int, again: tuple[int, int], chunks: int
) -> paths.Way:
    """What a warp runs for 32 expanded channels of a tile, with its part of what runs once a tile. again: parts of the
    outputs and slices of the inputs that each step loads anew, 0 where there is one."""
    rows, pixels = (3, 180) if stride == 1 else (1, 45)
    parts, slices = again
    loop = max(code.loop.inner, key=lambda loop: sum(inner.counts["special"] for inner in loop.walk()))

    def trips(inner: Loop) -> float:
        if inner.counts["barriers"]:
            return sum(again)
        if not inner.counts["mma"]:
            return 1
        at_once = inner.counts["mma"] / (2 * rows)  # of the outputs behind the first 16; what is left comes one by one
        return max((width / 16 - at_once) / at_once, 0.0)

    way = paths.one_pass(paths.read(code.lines), loop, trips)
    of_z = _ceil(4 * pixels, THREADS)
    of_dp = BACKWARD_DP * _ceil(pixels << max((width // 8 - 1).bit_length(), 1), THREADS)
    more = (
        BACKWARD_COPY * (of_z - way.counts["copies"])
        + BACKWARD_AROUND
        + BACKWARD_PARAMETERS * parameters / 16 / THREADS
    )
    more += parts * of_dp + slices * 16 * BACKWARD_COPY
    tile = WIDE_TILE if inputs16 > 4 else BACKWARD_TILE + BACKWARD_INPUTS * inputs16
    return way.then(paths.Way(0, Counter(all=more + (tile + (0 if parts else of_dp)) / chunks)))


def _filter_backward(call: Any) -> list[CudaLaunch]:
    x, expanded, outputs, stride = call.x, call.expand.shape[0], call.project.shape[0], call.stride
    inputs, chunks = x.shape[-1], _ceil(expanded, CHUNK)
    wide = inputs > MOST_INPUTS_IN_BACKWARD
    inputs16 = 8 if wide else 1 if inputs <= 16 else 2 if inputs <= 32 else 4
    slices, pitch = _ceil(inputs, 16 * inputs16), 2 * (16 * inputs16 + 8)
    most, out_pixels, computed, pairs, sums = (64, 180, 192, 10, 20) if stride == 1 else (128, 45, 48, 2.5, 10)
    parts = _ceil(outputs, most * (2 if wide else 1))
    width = _ceil(_ceil(outputs, parts), 16) * 16
    code = f"kernelINS_8BackwardINS_8BFloat16ELi{stride}ELi{inputs16}E"
    own = CHUNK * pitch + 4 * 624 + 16 * CHUNK  # parameters of a step but for the projection
    shared = own + 80 * (out_pixels + 1) + 80 * 128 + 6 * computed + 4 * 128 + 160
    shared += max(80 * width, 80 * 128) if wide else 128 * pitch + 80 * 128 + 80 * width
    shared += 2 * computed * (width + 8)
    tiles = _tiles(x, 1, (8, 16))
    blocks = _blocks(code, stride, shared, tiles)
    z, dp, written = (
        call.z.numel() * 2.0,
        call.dp.numel() * 2.0,
        2.0 * x.numel() / inputs * (expanded if wide else inputs),
    )
    moved = 2.0 * x.numel() + written + z + dp
    border = out_pixels * stride**2 / 128  # filtered pixels of a tile with those around it, for each of its own
    kept = expanded * (sums if wide else 68 + sums)
    packed = own + (slices - 1) * CHUNK * pitch + 80 * width * parts
    again = (parts if parts > 1 else 0, slices if slices > 1 else 0)
    anew = (2 * out_pixels * width * parts if parts > 1 else 0) + (2 * 128 * inputs if slices > 1 else 0)
    return [
        _small("inverted_residual.pack", chunks * packed / 4 + call.part.numel() + (expanded * inputs if wide else 0)),
        CudaLaunch(
            "inverted_residual.filter_backward", code, blocks, tiles * chunks / blocks, shared,
            bytes=moved,
            cached=2.0 * x.numel() + written + border * (z + dp)
            + tiles * chunks * (packed + anew) + 8.0 * tiles * kept,
            products=tiles * chunks * CHUNK * (
                2.0 * (computed * width * parts + 128 * 16 * inputs16 * (slices if wide else 3))
                + computed * 80 + 4096.0 * pairs
            ),
            way=_backward_step(find(code, stride), stride, inputs16, width, packed, again, chunks),
        ),
        _small("inverted_residual.finish_backward", blocks * kept + (0 if wide else expanded * inputs**2)),
    ]  # fmt: skip


def _depthwise(op: str, code: str, call: Any, extra: int) -> list[CudaLaunch]:
    x, stride = call.x, call.stride
    batch, height, width, channels = x.shape
    out_height, out_width = _ceil(height, stride), _ceil(width, stride)
    groups_of_all = _ceil(channels, 4)
    slices = _ceil(groups_of_all, 64)
    groups = _ceil(groups_of_all, slices)
    positions = 256 // groups
    columns, rows_of_a_pass = WALKS[op, stride]
    units = -(-batch * _ceil(out_width, columns) // positions) * out_height
    resident = MULTIPROCESSORS * occupancy(find(code, stride).registers, WARPS, 0).blocks
    blocks = min(max(resident // slices, 1), _ceil(units, 4)) if extra else call.parts
    out = batch * out_height * out_width * channels
    moved = 2.0 * (x.numel() * (2 if extra else 1) + out)
    last = [_small(f"depthwise_conv.finish_{op}", blocks * channels * extra)] if extra else []
    return [
        CudaLaunch(
            f"depthwise_conv.{op}", code, blocks * slices, units / blocks / rows_of_a_pass, 16384,
            bytes=moved, cached=1.5 * moved,
        ),
        *last,
    ]  # fmt: skip


_LAUNCHES = {
    "inverted_residual_filter": _filter,
    "inverted_residual_inference": _inference,
    "inverted_residual_filter_backward": _filter_backward,
    "depthwise_conv_filter": lambda call: _depthwise("filter", "15DepthwiseFilterI", call, 0),
    "depthwise_conv_filter_backward": lambda call: _depthwise("filter_backward", "17DepthwiseBackwardI", call, 9),
}
