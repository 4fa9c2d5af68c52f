"""Drop-in modules: parameters under the published names, and one call to an op. Maps are (B, C, H, W), best in
channels_last memory."""

from .attention import GlobalRepresentation, MultiHeadAttention, SeparableAttention, SeparableLayer, TransformerLayer
from .conv import ConvNormAct, InvertedResidual
from .mobilevit import MobileViTBlock
from .mobilevitv2 import MobileViTV2Block
from .mobilevitv3 import MobileViTV3Block, MobileViTV3SeparableBlock

__all__ = [
    "ConvNormAct",
    "GlobalRepresentation",
    "InvertedResidual",
    "MobileViTBlock",
    "MobileViTV2Block",
    "MobileViTV3Block",
    "MobileViTV3SeparableBlock",
    "MultiHeadAttention",
    "SeparableAttention",
    "SeparableLayer",
    "TransformerLayer",
]
