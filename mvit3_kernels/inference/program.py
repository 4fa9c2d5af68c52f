"""A network of this library as a program of the compiled inference engine: a list of steps, each an op with its weights
packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import nn as blocks
from ..models.network import GlobalPool, MobileViT
from ..nn.guard import Block, dropout_rate
from ..nn.plans import ConvPlan, ResidualPlan, SeparablePlan, TokensPlan, TransformerPlan
from ..ops.folding import fold_batch_norm
from ..ops.types import ACTIVATIONS, Linear

IMAGE = 0  # the number of the map that holds the images
IDENTITY = ACTIVATIONS.index("identity")
Result = Tensor | list[Tensor] | tuple[Tensor, ...]


class Refused(Exception):
    """The engine has no step for a module as it is now; the message says why. It never leaves `Program.of`."""


class Step(NamedTuple):
    """A step as the engine takes it. It reads the maps `inputs`."""

    kind: str
    inputs: tuple[int, ...]
    weights: tuple[Tensor, ...]
    integers: tuple[int, ...]
    numbers: tuple[float, ...]


WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)  # types that a program's weights may have


class Program:
    """Steps in the order in which they run. A map is known by its number; `add` returns the number of the map that a
    step writes. The engine gets them together, at `pack` or at the first call: a step whose map nobody reads in the end
    is not among them."""

    def __init__(self, channels: int, dtype: torch.dtype = torch.float32) -> None:
        options = {"bfloat16": True} if dtype is torch.bfloat16 else {}
        self._engine = torch.ops.mvit3.engine_new(channels, **options)
        self._steps: list[Step] = []
        self._endings: list[tuple[int, ...]] = []
        self._convert: list[Callable[[list[Tensor]], Result]] = []
        self._rounds: list[bool] = []
        self._packed = False
        self.images = torch.float32  # type of the images and of the results: that of the network's weights
        self.pooled: set[int] = set()  # maps of one pixel, on which a Linear works
        # Why the network does something else with these very images, where that depends on them.
        self.misfit: Callable[[Tensor], str | None] = lambda images: None
        self.kinds: list[str] = []  # of the steps that the engine got

    def __del__(self) -> None:
        if torch is not None and hasattr(self, "_engine"):  # neither at exit of the interpreter nor after a refusal
            torch.ops.mvit3.engine_free(self._engine)

    @staticmethod
    @torch.no_grad()
    def of(network: nn.Module, dtype: torch.dtype = torch.float32) -> Program | str:
        """The program of a network whose modules are plain (`guard.tampered_below`), its products of `dtype`, or why
        the engine has none that does exactly what they do."""
        reason = _weights_why_not(network)
        if reason is not None:
            return reason
        stem = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
        if stem is None:
            return "the network has no convolution"
        program = Program(stem.weight.shape[1], dtype)
        program.images = stem.weight.dtype
        try:
            assemble(network, program)
        except Refused as refusal:
            return str(refusal)
        program.pack()
        return program

    def add(
        self,
        kind: str,
        inputs: Sequence[int],
        weights: Sequence[Tensor] = (),
        integers: Sequence[int] = (),
        numbers: Sequence[float] = (),
    ) -> int:
        step = Step(kind, tuple(inputs), tuple(t.detach().float() for t in weights), tuple(integers), tuple(numbers))
        self._steps.append(step)
        return len(self._steps)

    def step_of(self, x: int, reader: int | None = None) -> Step | None:
        """The step that writes map `x`, where no other step reads it than that which writes `reader`."""
        if x == IMAGE or any(x in step.inputs for i, step in enumerate(self._steps, 1) if i != reader):
            return None
        return self._steps[x - 1]

    def finish(self, outputs: Sequence[int], convert: Callable[[list[Tensor]], Result], rounds: bool = True) -> int:
        """An ending: maps (B, H, W, C) that a call returns, as `convert` makes them of these; rounded to the
        images' dtype where it `rounds`, else float32. Returns its number."""
        self._convert.append(convert)
        self._rounds.append(rounds)
        self._endings.append(tuple(outputs))
        return len(self._endings) - 1

    def pack(self) -> None:
        """Hands the engine all steps that an ending needs, which packs their weights."""
        needed = {x for outputs in self._endings for x in outputs}
        for i, step in reversed(tuple(enumerate(self._steps, 1))):
            needed.update(step.inputs if i in needed else ())
        places = {IMAGE: IMAGE}
        for i, step in enumerate(self._steps, 1):
            if i in needed:
                inputs = [places[x] for x in step.inputs]
                weights, integers, numbers = step[2:]
                places[i] = torch.ops.mvit3.engine_add(self._engine, step.kind, inputs, weights, integers, numbers)
                self.kinds.append(step.kind)
        for outputs in self._endings:
            torch.ops.mvit3.engine_finish(self._engine, [places[x] for x in outputs])
        self._steps.clear()  # the engine has its own copy of the weights
        self._packed = True

    def ends(self, ending: int) -> bool:
        return ending < len(self._convert)

    def __call__(self, x: Tensor, ending: int = 0) -> Result:
        if not self._packed:
            self.pack()
        results = torch.ops.mvit3.engine_run(self._engine, x.detach().float(), ending)
        if self._rounds[ending] and x.dtype is not torch.float32:
            results = [y.to(x.dtype) for y in results]
        return self._convert[ending](results)


@singledispatch
def assemble(network: nn.Module, program: Program) -> None:
    """Adds the steps of a whole network, and finishes its program."""
    raise Refused(f"the engine has no program for a {type(network).__name__}")


@assemble.register
def _(network: MobileViT, program: Program) -> None:
    if network.features_only:
        outputs = features(network, program)
        different = sorted(set(outputs))
        program.finish(different, lambda results: [results[different.index(i)].permute(0, 3, 1, 2) for i in outputs])
        return
    x = emit(network.conv_1x1_exp, program, _stages(network, program)[-1])
    x = emit(network.classifier, program, x)
    if x not in program.pooled:
        raise Refused("its classifier does not pool")
    program.finish([x], lambda results: results[0].flatten(1))


def features(network: nn.Module, program: Program) -> list[int]:
    """The maps that a backbone returns."""
    if not isinstance(network, MobileViT) or not network.features_only:
        raise Refused("its encoder is not a MobileViT with features_only")
    stages = _stages(network, program)
    return [stages[i] for i in network.feature_info.out_indices]


def _stages(network: MobileViT, program: Program) -> list[int]:
    """The outputs of layer_1 to layer_5."""
    maps = [emit(network.conv_1, program, IMAGE)]
    for layer in (network.layer_1, network.layer_2, network.layer_3, network.layer_4, network.layer_5):
        maps.append(emit(layer, program, maps[-1]))
    return maps[1:]


def _weights_why_not(network: nn.Module) -> str | None:
    others = None
    for name, t in (*network.named_parameters(), *network.named_buffers()):
        if not t.is_floating_point():
            continue
        if t.device.type != "cpu" or t.dtype not in WEIGHTS:
            return f"the network's {name} is {t.dtype} on {t.device}, not float32 or of half precision on the CPU"
        others = others or t.dtype
        if t.dtype is not others:
            return f"the network's {name} is {t.dtype}, others are {others}"
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
    return pool(program, x)


@emit.register
def _(module: nn.Linear, program: Program, x: int) -> int:
    if x not in program.pooled:
        raise Refused("a Linear works on a map that is not pooled")
    x = pointwise(program, [x], *_affine(module.weight, module.bias, None), "identity")
    program.pooled.add(x)
    return x


@emit.register(blocks.ConvNormAct)
@emit.register(blocks.InvertedResidual)
@emit.register(blocks.GlobalRepresentation)
def _(module, program: Program, x: int) -> int:
    check(module)
    return emit(module.plan(), program, x)


@emit.register
def _(plan: ConvPlan, program: Program, x: int) -> int:
    return emit_conv(plan, program, [x])


@emit.register
def _(plan: ResidualPlan, program: Program, x: int) -> int:
    if plan.drop_path is not None:
        raise Refused("it drops paths")
    parts = (plan.expand, plan.depthwise, plan.project)
    if plan.skip is not plan.can_skip():  # the step adds its input wherever it can
        return _emit_all(parts, program, x)
    weights = [t for part in parts for t in conv_affine(part)]
    conv = plan.depthwise.conv
    integers = [conv.stride[0], conv.dilation[0], ACTIVATIONS.index(plan.expand.act)]
    return program.add("inverted_residual", [x], weights, integers)


@emit.register
def _(plan: TokensPlan, program: Program, x: int) -> int:
    if plan.drops():
        raise Refused("a Dropout is in training mode")
    patch = list(plan.patch_size)
    for layer in plan.layers:
        if plan.num_heads is None:
            weights = [layer.norm1.weight, layer.norm1.bias, *_linear(layer.qkv), *_linear(layer.out_proj)]
            x = program.add(
                "separable_attention", [x], weights, [*patch, int(layer.norm1.per_sample)], [layer.norm1.eps]
            )
        else:
            weights = [layer.norm1.weight, layer.norm1.bias, *_linear(layer.qkv)]
            qkv = program.add("norm_qkv", [x], weights, [int(layer.norm1.per_sample)], [layer.norm1.eps])
            attended = program.add("patch_attention", [qkv], (), [plan.num_heads, *patch])
            x = pointwise(program, [attended], *_affine(*layer.out_proj, None), "identity", residual=x)
        weights = [layer.norm2.weight, layer.norm2.bias, *_linear(layer.fc1), *_linear(layer.fc2)]
        x = program.add("feed_forward", [x], weights, [int(layer.norm2.per_sample)], [layer.norm2.eps])
    norm = plan.norm
    return program.add("layer_norm", [x], [norm.weight, norm.bias], [int(norm.per_sample)], [norm.eps])


@emit.register
def _(plan: TransformerPlan, program: Program, x: int) -> int:
    local = _emit_all(plan.local, program, x)
    tokens = program.add("resize_to_patches", [local], (), [*plan.tokens.patch_size, 0])
    tokens = program.add("resize_back", [emit(plan.tokens, program, tokens), local])
    projected = emit(plan.project, program, tokens)
    if plan.fusion is None:
        return projected
    if plan.with_local:
        return emit_conv(plan.fusion, program, [local, projected], residual=x)
    return emit_conv(plan.fusion, program, [x, projected])


@emit.register
def _(plan: SeparablePlan, program: Program, x: int) -> int:
    patch_size = plan.tokens.patch_size
    if not plan.crops:
        x = program.add("resize_to_patches", [x], (), [*patch_size, 1])
    local = _emit_all(plan.local, program, x)
    if plan.crops:
        tokens = emit(plan.tokens, program, program.add("crop_to_patches", [local], (), [*patch_size]))
        tokens = program.add("pad_back", [tokens, local])
    else:
        tokens = emit(plan.tokens, program, local)
    if plan.with_local:
        return emit_conv(plan.project, program, [tokens, local], residual=x)
    return emit(plan.project, program, tokens)


def _emit_all(plans: Sequence[ConvPlan], program: Program, x: int) -> int:
    for plan in plans:
        x = emit(plan, program, x)
    return x


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


def check(block: Block) -> None:
    if reason := block.misfit():
        raise Refused(f"{type(block).__name__}: {reason}")


def _conv(module: nn.Module, program: Program, inputs: list[int], residual: int | None = None) -> int:
    if type(module) is not blocks.ConvNormAct:
        raise Refused(f"a {type(module).__name__} takes the place of a ConvNormAct")
    check(module)
    return emit_conv(module.plan(), program, inputs, residual)


def emit_conv(plan: ConvPlan, program: Program, inputs: list[int], residual: int | None = None) -> int:
    """The steps of a convolution of the concatenation of `inputs`; `residual` is added behind its activation."""
    conv, affine = plan.conv, conv_affine(plan)
    if plan.is_pointwise():
        return pointwise(program, inputs, *affine, plan.act, residual)
    stride, dilation, act = conv.stride[0], conv.dilation[0], ACTIVATIONS.index(plan.act)
    if residual is None and plan.is_depthwise() and len(inputs) == 1:
        return program.add("depthwise_conv", inputs, affine, [stride, dilation, act])
    if residual is None and plan.is_dense3x3():
        weight, scale, shift = affine
        weights = [weight.permute(0, 2, 3, 1).contiguous(), scale, shift]
        return program.add("conv3x3", inputs, weights, [stride, dilation, act])
    raise Refused(f"the engine has no step for {conv}")


def pool(program: Program, x: int, reader: int | None = None) -> int:
    """The mean of map `x` over its pixels. An affine step in front of it runs behind it, on one pixel (docs/algebra.md,
    L), unless another step than that which writes `reader` reads the whole map."""
    step = program.step_of(x, reader)
    kind = None if step is None else step.kind
    if kind == "pointwise_conv" and step.integers[0] == IDENTITY:
        mean = program.add(kind, [pool(program, i, x) for i in step.inputs], *step[2:])
    elif kind == "norm_linear":
        norm_weight, norm_bias, weight, bias = step.weights
        mean = program.add("norm_pool", step.inputs, (norm_weight, norm_bias), *step[3:])
        mean = pointwise(program, [mean], weight, torch.ones_like(bias), bias, "identity")
    elif kind == "layer_norm":
        mean = program.add("norm_pool", *step[1:])
    else:
        mean = program.add("global_pool", [x])
    program.pooled.add(mean)
    return mean


def pointwise(
    program: Program,
    inputs: list[int],
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    act: str,
    residual: int | None = None,
) -> int:
    maps = inputs if residual is None else [*inputs, residual]
    norm = program.step_of(maps[0]) if len(maps) == 1 and act == "identity" else None
    if norm is not None and norm.kind == "layer_norm":  # the product is all that reads it: no map between the two
        weights = [*norm.weights, (weight.flatten(1).double() * scale.double()[:, None]).float(), shift]
        return program.add("norm_linear", norm.inputs, weights, norm.integers, norm.numbers)
    integers = [ACTIVATIONS.index(act), int(residual is not None)]
    return program.add("pointwise_conv", maps, [weight.flatten(1), scale, shift], integers)


def _linear(linear: Linear) -> list[Tensor]:
    weight = linear.weight.flatten(1)
    return [weight, weight.new_zeros(weight.shape[0]) if linear.bias is None else linear.bias]


def conv_affine(plan: ConvPlan) -> tuple[Tensor, Tensor, Tensor]:
    return _affine(plan.conv.weight, plan.conv.bias, plan.norm)


def _affine(weight: Tensor, bias: Tensor | None, norm: nn.Module | None) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, and what becomes of its product: scale and shift of each output, batch norm and bias folded
    together."""
    outputs = weight.shape[0]
    shift = weight.new_zeros(outputs, dtype=torch.float64) if bias is None else bias.double()
    if norm is None:
        return weight, weight.new_ones(outputs), shift.float()
    if norm.training or norm.running_mean is None:
        raise Refused("a BatchNorm2d is in training mode or keeps no statistics")
    mean = norm.running_mean.double() - shift  # a bias in front of the norm is taken off its mean
    scale, shift = fold_batch_norm(norm.weight, norm.bias, mean, norm.running_var, norm.eps, torch.float64)
    return weight, scale.float(), shift.float()
