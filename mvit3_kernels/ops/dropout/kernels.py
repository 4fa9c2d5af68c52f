"""The Triton kernel of dropout; triton.py launches it."""

from __future__ import annotations

import triton.language as tl

from ..triton_common import dropout_kept, dropout_key
from ..triton_launch import jit_kernel


@jit_kernel(do_not_specialize=["elements", "blocks", "keep", "keep_scale"])
def dropout_kernel(
    x_ptr,  # (samples, elements)
    residual_ptr,  # the same, or None
    seed_ptr,  # int64
    y_ptr,  # written: the same
    elements, blocks, keep, keep_scale,
    SITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a sample: of dropout with the threshold `keep`, divided by the probability that it keeps."""
    sample, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    element = block * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    at = sample.to(tl.int64) * elements + element
    value = tl.load(x_ptr + at, inside).to(tl.float32)
    kept = dropout_kept(dropout_key(seed_ptr, sample, SITE=SITE), element, keep)
    value = value * tl.where(kept, keep_scale, 0.0)  # NaN stays NaN
    if residual_ptr is not None:
        value += tl.load(residual_ptr + at, inside).to(tl.float32)
    tl.store(y_ptr + at, value.to(y_ptr.dtype.element_ty), inside)
