"""Deterministic arguments for the ops, and the bad ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_with_path

from mvit3_kernels.ops import BatchNorm, LayerNorm, Linear
from mvit3_kernels.ops.dispatch import KERNEL_DTYPES
from mvit3_kernels.ops.types import ACTIVATIONS

Arguments = dict[str, Any]
DTYPES = KERNEL_DTYPES  # of maps


class Draw:
    """Standard normal float64 tensors and parameter groups from a generator of its own."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
        return mean + scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def batch_norm(self, channels: int, training: bool = True, eps: float = 1e-5) -> BatchNorm:
        weight, bias, mean = self(channels, mean=1, scale=0.3), self(channels, scale=0.3), self(channels, scale=0.3)
        return BatchNorm(weight, bias, mean, self(channels, scale=0.3).exp(), training, eps)

    def layer_norm(self, channels: int, per_sample: bool = False, eps: float = 1e-5) -> LayerNorm:
        return LayerNorm(self(channels, mean=1, scale=0.3), self(channels, scale=0.3), eps, per_sample)

    def linear(self, outputs: int, inputs: int, bias: bool = True, conv: bool = False) -> Linear:
        weight = self(outputs, inputs, *((1, 1) if conv else ()), scale=inputs**-0.5)
        return Linear(weight, self(outputs, scale=0.3) if bias else None)


def chosen(options: Arguments, *names: str) -> tuple[Arguments, Arguments]:
    """The options of these names, and the others."""
    return {k: v for k, v in options.items() if k in names}, {k: v for k, v in options.items() if k not in names}


def seed(value: int = 7) -> Tensor:
    return torch.tensor(value * 0x0123_4567_89AB_CDEF % 2**62, dtype=torch.int64)


def label(path: tuple) -> str:
    """`layers[0].qkv.weight`, as an error message writes it."""
    return path[0].key + keystr(path[1:])


def named(arguments: Arguments) -> dict[str, Tensor]:
    return {label(path): leaf for path, leaf in tree_flatten_with_path(arguments)[0] if isinstance(leaf, Tensor)}


def mapped(arguments: Arguments, function: Callable[[str, Tensor], Tensor]) -> Arguments:
    """The same arguments with `function(name, tensor)` in place of each tensor."""
    return tree_map_with_path(
        lambda path, leaf: function(label(path), leaf) if isinstance(leaf, Tensor) else leaf, arguments
    )


def replaced(arguments: Arguments, name: str, change: Callable[[Any], Any]) -> tuple[Arguments, Any]:
    """The arguments with `change(old)` in place of the one of this name, and that value."""
    if name in arguments:
        value = change(arguments[name])
        return {**arguments, name: value}, value
    [old] = [leaf for path, leaf in tree_flatten_with_path(arguments)[0] if label(path) == name]
    value = change(old)
    return tree_map_with_path(lambda path, leaf: value if label(path) == name else leaf, arguments), value


class Bad(NamedTuple):
    """One argument that must be refused: `change` makes it from a good one; the message holds `name`, what came, and
    `allowed`."""

    name: str
    change: Callable[[Any], Any]
    error: type[Exception]
    allowed: str

    def apply(self, arguments: Arguments) -> tuple[Arguments, str]:
        """The arguments with the bad one, and what the message must say came."""
        arguments, value = replaced(arguments, self.name, self.change)
        return arguments, self._came(value)

    def _came(self, value: Any) -> str:
        if not isinstance(value, Tensor):
            return type(value).__name__ if self.error is TypeError else str(value)
        if value.device.type == "meta":
            return "meta"
        return str(value.dtype) if self.error is TypeError else str(tuple(value.shape))


def _to(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def bad_tensor(name: str, shape: str | None) -> Iterator[Bad]:
    yield Bad(name, lambda t: t.tolist(), TypeError, "Tensor")
    yield Bad(name, lambda t: t.long(), TypeError, "float32")
    yield Bad(name, lambda t: t.to("meta"), ValueError, "device")
    yield Bad(name, lambda t: t[..., None], ValueError, "shape")
    if shape is not None:
        yield Bad(name, lambda t: torch.cat((t, t[:1])), ValueError, shape)


def bad_map(name: str, first: bool = True) -> Iterator[Bad]:
    """`first`: the map that the others are compared with."""
    yield Bad(name, lambda t: t.tolist(), TypeError, "Tensor")
    yield Bad(name, lambda t: t.long(), TypeError, "float32")
    yield Bad(name, lambda t: t[0], ValueError, "(B, H, W, C)")
    yield Bad(name, lambda t: t[..., None], ValueError, "(B, H, W, C)")
    if not first:
        yield Bad(name, lambda t: t.float(), TypeError, "dtype of the input, torch.float64")
        yield Bad(name, lambda t: t.to("meta"), ValueError, "device of the input, cpu")
        yield Bad(name, lambda t: t[:, :-1], ValueError, "shape (")


def bad_parameter(name: str, channels: int) -> Iterator[Bad]:
    yield from bad_tensor(name, f"({channels},)")
    yield Bad(name, lambda t: t.half(), TypeError, "torch.float64")


# A group inside a group is not an argument of its own, so that only its fields are replaced.
def bad_batch_norm(name: str, channels: int) -> Iterator[Bad]:
    """For arguments whose norm is not in training."""
    if "." not in name:
        yield Bad(name, _to((1, 2)), TypeError, "BatchNorm")
    for field in ("weight", "bias", "running_mean", "running_var"):
        yield from bad_parameter(f"{name}.{field}", channels)
    yield Bad(f"{name}.running_mean", _to(None), ValueError, f"{name}.training is False")
    yield Bad(f"{name}.running_var", _to(None), ValueError, f"{name}.training is False")
    yield Bad(f"{name}.eps", _to(-1e-5), ValueError, "at least 0")
    yield Bad(f"{name}.eps", _to(float("nan")), ValueError, "at least 0")
    yield Bad(f"{name}.eps", _to("x"), TypeError, "a number at least 0")


def bad_layer_norm(name: str, channels: int) -> Iterator[Bad]:
    if "." not in name:
        yield Bad(name, _to((1, 2)), TypeError, "LayerNorm")
    yield from bad_parameter(f"{name}.weight", channels)
    yield from bad_parameter(f"{name}.bias", channels)
    yield Bad(f"{name}.eps", _to(-1.0), ValueError, "at least 0")


def bad_weight(name: str, inputs: int, outputs: int | None = None) -> Iterator[Bad]:
    shape = f"({outputs or 'any'}, {inputs})"
    yield from bad_tensor(name, None)
    yield Bad(name, lambda t: t[:, :-1], ValueError, shape)
    yield Bad(name, lambda t: t[0], ValueError, shape)
    yield Bad(name, lambda t: t[:0], ValueError, shape)
    if outputs is not None:
        yield Bad(name, lambda t: t[:-1], ValueError, shape)
    yield Bad(name, lambda t: t.half(), TypeError, "torch.float64")


def bad_linear(name: str, inputs: int, outputs: int, any_outputs: bool = False) -> Iterator[Bad]:
    if "." not in name:
        yield Bad(name, _to(None), TypeError, "Linear")
    yield from bad_weight(f"{name}.weight", inputs, None if any_outputs else outputs)
    yield from bad_parameter(f"{name}.bias", outputs)


def bad_activation() -> Iterator[Bad]:
    yield Bad("act", _to("gelu"), ValueError, ", ".join(ACTIVATIONS))
    yield Bad("act", _to(None), ValueError, ", ".join(ACTIVATIONS))


def bad_patches() -> Iterator[Bad]:
    yield Bad("patch_size", _to((3, 2)), ValueError, "multiple of patch_size")
    yield Bad("patch_size", _to((2, 4)), ValueError, "multiple of patch_size")
    yield Bad("patch_size", _to((0, 2)), ValueError, "two positive integers")
    yield Bad("patch_size", _to((2, 2, 2)), ValueError, "two positive integers")
    yield Bad("patch_size", _to(2), TypeError, "two positive integers")


def bad_dropout(*names: str) -> Iterator[Bad]:
    for name in names:
        for p in (-0.1, 1.0, float("nan")):
            yield Bad(name, _to(p), ValueError, "at least 0 and below 1")
        yield Bad(name, _to("x"), TypeError, "a number at least 0 and below 1")
    yield Bad("seed", _to(None), ValueError, "must be given")
    yield Bad("seed", _to(5), TypeError, "int64 tensor of shape ()")
    yield Bad("seed", lambda t: t.int(), TypeError, "int64 tensor of shape ()")
    yield Bad("seed", lambda t: t[None], ValueError, "int64 tensor of shape ()")
    yield Bad("seed", lambda t: t.to("meta"), ValueError, "device of the input, cpu")


def bad_conv3x3(name: str, channels: int) -> Iterator[Bad]:
    shape = f"(any, {channels}, 3, 3)"
    yield from bad_tensor(name, None)
    for change in (lambda t: t[:, :-1], lambda t: t[..., :-1], lambda t: t[0], lambda t: t[:0]):
        yield Bad(name, change, ValueError, shape)
    yield from _bad_geometry(name)


def bad_depthwise(name: str, channels: int) -> Iterator[Bad]:
    yield from bad_tensor(name, f"({channels}, 1, 3, 3)")
    yield from _bad_geometry(name)


def _bad_geometry(name: str) -> Iterator[Bad]:
    yield Bad(name, lambda t: t.half(), TypeError, "torch.float64")
    yield Bad("stride", _to(3), ValueError, "1 or 2")
    yield Bad("dilation", _to(0), ValueError, "at least 1")
