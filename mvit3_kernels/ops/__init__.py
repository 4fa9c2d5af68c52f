"""The fused ops. Feature maps are NHWC, (B, H, W, C); every op is pure; `reference.py` in an op's folder is its definition."""

from .batch_norm_act import batch_norm_act
from .types import BatchNorm, ConvNorm, Layer, LayerNorm, Linear, Moments

__all__ = ["BatchNorm", "ConvNorm", "Layer", "LayerNorm", "Linear", "Moments", "batch_norm_act"]
