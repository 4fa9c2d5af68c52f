"""What a training step of inverted_residual moves and computes on a GPU, and which of its two ways is the cheaper one.

Everything is counted for one pixel of the input, from numbers of channels and stride alone: the choice must not depend
on batch or size of the map.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Operations that take as long as one byte of memory traffic: of an H200 that reaches half of its 990 TFLOP/s and 4.3
# TB/s. Other GPUs differ from this by less than the estimates below are wrong.
OPERATIONS_PER_BYTE = 115
# The fused way computes a tile together with a border that its 3x3 taps reach, for 1.5 times the pixels: forward those
# of the expanded map, backward those of z, the result of the depth-wise convolution.
HALO = 1.5
# In evaluation, by the model of benchmarks/gpu_model: with more inputs the fused kernel copies its tile of x anew for
# each 32 expanded channels, and is as slow as three launches or slower; with fewer tiles it leaves most of a GPU idle,
# where three launches take about 25 us.
MOST_INPUTS = 128
LEAST_TILES = 32
# Of up to so many tiles two launches of small tiles take less time, where they filter no more channels than these one
# after the other: at 64x64x64 and 256 channels 13 us instead of 16 at batch 2.
MOST_TILES, MOST_FILTERED = 64, 256
# One launch of Triton takes less than either for as many programs as run at once, of 16 warps on a multiprocessor each,
# and for widths whose tiles fit a program: at batch 1 6 us for 9 with 16 inputs at 128x128, 8 for 9 with 64 at 64x64.
# Of four programs, 80 to 128 at 8x8, it takes 9 us, the three convolutions 6.
LEAST_PROGRAMS, MOST_PROGRAMS, MOST_OUTPUTS = 16, 128, 256
# A depth-wise convolution and a 1x1 one behind it are one launch for so many tiles of 16 pixels, and MOST_FILTERED
# channels: at batch 1 2.4 us for 4.3 of 128 to 144 at 32x32, 3.7 for 4.4 of 256 to 192 at 16x16. With fewer tiles each
# program filters more than the two launches take: 5.4 us for 4.6 of 320 to 240 at 8x8.
LEAST_LOCAL_TILES, MOST_LOCAL_TILES = 16, 64

# With more, the fused kernel of backward writes the gradient of the expanded map instead of multiplying it on chip.
MOST_INPUTS_IN_BACKWARD = 64


def fits_a_program(x: Tensor, expanded: int) -> bool:
    """Whether the expanded channels of some pixels and the whole weight of the expansion fit a program of the Triton
    way, which then reads the gradient of the expanded map once, for everything that follows from it."""
    return x.dtype is not torch.float32 and x.shape[-1] <= 64 and expanded <= 256


def values_moved(
    inputs: int, expanded: int, outputs: int, skip: bool, store: bool, one_pass: bool
) -> tuple[int, int, int, int]:
    """Values read and written in a training step: forward for each pixel of the input and for each pixel of the output,
    then the same backward. `store` is the Triton way, `skip` a residual, which is one more read each way.

    x has `inputs` channels, a (the activated expansion) and z (the result of the depth-wise convolution) `expanded`, p
    (the product before the last norm) and y `outputs`.

    Forward reads x twice (for moments and product), writes and reads z and p, and writes y. Backward reads dy and p
    twice, writes dp and reads it twice, reads z twice and x twice, writes dx, and reads and writes it once more for its
    correction. The Triton way also writes and reads a forward. Backward it writes and reads dz, reads a, and writes and
    reads da; without `one_pass` it also replaces da by another gradient, which it reads twice, and reads x once more.
    With more than MOST_INPUTS_IN_BACKWARD inputs the fused way writes that gradient too.
    """
    forward, backward = 2 * inputs + inputs * skip, 5 * inputs + inputs * skip
    forward_out, backward_out = 2 * expanded + 3 * outputs, 2 * expanded + 7 * outputs
    if store:
        forward += 2 * expanded
        backward += 3 * expanded if one_pass else 6 * expanded + inputs
        backward_out += 2 * expanded
    elif inputs > MOST_INPUTS_IN_BACKWARD:
        backward += 3 * expanded + inputs
    return forward, forward_out, backward, backward_out


def _cost(inputs: int, expanded: int, outputs: int, stride: int, store: bool) -> float:
    """What a training step costs for each pixel of the input, in bytes: the larger of its memory traffic, of maps in 16
    bits, and its products, for the two happen at the same time."""
    one_pass = inputs <= 64 and expanded <= 256
    at_input, at_output, back_at_input, back_at_output = values_moved(inputs, expanded, outputs, False, store, one_pass)
    moved = at_input + back_at_input + (at_output + back_at_output) / stride**2
    # Multiply-adds. For each pixel of the input: the moments of x and the correction of dx; the expansion, made once
    # more in backward, and the gradients of x and of the weight through it. For each pixel of the output: the
    # projection, the gradient of its weight, and the gradient of its input twice, for the sums and for dz. What the
    # fused way computes in backward has the border too.
    border = 1 if store else HALO
    products = 2 * inputs**2 + inputs * expanded * (3 + border) + expanded * outputs * (3 + border) / stride**2
    return max(2 * moved, 2 * products / OPERATIONS_PER_BYTE)


def storing_is_cheaper(inputs: int, expanded: int, outputs: int, stride: int) -> bool:
    """Whether the expanded map had better be stored than made again on chip."""
    return _cost(inputs, expanded, outputs, stride, True) < _cost(inputs, expanded, outputs, stride, False)


def evaluation_why_not(x: Tensor, expanded: int, stride: int) -> str | None:
    """Why two or three launches had better evaluate the block than the fused CUDA kernel."""
    inputs, tiles = x.shape[-1], _tiles(x, stride)
    if inputs > MOST_INPUTS:
        return f"at {inputs} input channels three launches are cheaper than its CUDA kernel of evaluation"
    if tiles < LEAST_TILES or few_pixels_why_not(x, expanded, stride) is None:
        return (
            f"its CUDA kernel of evaluation has {tiles} tiles of this map, launches of smaller ones fill more of a GPU"
        )
    return None


def few_pixels_why_not(x: Tensor, expanded: int, stride: int) -> str | None:
    """Why evaluation had better not be two launches of small tiles."""
    if expanded > MOST_FILTERED:
        return f"with {expanded} expanded channels three launches are cheaper than two"
    tiles = _tiles(x, stride)
    return f"{tiles} tiles of its CUDA kernel fill a GPU, two launches are for fewer" if tiles > MOST_TILES else None


def tile_of(x: Tensor, expanded: int, stride: int) -> tuple[int, int, int]:
    """Rows and columns of the outputs of a program that evaluates the whole block, and its warps: few expanded
    channels take larger tiles, of which two share a multiprocessor, and few outputs smaller ones."""
    if expanded <= 64 and _tiles_of(x, stride, 8, 8) >= MOST_PROGRAMS // 4:
        return 8, 8, 8
    return (4, 8, 16) if _tiles_of(x, stride, 4, 8) > MOST_PROGRAMS // 2 else (4, 4, 16)


def one_launch_why_not(x: Tensor, expanded: int, outputs: int, stride: int, dilation: int) -> str | None:
    """Why evaluation had better not be one launch of Triton."""
    inputs, (rows, columns, warps) = x.shape[-1], tile_of(x, expanded, stride)
    if inputs > MOST_INPUTS or expanded > MOST_FILTERED or outputs > MOST_OUTPUTS:
        most = f"{MOST_INPUTS}, {MOST_FILTERED} and {MOST_OUTPUTS}"
        return f"one launch evaluates up to {most} channels, these are {inputs}, {expanded} and {outputs}"
    if dilation > 1:
        return f"one launch evaluates undilated convolutions, got {dilation}"
    programs, most = _tiles_of(x, stride, rows, columns), MOST_PROGRAMS * 16 // warps
    if LEAST_PROGRAMS <= programs <= most:
        return None
    return f"one launch evaluates maps of {LEAST_PROGRAMS} to {most} tiles, x has {programs}"


def local_why_not(x: Tensor, outputs: int) -> str | None:
    """Why a depth-wise convolution, of stride 1, and a 1x1 one had better be two launches."""
    if max(x.shape[-1], outputs) > MOST_FILTERED:
        return f"one launch takes up to {MOST_FILTERED} channels, these are {x.shape[-1]} and {outputs}"
    tiles = -(-x.shape[:-1].numel() // 16)
    if LEAST_LOCAL_TILES <= tiles <= MOST_LOCAL_TILES:
        return None
    return f"one launch takes {LEAST_LOCAL_TILES} to {MOST_LOCAL_TILES} tiles of 16 pixels, x has {tiles}"


def _tiles(x: Tensor, stride: int) -> int:
    """Of the CUDA kernel of evaluation."""
    return _tiles_of(x, stride, *((8, 16) if stride == 1 else (4, 8)))


def _tiles_of(x: Tensor, stride: int, rows: int, columns: int) -> int:
    return x.shape[0] * -(-x.shape[1] // (stride * rows)) * -(-x.shape[2] // (stride * columns))
