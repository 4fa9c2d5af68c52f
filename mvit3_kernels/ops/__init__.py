"""The fused ops. Feature maps are NHWC, (B, H, W, C); every op is pure; `reference.py` in an op's folder is its definition."""

from .batch_norm_act import batch_norm_act
from .depthwise_conv import depthwise_conv
from .feed_forward import feed_forward
from .global_representation import global_representation
from .inverted_residual import inverted_residual
from .norm_linear import norm_linear
from .patch_attention import patch_attention
from .pointwise_conv import pointwise_conv
from .pointwise_fusion import pointwise_fusion
from .separable_attention import separable_attention
from .types import BatchNorm, ConvNorm, Layer, LayerNorm, Linear, Moments

__all__ = [
    "BatchNorm",
    "ConvNorm",
    "Layer",
    "LayerNorm",
    "Linear",
    "Moments",
    "batch_norm_act",
    "depthwise_conv",
    "feed_forward",
    "global_representation",
    "inverted_residual",
    "norm_linear",
    "patch_attention",
    "pointwise_conv",
    "pointwise_fusion",
    "separable_attention",
]
