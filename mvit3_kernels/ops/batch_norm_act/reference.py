"""What batch_norm_act means, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_activation
from ..sizes import values_per_channel
from ..types import ACTIVATION_FUNCTIONS, BatchNorm, Moments


def activate(y: Tensor, act: str) -> Tensor:
    """The activation called `act`, one of `ACTIVATIONS`."""
    check_activation(act)
    return ACTIVATION_FUNCTIONS[act](y)


def batch_norm_act(
    x: Tensor, norm: BatchNorm, act: str = "identity", residual: Tensor | None = None
) -> tuple[Tensor, Moments | None]:
    """act(batch_norm(x)) + residual, and the batch's moments in training (None otherwise)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    channels, rows = x.shape[-1], values_per_channel(x)
    # Contiguous, because torch's backward of a channels_last map takes these for that (2.15 reads the memory between
    # their values).
    weight, bias = norm.weight.to(dtype).contiguous(), norm.bias.to(dtype).contiguous()
    nchw = x.permute(0, 3, 1, 2)  # a view: NHWC memory is PyTorch's channels_last
    moments = None
    if norm.training and rows == 0:
        y, moments = (
            nchw + 0 * (weight + bias)[:, None, None].to(x.dtype),
            Moments(*x.new_zeros(2, channels, dtype=dtype)),
        )
    elif norm.training:
        # Momentum 1 on fresh buffers makes F.batch_norm hand over the batch's mean and unbiased variance; made from x,
        # because under vmap each sample then has its own.
        mean, var = x.new_zeros(channels, dtype=dtype), x.new_zeros(channels, dtype=dtype)
        y = F.batch_norm(nchw, mean, var, weight, bias, True, 1.0, norm.eps)
        moments = Moments(mean, var * ((rows - 1) / rows))
    else:
        mean, var = norm.running_mean.to(dtype).contiguous(), norm.running_var.to(dtype).contiguous()
        y = F.batch_norm(nchw, mean, var, weight, bias, False, 0.0, norm.eps)
    y = activate(y.permute(0, 2, 3, 1), act)
    return (y if residual is None else y + residual), moments
