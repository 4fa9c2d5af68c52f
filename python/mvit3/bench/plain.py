"""The networks as a user would write them without this library: plain PyTorch modules in NCHW, the eager peer of every
benchmark.

`plain(model)` rebuilds a network of ours from nn.Conv2d, nn.BatchNorm2d, F.scaled_dot_product_attention and reshapes
around the transformer (unfold once per block, fold once, as timm does), with copies of its parameters. It runs in
either memory format.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit3_kernels.models import MobileViT, SegmentationNetwork, SSDNetwork
from mvit3_kernels.models.detection import decode
from mvit3_kernels.models.segmentation import ASPP, POOL_SIZES
from mvit3_kernels.nn import (
    ConvNormAct,
    GlobalRepresentation,
    InvertedResidual,
    MobileViTBlock,
    MobileViTV2Block,
    MobileViTV3Block,
    MobileViTV3SeparableBlock,
)


class Apply(nn.Module):
    """A function of one map that owns the modules it uses."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(layer: ConvNormAct) -> nn.Sequential:
    return nn.Sequential(*layer.block, {"silu": nn.SiLU, "relu": nn.ReLU, "identity": nn.Identity}[layer.act]())


def inverted_residual(block: InvertedResidual) -> nn.Module:
    layers = nn.Sequential(*(conv(layer) for layer in block.block))
    return Apply(lambda m, x: x + m.layers(x), layers=layers) if block.has_skip else layers


def unfold(x: Tensor) -> Tensor:
    """(B, D, H, W) to (B, D, P, N) with 2x2 patches."""
    b, d, h, w = x.shape
    x = x.reshape(b * d * (h // 2), 2, w // 2, 2).transpose(1, 2)
    return x.reshape(b, d, (h // 2) * (w // 2), 4).transpose(2, 3)


def fold(x: Tensor, size: tuple[int, int]) -> Tensor:
    (b, d), (h, w) = x.shape[:2], size
    x = x.transpose(2, 3).reshape(b * d * (h // 2), w // 2, 2, 2).transpose(1, 2)
    return x.reshape(b, d, h, w)


def transformer(stack: GlobalRepresentation) -> nn.Module:
    *layers, norm = stack

    def attend(layer: nn.Module, t: Tensor) -> Tensor:
        pre_norm, attention, dropout = layer.pre_norm_mha
        qkv = attention.qkv_proj(pre_norm(t)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        p = attention.dropout.p if layer.training else 0.0
        out = F.scaled_dot_product_attention(*qkv.unbind(), dropout_p=p).transpose(1, 2).flatten(2)
        return t + dropout(attention.out_proj(out))

    def run(m: Apply, x: Tensor) -> Tensor:
        b, d, h, w = x.shape
        t = unfold(x).permute(0, 2, 3, 1).reshape(b * 4, -1, d)
        for layer in m.layers:
            t = attend(layer, t)
            t = t + layer.pre_norm_ffn(t)
        t = m.norm(t).reshape(b, 4, -1, d).permute(0, 3, 1, 2)
        return fold(t, (h, w))

    return Apply(run, layers=nn.ModuleList(layers), norm=norm)


def separable(stack: GlobalRepresentation) -> nn.Module:
    *layers, norm = stack

    def run(m: Apply, x: Tensor) -> Tensor:
        d, size = x.shape[1], x.shape[2:]
        t = unfold(x)
        for layer in m.layers:
            pre_norm, attention, dropout = layer.pre_norm_attn
            q, k, v = attention.qkv_proj.block(pre_norm(t)).split([1, d, d], 1)
            context = (k * attention.dropout(q.softmax(-1))).sum(-1, keepdim=True)
            t = t + dropout(attention.out_proj.block(F.relu(v) * context))
            norm2, fc1, hidden, fc2, output = layer.pre_norm_ffn
            t = t + output(fc2.block(hidden(F.silu(fc1.block(norm2(t))))))
        return fold(m.norm(t), size)

    return Apply(run, layers=nn.ModuleList(layers), norm=norm)


def resize(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    return (
        x if tuple(x.shape[2:]) == tuple(size) else F.interpolate(x, size, mode="bilinear", align_corners=align_corners)
    )


def even(x: Tensor) -> tuple[int, int]:
    return tuple(side + side % 2 for side in x.shape[2:])


def block(module: nn.Module) -> nn.Module:
    if isinstance(module, (MobileViTBlock, MobileViTV3Block)):

        def run(m: Apply, x: Tensor) -> Tensor:
            local = m.local_rep(x)
            tokens = resize(m.global_rep(resize(local, even(local), False)), local.shape[2:], False)
            first = local if m.v3 else x
            y = m.fusion(torch.cat((first, m.conv_proj(tokens)), 1))
            return x + y if m.v3 else y

        global_rep, fusion = transformer(module.global_rep), {"fusion": conv(module.fusion)}
    else:

        def run(m: Apply, x: Tensor) -> Tensor:
            x = resize(x, even(x), True)
            local = m.local_rep(x)
            tokens = m.global_rep(local)
            return x + m.conv_proj(torch.cat((tokens, local), 1)) if m.v3 else m.conv_proj(tokens)

        global_rep, fusion = separable(module.global_rep), {}
    local_rep = nn.Sequential(*(conv(layer) for layer in module.local_rep))
    peer = Apply(run, local_rep=local_rep, global_rep=global_rep, conv_proj=conv(module.conv_proj), **fusion)
    peer.v3 = isinstance(module, (MobileViTV3Block, MobileViTV3SeparableBlock))
    return peer


def _rebuild(module: nn.Module) -> nn.Module:
    if isinstance(module, ConvNormAct):
        return conv(module)
    if isinstance(module, InvertedResidual):
        return inverted_residual(module)
    if isinstance(module, (MobileViTBlock, MobileViTV2Block, MobileViTV3Block, MobileViTV3SeparableBlock)):
        return block(module)
    return nn.Sequential(*(_rebuild(child) for child in module)) if isinstance(module, nn.Sequential) else module


def plain(model: MobileViT, copies: bool = True) -> nn.Sequential:
    """`model` (a classifier) in plain PyTorch, with its own copies of parameters and buffers in the same order, in the
    same mode; without `copies` on those of `model`, which is then trained and put in a mode with it."""
    model = copy.deepcopy(model) if copies else model
    stages = (
        model.conv_1,
        model.layer_1,
        model.layer_2,
        model.layer_3,
        model.layer_4,
        model.layer_5,
        model.conv_1x1_exp,
        model.classifier,
    )
    return nn.Sequential(*(_rebuild(stage) for stage in stages)).train(model.training)


# Dense prediction


class Backbone(nn.Module):
    """layer_4 and layer_5 of a network with features_only."""

    def __init__(self, model: MobileViT) -> None:
        super().__init__()
        stages = (model.conv_1, model.layer_1, model.layer_2, model.layer_3, model.layer_4, model.layer_5)
        *first, layer_4, layer_5 = (_rebuild(stage) for stage in stages)
        self.first, self.layer_4, self.layer_5 = nn.Sequential(*first), layer_4, layer_5

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer_4(self.first(x))
        return y, self.layer_5(y)


def pyramid(module: nn.Module) -> nn.Module:
    def run(m: Apply, x: Tensor) -> Tensor:
        maps = [branch(x) for branch in m.branches]
        maps[m.own :] = [F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=m.align) for y in maps[m.own :]]
        return m.project(torch.cat(maps if m.own else [x, *maps], 1))

    if isinstance(module, ASPP):
        *branches, pooled = module.aspp_layer["convs"]
        parts = [*(conv(branch) for branch in branches), _rebuild(pooled.aspp_pool)]
        project = nn.Sequential(conv(module.aspp_layer["project"]), module.dropout)
    else:
        parts, project = [_rebuild(branch) for branch in module.psp_branches], _rebuild(module.fusion)
    peer = Apply(run, branches=nn.ModuleList(parts), project=project)
    peer.own, peer.align = (
        len(parts) - (1 if isinstance(module, ASPP) else len(POOL_SIZES)),
        not isinstance(module, ASPP),
    )
    return peer


class PlainSegmentation(nn.Module):
    """Logits as large as the image; with `labels` the most likely class of each pixel."""

    def __init__(self, model: SegmentationNetwork, labels: bool) -> None:
        super().__init__()
        head = model.seg_head
        self.backbone, self.pyramid = Backbone(model.encoder), pyramid(getattr(head, head.pyramid))
        self.classifier = _rebuild(head.classifier)
        self.stride, self.align_corners, self.labels = model.output_stride, model.align_corners, labels

    def forward(self, x: Tensor) -> Tensor:
        y = self.classifier(self.pyramid(self.backbone(x)[1]))
        size = [side * self.stride for side in y.shape[2:]]
        y = F.interpolate(y, size, mode="bilinear", align_corners=self.align_corners)
        return y.argmax(1) if self.labels else y


class PlainSSD(nn.Module):
    """Scores and offsets; with `anchors` probabilities and boxes."""

    def __init__(self, model: SSDNetwork, anchors: Tensor | None) -> None:
        super().__init__()
        self.backbone = Backbone(model.encoder)
        self.extra = nn.ModuleList(_rebuild(layer) for layer in model.extra_layers.values())
        self.heads = nn.ModuleList()
        for head in model.ssd_heads:
            layers = [layer for layer in (head.proj_layer, head.loc_cls_layer) if layer is not None]
            self.heads.append(nn.Sequential(*(_rebuild(layer) for layer in layers)))
        self.classes = model.num_classes
        self.register_buffer("anchors", anchors, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = list(self.backbone(x))
        for layer in self.extra:
            maps.append(layer(maps[-1]))
        found = [
            head(y).permute(0, 2, 3, 1).reshape(len(x), -1, 4 + self.classes)
            for head, y in zip(self.heads, maps, strict=True)
        ]
        offsets, scores = torch.cat(found, 1).split((4, self.classes), -1)
        return (scores, offsets) if self.anchors is None else (scores.softmax(-1), decode(offsets, self.anchors))


def plain_dense(model: SegmentationNetwork | SSDNetwork, size: tuple[int, int] | None = None) -> nn.Module:
    """`model` in plain PyTorch, with its own copies of parameters and buffers in the same order but for an auxiliary
    head, in the same mode; with the `size` of images its post-processing is part of it: label maps, or probabilities
    and boxes."""
    training, model = model.training, copy.deepcopy(model)
    if isinstance(model, SegmentationNetwork):
        return PlainSegmentation(model, size is not None).train(training)
    return PlainSSD(model, None if size is None else model.anchors(size)).train(training)
