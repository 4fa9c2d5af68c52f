"""MobileViTv2 (arXiv 2206.02680): dimensions from the paper and its release."""

from __future__ import annotations

from torch import nn

from ..nn import MobileViTV2Block
from .init import init_default
from .network import Architecture, Stage, make_divisible


def separable_architecture(block: type[nn.Module], width: float) -> Architecture:
    """A network with separable attention, `width` times the base width."""

    def stage(channels: int, dim: int, depth: int) -> Stage:
        d = make_divisible(dim * width, 8)
        return Stage(make_divisible(channels * width, 8), d, 2 * d // 16 * 16, depth)

    return Architecture(
        stem=make_divisible(min(max(32 * width, 16), 64), 8, 16),
        layer_1=make_divisible(64 * width, 16),
        layer_2=make_divisible(128 * width, 8),
        layer_2_depth=2,
        stages=(stage(256, 128, 2), stage(384, 192, 4), stage(512, 256, 3)),
        expand_ratio=2,
        block=block,
        dilate_block=True,
        head_channels=None,
        init=init_default,
    )


ARCHITECTURES = {
    f"mobilevitv2_{round(100 * width):03d}": separable_architecture(MobileViTV2Block, width)
    for width in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
}
