"""MobileViTv3 (arXiv 2209.15159): XXS, XS and S with softmax attention, widths 0.5 to 2.0 with separable attention."""

from __future__ import annotations

from ..nn import MobileViTV3Block, MobileViTV3SeparableBlock
from .mobilevit import transformer_architecture
from .mobilevitv2 import separable_architecture

_TRANSFORMER = {
    "xxs": dict(layer_1=16, layer_2=24, channels=(64, 80, 128), dims=(64, 80, 96), expand_ratio=2, dropout=0.05),
    "xs": dict(layer_1=32, layer_2=48, channels=(96, 160, 160), dims=(96, 120, 144)),
    "s": dict(layer_1=32, layer_2=64, channels=(128, 256, 320), dims=(144, 192, 240)),
}

ARCHITECTURES = {
    **{
        f"mobilevitv3_{size}": transformer_architecture(MobileViTV3Block, **dims) for size, dims in _TRANSFORMER.items()
    },
    # The fast variants have two transformer layers in layer_4 instead of four.
    **{
        f"mobilevitv3_{size}_fast": transformer_architecture(MobileViTV3Block, **dims, depths=(2, 2, 3))
        for size, dims in _TRANSFORMER.items()
    },
    **{
        f"mobilevitv3_{round(100 * width):03d}": separable_architecture(MobileViTV3SeparableBlock, width)
        for width in (0.5, 0.75, 1.0, 2.0)
    },
}
