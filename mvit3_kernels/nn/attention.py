"""Pre-norm layers and the global representation that they form.

Fused, a layer works on maps (B, H, W, D) and unfolds nothing. Where it must call its modules it does what the published
networks do: TransformerLayer's modules see tokens (B * P, N, D), SeparableLayer's see (B, D, P, N), with P positions
inside a patch and N patches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.checks import check_patches
from ..ops.types import Layer, LayerNorm, Linear
from .conv import ConvNormAct
from .guard import Block, dropout_rate, is_dropout, known, tampered
from .layout import fold, to_nchw, to_nhwc, unfold
from .plans import TokensPlan, layer_norm, linear


def _linear(module: nn.Linear | ConvNormAct) -> Linear:
    return linear(module.block.conv if isinstance(module, ConvNormAct) else module)


@known
class MultiHeadAttention(nn.Module):
    """Multi-head attention over tokens (..., N, D): qkv_proj (query, key, value; head-major inside each), out_proj,
    dropout of probabilities."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must be positive and divide dim {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.qkv_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, t: Tensor) -> Tensor:
        qkv = self.qkv_proj(t)
        if dropout_rate(self.dropout) == 0 and is_dropout(self.dropout) and tampered(self.dropout) is None:
            # One position of a patch whose pixels are the tokens.
            attended = ops.patch_attention(qkv.flatten(0, -3)[:, :, None], self.num_heads, (1, 1))
            return self.out_proj(attended.reshape(*qkv.shape[:-1], qkv.shape[-1] // 3))
        # (..., heads, N, head_dim)
        q, k, v = (t.transpose(-3, -2) for t in qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3))
        probabilities = self.dropout(torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1).to(v.dtype))
        return self.out_proj((probabilities @ v).transpose(-3, -2).flatten(-2))


@known
class SeparableAttention(nn.Module):
    """Separable attention over tokens (B, D, P, N): qkv_proj (score, keys, values) and out_proj, 1x1 convolutions;
    dropout of scores."""

    num_heads = None

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv_proj = ConvNormAct(dim, 1 + 2 * dim, bias=True, norm=False, act="identity")
        self.out_proj = ConvNormAct(dim, dim, bias=True, norm=False, act="identity")
        self.dropout = nn.Dropout(dropout)

    def forward(self, t: Tensor) -> Tensor:
        qkv = self.qkv_proj(t)
        width = (qkv.shape[1] - 1) // 2
        query, key, value = qkv.split((1, width, width), 1)
        scores = self.dropout(query.softmax(-1).to(qkv.dtype))
        context = (key * scores).sum(-1, keepdim=True)
        return self.out_proj(torch.relu(value) * context)


class _PreNormLayer(Block):
    """t += attention(norm(t)), then t += feed_forward(norm(t)), on maps (B, D, H, W)."""

    def branches(self) -> tuple[nn.Sequential, tuple[nn.Module, nn.Module, nn.Module, nn.Module, nn.Module]]:
        """The attention branch (norm, attention, dropout) and (norm, fc1, hidden dropout, fc2, dropout) of the
        feed-forward branch."""
        raise NotImplementedError

    def layer(self) -> Layer:
        (norm1, attention, _), (norm2, fc1, _, fc2, _) = self.branches()
        return Layer(
            layer_norm(norm1),
            _linear(attention.qkv_proj),
            _linear(attention.out_proj),
            layer_norm(norm2),
            _linear(fc1),
            _linear(fc2),
        )

    def dropouts(self) -> dict[str, float]:
        """The probabilities with which the layer drops now, as `ops.global_representation` names them."""
        (_, attention, output), (_, _, hidden, _, ffn_output) = self.branches()
        modules = (attention.dropout, hidden, output, ffn_output)
        places = ("attention_dropout", "hidden_dropout", "output_dropout", "ffn_output_dropout")
        return {place: dropout_rate(module) for place, module in zip(places, modules, strict=True)}

    @property
    def num_heads(self) -> int | None:
        return self.branches()[0][1].num_heads

    def _dropout_misfit(self) -> str | None:
        (_, attention, output), (_, _, hidden, _, last) = self.branches()
        for module in (attention.dropout, output, hidden, last):
            if not is_dropout(module):
                return f"a {type(module).__name__} stands where a Dropout should"
        return None

    def forward(self, x: Tensor) -> Tensor:
        if self.why_modules() is None:
            return to_nchw(_plan([self], None, self.patch_size).run(to_nhwc(x)))
        x = to_nhwc(x)
        check_patches("x", x, self.patch_size)
        return to_nchw(fold(self._forward_modules(unfold(x, self.patch_size)), x.shape, self.patch_size))

    def _forward_modules(self, t: Tensor) -> Tensor:
        """Tokens (B, P, N, D) in and out."""
        raise NotImplementedError


@known
class TransformerLayer(_PreNormLayer):
    """Multi-head attention and feed-forward network, pre-norm with LayerNorm over channels, on maps (B, D, H, W).

    The pixels that share their position inside a patch attend to each other (`ops.patch_attention`). MobileViTv1,
    MobileViTv3-XXS/XS/S.

    Args:
        dim: D, divisible by num_heads.
        ffn_dim: width of the feed-forward network's hidden tensor.
        dropout: behind attention and feed-forward network; attn_dropout on probabilities; ffn_dropout on the hidden
            tensor.
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
        self.patch_size = tuple(patch_size)
        self.pre_norm_mha = nn.Sequential(
            nn.LayerNorm(dim), MultiHeadAttention(dim, num_heads, attn_dropout), nn.Dropout(dropout)
        )
        self.pre_norm_ffn = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, ffn_dim),
            nn.SiLU(),
            nn.Dropout(ffn_dropout),
            nn.Linear(ffn_dim, dim),
            nn.Dropout(dropout),
        )

    def branches(self):
        norm, fc1, _, hidden, fc2, output = self.pre_norm_ffn
        return self.pre_norm_mha, (norm, fc1, hidden, fc2, output)

    def misfit(self) -> str | None:
        attention = _types(self.pre_norm_mha)
        if attention[:2] != [nn.LayerNorm, MultiHeadAttention] or len(attention) != 3:
            return f"pre_norm_mha is made of {_names(self.pre_norm_mha)}"
        mha = self.pre_norm_mha[1]
        if (
            tuple(mha._modules) != ("qkv_proj", "out_proj", "dropout")
            or type(mha.qkv_proj) is not nn.Linear
            or type(mha.out_proj) is not nn.Linear
        ):
            return f"its attention is made of {_names(mha)}"
        ffn = _types(self.pre_norm_ffn)
        if len(ffn) != 6 or (*ffn[:3], ffn[4]) != (nn.LayerNorm, nn.Linear, nn.SiLU, nn.Linear):
            return f"pre_norm_ffn is made of {_names(self.pre_norm_ffn)}"
        # By attributes: reading the shape of a weight would leave a trace in torch.jit.trace.
        widths = {
            mha.qkv_proj.in_features,
            mha.qkv_proj.out_features / 3,
            mha.out_proj.in_features,
            mha.out_proj.out_features,
        }
        if len(widths) > 1:
            return "qkv_proj and out_proj do not keep the width, as heads that were pruned do not"
        return self._dropout_misfit()

    def _forward_modules(self, t: Tensor) -> Tensor:
        tokens = t.flatten(0, 1)
        tokens = tokens + self.pre_norm_mha(tokens)
        tokens = tokens + self.pre_norm_ffn(tokens)
        return tokens.view(t.shape)


@known
class SeparableLayer(_PreNormLayer):
    """Separable attention and feed-forward network, pre-norm with one-group GroupNorm, on maps (B, D, H, W).
    MobileViTv2, MobileViTv3-w.

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
        self.patch_size = tuple(patch_size)
        self.pre_norm_attn = nn.Sequential(
            nn.GroupNorm(1, dim), SeparableAttention(dim, attn_dropout), nn.Dropout(dropout)
        )
        self.pre_norm_ffn = nn.Sequential(
            nn.GroupNorm(1, dim),
            ConvNormAct(dim, ffn_dim, bias=True, norm=False),
            nn.Dropout(ffn_dropout),
            ConvNormAct(ffn_dim, dim, bias=True, norm=False, act="identity"),
            nn.Dropout(dropout),
        )

    def branches(self):
        return self.pre_norm_attn, tuple(self.pre_norm_ffn)

    def misfit(self) -> str | None:
        attention = _types(self.pre_norm_attn)
        if attention[:2] != [nn.GroupNorm, SeparableAttention] or len(attention) != 3:
            return f"pre_norm_attn is made of {_names(self.pre_norm_attn)}"
        separable = self.pre_norm_attn[1]
        if tuple(separable._modules) != ("qkv_proj", "out_proj", "dropout"):
            return f"its attention is made of {_names(separable)}"
        ffn = _types(self.pre_norm_ffn)
        if len(ffn) != 5 or (ffn[0], ffn[1], ffn[3]) != (nn.GroupNorm, ConvNormAct, ConvNormAct):
            return f"pre_norm_ffn is made of {_names(self.pre_norm_ffn)}"
        _, fc1, _, fc2, _ = self.pre_norm_ffn
        for name, layer, act in (
            ("qkv_proj", separable.qkv_proj, "identity"),
            ("out_proj", separable.out_proj, "identity"),
            ("fc1", fc1, "silu"),
            ("fc2", fc2, "identity"),
        ):
            if type(layer) is not ConvNormAct:
                return f"{name} is a {type(layer).__name__}"
            if reason := layer.misfit():
                return f"{name}: {reason}"
            if layer.norm is not None or layer.act != act or not layer.plan().is_pointwise():
                return f"{name} is not a plain 1x1 convolution with act {act}"
        return self._dropout_misfit()

    def _forward_modules(self, t: Tensor) -> Tensor:
        tokens = to_nchw(t)  # (B, D, P, N)
        tokens = tokens + self.pre_norm_attn(tokens)
        tokens = tokens + self.pre_norm_ffn(tokens)
        return to_nhwc(tokens)


def _types(module: nn.Module) -> list[type[nn.Module]]:
    return [type(child) for child in module.children()]


def _names(module: nn.Module) -> str:
    return ", ".join(kind.__name__ for kind in _types(module)) or "nothing"


@known
class GlobalRepresentation(nn.Sequential, Block):
    """The layers of a stage and their final norm, on maps (B, D, H, W): one call to `ops.global_representation`.

    Args:
        layers: `TransformerLayer`s or `SeparableLayer`s.
        norm: nn.LayerNorm(D) or nn.GroupNorm(1, D).
        patch_size: (ph, pw), must divide the map.
    """

    def __init__(
        self, layers: list[_PreNormLayer], norm: nn.LayerNorm | nn.GroupNorm, patch_size: tuple[int, int] = (2, 2)
    ) -> None:
        super().__init__(*layers, norm)
        self.patch_size = tuple(patch_size)

    def misfit(self) -> str | None:
        if not len(self):
            return "it is empty"
        *layers, norm = self
        if type(norm) not in (nn.LayerNorm, nn.GroupNorm):
            return f"its last module is a {type(norm).__name__}, not a norm"
        kinds = {type(layer) for layer in layers}
        if kinds not in ({TransformerLayer}, {SeparableLayer}, set()):
            return f"its layers are of the classes {', '.join(sorted(kind.__name__ for kind in kinds))}"
        for i, layer in enumerate(layers):
            if reason := layer.misfit():
                return f"layer {i}: {reason}"
        if (
            any(layer.patch_size != self.patch_size for layer in layers)
            or len({layer.num_heads for layer in layers}) > 1
        ):
            return "its layers differ in patch_size or num_heads"
        if any(layer.dropouts() != layers[0].dropouts() for layer in layers):
            return "its layers drop with different probabilities"
        return None

    def plan(self) -> TokensPlan:
        *layers, norm = self
        return _plan(layers, layer_norm(norm), self.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        *layers, norm = self
        if self.why_modules() is None:
            return to_nchw(self.plan().run(to_nhwc(x)))
        for layer in layers:
            x = layer(x)
        # Transformers normalise tokens, whose channels come last; separable attention normalises maps.
        last = isinstance(norm, nn.LayerNorm) or (
            any(isinstance(layer, TransformerLayer) for layer in layers) and not isinstance(norm, nn.GroupNorm)
        )
        return to_nchw(norm(to_nhwc(x))) if last else norm(x)


def _plan(layers: list[_PreNormLayer], norm: LayerNorm | None, patch_size: tuple[int, int]) -> TokensPlan:
    dropouts, num_heads = (layers[0].dropouts(), layers[0].num_heads) if layers else ({}, None)
    return TokensPlan([layer.layer() for layer in layers], norm, num_heads, patch_size, dropouts)
