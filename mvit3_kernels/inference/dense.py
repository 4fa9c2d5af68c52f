"""Networks of dense prediction as programs: a backbone and what stands on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..models.detection import (
    CENTER_VARIANCE,
    SIZE_VARIANCE,
    SSDHead,
    SSDNetwork,
    anchor_shapes,
)
from ..models.segmentation import ASPP, PSP, SegmentationHead, SegmentationNetwork
from ..nn import ConvNormAct
from ..nn.plans import ConvPlan
from ..ops.types import ACTIVATIONS
from .program import IDENTITY, Program, Refused, assemble, check, conv_affine, emit, features, pointwise

# The endings of a detector's program.
RAW, BOXES = 0, 1


@assemble.register
def _(network: SegmentationNetwork, program: Program) -> None:
    layer_5 = features(network.encoder, program)[-1]
    head = network.seg_head
    if type(head) is not SegmentationHead:
        raise Refused(f"seg_head is a {type(head).__name__}")
    if head.aux_head is not None and head.training:
        raise Refused("its auxiliary head is in training mode")
    x = emit(head.classifier, program, emit(getattr(head, head.pyramid), program, layer_5))
    program.finish([x], lambda results: results[0].permute(0, 3, 1, 2))


@assemble.register
def _(network: SSDNetwork, program: Program) -> None:
    maps = features(network.encoder, program)[-2:]
    for layer in network.extra_layers.values():
        maps.append(emit(layer, program, maps[-1]))
    heads = list(network.ssd_heads)
    if len(heads) != len(maps) or any(head.values != 4 + network.num_classes for head in heads):
        raise Refused("its heads are not one for each map, of four offsets and its classes")
    outputs = [emit(head, program, x) for head, x in zip(heads, maps, strict=True)]

    values = 4 + network.num_classes

    def split(results: list[Tensor]) -> tuple[Tensor, Tensor]:
        offsets, scores = results[0].flatten(1, 2).split((4, values - 4), -1)
        return scores, offsets

    raw = program.add("anchors", outputs, (), [values])
    sizes = [torch.tensor(shapes, dtype=torch.float64).float().clamp(0, 1) for shapes in anchor_shapes()]
    boxes = program.add("boxes", outputs, sizes, [values, len(sizes)], [CENTER_VARIANCE, SIZE_VARIANCE])
    program.finish([raw], split)  # RAW
    program.finish([boxes], split, rounds=False)  # BOXES, float32 whatever the network's dtype


@emit.register
def _(module: SSDHead, program: Program, x: int) -> int:
    return emit(module.loc_cls_layer, program, x if module.proj_layer is None else emit(module.proj_layer, program, x))


@emit.register
def _(module: nn.AdaptiveAvgPool2d, program: Program, x: int) -> int:
    size = module.output_size
    if isinstance(size, int):
        size = (size, size)
    if len(set(size)) != 1 or size[0] is None:
        raise Refused(f"the engine has no step for {module}")
    return program.add("adaptive_pool", [x], (), [size[0]])


@emit.register
def _(module: nn.Dropout2d, program: Program, x: int) -> int:
    if module.training and module.p > 0:
        raise Refused("a Dropout2d is in training mode")
    return x


def _outputs(branch: nn.Module) -> int:
    """Channels of a pooled branch."""
    last = branch[-1] if type(branch) is nn.Sequential and len(branch) > 0 else None
    if type(last) is not ConvNormAct:
        raise Refused("a pooled branch does not end with a ConvNormAct")
    return last.block.conv.out_channels


@emit.register
def _(module: ASPP, program: Program, x: int) -> int:
    check(module)
    *branches, pooled = module.aspp_layer["convs"]
    maps = [emit(branch, program, x) for branch in branches]
    vector = emit(pooled.aspp_pool, program, x)
    share, project = _outputs(pooled.aspp_pool), module.aspp_layer["project"].plan()
    return emit(module.dropout, program, pooled_sum(program, maps, vector, share, project))


def pooled_sum(program: Program, maps: Sequence[int], vector: int, share: int, project: ConvPlan) -> int:
    """A 1x1 convolution of the concatenation of maps and of a vector of each sample, `share` channels wide: what that
    adds to the product is a bias."""
    weight, scale, shift = conv_affine(project)
    own, shared = weight.flatten(1).split((weight.shape[1] - share, share), 1)
    bias = pointwise(program, [vector], shared, scale, torch.zeros_like(shift), "identity")
    act = ACTIVATIONS.index(project.act)
    return program.add("pointwise_sum", [*maps, bias], [own.contiguous(), scale, shift], [act])


@emit.register
def _(module: PSP, program: Program, x: int) -> int:
    check(module)
    conv, *others = module.fusion
    tokens = [emit(branch, program, x) for branch in module.psp_branches]
    weight, scale, shift = conv_affine(conv.plan())
    widths = [_outputs(branch) for branch in module.psp_branches]
    own, *shared = weight.split((weight.shape[1] - sum(widths), *widths), 1)
    y = program.add("conv3x3", [x], [own.permute(0, 2, 3, 1).contiguous(), scale, shift], [1, 1, IDENTITY])
    taps = []
    for map_, part in zip(tokens, shared, strict=True):
        part = part.permute(2, 3, 0, 1).flatten(0, 2)  # (9 * outputs, inputs)
        ones = scale.repeat(9)
        taps.append(pointwise(program, [map_], part.contiguous(), ones, torch.zeros_like(ones), "identity"))
    y = program.add("spread_taps", [y, *taps], (), [ACTIVATIONS.index(conv.act)])
    for layer in others:
        y = emit(layer, program, y)
    return y
