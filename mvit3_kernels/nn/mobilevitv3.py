"""The two MobileViTv3 blocks (arXiv 2209.15159): local and global representation meet in a 1x1 fusion with residual."""

from __future__ import annotations

from torch import Tensor

from .conv import ConvNormAct, conv_of_concat
from .guard import known
from .mobilevit import _TransformerBlock
from .mobilevitv2 import _SeparableBlock


@known
class MobileViTV3Block(_TransformerBlock):
    """MobileViTv3 block of XXS, XS and S: depth-wise 3x3 and 1x1, transformer, 1x1 projection, then input + 1x1 fusion
    over concat(local, projection).

    (B, C, H, W) to the same shape, any H and W.

    Args:
        channels: C.
        dim: D, the transformer's width; ffn_dim its hidden width; depth its number of layers; num_heads divides D.
        dropout: behind attention and feed-forward network; attn_dropout on probabilities; ffn_dropout on the hidden
            tensor.
        patch_size: (ph, pw).
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        ffn_dim: int,
        depth: int,
        num_heads: int = 4,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        ffn_dropout: float = 0.0,
        patch_size: tuple[int, int] = (2, 2),
    ) -> None:
        local, fusion = ConvNormAct(channels, channels, 3, groups=channels), ConvNormAct(dim + channels, channels)
        super().__init__(
            channels, dim, ffn_dim, depth, num_heads, dropout, attn_dropout, ffn_dropout, patch_size, local, fusion
        )

    def forward(self, x: Tensor) -> Tensor:
        local, projected = self.representations(x, self.fusion)
        return conv_of_concat(self.fusion, local, projected, residual=x)


@known
class MobileViTV3SeparableBlock(_SeparableBlock):
    """MobileViTv3 block of widths 0.5 to 2.0: depth-wise 3x3 and 1x1, separable attention, then input + 1x1 fusion over
    concat(global, local).

    (B, C, H, W) to (B, C, H', W'), where H' and W' are H and W rounded up to whole patches (the published behaviour);
    the residual is the resized input.

    Args:
        channels: C.
        dim: D, the width of attention; ffn_dim the feed-forward network's hidden width; depth the number of layers.
        dropout: behind attention and feed-forward network; attn_dropout on scores; ffn_dropout on the hidden tensor.
        patch_size: (ph, pw).
        dilation: of the depth-wise convolution.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        ffn_dim: int,
        depth: int,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        ffn_dropout: float = 0.0,
        patch_size: tuple[int, int] = (2, 2),
        dilation: int = 1,
    ) -> None:
        super().__init__(
            channels, dim, ffn_dim, depth, dropout, attn_dropout, ffn_dropout, patch_size, dilation, 2 * dim
        )

    def forward(self, x: Tensor) -> Tensor:
        x, local, tokens = self.representations(x, self.conv_proj)
        return conv_of_concat(self.conv_proj, tokens, local, residual=x)
