"""transformers' MobileViT* and MobileViTV2* models, with or without the classifier and the prefix that goes with it.

MobileViT is the published network in every number; query, key and value are three tensors there and one here.
MobileViTV2 is it wherever patches divide the feature maps (image sides divisible by 64, for instance): other maps it
cuts to whole patches and fills up with zeros, where the published network resizes them. With an output stride of 8 or
16 it leaves the convolutions of its attention blocks undilated. The image processor of MobileViT hands over BGR images,
as the published network takes them.
"""

from __future__ import annotations

from .key_map import LAST_NORM, KeyMap

_COMMON = {
    "conv_stem.": "conv_1.block.",
    **{f"encoder.layer.{i}.layer.": f"layer_{i + 1}." for i in (0, 1)},
    **{f"encoder.layer.{i}.downsampling_layer.": f"layer_{i + 1}.0." for i in (2, 3, 4)},
    **{f"encoder.layer.{i}.": f"layer_{i + 1}.1." for i in (2, 3, 4)},
    "expand_1x1.": "block.exp_1x1.block.",
    "conv_3x3.": "block.conv_3x3.block.",
    "reduce_1x1.": "block.red_1x1.block.",
    "convolution.": "conv.",
    "normalization.": "norm.",
    "transformer.layer.": "global_rep.",
    "layernorm_after.": "pre_norm_ffn.0.",
    "layernorm.": LAST_NORM,
    "conv_projection.": "conv_proj.block.",
}

_V1 = {
    **_COMMON,
    "mobilevit.": "",
    "conv_kxk.": "local_rep.conv_3x3.block.",
    "conv_1x1.": "local_rep.conv_1x1.block.",
    "layernorm_before.": "pre_norm_mha.0.",
    "attention.attention.query.": "pre_norm_mha.1.qkv_proj.#0.",
    "attention.attention.key.": "pre_norm_mha.1.qkv_proj.#1.",
    "attention.attention.value.": "pre_norm_mha.1.qkv_proj.#2.",
    "attention.output.dense.": "pre_norm_mha.1.out_proj.",
    "intermediate.dense.": "pre_norm_ffn.1.",
    "output.dense.": "pre_norm_ffn.4.",
    "fusion.": "fusion.block.",
    "conv_1x1_exp.": "conv_1x1_exp.block.",
    "classifier.": "classifier.fc.",
}

_V2 = {
    **_COMMON,
    "mobilevitv2.": "",
    "conv_kxk.": "local_rep.0.block.",
    "conv_1x1.": "local_rep.1.block.",
    "layernorm_before.": "pre_norm_attn.0.",
    "attention.qkv_proj.": "pre_norm_attn.1.qkv_proj.block.",
    "attention.out_proj.": "pre_norm_attn.1.out_proj.block.",
    "ffn.conv1.": "pre_norm_ffn.1.block.",
    "ffn.conv2.": "pre_norm_ffn.3.block.",
    "classifier.": "classifier.1.",
}

KEY_MAPS = (
    KeyMap("transformers MobileViT", ".attention.attention.query.", _V1),
    KeyMap("transformers MobileViTV2", ".attention.qkv_proj.convolution.", _V2),
)
