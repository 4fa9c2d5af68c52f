"""The parameters of an op, grouped as the networks group them. All are plain tuples: an op stays a function of
tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

# The activations that ops know, by name.
ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda y: y, "silu": F.silu, "relu": F.relu}
# The position in this tuple is the code that a kernel receives.
ACTIVATIONS = tuple(ACTIVATION_FUNCTIONS)


class BatchNorm(NamedTuple):
    """Batch normalisation over B, H and W. `training` uses the batch's statistics, else `running_mean` and
    `running_var`, all (C,)."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    eps: float = 1e-5


class Moments(NamedTuple):
    """What batch normalisation measured: mean and biased (population) variance of each channel, (C,), float32 (float64
    for float64 x). Not differentiable: the op already differentiates through them."""

    mean: Tensor
    var: Tensor


class LayerNorm(NamedTuple):
    """Layer normalisation of each token over its channels or, with `per_sample`, of each sample over H, W and C
    together (one-group group normalisation, "layer_norm_2d"). weight and bias are (C,)."""

    weight: Tensor
    bias: Tensor
    eps: float = 1e-5
    per_sample: bool = False


class Linear(NamedTuple):
    """weight (out, in) or, as a 1x1 convolution stores it, (out, in, 1, 1); bias (out,) or None."""

    weight: Tensor
    bias: Tensor | None = None


class ConvNorm(NamedTuple):
    """A convolution weight and the batch normalisation that follows it."""

    weight: Tensor
    norm: BatchNorm


class Layer(NamedTuple):
    """One pre-norm layer: t += out_proj(attention(qkv(norm1(t)))), then t += fc2(SiLU(fc1(norm2(t))))."""

    norm1: LayerNorm
    qkv: Linear
    out_proj: Linear
    norm2: LayerNorm
    fc1: Linear
    fc2: Linear
