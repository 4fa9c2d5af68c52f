"""The Triton kernel of conv3x3 where there is no GPU."""

import importlib

import pytest
import torch

from mvit3_kernels.ops.registry import FORMS

from ..triton_tools import SHARED_MEMORY_LIMITS, offline, resources, run_interpreted
from .triton_kernel import BF16, F16, F32, needs_triton

OP = "conv3x3_image_inference"


@needs_triton
def test_interpreter():
    run_interpreted("ops/conv3x3_interpreted.py")


@needs_triton
@pytest.mark.parametrize(
    ("architecture", "image", "dtype", "outputs"),
    [(90, F32, BF16, 16), (90, BF16, BF16, 32), (80, F32, F16, 64), (86, F16, F16, 16), ("gfx942", F32, BF16, 16)],
    ids=str,
)
def test_kernel_fits(architecture, image, dtype, outputs, tmp_path, monkeypatch):
    """It does not spill, and is one binary for images of every size."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launchers = importlib.import_module("mvit3_kernels.ops.conv3x3.triton")
    weight = torch.empty(outputs, 3, 3, 3, device="meta").to(memory_format=torch.channels_last)
    fixed = (weight, *torch.empty(4, outputs, device="meta"), 1e-5, 1, 2, dtype)
    with offline(architecture, True) as kernels:
        for sides in ((256, 256), (111, 97)):
            x = torch.empty(2, *sides, 3, device="meta", dtype=image)
            y = getattr(launchers, OP)(FORMS[OP].call(x, *fixed))
            assert y.dtype is dtype and y.shape == (2, *(-(-side // 2) for side in sides), outputs)
    kernel, other = kernels
    assert kernel is other
    if isinstance(architecture, str):
        assert kernel.asm["hsaco"]
        return
    used = resources(kernel)
    assert used.stack == 0 and used.shared <= min(SHARED_MEMORY_LIMITS.values()), used
