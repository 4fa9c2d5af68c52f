"""Semantic segmentation: DeepLabv3 and PSPNet on every backbone, as the MobileViTv3 release and ml-cvnets publish
them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..nn import ConvNormAct
from ..nn.guard import Block, known
from ..nn.pooled import conv1x1_with_vector, conv3x3_with_tokens, pooled_misfit
from ..ops import dispatch
from .init import init_kaiming
from .network import MobileViT
from .saving import Savable

# Dilations of the three dense branches, by output stride, as published (16: PASCAL VOC, 8: ADE20K).
ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}
POOL_SIZES = (1, 2, 3, 6)


def resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Bilinear interpolation of a map (B, C, H, W)."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)


@known
class PooledBranch(nn.Module):
    """ASPP's last branch: the mean over the map, 1x1 convolution, norm and ReLU, spread over the map again."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.aspp_pool = nn.Sequential(
            OrderedDict(global_pool=nn.AdaptiveAvgPool2d(1), conv_1x1=ConvNormAct(channels, outputs, act="relu"))
        )

    def forward(self, x: Tensor) -> Tensor:
        # bilinear interpolation of one pixel is that pixel
        return self.aspp_pool(x).expand(-1, -1, *x.shape[2:])


@known
class ASPP(Block):
    """Atrous spatial pyramid pooling: (B, C, H, W) to (B, outputs, H, W).

    The pooled branch is one vector of each sample: its share of the projection is taken of that and added as a bias,
    where nothing stands in the way of that (`Block`).
    """

    def __init__(self, channels: int, outputs: int, rates: Sequence[int], dropout: nn.Module) -> None:
        super().__init__()
        branches = [
            ConvNormAct(channels, outputs, act="relu"),
            *(ConvNormAct(channels, outputs, 3, dilation=rate, act="relu") for rate in rates),
            PooledBranch(channels, outputs),
        ]
        self.aspp_layer = nn.ModuleDict(
            OrderedDict(
                convs=nn.ModuleList(branches), project=ConvNormAct(len(branches) * outputs, outputs, act="relu")
            )
        )
        self.dropout = dropout

    def misfit(self) -> str | None:
        if type(self.aspp_layer["convs"][-1]) is not PooledBranch:
            return "its last branch is not a PooledBranch"
        reason = pooled_misfit(self.aspp_layer["project"], 1)
        return reason and f"project {reason}"

    def forward(self, x: Tensor) -> Tensor:
        branches, project = self.aspp_layer["convs"], self.aspp_layer["project"]
        if self.why_modules() is not None or dispatch.writes_aten():
            return self.dropout(project(torch.cat([branch(x) for branch in branches], 1)))
        maps = [branch(x) for branch in list(branches)[:-1]]
        return self.dropout(conv1x1_with_vector(project, maps, branches[-1].aspp_pool(x)))


@known
class PSP(Block):
    """Pyramid pooling: (B, C, H, W) to (B, outputs, H, W).

    The fusion's product with the pooled maps is taken before they are up-sampled, where nothing stands in the way of
    that (`Block`).
    """

    def __init__(self, channels: int, outputs: int, dropout: float) -> None:
        super().__init__()
        width = channels // len(POOL_SIZES) // 16 * 16
        self.psp_branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), ConvNormAct(channels, width, act="relu")) for size in POOL_SIZES
        )
        self.fusion = nn.Sequential(
            ConvNormAct(channels + len(POOL_SIZES) * width, outputs, 3, act="relu"), nn.Dropout2d(dropout)
        )

    def misfit(self) -> str | None:
        if type(self.fusion) is not nn.Sequential or len(self.fusion) == 0:
            return "fusion does not begin with a convolution"
        reason = pooled_misfit(self.fusion[0], 3)
        return reason and f"fusion.0 {reason}"

    def forward(self, x: Tensor) -> Tensor:
        tokens = [branch(x) for branch in self.psp_branches]
        if self.why_modules() is not None or dispatch.writes_aten():
            maps = [resize(t, x.shape[2:], align_corners=True) for t in tokens]
            return self.fusion(torch.cat((x, *maps), 1))
        conv, *others = self.fusion
        y = conv3x3_with_tokens(conv, x, tokens)
        for layer in others:
            y = layer(y)
        return y


@known
class SegmentationHead(nn.Module):
    """What stands on layer_5: the pyramid and the classifier; with `auxiliary_channels` a second classifier on layer_4.

    The families differ in where they drop and in a name: v1-style heads have one more level around the classifier.
    """

    def __init__(
        self,
        pyramid: tuple[str, nn.Module],
        outputs: int,
        num_classes: int,
        dropout: float,
        auxiliary_channels: int | None,
        v1_style: bool,
    ) -> None:
        super().__init__()
        self.aux_head = None
        if auxiliary_channels is not None:
            width = max(auxiliary_channels // 4, 128)
            self.aux_head = nn.Sequential(
                ConvNormAct(auxiliary_channels, width, 3, act="relu"),
                nn.Dropout2d(dropout),
                classifier(width, num_classes),
            )
        name, module = pyramid
        self.pyramid = name
        self.add_module(name, module)
        self.classifier = classifier(outputs, num_classes)
        if v1_style:
            self.classifier = nn.Sequential(OrderedDict(dropout=nn.Dropout2d(dropout), classifier=self.classifier))

    def forward(self, layer_4: Tensor, layer_5: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = self.classifier(getattr(self, self.pyramid)(layer_5))
        return logits, self.aux_head(layer_4) if self.aux_head is not None and self.training else None


def classifier(channels: int, num_classes: int) -> ConvNormAct:
    return ConvNormAct(channels, num_classes, bias=True, norm=False, act="identity")


class SegmentationNetwork(Savable, nn.Module):
    """A backbone and a head, on images (B, in_chans, H, W) of any size and memory format.

    Returns logits (B, num_classes, h * output_stride, w * output_stride), where h x w is the backbone's last map; in
    training, where the network has an auxiliary head, these and that head's logits (B, num_classes, h, w) at the size
    of layer_4. State-dict keys are the published ones (encoder.*, seg_head.*). Use `create_model`.

    `small_logits` returns them before up-sampling, which is all that a loss or a prediction needs to read.
    """

    def __init__(self, encoder: MobileViT, head: SegmentationHead, num_classes: int, align_corners: bool) -> None:
        super().__init__()
        self.encoder, self.seg_head = encoder, head
        self.num_classes = num_classes
        self.align_corners = align_corners
        self.output_stride = encoder.feature_info.reduction(4)

    def small_logits(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (B, num_classes, h, w) of the head and, in training, of the auxiliary head."""
        return self.seg_head(*self.encoder(x)[-2:])

    def label_map(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """The most likely class of each pixel, (B, H, W) int64, at `size` (H, W) or at that of `forward`. As published:
        v2-style networks interpolate their small logits to the size, v1-style ones take the nearest pixel of what
        `forward` returns. Neither the large logits nor a gradient exist."""
        return self.labels(self.small_logits(x)[0], size)

    def labels(self, logits: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """`label_map` of the head's small logits (B, num_classes, h, w)."""
        if size is not None and not (isinstance(size, Sequence) and len(size) == 2 and min(size) > 0):
            raise ValueError(f"size must be two positive integers (H, W), got {size!r}")
        full = [side * self.output_stride for side in logits.shape[2:]]
        own = full if size is None or not self.align_corners else size
        labels, _ = ops.upsample_argmax(logits.permute(0, 2, 3, 1), own, self.align_corners)
        if size is None or own is size:
            return labels
        return F.interpolate(labels[:, None].double(), tuple(size)).long()[:, 0]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        logits, auxiliary = self.small_logits(x)
        size = [side * self.output_stride for side in logits.shape[2:]]
        logits = resize(logits, size, self.align_corners)
        return logits if auxiliary is None else (logits, auxiliary)


def build_segmentation(head: str, encoder: MobileViT, num_classes: int, drop_rate: float) -> SegmentationNetwork:
    """The network of a head, "deeplabv3" or "pspnet", on a backbone whose output stride is set.

    Published are: for MobileViTv1 and MobileViTv3-XXS/XS/S DeepLabv3 with 256 channels, without auxiliary head, its
    logits up-sampled with align_corners=False; for MobileViTv2 and MobileViTv3-w both with 512, with auxiliary head and
    align_corners=True.
    """
    _, _, _, layer_4, layer_5 = encoder.feature_info.channels()
    v1_style = encoder._architecture.v1_style
    outputs = 256 if v1_style else 512
    if head == "deeplabv3":
        rates = ATROUS_RATES.get(encoder.feature_info.reduction(4), ATROUS_RATES[16])
        dropout = nn.Dropout(drop_rate) if v1_style else nn.Dropout2d(drop_rate)
        pyramid = ("aspp", ASPP(layer_5, outputs, rates, dropout))
    else:
        pyramid = ("psp_layer", PSP(layer_5, outputs, drop_rate))
    seg_head = SegmentationHead(pyramid, outputs, num_classes, drop_rate, None if v1_style else layer_4, v1_style)
    if v1_style:
        init_kaiming(seg_head)  # the others keep PyTorch's defaults
    return SegmentationNetwork(encoder, seg_head, num_classes, align_corners=not v1_style)
