"""The Triton kernels of inverted_residual where there is no GPU, and the count by which the fused way is chosen."""

import importlib

import pytest
import torch

import mvit3_kernels
from mvit3_kernels.ops import inverted_residual
from mvit3_kernels.ops.registry import FORMS
from mvit3_kernels.ops.types import ACTIVATIONS

from ..triton_tools import SHARED_MEMORY_LIMITS, offline, resources
from .inputs import Draw, mapped
from .test_inverted_residual import TestInvertedResidual as Reference
from .triton_kernel import BF16, F16, F32, Case, TritonKernel, needs_triton


def arguments(draw, *sizes, mean=0.0, **options):
    found = Reference.arguments(draw, *sizes, **options)
    found["x"] += mean
    return found


def registered(x, expand, depthwise, project, stride, dilation, act, skip=None, store=True):
    """The registered ops of the launchers, each with its arguments; they add the input where they can."""
    assert skip is None
    parts, geometry = (expand, depthwise, project), (stride, dilation, ACTIVATIONS.index(act))
    learned = [value for weight, norm in parts for value in (weight, norm.weight, norm.bias, norm.eps)]
    inputs = (x, *learned, *geometry, store)
    yield torch.ops.mvit3.inverted_residual_forward.default, inputs
    y, *kept = torch.ops.mvit3.inverted_residual_forward(*inputs)
    fixed = [
        v for i, (weight, n) in enumerate(parts) for v in (weight, n.weight, n.bias, *kept[2 * i : 2 * i + 2], n.eps)
    ]
    yield torch.ops.mvit3.inverted_residual_backward.default, (torch.ones_like(y), x, *fixed, *kept[6:], *geometry)


@needs_triton
class TestInvertedResidualTriton(TritonKernel):
    op = staticmethod(inverted_residual)
    alone = (90,)
    arguments = staticmethod(arguments)
    registered = staticmethod(lambda arguments: registered(**arguments))
    # (batch, height, width, inputs, expanded, outputs) of the networks, and odd ones.
    cases = (
        Case(90, BF16, (2, 8, 8, 64, 256, 64)),
        Case(90, BF16, (2, 8, 8, 16, 64, 32), {"stride": 2}),
        Case(90, F16, (2, 8, 8, 384, 768, 512)),
        Case(90, BF16, (2, 8, 8, 9, 27, 5)),
        Case(90, BF16, (2, 8, 8, 128, 512, 256)),
        Case(90, BF16, (2, 8, 8, 256, 1024, 320)),
        Case(90, F32, (2, 8, 8, 64, 256, 64)),
        Case(80, BF16, (2, 8, 8, 64, 256, 64)),
        Case(80, F32, (2, 8, 8, 256, 1024, 320)),
        Case("gfx942", F16, (2, 8, 8, 64, 256, 64)),
    )
    larger = (2, 7, 9, 64, 256, 64)

    def test_the_fused_way_compiles_without_a_graph_break(self, monkeypatch):
        monkeypatch.setattr(importlib.import_module("mvit3_kernels._native"), "cuda_why_not", lambda x: None)
        with mvit3_kernels.backend("cuda"):
            self.test_compiles_without_a_graph_break(monkeypatch)


# What a step moves and computes for each pixel, in bytes (benchmarks/NOTES.md), decides: (inputs, expanded, outputs,
# stride).
RECOMPUTED = [
    (16, 64, 32, 1),
    (32, 128, 64, 2),
    (64, 256, 64, 1),
    (64, 256, 128, 2),
    (128, 512, 256, 2),
    (64, 128, 128, 2),
    (128, 256, 128, 1),
]
STORED = [(256, 1024, 320, 2), (256, 512, 384, 2), (384, 768, 512, 2)]


@pytest.mark.parametrize("widths", [*RECOMPUTED, *STORED], ids=str)
def test_the_way_through_training_follows_the_count(widths, monkeypatch):
    inputs, wide, outputs, stride = widths
    op = importlib.import_module("mvit3_kernels.ops.inverted_residual")
    monkeypatch.setattr(op._native, "cuda_why_not", lambda x: None)
    monkeypatch.setattr(op.dispatch, "triton_32_bit_why_not", lambda x: None)
    given = mapped(arguments(Draw(), 2, 16, 16, inputs, wide, outputs), lambda _, t: t.bfloat16())
    reason = op._cuda_why_not(given["x"], given["expand"], given["depthwise"], given["project"], stride, 1)
    assert (reason is None) == (widths in RECOMPUTED), reason


@pytest.mark.parametrize(
    "batch, side, inputs, expanded, stride, said",
    [
        (4, 32, 128, 257, 1, None),
        (4, 32, 129, 257, 1, "129 input channels"),
        (3, 32, 64, 257, 1, "24 tiles"),
        (1, 64, 32, 257, 2, None),
        (8, 32, 64, 256, 1, "64 tiles"),
        (9, 32, 64, 256, 1, None),
    ],
)
def test_the_way_through_evaluation_follows_the_count(batch, side, inputs, expanded, stride, said, monkeypatch):
    op = importlib.import_module("mvit3_kernels.ops.inverted_residual")
    monkeypatch.setattr(op._native, "cuda_why_not", lambda x: None)
    given = mapped(arguments(Draw(), batch, side, side, inputs, expanded, 32), lambda _, t: t.bfloat16())
    parts = [given[k]._replace(norm=given[k].norm._replace(training=False)) for k in ("expand", "depthwise", "project")]
    with torch.no_grad():
        reason = op._cuda_why_not(given["x"], *parts, stride, 1)
        assert reason is None if said is None else said in reason
        with mvit3_kernels.backend("cuda"):  # who asks for it gets it
            assert op._cuda_why_not(given["x"], *parts, stride, 1) is None


@needs_triton
def test_bytes_moved():
    """By hand, for 16 -> 64 -> 32 at 2x8x8, stride 1: 128 pixels of 2 bytes."""
    kernels = importlib.import_module("mvit3_kernels.ops.inverted_residual.triton")
    x = torch.empty(2, 8, 8, 16, dtype=BF16, device="meta")
    z_and_p = 2 * 64 + 3 * 32
    assert kernels.bytes_moved(x, 64, 32, 1, False) == (256 * (2 * 16 + z_and_p), 256 * (5 * 16 + 2 * 64 + 7 * 32))
    assert kernels.bytes_moved(x, 64, 32, 1, True) == (
        256 * (2 * 16 + 2 * 64 + z_and_p),
        256 * (5 * 16 + 7 * 64 + 7 * 32),
    )
    # Of wide inputs backward writes G and reads it twice, and x once more.
    wide = x.new_empty(2, 8, 8, 128)
    assert kernels.bytes_moved(wide, 64, 32, 1, False)[1] == 256 * (5 * 128 + 2 * 64 + 7 * 32 + 3 * 64 + 128)


@needs_triton
@pytest.mark.parametrize(
    ("expanded", "outputs", "stride", "dtype"), [(256, 64, 1, BF16), (256, 128, 2, F16), (192, 96, 1, BF16)]
)
def test_evaluation_of_few_pixels_fits(expanded, outputs, stride, dtype, tmp_path, monkeypatch):
    """What follows the expansion does not spill, and fits sm_90, the one that it is for."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launchers, op = importlib.import_module("mvit3_kernels.ops.inverted_residual.triton"), "inverted_residual_project"

    def part(*shape):
        return (torch.empty(shape, device="meta"), *torch.empty(4, shape[0], device="meta"), 1e-5)

    e = torch.empty(1, 16, 16, expanded, device="meta", dtype=dtype)
    residual = e.new_empty(1, 16, 16, outputs) if stride == 1 else None
    inputs = (e, *part(expanded, 1, 3, 3), *part(outputs, expanded, 1, 1), stride, 1, 1, residual)
    fits(launchers, f"{op}_inference", inputs)


@needs_triton
@pytest.mark.parametrize(
    ("side", "channels", "outputs", "dtype"), [(32, 128, 144, BF16), (32, 128, 128, F16), (16, 256, 192, F16)]
)
def test_a_local_representation_fits(side, channels, outputs, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launchers = importlib.import_module("mvit3_kernels.ops.inverted_residual.triton")
    x = torch.empty(1, side, side, channels, device="meta", dtype=dtype)
    depthwise = (torch.empty(channels, 1, 3, 3, device="meta"), *torch.empty(4, channels, device="meta"), 1e-5)
    project = (torch.empty(outputs, channels, 1, 1, device="meta"), None, None, None, None, 0.0)
    fits(launchers, "inverted_residual_project_inference", (x, *depthwise, *project, 1, 1, 1, None))


def fits(launchers, op, inputs):
    """The one kernel that an op launches does not spill, and fits sm_90, the one that it is for."""
    with offline(90, True) as kernels:
        getattr(launchers, op)(FORMS[op].call(*inputs))
    [kernel] = kernels
    used = resources(kernel)
    assert used.stack == 0 and used.shared <= SHARED_MEMORY_LIMITS[90], used


@needs_triton
@pytest.mark.parametrize(
    ("side", "widths", "stride", "dtype"),
    [
        (128, (16, 64, 32), 1, BF16),
        (128, (64, 128, 128), 2, F16),
        (64, (64, 256, 64), 1, BF16),
        (64, (64, 256, 64), 1, F16),
        (64, (128, 256, 128), 1, BF16),
        (64, (64, 256, 128), 2, BF16),
        (64, (128, 256, 256), 2, F16),
        (64, (24, 72, 24), 1, BF16),
    ],
)
def test_evaluation_in_one_launch_fits(side, widths, stride, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launchers = importlib.import_module("mvit3_kernels.ops.inverted_residual.triton")
    inputs, expanded, outputs = widths

    def part(*shape):
        return (torch.empty(shape, device="meta"), *torch.empty(4, shape[0], device="meta"), 1e-5)

    x = torch.empty(1, side, side, inputs, device="meta", dtype=dtype)
    parts = (*part(expanded, inputs, 1, 1), *part(expanded, 1, 3, 3), *part(outputs, expanded, 1, 1))
    fits(launchers, "inverted_residual_tile_inference", (x, *parts, stride, 1, 1))


@needs_triton
@pytest.mark.parametrize(
    ("batch", "side", "inputs", "expanded", "stride", "said"),
    [
        (1, 128, 16, 64, 1, None),
        (2, 128, 16, 64, 1, "to 256 tiles"),  # more than run at once
        (1, 64, 64, 256, 1, None),
        (1, 64, 64, 256, 2, None),
        (2, 64, 64, 256, 1, "to 128 tiles"),
        (1, 32, 128, 512, 2, "one launch evaluates up to"),
    ],
)
def test_one_launch_is_for_maps_of_few_tiles(batch, side, inputs, expanded, stride, said):
    op = importlib.import_module("mvit3_kernels.ops.inverted_residual")
    given = mapped(arguments(Draw(), batch, side, side, inputs, expanded, 32), lambda _, t: t.bfloat16())
    parts = [given[k]._replace(norm=given[k].norm._replace(training=False)) for k in ("expand", "depthwise", "project")]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(op.dispatch, "triton_32_bit_why_not", lambda x: None)
        reason = op._one_launch_why_not(given["x"], *parts, stride, 1)
        assert reason is None if said is None else said in reason
        if said is None:
            assert "undilated" in op._one_launch_why_not(given["x"], *parts, stride, 2)
