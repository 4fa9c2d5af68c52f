"""The calls of single ops that are measured and tuned on a GPU: shapes of the networks at 256x256, maps in bfloat16."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mvit3_kernels
from benchmarks.common import Run
from mvit3_kernels import ops
from mvit3_kernels.ops import BatchNorm, ConvNorm, LayerNorm, Linear

# Maps of mobilevitv3_s: (H, C) of the stem, the local representations, the head; (H, D, C) of the global
# representations.
MAPS = ((128, 16), (64, 64), (32, 128), (16, 256), (8, 320), (8, 640))
TRANSFORMERS = ((32, 144, 128), (16, 192, 256), (8, 240, 320))
# Depth-wise convolutions: (H, C, stride); inverted residuals: (H, inputs, expanded, outputs, stride); separable
# attention: (H, C), of mobilevitv3_100; global representations: (H, D, hidden, layers, heads), None for separable
# attention.
DEPTHWISE = (
    (128, 64, 1),
    (128, 128, 2),
    (64, 256, 1),
    (64, 256, 2),
    (32, 512, 2),
    (16, 1024, 2),
    (32, 128, 1),
    (16, 256, 1),
    (8, 320, 1),
)
INVERTED = (
    (128, 16, 64, 32, 1), (128, 32, 128, 64, 2), (64, 64, 256, 64, 1),
    (64, 64, 256, 128, 2), (32, 128, 512, 256, 2), (16, 256, 1024, 320, 2),
)  # fmt: skip
SEPARABLE = ((32, 128), (16, 192), (8, 256))
# Logits up-sampled to labels: (batch at most, side, classes, side of the labels), of DeepLabv3 on ADE20K and VOC.
UPSAMPLED = ((16, 32, 150, 512), (16, 32, 21, 512))
STACKS = ((16, 192, 384, 4, 4), (8, 240, 480, 3, 4), (16, 192, 384, 4, None), (8, 256, 512, 3, None))
MODES = ("step", "forward", "evaluation")


class OpCase(NamedTuple):
    """A call to time: `call(*leaves)` gives y. Backward follows where the mode is "step"; "evaluation" uses running
    statistics. `bytes` must at least be moved."""

    op: str
    mode: str
    call: Callable[..., Tensor]
    leaves: list[Tensor]
    bytes: int
    backends: tuple[str, ...] = ("triton",)

    def step(self, call: Callable[..., Tensor] | None = None) -> Run:
        """The case without arguments: of `call` in place of its own where one is given."""
        call = call or self.call
        if self.mode == "step":
            dy = torch.randn_like(call(*self.leaves))
            return lambda: torch.autograd.grad(call(*self.leaves), self.leaves, dy)

        def forward() -> Tensor:
            with torch.no_grad():
                return call(*self.leaves)

        return forward


def on_backend(backend: str, function: Callable) -> Callable:
    """`function` with the ops on one backend; "free" leaves the choice to the library."""
    if backend == "free":
        return function

    def call(*args: Any) -> Any:
        with mvit3_kernels.backend(backend):
            return function(*args)

    return call


class Draw(NamedTuple):
    """Random leaves on a device."""

    batch: int
    device: str

    def feature_map(self, side: int, channels: int) -> Tensor:
        drawn = torch.randn(self.batch, side, side, channels, device=self.device)
        return drawn.to(torch.bfloat16).requires_grad_()

    def weight(self, outputs: int, *inputs: int) -> Tensor:
        drawn = torch.randn(outputs, *inputs, device=self.device)
        return (drawn / math.prod(inputs) ** 0.5).requires_grad_()

    def affine(self, channels: int) -> list[Tensor]:
        """Weight and bias of a norm."""
        made = torch.ones(channels, device=self.device), torch.zeros(channels, device=self.device)
        return [t.requires_grad_() for t in made]

    def linear(self, outputs: int, inputs: int) -> list[Tensor]:
        """Weight and bias."""
        return [self.weight(outputs, inputs), self.affine(outputs)[1]]


def _kernels(op: str) -> Any:
    """The module of an op's Triton kernels."""
    return importlib.import_module(f"mvit3_kernels.ops.{op}.triton")


def _norm(weight: Tensor, bias: Tensor, training: bool) -> BatchNorm:
    running = (None, None) if training else (bias.detach(), weight.detach())
    return BatchNorm(weight, bias, *running, training)


def _batch_norm_act(draw: Draw, side: int, channels: int) -> Iterator[OpCase]:
    leaves = [draw.feature_map(side, channels), *draw.affine(channels)]
    for mode in MODES:

        def call(x: Tensor, *norm: Tensor, training: bool = mode != "evaluation") -> Tensor:
            return ops.batch_norm_act(x, _norm(*norm, training), "silu")[0]

        moved = _kernels("batch_norm_act").bytes_moved(leaves[0], mode != "evaluation", False)
        yield OpCase("batch_norm_act", mode, call, leaves, sum(moved) if mode == "step" else moved[0])


def _fusion(a: Tensor, b: Tensor, weight: Tensor, *norm: Tensor) -> Tensor:
    return ops.pointwise_fusion(a, b, weight, _norm(*norm, True), "silu", b)[0]


def _conv(x: Tensor, weight: Tensor, *norm: Tensor) -> Tensor:
    return ops.pointwise_conv(x, Linear(weight), _norm(*norm, True), "silu")[0]


def _norm_linear(x: Tensor, weight: Tensor, bias: Tensor, *linear: Tensor) -> Tensor:
    return ops.norm_linear(x, LayerNorm(weight, bias), Linear(*linear))


def _feed_forward(x: Tensor, weight: Tensor, bias: Tensor, *linears: Tensor) -> Tensor:
    return ops.feed_forward(x, LayerNorm(weight, bias), Linear(*linears[:2]), Linear(*linears[2:]))


def _dropout(x: Tensor, residual: Tensor) -> Tensor:
    return ops.dropout(x, 0.1, torch.tensor(7, device=x.device), residual)


def _attention(qkv: Tensor) -> Tensor:
    return ops.patch_attention(qkv, 4)


def _transformer(draw: Draw, side: int, width: int, channels: int) -> Iterator[OpCase]:
    """The ops of a global representation and those around it."""
    x, y, qkv = draw.feature_map(side, width), draw.feature_map(side, channels), draw.feature_map(side, 3 * width)
    norms = {c: draw.affine(c) for c in (width, channels)}
    linear, fc1, fc2 = (draw.linear(*size) for size in ((3 * width, width), (2 * width, width), (width, 2 * width)))
    conv = [x, draw.weight(channels, width), *norms[channels]]
    fusion = [x, y, draw.weight(channels, width + channels), *norms[channels]]
    pointwise = _kernels("pointwise_conv")
    for name, call, leaves, moved in (
        ("patch_attention", _attention, [qkv], _kernels("patch_attention").bytes_moved(qkv)),
        (
            "norm_linear",
            _norm_linear,
            [x, *norms[width], *linear],
            _kernels("norm_linear").bytes_moved(x, 3 * width, False),
        ),
        (
            "feed_forward",
            _feed_forward,
            [x, *norms[width], *fc1, *fc2],
            _kernels("feed_forward").bytes_moved(x, 2 * width, False),
        ),
        ("dropout", _dropout, [x, x.clone()], _kernels("dropout").bytes_moved(x, True)),
        ("pointwise_conv", _conv, conv, pointwise.bytes_moved(x, None, channels, True, True, False)),
        ("pointwise_fusion", _fusion, fusion, pointwise.bytes_moved(x, y, channels, True, True, True)),
    ):
        yield OpCase(name, "step", call, leaves, sum(moved))
        yield OpCase(name, "forward", call, leaves, moved[0])


def _depthwise(draw: Draw, side: int, channels: int, stride: int) -> Iterator[OpCase]:
    leaves = [draw.feature_map(side, channels), draw.weight(channels, 1, 3, 3), *draw.affine(channels)]
    for mode in MODES:

        def call(x: Tensor, w: Tensor, *norm: Tensor, training: bool = mode != "evaluation") -> Tensor:
            return ops.depthwise_conv(x, w, _norm(*norm, training), "silu", stride)[0]

        moved = _kernels("depthwise_conv").bytes_moved(leaves[0], stride, mode != "evaluation")
        yield OpCase("depthwise_conv", mode, call, leaves, sum(moved) if mode == "step" else moved[0])


def _inverted(draw: Draw, side: int, inputs: int, wide: int, outputs: int, stride: int) -> Iterator[OpCase]:
    parts = ((wide, inputs), (wide, 1, 3, 3), (outputs, wide))
    x = draw.feature_map(side, inputs)
    leaves = [x, *(t for shape in parts for t in (draw.weight(*shape), *draw.affine(shape[0])))]
    for mode in MODES:

        def call(x: Tensor, *p: Tensor, training: bool = mode != "evaluation") -> Tensor:
            three = (ConvNorm(p[i], _norm(p[i + 1], p[i + 2], training)) for i in (0, 3, 6))
            return ops.inverted_residual(x, *three, stride=stride)[0]

        if mode == "evaluation":  # read x, write y
            moved = (x.numel() + x.numel() // inputs // stride**2 * outputs) * x.element_size()
        else:
            both = _kernels("inverted_residual").bytes_moved(x, wide, outputs, stride, False)
            moved = sum(both) if mode == "step" else both[0]
        yield OpCase("inverted_residual", mode, call, leaves, moved, ("free", "triton", "cuda"))


def _separable(draw: Draw, side: int, width: int) -> Iterator[OpCase]:
    leaves = [draw.feature_map(side, width), *draw.affine(width)]
    leaves += [*draw.linear(1 + 2 * width, width), *draw.linear(width, width)]

    def call(x: Tensor, weight: Tensor, bias: Tensor, *p: Tensor) -> Tensor:
        return ops.separable_attention(x, LayerNorm(weight, bias, per_sample=True), Linear(*p[:2]), Linear(*p[2:]))

    moved, alone = (_kernels("separable_attention").bytes_moved(leaves[0], training) for training in (True, False))
    yield OpCase("separable_attention", "step", call, leaves, sum(moved))
    yield OpCase("separable_attention", "evaluation", call, leaves, alone[0])


def _stack(draw: Draw, side: int, width: int, hidden: int, layers: int, heads: int | None) -> Iterator[OpCase]:
    per_sample = heads is None
    sizes = ((1 + 2 * width if per_sample else 3 * width, width), (width, width), (hidden, width), (width, hidden))

    def layer() -> ops.Layer:
        qkv, out, fc1, fc2 = (Linear(*draw.linear(*size)) for size in sizes)
        norms = [LayerNorm(*draw.affine(width), per_sample=per_sample) for _ in range(2)]
        return ops.Layer(norms[0], qkv, out, norms[1], fc1, fc2)

    stack, last = [layer() for _ in range(layers)], LayerNorm(*draw.affine(width), per_sample=per_sample)

    def call(x: Tensor) -> Tensor:
        return ops.global_representation(x, stack, last, heads, (2, 2))

    x = draw.feature_map(side, width)
    moved = _kernels("global_representation").bytes_moved(x, layers, heads)
    yield OpCase("global_representation", "evaluation", call, [x], moved, ("free", "triton"))


def _upsampled(draw: Draw, most: int, side: int, classes: int, large: int) -> Iterator[OpCase]:
    """Of the loss, of labels ("forward") and of labels with their confusion matrix ("evaluation"); the reference is
    F.interpolate and cross_entropy or argmax, whose logits of 150 classes take 157 MB an image, several times over."""
    draw = draw._replace(batch=min(draw.batch, most))
    target = torch.randint(0, classes, (draw.batch, large, large), device=draw.device)

    def loss(x: Tensor) -> Tensor:
        return ops.upsample_cross_entropy(x, target, True, 255)

    def labels(x: Tensor) -> Tensor:
        return ops.upsample_argmax(x, (large, large), True)[0]

    def counted(x: Tensor) -> Tensor:
        return ops.upsample_argmax(x, (large, large), True, target)[1]

    x = draw.feature_map(side, classes)
    moved = _kernels("upsample_cross_entropy").bytes_moved(x, target.numel())
    yield OpCase("upsample_cross_entropy", "step", loss, [x], sum(moved))
    yield OpCase("upsample_cross_entropy", "forward", loss, [x], moved[0] - 4 * x.numel())
    moved = _kernels("upsample_argmax").bytes_moved
    yield OpCase("upsample_argmax", "forward", labels, [x], moved(x, target.numel(), False))
    yield OpCase("upsample_argmax", "evaluation", counted, [x], moved(x, target.numel(), True))


def op_cases(batch: int, device: str, tiny: bool = False) -> Iterator[OpCase]:
    """Every op at every shape; of `tiny` only at the last one of each kind."""
    draw = Draw(batch, device)
    for make, shapes in (
        (_batch_norm_act, MAPS),
        (_transformer, TRANSFORMERS),
        (_depthwise, DEPTHWISE),
        (_inverted, INVERTED),
        (_separable, SEPARABLE),
        (_stack, STACKS),
        (_upsampled, ((2, 8, 21, 64),) if tiny else UPSAMPLED),
    ):
        yield from itertools.chain.from_iterable(make(draw, *shape) for shape in (shapes[-1:] if tiny else shapes))
