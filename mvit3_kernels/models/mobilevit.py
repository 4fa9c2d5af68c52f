"""MobileViTv1 (arXiv 2110.02178): dimensions from the paper and its release."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..nn import MobileViTBlock
from .init import init_kaiming
from .network import Architecture, Stage


def transformer_architecture(
    block: type[nn.Module],
    layer_1: int,
    layer_2: int,
    channels: Sequence[int],
    dims: Sequence[int],
    expand_ratio: int = 4,
    dropout: float = 0.1,
    depths: Sequence[int] = (2, 4, 3),
) -> Architecture:
    """A network with softmax attention: 4 heads everywhere, hidden width 2 D, head of 4 C5 (at most 960) channels."""

    stages = tuple(Stage(c, d, 2 * d, n) for c, d, n in zip(channels, dims, depths, strict=True))
    return Architecture(
        stem=16,
        layer_1=layer_1,
        layer_2=layer_2,
        layer_2_depth=3,
        stages=stages,
        expand_ratio=expand_ratio,
        block=block,
        dilate_block=False,
        head_channels=min(4 * channels[-1], 960),
        init=init_kaiming,
        drop_rate=0.1,
        proj_drop_rate=dropout,
    )


ARCHITECTURES = {
    "mobilevit_xxs": transformer_architecture(
        MobileViTBlock, 16, 24, (48, 64, 80), (64, 80, 96), expand_ratio=2, dropout=0.05
    ),
    "mobilevit_xs": transformer_architecture(MobileViTBlock, 32, 48, (64, 80, 96), (96, 120, 144)),
    "mobilevit_s": transformer_architecture(MobileViTBlock, 32, 64, (96, 128, 160), (144, 192, 240)),
}
