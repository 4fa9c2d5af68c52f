"""The Triton kernels of upsample_cross_entropy, where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from mvit3_kernels.ops import upsample_cross_entropy

from ..triton_tools import SHARED_MEMORY_LIMITS, resources
from .inputs import Arguments
from .test_upsample_cross_entropy import TestUpsampleCrossEntropy as Reference
from .triton_kernel import BF16, F16, F32, Case, TritonKernel, needs_triton

reference_arguments = Reference.arguments
del Reference
SMOOTHED = {"weighted": True, "label_smoothing": 0.1}


def registered(arguments: Arguments):
    forward, backward = (
        getattr(torch.ops.mvit3, f"upsample_cross_entropy_{name}").default for name in ("forward", "backward")
    )
    inputs = (*arguments.values(), True)
    yield forward, inputs
    loss, total, gradient = forward(*inputs)
    yield backward, (torch.ones_like(loss), arguments["logits"], total, gradient)


@needs_triton
class TestUpsampleCrossEntropyTriton(TritonKernel):
    op = staticmethod(upsample_cross_entropy)
    maps = ("logits",)
    arguments = staticmethod(reference_arguments)
    registered = staticmethod(registered)
    # A configuration is decided by the classes: those of VOC, ADE20K, one thread for a column, more than a program
    # holds.
    cases = (
        Case(90, F32, (4, 32, 32, 21, 16), {"align_corners": True}),
        Case(90, BF16, (4, 32, 32, 21, 16), SMOOTHED),
        Case(90, F32, (4, 32, 32, 150, 16), SMOOTHED),
        Case(90, F32, (1, 4, 4, 2, 3)),
        Case(90, BF16, (1, 4, 4, 1000, 3), SMOOTHED),
        Case(80, F32, (4, 32, 32, 150, 16), {"weighted": True}),
        Case(80, F32, (1, 4, 4, 320, 3), SMOOTHED),
        Case("gfx942", BF16, (4, 32, 32, 21, 16)),
        Case("gfx942", F16, (4, 32, 32, 1000, 16)),
    )
    larger = (7, 33, 9, 21, 5)

    @pytest.mark.parametrize("classes", [21, 150])
    def test_every_configuration_fits(self, monkeypatch, classes):
        """Those that a tuning run may choose as well."""
        from mvit3_kernels.ops import triton_upsampling

        listed = triton_upsampling.configurations
        assert len(listed(classes)) == 2
        monkeypatch.setattr(triton_upsampling, "configurations", lambda classes: listed(classes)[1:])
        for kernel in self.compiled(Case(90, F32, (4, 32, 32, classes, 16), SMOOTHED)):
            used = resources(kernel)
            assert used.stack == 0, f"{kernel.metadata.name} spills: {used}"
            assert used.shared <= min(SHARED_MEMORY_LIMITS.values()), f"{kernel.metadata.name}: {used}"

    def test_threads_have_whole_columns(self):
        """No sum over classes crosses a warp, so no row waits for one."""
        [kernel] = [k for k in self.compiled(self.cases[2]) if k.metadata.name == "loss_fwd_kernel"]
        assert "threadsPerWarp = [1, 4, 8], warpsPerCTA = [1, 4, 1]" in kernel.asm["ttgir"]
        ptx = kernel.asm["ptx"]
        row = ptx[ptx.index("ex2.approx") : ptx.rindex("ex2.approx")]
        assert row.count("ex2.approx") == 19 and "bar.sync" not in row and "bra" not in row
