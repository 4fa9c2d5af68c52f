"""The MobileViTv1 block, and what it shares with the MobileViTv3 block of the same style."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from .attention import GlobalRepresentation, TransformerLayer
from .conv import ConvNormAct, conv_of_concat, local_representation, run_for_two
from .guard import known
from .layout import resize, whole_patches


class _TransformerBlock(nn.Module):
    """Local representation, transformer over patches, projection, fusion with `fusion_inputs(C, D)` input channels."""

    def __init__(
        self,
        channels: int,
        dim: int,
        ffn_dim: int,
        depth: int,
        num_heads: int,
        dropout: float,
        attn_dropout: float,
        ffn_dropout: float,
        patch_size: tuple[int, int],
        local: ConvNormAct,
        fusion: ConvNormAct,
    ) -> None:
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.local_rep = nn.Sequential(
            OrderedDict(conv_3x3=local, conv_1x1=ConvNormAct(channels, dim, norm=False, act="identity"))
        )
        layers = [
            TransformerLayer(dim, ffn_dim, num_heads, dropout, attn_dropout, ffn_dropout, patch_size)
            for _ in range(depth)
        ]
        self.global_rep = GlobalRepresentation(layers, nn.LayerNorm(dim), patch_size)
        self.conv_proj = ConvNormAct(dim, channels)
        self.fusion = fusion

    def representations(self, x: Tensor, *readers: nn.Module) -> tuple[Tensor, Tensor]:
        """The local representation (B, D, H, W), for `readers` beside the layers, and the projected global one
        (B, C, H, W) of x (B, C, H, W)."""
        if readers:
            local, beside = run_for_two(self.local_rep, x, self.global_rep, *readers)
        else:
            local = beside = local_representation(self.local_rep, x)
        # A map that the patches do not divide is resized for the transformer only: the published models do so.
        tokens = self.global_rep(resize(local, whole_patches(local, self.patch_size), align_corners=False))
        return beside, self.conv_proj(resize(tokens, local.shape[2:], align_corners=False))


@known
class MobileViTBlock(_TransformerBlock):
    """MobileViTv1 block (arXiv 2110.02178): dense 3x3 and 1x1, transformer, 1x1 projection, dense 3x3 over
    concat(input, projection).

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
        local, fusion = ConvNormAct(channels, channels, 3), ConvNormAct(2 * channels, channels, 3)
        super().__init__(
            channels, dim, ffn_dim, depth, num_heads, dropout, attn_dropout, ffn_dropout, patch_size, local, fusion
        )

    def forward(self, x: Tensor) -> Tensor:
        _, projected = self.representations(x)
        return conv_of_concat(self.fusion, x, projected)
