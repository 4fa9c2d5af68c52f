"""What batch_norm_act means, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sizes import values_per_channel
from ..types import BatchNorm, Moments


def activate(y: Tensor, act: str) -> Tensor:
    if act == "silu":
        return F.silu(y)
    return F.relu(y) if act == "relu" else y


def batch_norm_act(x: Tensor, norm: BatchNorm, act: str = "identity", residual: Tensor | None = None) -> tuple[Tensor, Moments | None]:
    """act(batch_norm(x)) + residual, and the batch's moments in training (None otherwise)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    channels, rows = x.shape[-1], values_per_channel(x)
    # Contiguous, because torch's backward of a channels_last map takes these for that (2.15 reads the memory between their values).
    weight, bias = norm.weight.to(dtype).contiguous(), norm.bias.to(dtype).contiguous()
    nchw = x.permute(0, 3, 1, 2)  # a view: NHWC memory is PyTorch's channels_last
    moments = None
    if norm.training and rows == 0:
        y, moments = nchw + 0 * (weight + bias)[:, None, None].to(x.dtype), Moments(*x.new_zeros(2, channels, dtype=dtype))
    elif norm.training:
        # Momentum 1 on fresh buffers makes F.batch_norm hand over the batch's mean and unbiased variance; made from x, because under
        # vmap each sample then has its own.
        mean, var = x.new_zeros(channels, dtype=dtype), x.new_zeros(channels, dtype=dtype)
        y = F.batch_norm(nchw, mean, var, weight, bias, True, 1.0, norm.eps)
        moments = Moments(mean, var * ((rows - 1) / rows))
    else:
        mean, var = norm.running_mean.to(dtype).contiguous(), norm.running_var.to(dtype).contiguous()
        y = F.batch_norm(nchw, mean, var, weight, bias, False, 0.0, norm.eps)
    y = activate(y.permute(0, 2, 3, 1), act)
    return (y if residual is None else y + residual), moments


def batch_norm_act_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, training: bool, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias for the gradient `dy` of act(batch_norm(x)); mean and var are those that normalised x."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rstd = (var.to(dtype) + eps).rsqrt()
    normal = (x.to(dtype) - mean.to(dtype)) * rstd
    grad = dy.to(dtype)
    if act != "identity":
        pre = normal * weight.to(dtype) + bias.to(dtype)
        sigmoid = pre.sigmoid()
        grad = grad * (sigmoid * (1 + pre * (1 - sigmoid)) if act == "silu" else (pre > 0))
    dbias, dweight = grad.sum((0, 1, 2)), (grad * normal).sum((0, 1, 2))
    if training:
        rows = max(values_per_channel(x), 1)
        grad = grad - dbias / rows - normal * (dweight / rows)
    return (grad * (weight.to(dtype) * rstd)).to(x.dtype), dweight.to(weight.dtype), dbias.to(bias.dtype)
