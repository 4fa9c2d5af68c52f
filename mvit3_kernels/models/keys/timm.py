"""timm's mobilevit_{xxs,xs,s} and mobilevitv2_{050..200}, also as its features_only models write them ("stages_0." for
"stages.0.").

The networks are the published ones in every number, at odd feature-map sizes too. Two things differ in mobilevit_*:
with an output stride of 8 or 16 timm also dilates the local convolution of an attention block, and a features_only
model ends with the map of the 1x1 expansion.
"""

from __future__ import annotations

from .key_map import LAST_NORM, KeyMap

_COMMON = {
    "stem.": "conv_1.block.",
    **{f"stages{separator}{i}.": f"layer_{i + 1}." for i in range(5) for separator in "._"},
    "conv1_1x1.": "block.exp_1x1.block.",
    "conv2_kxk.": "block.conv_3x3.block.",
    "conv3_1x1.": "block.red_1x1.block.",
    "bn.": "norm.",
    "transformer.": "global_rep.",
    "norm2.": "pre_norm_ffn.0.",
    "norm.": LAST_NORM,
    "conv_proj.": "conv_proj.block.",
}

_V1 = {
    **_COMMON,
    "conv_kxk.": "local_rep.conv_3x3.block.",
    "conv_1x1.": "local_rep.conv_1x1.block.conv.",
    "norm1.": "pre_norm_mha.0.",
    "attn.qkv.": "pre_norm_mha.1.qkv_proj.",
    "attn.proj.": "pre_norm_mha.1.out_proj.",
    "mlp.fc1.": "pre_norm_ffn.1.",
    "mlp.fc2.": "pre_norm_ffn.4.",
    "conv_fusion.": "fusion.block.",
    "final_conv.": "conv_1x1_exp.block.",
    "head.fc.": "classifier.fc.",
}

_V2 = {
    **_COMMON,
    "conv_kxk.": "local_rep.0.block.",
    "conv_1x1.": "local_rep.1.block.conv.",
    "norm1.": "pre_norm_attn.0.",
    "attn.qkv_proj.": "pre_norm_attn.1.qkv_proj.block.conv.",
    "attn.out_proj.": "pre_norm_attn.1.out_proj.block.conv.",
    "mlp.fc1.": "pre_norm_ffn.1.block.conv.",
    "mlp.fc2.": "pre_norm_ffn.3.block.conv.",
    "head.fc.": "classifier.1.",
}

KEY_MAPS = (KeyMap("timm mobilevit", ".attn.qkv.", _V1), KeyMap("timm mobilevitv2", ".attn.qkv_proj.", _V2))
