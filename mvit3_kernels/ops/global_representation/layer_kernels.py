"""The Triton kernel that finishes the gradients of a layer's parameters."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_row_gradients import norm_linear_gradient_kernel, second_gradient_kernel


@triton.jit(do_not_specialize=["qkv_parts", "qkv_norm_parts", "fc1_parts", "fc1_norm_parts", "out_parts", "fc2_parts"])
def layer_gradient_kernel(
    qkv, fc1,  # the tensors of norm_linear_gradient_kernel, in its order
    out, fc2,  # those of second_gradient_kernel
    qkv_parts, qkv_norm_parts, fc1_parts, fc1_norm_parts, out_parts, fc2_parts,
    C: tl.constexpr, F: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The gradients of both norms and of the four linear maps of a layer, from the sums of parts of the rows. The third
    axis of the grid is which, the others are as in the kernels of the linear maps, as long as the longest needs."""
    which, block = tl.program_id(2), tl.program_id(1)
    if which == 0:
        if block * BLOCK_O < 3 * C:
            norm_linear_gradient_kernel(
                qkv[0], qkv[1], qkv[2], qkv[3], qkv[4], qkv[5], qkv[6], qkv[7], qkv[8], qkv_parts, qkv_norm_parts,
                OUT=3 * C, C=C, BLOCK_C=BLOCK_C, BLOCK_O=BLOCK_O,
            )  # fmt: skip
    elif which == 1:
        if block * BLOCK_O < F:
            norm_linear_gradient_kernel(
                fc1[0], fc1[1], fc1[2], fc1[3], fc1[4], fc1[5], fc1[6], fc1[7], fc1[8], fc1_parts, fc1_norm_parts,
                OUT=F, C=C, BLOCK_C=BLOCK_C, BLOCK_O=BLOCK_O,
            )  # fmt: skip
    elif which == 2:
        if block * BLOCK_F < C:
            second_gradient_kernel(
                out[0], out[1], out[2], out[3], out_parts, F=C, C=C, BLOCK_C=BLOCK_C, BLOCK_F=BLOCK_F
            )
    elif block * BLOCK_F < F:
        second_gradient_kernel(fc2[0], fc2[1], fc2[2], fc2[3], fc2_parts, F=F, C=C, BLOCK_C=BLOCK_C, BLOCK_F=BLOCK_F)
