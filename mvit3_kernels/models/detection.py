"""Object detection: SSDLite on every backbone, as the MobileViTv3 release and ml-cvnets publish it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..nn import ConvNormAct
from ..nn.guard import known
from .network import MobileViT
from .saving import Savable

# Of the six feature maps: layer_4, layer_5, then four extra ones, the last of one pixel.
EXTRA_CHANNELS = (256, 128, 128, 64)
HEAD_CHANNELS = (512, 256, 256, 128, 128, 64)
ASPECT_RATIOS = ((2, 3), (2, 3), (2, 3), (2, 3), (2, 3), (2,))
SCALES = (0.1, 1.05)
CENTER_VARIANCE, SIZE_VARIANCE = 0.1, 0.2


def separable(channels: int, outputs: int, stride: int, last: dict[str, object]) -> nn.Sequential:
    """A depth-wise 3x3 convolution with norm, without activation, and a 1x1 convolution."""
    depthwise = ConvNormAct(channels, channels, 3, stride, groups=channels, act="identity")
    return nn.Sequential(OrderedDict(dw_conv=depthwise, pw_conv=ConvNormAct(channels, outputs, **last)))


@known
class SSDHead(nn.Module):
    """Box offsets and class scores of the anchors of one map (B, C, H, W): (B, H * W * anchors, 4 + classes)."""

    def __init__(self, channels: int, width: int, anchors: int, num_classes: int, kernel_size: int) -> None:
        super().__init__()
        self.values = 4 + num_classes
        outputs = anchors * self.values
        plain = {"bias": True, "norm": False, "act": "identity"}
        if kernel_size == 1:
            self.loc_cls_layer = ConvNormAct(channels, outputs, **plain)
            self.proj_layer = None
            return
        self.proj_layer = None if channels == width else ConvNormAct(channels, width, act="relu")
        self.loc_cls_layer = separable(width, outputs, 1, plain)

    def forward(self, x: Tensor) -> Tensor:
        y = self.loc_cls_layer(x if self.proj_layer is None else self.proj_layer(x))
        # flatten and unflatten leave the batch open, and take one of no images
        return y.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, self.values))


class SSDNetwork(Savable, nn.Module):
    """A backbone, four extra maps and a head for each of six maps, on images (B, in_chans, H, W) of any size and memory
    format.

    Returns class scores (B, N, num_classes) before softmax, class 0 being the background, and box offsets (B, N, 4)
    from the N anchors of `anchors`, which `decode` turns into boxes. State-dict keys are the published ones (encoder.*,
    extra_layers.*, ssd_heads.*). Use `create_model`.
    """

    def __init__(self, encoder: MobileViT, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_classes = num_classes
        layer_4, layer_5 = encoder.feature_info.channels()[3:]
        channels = (layer_4, layer_5, *EXTRA_CHANNELS)
        extra: OrderedDict[str, nn.Module] = OrderedDict()
        for i, stride in enumerate((64, 128, 256), start=2):
            extra[f"os_{stride}"] = separable(channels[i - 1], channels[i], 2, {"act": "relu"})
        last = ConvNormAct(channels[-2], channels[-1], norm=False, act="relu")
        extra["os_-1"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), last)
        self.extra_layers = nn.ModuleDict(extra)
        self.ssd_heads = nn.ModuleList(
            SSDHead(c, width, 2 + 2 * len(ratios), num_classes, 1 if i == 5 else 3)
            for i, (c, width, ratios) in enumerate(zip(channels, HEAD_CHANNELS, ASPECT_RATIOS, strict=True))
        )
        for m in (*self.extra_layers.modules(), *self.ssd_heads.modules()):
            if isinstance(m, nn.Conv2d):
                nn.init.xavier_uniform_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """The six feature maps."""
        maps = self.encoder(x)[-2:]
        for layer in self.extra_layers.values():
            maps.append(layer(maps[-1]))
        return maps

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.cat([head(y) for head, y in zip(self.ssd_heads, self.forward_maps(x), strict=True)], 1)
        offsets, scores = found.split((4, self.num_classes), -1)  # two slices would add up two gradients
        return scores, offsets

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class probabilities (B, N, num_classes) and boxes (B, N, 4) as `decode` makes them: what is left to do is to
        choose among them (`tasks.choose`). float64 where `forward` is, else float32."""
        scores, offsets = self(x)
        dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
        anchors = self.anchors(x.shape[2:], x.device).to(dtype)
        return scores.softmax(-1, dtype=dtype), decode(offsets.to(dtype), anchors)

    def anchors(self, size: Sequence[int], device: torch.device | str | None = None) -> Tensor:
        """The anchors (N, 4) of images of `size` (H, W), in the order of the outputs: centre x, centre y, width and
        height as fractions of the image, float32."""
        device = next(self.parameters()).device if device is None else device
        return anchors_of(*size, not self.encoder._architecture.v1_style, device)


def map_sizes(height: int, width: int, even: bool) -> list[tuple[int, int]]:
    """Sizes of the six maps of an image: strides of 2, each rounded up. `even`: a MobileViT block of the backbone
    leaves its map, of stride 8, 16 or 32, enlarged to whole patches."""
    sizes = []
    for halvings in range(1, 9):
        height, width = -(-height // 2), -(-width // 2)
        if even and 3 <= halvings <= 5:
            height, width = height + height % 2, width + width % 2
        if halvings >= 4:
            sizes.append((height, width))
    return [*sizes, (1, 1)]


def anchor_shapes() -> list[list[tuple[float, float]]]:
    """Width and height of the anchors of a pixel, for each of the six maps, before they are clamped to the image."""
    scales = [SCALES[0] + (SCALES[1] - SCALES[0]) * i / len(ASPECT_RATIOS) for i in range(len(ASPECT_RATIOS) + 1)]
    found = []
    for i, ratios in enumerate(ASPECT_RATIOS):
        scale, between = scales[i], math.sqrt(scales[i] * scales[i + 1])
        shapes = [(scale, scale), (between, between)]
        for ratio in ratios:
            root = math.sqrt(ratio)
            shapes += [(scale * root, scale / root), (scale / root, scale * root)]
        found.append(shapes)
    return found


def anchors_of(height: int, width: int, even: bool = False, device: torch.device | str = "cpu") -> Tensor:
    """`SSDNetwork.anchors`; `even` as in `map_sizes`."""
    found = []
    for (rows, columns), shapes in zip(map_sizes(height, width, even), anchor_shapes(), strict=True):
        y, x = torch.meshgrid(
            (torch.arange(rows, dtype=torch.float64, device=device) + 0.5) / rows,
            (torch.arange(columns, dtype=torch.float64, device=device) + 0.5) / columns,
            indexing="ij",
        )
        cells = torch.stack((x, y), -1).view(-1, 1, 2).expand(-1, len(shapes), 2)
        sizes = torch.tensor(shapes, dtype=torch.float64, device=device).expand(cells.shape[0], -1, 2)
        found.append(torch.cat((cells, sizes), -1).view(-1, 4))
    return torch.cat(found).float().clamp(0, 1)


def decode(offsets: Tensor, anchors: Tensor) -> Tensor:
    """Boxes (..., N, 4) as corners x1, y1, x2, y2, fractions of the image, not clipped, from the network's offsets."""
    centers = offsets[..., :2] * CENTER_VARIANCE * anchors[:, 2:] + anchors[:, :2]
    sizes = (offsets[..., 2:] * SIZE_VARIANCE).exp() * anchors[:, 2:]
    return torch.cat((centers - sizes / 2, centers + sizes / 2), -1)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """The inverse: offsets of boxes given as corners."""
    centers, sizes = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    return torch.cat(
        (
            (centers - anchors[:, :2]) / anchors[:, 2:] / CENTER_VARIANCE,
            (sizes / anchors[:, 2:]).log() / SIZE_VARIANCE,
        ),
        -1,
    )
