"""The MobileViTv2 block, and what it shares with the MobileViTv3 block of the same style."""

from __future__ import annotations

from torch import Tensor, nn

from .attention import GlobalRepresentation, SeparableLayer
from .conv import ConvNormAct, local_representation, run_for_two
from .guard import known
from .layout import resize, whole_patches


class _SeparableBlock(nn.Module):
    """Local representation, separable attention over patches, projection of `projected` input channels."""

    def __init__(
        self,
        channels: int,
        dim: int,
        ffn_dim: int,
        depth: int,
        dropout: float,
        attn_dropout: float,
        ffn_dropout: float,
        patch_size: tuple[int, int],
        dilation: int,
        projected: int,
    ) -> None:
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.local_rep = nn.Sequential(
            ConvNormAct(channels, channels, 3, dilation=dilation, groups=channels),
            ConvNormAct(channels, dim, norm=False, act="identity"),
        )
        layers = [SeparableLayer(dim, ffn_dim, dropout, attn_dropout, ffn_dropout, patch_size) for _ in range(depth)]
        self.global_rep = GlobalRepresentation(layers, nn.GroupNorm(1, dim), patch_size)
        self.conv_proj = ConvNormAct(projected, channels, act="identity")

    def representations(self, x: Tensor, *readers: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, C, H, W) resized to whole patches, as the published models do, and its local representation, for
        `readers` beside the layers, and global one (B, D, H, W)."""
        x = resize(x, whole_patches(x, self.patch_size), align_corners=True)
        if readers:
            local, beside = run_for_two(self.local_rep, x, self.global_rep, *readers)
        else:
            local = beside = local_representation(self.local_rep, x)
        return x, beside, self.global_rep(local)


@known
class MobileViTV2Block(_SeparableBlock):
    """MobileViTv2 block (arXiv 2206.02680): depth-wise 3x3 and 1x1, separable attention, 1x1 projection.

    (B, C, H, W) to (B, C, H', W'), where H' and W' are H and W rounded up to whole patches (the published behaviour).

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
        super().__init__(channels, dim, ffn_dim, depth, dropout, attn_dropout, ffn_dropout, patch_size, dilation, dim)

    def forward(self, x: Tensor) -> Tensor:
        _, _, tokens = self.representations(x)
        return self.conv_proj(tokens)
