"""The fused ops. Feature maps are NHWC, (B, H, W, C); every op is pure; `reference.py` in an op's folder is its
definition."""

from .batch_norm_act import batch_norm_act
from .conv3x3 import conv3x3
from .depthwise_conv import depthwise_conv
from .dropout import dropout
from .feed_forward import feed_forward
from .global_representation import global_representation
from .inverted_residual import inverted_residual
from .norm_linear import norm_linear
from .patch_attention import patch_attention
from .pointwise_conv import pointwise_conv
from .pointwise_fusion import pointwise_fusion
from .running_stats import update_running_stats
from .separable_attention import separable_attention
from .types import BatchNorm, ConvNorm, Layer, LayerNorm, Linear, Moments
from .upsample_argmax import upsample_argmax
from .upsample_cross_entropy import upsample_cross_entropy

__all__ = [
    "BatchNorm",
    "ConvNorm",
    "Layer",
    "LayerNorm",
    "Linear",
    "Moments",
    "batch_norm_act",
    "conv3x3",
    "depthwise_conv",
    "dropout",
    "feed_forward",
    "global_representation",
    "inverted_residual",
    "norm_linear",
    "patch_attention",
    "pointwise_conv",
    "pointwise_fusion",
    "separable_attention",
    "update_running_stats",
    "upsample_argmax",
    "upsample_cross_entropy",
]
