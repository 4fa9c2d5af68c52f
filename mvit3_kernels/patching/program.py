"""A network of this library as a program of the compiled inference engine: a list of steps, each an op with its weights packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import singledispatch

import torch
from torch import Tensor, nn

from .. import nn as blocks
from ..models.network import GlobalPool, MobileViT
from ..nn.guard import Block, dropout_rate
from ..ops.types import ACTIVATIONS, Layer, LayerNorm, Linear

IMAGE = 0  # the number of the map that holds the images


class Refused(Exception):
    """The engine has no step for a module as it is now; the message says why. It never leaves `Program.of`."""


class Program:
    """Steps in the order in which they run. A map is known by its number; `add` returns the number of the map that a step writes."""

    def __init__(self, channels: int) -> None:
        self._engine = torch.ops.mvit3.engine_new(channels)
        self._finish: Callable[[list[Tensor]], Tensor | list[Tensor]] | None = None
        self.pooled: set[int] = set()  # maps of one pixel, on which a Linear works

    def __del__(self) -> None:
        if torch is not None:  # at exit of the interpreter
            torch.ops.mvit3.engine_free(self._engine)

    @staticmethod
    @torch.no_grad()
    def of(network: MobileViT) -> Program | str:
        """The program of a network whose modules are plain (`guard.tampered_below`), or why the engine has none that does exactly what they
        do."""
        reason = _weights_why_not(network)
        if reason is not None:
            return reason
        if type(network.conv_1) is not blocks.ConvNormAct:
            return f"conv_1 is a {type(network.conv_1).__name__}, not a ConvNormAct"
        program = Program(network.conv_1.block.conv.weight.shape[1])
        try:
            program._emit(network)
        except Refused as refusal:
            return str(refusal)
        return program

    def _emit(self, network: MobileViT) -> None:
        maps = [emit(network.conv_1, self, IMAGE)]
        for layer in (network.layer_1, network.layer_2, network.layer_3, network.layer_4, network.layer_5):
            maps.append(emit(layer, self, maps[-1]))
        if network.features_only:
            outputs = [maps[1 + i] for i in network.feature_info.out_indices]
            different = sorted(set(outputs))
            self.finish(different, lambda results: [results[different.index(i)].permute(0, 3, 1, 2) for i in outputs])
            return
        x = emit(network.classifier, self, emit(network.conv_1x1_exp, self, maps[-1]))
        if x not in self.pooled:
            raise Refused("its classifier does not pool")
        self.finish([x], lambda results: results[0].flatten(1))

    def add(
        self, kind: str, inputs: Sequence[int], weights: Sequence[Tensor] = (), integers: Sequence[int] = (), numbers: Sequence[float] = ()
    ) -> int:
        return torch.ops.mvit3.engine_add(self._engine, kind, inputs, [t.detach() for t in weights], integers, numbers)

    def finish(self, outputs: Sequence[int], convert: Callable[[list[Tensor]], Tensor | list[Tensor]]) -> None:
        torch.ops.mvit3.engine_finish(self._engine, outputs)
        self._finish = convert

    def __call__(self, x: Tensor) -> Tensor | list[Tensor]:
        return self._finish(torch.ops.mvit3.engine_run(self._engine, x.detach()))


def _weights_why_not(network: nn.Module) -> str | None:
    for name, t in (*network.named_parameters(), *network.named_buffers()):
        if t.is_floating_point() and (t.device.type != "cpu" or t.dtype is not torch.float32):
            return f"the network's {name} is {t.dtype} on {t.device}, not float32 on the CPU"
    return None


@singledispatch
def emit(module: nn.Module, program: Program, x: int) -> int:
    """Adds the steps of `module` on map `x`; returns the number of the map with the result."""
    raise Refused(f"the engine has no step for a {type(module).__name__}")


@emit.register
def _(module: nn.Sequential, program: Program, x: int) -> int:
    for child in module:
        x = emit(child, program, x)
    return x


@emit.register
def _(module: nn.Identity, program: Program, x: int) -> int:
    return x


@emit.register
def _(module: nn.Dropout, program: Program, x: int) -> int:
    if dropout_rate(module) > 0:
        raise Refused("a Dropout is in training mode")
    return x


@emit.register
def _(module: GlobalPool, program: Program, x: int) -> int:
    x = program.add("global_pool", [x])
    program.pooled.add(x)
    return x


@emit.register
def _(module: nn.Linear, program: Program, x: int) -> int:
    if x not in program.pooled:
        raise Refused("a Linear works on a map that is not pooled")
    x = _pointwise(program, [x], *_affine(module.weight, module.bias, None), "identity")
    program.pooled.add(x)
    return x


@emit.register
def _(module: blocks.ConvNormAct, program: Program, x: int) -> int:
    return _conv(module, program, [x])


@emit.register
def _(module: blocks.InvertedResidual, program: Program, x: int) -> int:
    _check(module)
    layers = tuple(module.block)
    weights = [t for layer in layers for t in _conv_affine(layer)]
    conv = layers[1].block.conv
    return program.add("inverted_residual", [x], weights, [conv.stride[0], conv.dilation[0], ACTIVATIONS.index(layers[0].act)])


@emit.register
def _(module: blocks.GlobalRepresentation, program: Program, x: int) -> int:
    _check(module)
    *layers, norm = module
    if layers and any(layers[0].dropouts().values()):
        raise Refused("a Dropout is in training mode")
    patch = list(module.patch_size)
    for child in layers:
        layer: Layer = child.layer()
        if child.num_heads is None:
            weights = [layer.norm1.weight, layer.norm1.bias, *_linear(layer.qkv), *_linear(layer.out_proj)]
            x = program.add("separable_attention", [x], weights, [*patch, int(layer.norm1.per_sample)], [layer.norm1.eps])
        else:
            qkv = _norm_linear(program, x, layer.norm1, layer.qkv)
            attended = program.add("patch_attention", [qkv], (), [child.num_heads, *patch])
            x = _pointwise(program, [attended], *_affine(*layer.out_proj, None), "identity", residual=x)
        weights = [layer.norm2.weight, layer.norm2.bias, *_linear(layer.fc1), *_linear(layer.fc2)]
        x = program.add("feed_forward", [x], weights, [int(layer.norm2.per_sample)], [layer.norm2.eps])
    per_sample = isinstance(norm, nn.GroupNorm)
    return program.add("layer_norm", [x], [norm.weight, norm.bias], [int(per_sample)], [norm.eps])


@emit.register(blocks.MobileViTBlock)
@emit.register(blocks.MobileViTV3Block)
def _(module, program: Program, x: int) -> int:
    local = emit(module.local_rep, program, x)
    tokens = program.add("resize_to_patches", [local], (), [*module.patch_size, 0])
    tokens = emit(module.global_rep, program, tokens)
    tokens = program.add("resize_back", [tokens, local])
    projected = emit(module.conv_proj, program, tokens)
    if isinstance(module, blocks.MobileViTV3Block):
        # The local representation that is fused is the one of the transformer's width.
        return _conv(module.fusion, program, [local, projected], residual=x)
    return _conv(module.fusion, program, [x, projected])


@emit.register(blocks.MobileViTV2Block)
@emit.register(blocks.MobileViTV3SeparableBlock)
def _(module, program: Program, x: int) -> int:
    x = program.add("resize_to_patches", [x], (), [*module.patch_size, 1])
    local = emit(module.local_rep, program, x)
    tokens = emit(module.global_rep, program, local)
    if isinstance(module, blocks.MobileViTV3SeparableBlock):
        return _conv(module.conv_proj, program, [tokens, local], residual=x)
    return emit(module.conv_proj, program, tokens)


def _check(block: Block) -> None:
    if reason := block.misfit():
        raise Refused(f"{type(block).__name__}: {reason}")


def _conv(module: nn.Module, program: Program, inputs: list[int], residual: int | None = None) -> int:
    if type(module) is not blocks.ConvNormAct:
        raise Refused(f"a {type(module).__name__} takes the place of a ConvNormAct")
    _check(module)
    conv, affine = module.block.conv, _conv_affine(module)
    if module.is_pointwise():
        return _pointwise(program, inputs, *affine, module.act, residual)
    stride, dilation, act = conv.stride[0], conv.dilation[0], ACTIVATIONS.index(module.act)
    if residual is None and module.is_depthwise() and len(inputs) == 1:
        return program.add("depthwise_conv", inputs, affine, [stride, dilation, act])
    geometry = (conv.kernel_size, conv.padding, conv.dilation, conv.groups)
    if residual is None and geometry == ((3, 3), (1, 1), (1, 1), 1) and conv.stride in ((1, 1), (2, 2)):
        weight, scale, shift = affine
        return program.add("conv3x3", inputs, [weight.permute(0, 2, 3, 1).contiguous(), scale, shift], [stride, act])
    raise Refused(f"the engine has no step for {conv}")


def _pointwise(
    program: Program, inputs: list[int], weight: Tensor, scale: Tensor, shift: Tensor, act: str, residual: int | None = None
) -> int:
    maps = inputs if residual is None else [*inputs, residual]
    integers = [ACTIVATIONS.index(act), int(residual is not None)]
    return program.add("pointwise_conv", maps, [weight.flatten(1), scale, shift], integers)


def _norm_linear(program: Program, x: int, norm: LayerNorm, linear: Linear) -> int:
    return program.add("norm_linear", [x], [norm.weight, norm.bias, *_linear(linear)], [int(norm.per_sample)], [norm.eps])


def _linear(linear: Linear) -> list[Tensor]:
    weight = linear.weight.flatten(1)
    return [weight, weight.new_zeros(weight.shape[0]) if linear.bias is None else linear.bias]


def _conv_affine(module: blocks.ConvNormAct) -> tuple[Tensor, Tensor, Tensor]:
    return _affine(module.block.conv.weight, module.block.conv.bias, module.norm)


def _affine(weight: Tensor, bias: Tensor | None, norm: nn.Module | None) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, and what becomes of its product: scale and shift of each output, batch norm and bias folded together."""
    outputs = weight.shape[0]
    shift = weight.new_zeros(outputs, dtype=torch.float64) if bias is None else bias.double()
    if norm is None:
        return weight, weight.new_ones(outputs), shift.to(weight.dtype)
    if norm.training or norm.running_mean is None:
        raise Refused("a BatchNorm2d is in training mode or keeps no statistics")
    scale = (norm.running_var.double() + norm.eps).rsqrt() * norm.weight.double()
    shift = (shift - norm.running_mean.double()) * scale + norm.bias.double()
    return weight, scale.to(weight.dtype), shift.to(weight.dtype)
