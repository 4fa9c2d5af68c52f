"""Blocks as ml-cvnets and the MobileViTv3 release have them, written from what is known of both: names of classes,
attributes and modules, and what they compute. `load_cvnets` runs this file as a module of a package `cvnets`.

LATE is set from outside: LayerNorm as from version 0.3 on, which looks for the channels, and attention that rounds its
probabilities to float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LATE = globals().get("LATE", False)


class Conv2d(nn.Conv2d):
    pass


class BatchNorm2d(nn.BatchNorm2d):
    pass


class Dropout(nn.Dropout):
    pass


class Swish(nn.SiLU):
    pass


class ReLU(nn.ReLU):
    pass


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class LayerNorm2D(nn.GroupNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)


class LayerNorm(nn.LayerNorm):
    if LATE:

        def forward(self, x: Tensor) -> Tensor:
            if x.ndim < 3 or x.shape[1] != self.normalized_shape[0]:
                return super().forward(x)
            s, mean = torch.std_mean(x, dim=1, keepdim=True, unbiased=False)
            shape = (1, -1, *[1] * (x.ndim - 2))
            return (x - mean) / (s + self.eps) * self.weight.reshape(shape) + self.bias.reshape(shape)


class ConvLayer(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        act: type[nn.Module] | None = Swish,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        padding = (kernel - 1) // 2 * dilation
        self.block = nn.Sequential()
        self.block.add_module("conv", Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias))
        if norm:
            self.block.add_module("norm", BatchNorm2d(outputs))
        if act is not None:
            self.block.add_module("act", act())
        self.in_channels, self.out_channels, self.stride, self.bias = inputs, outputs, stride, bias

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1, ratio: int = 2, dilation: int = 1) -> None:
        super().__init__()
        hidden = inputs * ratio
        self.block = nn.Sequential()
        if ratio != 1:
            self.block.add_module("exp_1x1", ConvLayer(inputs, hidden))
        depthwise = ConvLayer(hidden, hidden, 3, stride, hidden, dilation=dilation)
        self.block.add_module("conv_3x3", depthwise)
        self.block.add_module("red_1x1", ConvLayer(hidden, outputs, act=None))
        self.use_res_connect = stride == 1 and inputs == outputs

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        y = self.block(x)
        return y + x if self.use_res_connect else y


class LinearLayer(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * in_features**-0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.in_features, self.out_features, self.channel_first = in_features, out_features, False

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class MultiHeadAttention(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int, attn_dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv_proj = LinearLayer(embed_dim, 3 * embed_dim)
        self.attn_dropout = Dropout(attn_dropout)
        self.out_proj = LinearLayer(embed_dim, embed_dim)
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x_q: Tensor, x_kv: Tensor | None = None) -> Tensor:
        batch, tokens, width = x_q.shape
        qkv = self.qkv_proj(x_q).reshape(batch, tokens, 3, self.num_heads, -1).transpose(1, 3)
        query, key, value = qkv[:, :, 0] * self.scaling, qkv[:, :, 1], qkv[:, :, 2]
        scores = torch.matmul(query, key.transpose(2, 3))
        y = torch.matmul(self.attn_dropout(self.forward_default(scores)), value)
        return self.out_proj(y.transpose(1, 2).reshape(batch, tokens, width))

    if LATE:

        def forward_default(self, scores: Tensor) -> Tensor:
            return self.softmax(scores.float()).to(scores.dtype)

    else:

        def forward_default(self, scores: Tensor) -> Tensor:
            return self.softmax(scores)


class TransformerEncoder(nn.Module):
    def __init__(self, width: int, ffn: int, heads: int, dropout: float = 0.0, act: type[nn.Module] = Swish) -> None:
        super().__init__()
        self.pre_norm_mha = nn.Sequential(LayerNorm(width), MultiHeadAttention(width, heads), Dropout(dropout))
        first, second = LinearLayer(width, ffn), LinearLayer(ffn, width)
        self.pre_norm_ffn = nn.Sequential(LayerNorm(width), first, act(), Dropout(0.0), second, Dropout(dropout))
        self.drop_path = Identity()
        self.embed_dim, self.std_dropout = width, dropout

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.pre_norm_mha(x))
        return x + self.drop_path(self.pre_norm_ffn(x))


class LinearSelfAttention(nn.Module):
    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.qkv_proj = ConvLayer(embed_dim, 1 + 2 * embed_dim, bias=True, norm=False, act=None)
        self.attn_dropout = Dropout(0.0)
        self.out_proj = ConvLayer(embed_dim, embed_dim, bias=True, norm=False, act=None)
        self.embed_dim = embed_dim

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = torch.split(self.qkv_proj(x), [1, self.embed_dim, self.embed_dim], dim=1)
        scores = self.attn_dropout(F.softmax(query, dim=-1))
        return self.out_proj(F.relu(value) * torch.sum(key * scores, dim=-1, keepdim=True))


class LinearAttnFFN(nn.Module):
    def __init__(self, width: int, ffn: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.pre_norm_attn = nn.Sequential(LayerNorm2D(width), LinearSelfAttention(width), Dropout(dropout))
        first = ConvLayer(width, ffn, bias=True, norm=False)
        second = ConvLayer(ffn, width, bias=True, norm=False, act=None)
        self.pre_norm_ffn = nn.Sequential(LayerNorm2D(width), first, Dropout(0.0), second, Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pre_norm_attn(x)
        return x + self.pre_norm_ffn(x)


class MobileViTBlock(nn.Module):
    """With `v3` the block of the MobileViTv3 release."""

    v3 = False

    def __init__(self, channels: int, width: int, depth: int = 2, patch: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.local_rep = nn.Sequential()
        self.local_rep.add_module("conv_3x3", ConvLayer(channels, channels, 3, groups=channels if self.v3 else 1))
        self.local_rep.add_module("conv_1x1", ConvLayer(channels, width, norm=False, act=None))
        layers = [TransformerEncoder(width, 2 * width, 4, dropout) for _ in range(depth)]
        self.global_rep = nn.Sequential(*layers, LayerNorm(width))
        self.conv_proj = ConvLayer(width, channels)
        self.fusion = ConvLayer(width + channels, channels) if self.v3 else ConvLayer(2 * channels, channels, 3)
        self.patch_h = self.patch_w = patch
        self.patch_area = patch * patch

    def unfolding(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        height, width = (math.ceil(side / self.patch_h) * self.patch_h for side in x.shape[2:])
        resized = x
        if (height, width) != tuple(x.shape[2:]):
            resized = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
        (batch, channels), ph, pw = x.shape[:2], self.patch_h, self.patch_w
        t = resized.reshape(batch * channels * (height // ph), ph, width // pw, pw).transpose(1, 2)
        t = t.reshape(batch, channels, -1, self.patch_area).transpose(1, 3)
        return t.reshape(batch * self.patch_area, -1, channels), (*x.shape, height, width)

    def folding(self, t: Tensor, sizes: tuple[int, ...]) -> Tensor:
        (batch, channels, *was, height, width), ph, pw = sizes, self.patch_h, self.patch_w
        t = t.reshape(batch, self.patch_area, -1, channels).transpose(1, 3)
        t = t.reshape(batch * channels * (height // ph), width // pw, ph, pw).transpose(1, 2)
        x = t.reshape(batch, channels, height, width)
        return x if (height, width) == tuple(was) else F.interpolate(x, was, mode="bilinear", align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        local = self.local_rep(x)
        tokens, sizes = self.unfolding(local)
        projected = self.conv_proj(self.folding(self.global_rep(tokens), sizes))
        return self.fusion(torch.cat((x, projected), 1))


class MobileViTBlockv3(MobileViTBlock):
    v3 = True

    def forward(self, x: Tensor) -> Tensor:
        local = self.local_rep(x)
        tokens, sizes = self.unfolding(local)
        projected = self.conv_proj(self.folding(self.global_rep(tokens), sizes))
        return x + self.fusion(torch.cat((local, projected), 1))


class MobileViTBlockv2(nn.Module):
    def __init__(self, channels: int, width: int, depth: int = 2, patch: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        local = ConvLayer(channels, channels, 3, groups=channels)
        self.local_rep = nn.Sequential(local, ConvLayer(channels, width, norm=False, act=None))
        layers = [LinearAttnFFN(width, 2 * width, dropout) for _ in range(depth)]
        self.global_rep = nn.Sequential(*layers, LayerNorm2D(width))
        self.conv_proj = ConvLayer(width, channels, act=None)
        self.patch_h = self.patch_w = patch
        self.enable_coreml_compatible_fn = False

    def resize_input_if_needed(self, x: Tensor) -> Tensor:
        sides = [math.ceil(side / self.patch_h) * self.patch_h for side in x.shape[2:]]
        return x if sides == list(x.shape[2:]) else F.interpolate(x, sides, mode="bilinear", align_corners=True)

    def forward_spatial(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.resize_input_if_needed(x)
        local, patch = self.local_rep(x), (self.patch_h, self.patch_w)
        t = F.unfold(local, patch, stride=patch)
        t = self.global_rep(t.reshape(*local.shape[:2], self.patch_h * self.patch_w, -1))
        y = F.fold(t.reshape(t.shape[0], -1, t.shape[-1]), local.shape[2:], patch, stride=patch)
        return x, local, y

    def forward(self, x: Tensor) -> Tensor:
        _, _, y = self.forward_spatial(x)
        return self.conv_proj(y)


class MobileViTv3Block(MobileViTBlockv2):
    def __init__(self, channels: int, width: int, depth: int = 2, patch: int = 2, dropout: float = 0.0) -> None:
        super().__init__(channels, width, depth, patch, dropout)
        self.conv_proj = ConvLayer(2 * width, channels, act=None)

    def forward(self, x: Tensor) -> Tensor:
        x, local, y = self.forward_spatial(x)
        return x + self.conv_proj(torch.cat((y, local), 1))


class GlobalPool(nn.Module):
    def __init__(self, pool_type: str = "mean") -> None:
        super().__init__()
        self.pool_type, self.keep_dim = pool_type, False

    def forward(self, x: Tensor) -> Tensor:
        return torch.mean(x, dim=[-2, -1], keepdim=self.keep_dim)


class MobileViT(nn.Module):
    """A classifier of the parts of `cvnets`, with one block."""

    def __init__(self, cvnets: object, block: str) -> None:
        super().__init__()
        self.neural_augmentor = None
        self.conv_1 = cvnets.ConvLayer(3, 8, 3, stride=2)
        self.layer_1 = nn.Sequential(cvnets.InvertedResidual(8, 8))
        self.layer_2 = nn.Sequential(cvnets.InvertedResidual(8, 12, stride=2))
        self.layer_3 = nn.Sequential(cvnets.InvertedResidual(12, 12), getattr(cvnets, block)(12, 16))
        self.layer_4 = nn.Sequential(cvnets.InvertedResidual(12, 16, stride=2))
        self.layer_5 = nn.Sequential(cvnets.InvertedResidual(16, 16))
        self.conv_1x1_exp = cvnets.ConvLayer(16, 24) if hasattr(self.layer_3[1], "unfolding") else cvnets.Identity()
        width = 24 if hasattr(self.layer_3[1], "unfolding") else 16
        self.classifier = nn.Sequential(cvnets.GlobalPool(), cvnets.Dropout(0.1), cvnets.LinearLayer(width, 5))

    def extract_features(self, x: Tensor) -> Tensor:
        x = self.layer_2(self.layer_1(self.conv_1(x)))
        return self.conv_1x1_exp(self.layer_5(self.layer_4(self.layer_3(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.extract_features(x))
