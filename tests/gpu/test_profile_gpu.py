"""What a step of a network launches: no kernel that only moves a map from one layout to another."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from .test_networks_gpu import FAMILIES, data, network

# Kernels of PyTorch, cuDNN and Triton's launchers that copy or transpose; casts of images and weights are element-wise
# kernels.
MOVES = re.compile(
    r"nchwToNhwc|nhwcToNchw|transpose|direct_copy|CatArrayBatchedCopy|im2col|col2im|permute", re.IGNORECASE
)
# cuDNN may bring the images' three channels, and the gradient of their weight, into a layout of its own.
OF_THE_STEM = re.compile(r"nchwToNhwc|nhwcToNchw", re.IGNORECASE)
# The 3x3 convolution of MobileViTv1's fusion is the library's, which wants a concatenation in one tensor.
ALLOWED = {"mobilevit_xxs": re.compile("CatArrayBatchedCopy")}


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_kernel_moves_a_map(name, training):
    model = network(name, training)
    images, targets = data(8)

    def step():
        with torch.autocast("cuda", torch.bfloat16), torch.set_grad_enabled(training):
            logits = model(images)
        if training:
            F.cross_entropy(logits.float(), targets).backward()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as recorded:
        step()
        torch.cuda.synchronize()
    kernels = [e.name for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) > 50
    allowed = ALLOWED.get(name)
    moving = [k for k in kernels if MOVES.search(k) and not (allowed and allowed.search(k))]
    # Casts are the same kernel as copies: told apart by what they are given.
    copies = [
        e.input_shapes
        for e in recorded.events()
        if e.name in ("aten::clone", "aten::contiguous", "aten::copy_")
        and e.input_shapes
        and e.input_shapes[0][:1] == [8]
        and len(e.input_shapes[0]) == 4 and e.input_shapes[0] != list(images.shape) and e.device_time_total > 0
    ]  # fmt: skip
    assert not copies, copies
    moving = [k for k in moving if "direct_copy" not in k]
    assert len([k for k in moving if OF_THE_STEM.search(k)]) <= (3 if training else 1), moving
    assert not [k for k in moving if not OF_THE_STEM.search(k)], moving
