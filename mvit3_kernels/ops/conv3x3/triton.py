"""The launcher of conv3x3's Triton kernel: the convolution of an image with norm and activation, in evaluation.

With few channels a library's convolution takes as long as its bytes do, and so do the cast of the image in front of it
and the norm behind it: one launch reads the image as it is and writes the activated map."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Call
from ..sizes import cdiv, next_power_of_2
from ..triton_common import contiguous, on_device
from . import kernels


def conv3x3_image_inference(call: Call) -> Tensor:
    """Launches the convolution with what follows it."""
    x, weight = call.x.contiguous(), call.weight
    last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    weight = weight if last else weight.contiguous()
    (batch, height, width, channels), outputs = x.shape, weight.shape[0]
    out_height, out_width = -(-height // call.stride), -(-width // call.stride)
    y = x.new_empty(batch, out_height, out_width, outputs, dtype=call.dtype)
    if y.numel() == 0:
        return y
    norm = contiguous(call.norm_weight, call.norm_bias, call.running_mean, call.running_var)
    block = 64
    with on_device(x):
        kernels.image_fwd_kernel[(batch * out_height * cdiv(out_width, block),)](
            x, weight, *norm, y, height, width, out_height, out_width, call.eps,
            STRIDE=call.stride, ACT=call.act, C=channels, OUT=outputs, LAST=last,
            BLOCK_M=block, BLOCK_N=max(next_power_of_2(outputs), 16),
            BLOCK_K=max(next_power_of_2(9 * channels), 16), num_warps=4,
        )  # fmt: skip
    return y
