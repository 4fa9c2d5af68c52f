"""softmax(q k^T / sqrt(dim)) v with every derivative: PyTorch's fused attention has the first one only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(dim)) in the dtype of q; (..., queries, keys)."""
    return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1).to(q.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(dim)) v, all (..., tokens, dim): fused wherever a first derivative is the most that can be
    asked for."""
    if not dispatch.writes_aten() and dispatch.transform() is not None:
        return probabilities(q, k) @ v
    out = F.scaled_dot_product_attention(q, k, v)
    if torch.compiler.is_compiling() or dispatch.writes_aten() or not (torch.is_grad_enabled() and out.requires_grad):
        return out
    return _Differentiable.apply(out, q, k, v)


class _Differentiable(torch.autograd.Function):
    """`out` as it is. A gradient goes back through the fused attention that made it or, where it is to be
    differentiated again (create_graph), through its formula written out."""

    @staticmethod
    def forward(ctx, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)  # which the fused attention keeps too: no memory of its own
        return out.view_as(out)

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return dout, None, None, None
        q, k, v = ctx.saved_tensors
        p = probabilities(q, k)
        dp = dout @ v.transpose(-2, -1)
        dscores = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        return None, dscores @ k, dscores.transpose(-2, -1) @ q, p.transpose(-2, -1) @ dout
