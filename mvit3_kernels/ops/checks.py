"""Argument checks shared by the ops: each names the argument, what came and what is allowed, before any work is
done."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from .types import ACTIVATIONS, BatchNorm, LayerNorm, Linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_group(name: str, value: object, group: type) -> None:
    """One of the tuples of `types`."""
    if not isinstance(value, group):
        raise TypeError(f"{name} must be a {group.__name__}, got {type(value).__name__}")


def check_map(name: str, x: Tensor) -> None:
    """A feature map: floating-point (B, H, W, C)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.ndim != 4:
        raise ValueError(f"{name} must be a feature map (B, H, W, C), got shape {tuple(x.shape)}")


def check_same(name: str, t: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """A second feature map that must match `like` in dtype and device and have `shape`."""
    check_map(name, t)
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")
    if t.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of the input, {like.dtype}, got {t.dtype}")
    _check_device(name, t, like)


def check_parameter(name: str, t: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """A parameter of known shape on the device of `x`, of its dtype or float32 (float32 parameters beside bfloat16
    activations)."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
    if t.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"{name} must have dtype torch.float32 or that of the input, {x.dtype}, got {t.dtype}")
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
    _check_device(name, t, x)


def _check_device(name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of the input, {x.device}, got {t.device}")


def check_activation(act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")


def check_eps(name: str, eps: float) -> None:
    _check_number(name, eps, "at least 0")
    if not eps >= 0:
        raise ValueError(f"{name} must be at least 0, got {eps}")


def check_batch_norm(name: str, norm: BatchNorm, rows: int, channels: int, x: Tensor) -> None:
    """`norm` for `rows` values per channel."""
    check_group(name, norm, BatchNorm)
    check_parameter(f"{name}.weight", norm.weight, (channels,), x)
    check_parameter(f"{name}.bias", norm.bias, (channels,), x)
    check_eps(f"{name}.eps", norm.eps)
    if norm.training:
        if rows == 1:
            raise ValueError(f"{name}.training needs more than 1 value per channel, got 1 (batch 1 of a 1x1 map)")
        return
    for field in ("running_mean", "running_var"):
        t = getattr(norm, field)
        if t is None:
            raise ValueError(f"{name}.{field} must be given when {name}.training is False, got None")
        check_parameter(f"{name}.{field}", t, (channels,), x)


def check_layer_norm(name: str, norm: LayerNorm, channels: int, x: Tensor) -> None:
    check_group(name, norm, LayerNorm)
    check_parameter(f"{name}.weight", norm.weight, (channels,), x)
    check_parameter(f"{name}.bias", norm.bias, (channels,), x)
    check_eps(f"{name}.eps", norm.eps)


def check_weight(name: str, weight: Tensor, inputs: int, outputs: int | None, x: Tensor) -> int:
    """Checks the weight of a linear map, (outputs, inputs) or (outputs, inputs, 1, 1); returns the number of
    outputs."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(weight).__name__}")
    found = weight.shape[0] if weight.ndim in (2, 4) else 0
    rows = found if outputs is None else outputs
    if tuple(weight.shape) not in ((rows, inputs), (rows, inputs, 1, 1)) or rows == 0:
        raise ValueError(
            f"{name} must have shape ({outputs or 'any'}, {inputs}) or that with (1, 1) behind it, got "
            f"{tuple(weight.shape)}"
        )
    check_parameter(name, weight, tuple(weight.shape), x)
    return rows


def check_linear(name: str, linear: Linear, inputs: int, outputs: int | None, x: Tensor) -> int:
    """Checks weight and bias; returns the number of outputs."""
    check_group(name, linear, Linear)
    rows = check_weight(f"{name}.weight", linear.weight, inputs, outputs, x)
    if linear.bias is not None:
        check_parameter(f"{name}.bias", linear.bias, (rows,), x)
    return rows


def check_patches(x_name: str, x: Tensor, patch_size: tuple[int, int]) -> None:
    if not isinstance(patch_size, (tuple, list)):
        raise TypeError(f"patch_size must be two positive integers, got {type(patch_size).__name__}")
    if len(patch_size) != 2 or min(patch_size) < 1:
        raise ValueError(f"patch_size must be two positive integers, got {tuple(patch_size)}")
    ph, pw = patch_size
    if x.shape[1] % ph or x.shape[2] % pw:
        raise ValueError(
            f"{x_name} of height {x.shape[1]} and width {x.shape[2]} must be a multiple of patch_size "
            f"{tuple(patch_size)}"
        )


def _check_number(name: str, value: float, allowed: str) -> None:
    if not isinstance(value, (float, int, Real, Tensor, torch.SymFloat)):
        raise TypeError(f"{name} must be a number {allowed}, got {type(value).__name__}")


def check_dropout(seed: Tensor | None, x: Tensor, **probabilities: float) -> None:
    """Dropout probabilities; a positive one needs the seed that makes the call reproducible."""
    for name, p in probabilities.items():
        _check_number(name, p, "at least 0 and below 1")
        if not 0 <= p < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {p}")
        if p > 0 and seed is None:
            raise ValueError(
                f"seed must be given when {name} is positive: an int64 tensor of shape () from torch's generator; got "
                "None"
            )
    if seed is None:
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        raise TypeError(
            "seed must be an int64 tensor of shape (), got "
            f"{seed.dtype if isinstance(seed, Tensor) else type(seed).__name__}"
        )
    if seed.ndim != 0:
        raise ValueError(f"seed must be an int64 tensor of shape (), got shape {tuple(seed.shape)}")
    _check_device("seed", seed, x)


def check_depthwise(
    name: str, weight: Tensor, x: Tensor, stride: int, dilation: int, channels: int | None = None
) -> int:
    """Checks a depth-wise 3x3 weight and its geometry; returns the number of values per channel of the output."""
    check_parameter(name, weight, (x.shape[-1] if channels is None else channels, 1, 3, 3), x)
    return _check_stride(x, stride, dilation)


def check_conv3x3(name: str, weight: Tensor, x: Tensor, stride: int, dilation: int) -> tuple[int, int]:
    """Checks a dense 3x3 weight and its geometry; returns the number of outputs, and of values of each."""
    outputs = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 4 else 0
    if isinstance(weight, Tensor) and (outputs == 0 or tuple(weight.shape[1:]) != (x.shape[-1], 3, 3)):
        raise ValueError(f"{name} must have shape (any, {x.shape[-1]}, 3, 3), got {tuple(weight.shape)}")
    check_parameter(name, weight, (outputs, x.shape[-1], 3, 3), x)
    return outputs, _check_stride(x, stride, dilation)


def _check_stride(x: Tensor, stride: int, dilation: int) -> int:
    """Checks what a 3x3 convolution of x needs; returns the number of values per channel of its output."""
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}")
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    if x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"x must have at least one row and one column, got height {x.shape[1]} and width {x.shape[2]}")
    return x.shape[0] * -(-x.shape[1] // stride) * -(-x.shape[2] // stride)


def check_target(name: str, target: Tensor, logits: Tensor) -> None:
    """Labels (B, H, W) of a map of logits (B, h, w, C)."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {target.dtype}")
    if target.ndim != 3 or target.shape[0] != logits.shape[0] or 0 in target.shape[1:]:
        raise ValueError(
            f"{name} must have shape (B, H, W) with the batch of the logits, {logits.shape[0]}, and at least one "
            "pixel, "
            f"got {tuple(target.shape)}"
        )
    if 0 in logits.shape[1:]:
        raise ValueError(f"logits must have at least one pixel and one class, got shape {tuple(logits.shape)}")
    _check_device(name, target, logits)
