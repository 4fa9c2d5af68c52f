"""What a training step of inverted_residual moves and computes on a GPU, and which of its two ways is the cheaper one.

Counted for each pixel of the input, from widths and stride alone: the choice must not depend on batch or size of the map.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Operations in the time of a byte: an H200 at half of 990 TFLOP/s and 4.3 TB/s. Other GPUs differ by less than the estimates below.
OPERATIONS_PER_BYTE = 115
# Pixels around a tile that the fused way computes too: forward of the expanded map, backward of the filtered one.
HALO = 1.5


def fits_a_program(x: Tensor, wide: int) -> bool:
    """Whether a row of the expansion and its whole weight fit a program of the Triton way, so that one read of a gradient serves all."""
    return x.dtype is not torch.float32 and x.shape[-1] <= 64 and wide <= 256


def values_moved(inputs: int, wide: int, outputs: int, skip: bool, store: bool, one_pass: bool) -> tuple[int, int, int, int]:
    """Values read and written: forward for each pixel of the input and of the output, then backward. `store` is the Triton way.

    Forward reads x twice (moments, product), writes and reads z and p, writes y. Backward reads dy and p twice, writes dp and reads it
    twice, reads z twice, reads x twice, and writes dx, then corrects it in place. The Triton way also writes and reads a forward; backward
    it writes and reads dz, reads a, and writes and reads the gradient of a, which without `one_pass` it replaces once and reads twice more,
    with one more read of x. A residual is one more read each way.
    """
    forward, backward = 2 * inputs + inputs * skip, 5 * inputs + inputs * skip
    forward_out, backward_out = 2 * wide + 3 * outputs, 2 * wide + 7 * outputs
    if store:
        forward += 2 * wide
        backward += 3 * wide if one_pass else 6 * wide + inputs
        backward_out += 2 * wide
    return forward, forward_out, backward, backward_out


def _cost(inputs: int, wide: int, outputs: int, stride: int, store: bool) -> float:
    """Of maps in 16 bits, in bytes for each pixel of the input; products and memory overlap."""
    one_pass = inputs <= 64 and wide <= 256
    at_input, at_output, back_at_input, back_at_output = values_moved(inputs, wide, outputs, False, store, one_pass)
    moved = at_input + back_at_input + (at_output + back_at_output) / stride**2
    # Multiply-adds: moments and correction of x; the expansion, again in backward, and its two gradients; the projection and its weight's
    # gradient, and the gradient of its input for the sums and for z.
    border = 1 if store else HALO
    products = 2 * inputs**2 + inputs * wide * (3 + border) + wide * outputs * (3 + border) / stride**2
    return max(2 * moved, 2 * products / OPERATIONS_PER_BYTE)


def storing_is_cheaper(inputs: int, wide: int, outputs: int, stride: int) -> bool:
    """Whether the expanded map had better be stored than made again on chip."""
    return _cost(inputs, wide, outputs, stride, True) < _cost(inputs, wide, outputs, stride, False)
