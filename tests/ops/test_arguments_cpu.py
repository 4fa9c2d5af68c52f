"""Wrong arguments of the CPU kernels: an exception that names the argument, never a result, never the end of the
process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mvit3_kernels
from mvit3_kernels.ops import (
    BatchNorm,
    ConvNorm,
    LayerNorm,
    Linear,
    depthwise_conv,
    feed_forward,
    inverted_residual,
    norm_linear,
    patch_attention,
    pointwise_conv,
    separable_attention,
)

from .cpu_kernel import needs_the_kernels
from .inputs import DTYPES


@pytest.fixture(scope="module")
def outcomes() -> list[str]:
    """What wrong_arguments.py prints, which runs in a process of its own."""
    command = [sys.executable, "-m", "tests.ops.wrong_arguments"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"after {lines[-1] if lines else 'nothing'}: {done.returncode}\n{done.stderr[-2000:]}"
    return [line for line in lines if line.startswith("done ")]


@needs_the_kernels
def test_wrong_arguments_are_refused_by_name(outcomes):
    assert not [line for line in outcomes if not line.endswith((" refused", " right"))]


@needs_the_kernels
def test_every_op_of_the_kernels_is_called(outcomes):
    kernels = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mvit3::")}
    compiled = {name for name in kernels if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")}
    compiled |= {name for name in kernels if name.startswith("mvit3::engine_")}
    assert compiled == {"mvit3::" + line.split()[1].rstrip(":") for line in outcomes}


@needs_the_kernels
def test_a_message_is_about_the_call_alone():
    """It names no source file of the kernels."""
    x, w = torch.randn(1, 2, 2, 4), torch.randn(3, 5)
    with pytest.raises(RuntimeError) as refusal:
        torch.ops.mvit3.norm_linear_forward(x, torch.ones(4), torch.zeros(4), 1e-5, False, w, None)
    assert str(refusal.value) == "weight must have 3 outputs of 4 values, got shape (3, 5)"


def norm(channels: int, training: bool) -> BatchNorm:
    one, zero = torch.ones(channels), torch.zeros(channels)
    return BatchNorm(one, zero, zero, one, training)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 0, 5, 4), (2, 5, 0, 4), (0, 0, 5, 4), (2, 0, 0, 4)], ids=str)
def test_maps_without_pixels_have_no_taps(shape, training, backend):
    """PyTorch's convolution refuses them too."""
    x, taps = torch.randn(shape), torch.randn(4, 1, 3, 3)
    parts = [ConvNorm(w, norm(4, training)) for w in (torch.randn(4, 4), taps, torch.randn(4, 4))]
    with mvit3_kernels.backend(backend or "cpu") if backend else torch.no_grad():
        for stride in (1, 2):
            with pytest.raises(ValueError, match="x must have at least one row and one column, got height"):
                depthwise_conv(x, taps, norm(4, training), "silu", stride)
            with pytest.raises(ValueError, match="x must have at least one row and one column, got height"):
                inverted_residual(x, *parts, stride)


@needs_the_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 4, 6, 6), (2, 0, 6, 6), (2, 4, 0, 6), (0, 0, 0, 6)], ids=str)
def test_empty_maps(shape, dtype):
    """The other ops take them, forward and backward, and return what the reference does: an empty map and gradients of
    zero."""
    one, zero = torch.ones(6), torch.zeros(6)
    for per_sample in (False, True):
        if per_sample and 0 in shape[1:3]:
            continue  # PyTorch's group norm refuses them
        layer = LayerNorm(one, zero, 1e-5, per_sample)
        square, fc1, fc2, qkv = (
            Linear(torch.randn(o, i), torch.randn(o)) for o, i in ((6, 6), (9, 6), (6, 9), (13, 6))
        )
        for function in (
            lambda x: norm_linear(x, layer, fc1),  # noqa: B023
            lambda x: feed_forward(x, layer, fc1, fc2),  # noqa: B023
            lambda x: separable_attention(x, layer, qkv, square, (2, 2)),  # noqa: B023
            lambda x: patch_attention(x, 2, (2, 2)),
            lambda x: pointwise_conv(x, fc1, norm(9, True), "silu")[0],  # noqa: B023
            lambda x: pointwise_conv(x, fc1, norm(9, False), "silu")[0],  # noqa: B023
        ):
            results = []
            for backend in ("cpu", "reference"):
                x = torch.zeros(shape, dtype=dtype, requires_grad=True)
                with mvit3_kernels.backend(backend):
                    y = function(x)
                results.append((y.shape, y.dtype, torch.autograd.grad(y.sum(), x)[0].shape))
            assert results[0] == results[1]
