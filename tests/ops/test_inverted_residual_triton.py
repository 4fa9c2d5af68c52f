import torch

from mvit3_kernels.ops import inverted_residual
from mvit3_kernels.ops.types import ACTIVATIONS

from .test_inverted_residual import TestInvertedResidual as Reference
from .triton_kernel import BF16, F16, F32, Case, TritonKernel, needs_triton


def arguments(draw, *sizes, mean=0.0, **options):
    found = Reference.arguments(draw, *sizes, **options)
    found["x"] += mean
    return found


def registered(x, expand, depthwise, project, stride, dilation, act, store=True):
    """The registered ops of the launchers, each with its arguments."""
    parts, geometry = (expand, depthwise, project), (stride, dilation, ACTIVATIONS.index(act))
    learned = [value for weight, norm in parts for value in (weight, norm.weight, norm.bias, norm.eps)]
    inputs = (x, *learned, *geometry, store)
    yield torch.ops.mvit3.inverted_residual_training.default, inputs
    y, *kept = torch.ops.mvit3.inverted_residual_training(*inputs)
    fixed = [v for i, (weight, n) in enumerate(parts) for v in (weight, n.weight, n.bias, *kept[2 * i : 2 * i + 2], n.eps)]
    yield torch.ops.mvit3.inverted_residual_backward.default, (torch.ones_like(y), x, *fixed, *kept[6:], *geometry)


@needs_triton
class TestInvertedResidualTriton(TritonKernel):
    op = staticmethod(inverted_residual)
    arguments = staticmethod(arguments)
    registered = staticmethod(lambda arguments: registered(**arguments))
    # (batch, height, width, inputs, expanded, outputs) of the networks, and odd ones.
    cases = (
        Case(90, BF16, (2, 8, 8, 64, 256, 64)),
        Case(90, BF16, (2, 8, 8, 16, 64, 32), {"stride": 2}),
        Case(90, F16, (2, 8, 8, 384, 768, 512)),
        Case(90, BF16, (2, 8, 8, 9, 27, 5)),
        Case(90, F32, (2, 8, 8, 64, 256, 64)),
        Case(80, BF16, (2, 8, 8, 64, 256, 64)),
        Case(80, F32, (2, 8, 8, 256, 1024, 320)),
        Case("gfx942", F16, (2, 8, 8, 64, 256, 64)),
    )
    larger = (3, 9, 11, 64, 256, 64)
