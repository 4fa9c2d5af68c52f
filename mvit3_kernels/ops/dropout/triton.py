"""The Triton kernel of dropout: one launch forward, one backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Call
from ..sizes import cdiv
from ..triton_common import contiguous, dropout_threshold, on_device
from . import kernels

BLOCK = 1024


def bytes_moved(x: Tensor, residual: bool) -> tuple[int, int]:
    """Bytes of full-size tensors that the forward and the backward pass read and write: x, y and the residual; dy and
    dx."""
    size = x.numel() * x.element_size()
    return size * (3 if residual else 2), size * 2


def drop(x: Tensor, p: float, seed: Tensor | None, residual: Tensor | None, site: int = 0) -> Tensor:
    """dropout(x) + residual, for contiguous x and residual; `site`: which of an op's dropouts it is (random.py)."""
    if p == 0:
        return x.clone() if residual is None else x + residual
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    elements = x[0].numel()
    blocks = cdiv(elements, BLOCK)
    with on_device(x):
        kernels.dropout_kernel[(x.shape[0] * blocks,)](
            x, residual, seed, y, elements, blocks, dropout_threshold(p), 1 / (1 - p),
            SITE=site, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return y


def dropout_forward(call: Call) -> Tensor:
    x, residual = contiguous(call.x, call.residual)
    return drop(x, call.p, call.seed, residual)


def dropout_backward(call: Call) -> Tensor:
    return drop(call.dy.contiguous(), call.p, call.seed, None)
