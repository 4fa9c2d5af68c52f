"""Pre-norm layers and the global representation that they form."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from ..ops.random import draw_seed
from ..ops.types import Layer, LayerNorm, Linear
from .conv import ConvNormAct
from .layout import to_nchw, to_nhwc


def _norm(norm: nn.LayerNorm | nn.GroupNorm) -> LayerNorm:
    return LayerNorm(norm.weight, norm.bias, norm.eps, isinstance(norm, nn.GroupNorm))


def _linear(module: nn.Linear | ConvNormAct) -> Linear:
    layer = module.block.conv if isinstance(module, ConvNormAct) else module
    return Linear(layer.weight, layer.bias)


class MultiHeadAttention(nn.Module):
    """Parameters of multi-head attention: qkv_proj (query, key, value; head-major inside each) and out_proj."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must be positive and divide dim {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.qkv_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)


class SeparableAttention(nn.Module):
    """Parameters of separable attention: qkv_proj (score, keys, values) and out_proj, stored as 1x1 convolutions."""

    num_heads = None

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv_proj = ConvNormAct(dim, 1 + 2 * dim, bias=True, norm=False, act="identity")
        self.out_proj = ConvNormAct(dim, dim, bias=True, norm=False, act="identity")
        self.dropout = nn.Dropout(dropout)


class _PreNormLayer(nn.Module):
    """t += attention(norm(t)), then t += feed_forward(norm(t)), on maps (B, D, H, W). The submodules hold parameters; `ops` computes."""

    def branches(self) -> tuple[nn.Sequential, tuple[nn.Module, nn.Module, nn.Module, nn.Module, nn.Module]]:
        """The attention branch (norm, attention, dropout) and (norm, fc1, hidden dropout, fc2, dropout) of the feed-forward branch."""
        raise NotImplementedError

    def layer(self) -> Layer:
        (norm1, attention, _), (norm2, fc1, _, fc2, _) = self.branches()
        return Layer(_norm(norm1), _linear(attention.qkv_proj), _linear(attention.out_proj), _norm(norm2), _linear(fc1), _linear(fc2))

    def dropouts(self) -> dict[str, float]:
        (_, attention, output), (_, _, hidden, _, _) = self.branches()
        return {"attention_dropout": attention.dropout.p, "hidden_dropout": hidden.p, "output_dropout": output.p}

    @property
    def num_heads(self) -> int | None:
        return self.branches()[0][1].num_heads

    def forward(self, x: Tensor) -> Tensor:
        return to_nchw(_run(to_nhwc(x), [self], None, self.patch_size))


class TransformerLayer(_PreNormLayer):
    """Multi-head attention and feed-forward network, pre-norm with LayerNorm over channels, on maps (B, D, H, W).

    The pixels that share their position inside a patch attend to each other (`ops.patch_attention`). MobileViTv1, MobileViTv3-XXS/XS/S.

    Args:
        dim: D, divisible by num_heads.
        ffn_dim: width of the feed-forward network's hidden tensor.
        dropout: behind attention and feed-forward network; attn_dropout on probabilities; ffn_dropout on the hidden tensor.
        patch_size: (ph, pw), must divide the map.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_heads: int = 4,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        ffn_dropout: float = 0.0,
        patch_size: tuple[int, int] = (2, 2),
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.pre_norm_mha = nn.Sequential(nn.LayerNorm(dim), MultiHeadAttention(dim, num_heads, attn_dropout), nn.Dropout(dropout))
        self.pre_norm_ffn = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, ffn_dim), nn.SiLU(), nn.Dropout(ffn_dropout), nn.Linear(ffn_dim, dim), nn.Dropout(dropout)
        )

    def branches(self):
        norm, fc1, _, hidden, fc2, output = self.pre_norm_ffn
        return self.pre_norm_mha, (norm, fc1, hidden, fc2, output)


class SeparableLayer(_PreNormLayer):
    """Separable attention and feed-forward network, pre-norm with one-group GroupNorm, on maps (B, D, H, W). MobileViTv2, MobileViTv3-w.

    Arguments as in `TransformerLayer`.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        ffn_dropout: float = 0.0,
        patch_size: tuple[int, int] = (2, 2),
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.pre_norm_attn = nn.Sequential(nn.GroupNorm(1, dim), SeparableAttention(dim, attn_dropout), nn.Dropout(dropout))
        self.pre_norm_ffn = nn.Sequential(
            nn.GroupNorm(1, dim),
            ConvNormAct(dim, ffn_dim, bias=True, norm=False),
            nn.Dropout(ffn_dropout),
            ConvNormAct(ffn_dim, dim, bias=True, norm=False, act="identity"),
            nn.Dropout(dropout),
        )

    def branches(self):
        return self.pre_norm_attn, tuple(self.pre_norm_ffn)


class GlobalRepresentation(nn.Sequential):
    """The layers of a stage and their final norm, on maps (B, D, H, W): one call to `ops.global_representation`.

    Args:
        layers: `TransformerLayer`s or `SeparableLayer`s, all of one kind and with the same dropouts.
        norm: nn.LayerNorm(D) or nn.GroupNorm(1, D).
        patch_size: (ph, pw), must divide the map.
    """

    def __init__(self, layers: list[_PreNormLayer], norm: nn.LayerNorm | nn.GroupNorm, patch_size: tuple[int, int] = (2, 2)) -> None:
        super().__init__(*layers, norm)
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Tensor:
        return to_nchw(self.forward_nhwc(to_nhwc(x)))

    def forward_nhwc(self, x: Tensor) -> Tensor:
        *layers, norm = self
        return _run(x, layers, _norm(norm), self.patch_size)


def _run(x: Tensor, layers: list[_PreNormLayer], norm: LayerNorm | None, patch_size: tuple[int, int]) -> Tensor:
    dropouts, seed = {}, None
    if layers and layers[0].training:
        dropouts = layers[0].dropouts()
        seed = draw_seed(x.device) if any(p > 0 for p in dropouts.values()) else None
    num_heads = layers[0].num_heads if layers else None
    return ops.global_representation(x, [layer.layer() for layer in layers], norm, num_heads, patch_size, **dropouts, seed=seed)
