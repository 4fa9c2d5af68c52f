"""upsample_argmax: what it means, and its CPU kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import mvit3_kernels
from mvit3_kernels.ops import upsample_argmax

from .cpu_kernel import needs_the_kernels
from .test_upsample_cross_entropy_cpu import IGNORE, SHAPES, example


@needs_the_kernels
def test_registration():
    logits, target, _ = example((2, 3, 5, 21), (17, 23), torch.float32)
    logits = logits.float()
    torch.library.opcheck(torch.ops.mvit3.upsample_argmax_inference.default, (logits, 17, 23, True, target))
    torch.library.opcheck(torch.ops.mvit3.upsample_argmax.default, (logits, [17, 23], True, target))
    compiled = torch.compile(lambda x: upsample_argmax(x, (17, 23), True, target), fullgraph=True)
    for got, want in zip(compiled(logits), upsample_argmax(logits, (17, 23), True, target), strict=True):
        assert torch.equal(got, want)


def test_transforms_and_dtypes():
    """vmap follows the reference; every dtype has the labels of its values in float32."""
    logits, target, _ = example((2, 3, 5, 21), (17, 23), torch.float32)
    labels, counted = torch.func.vmap(lambda x, t: upsample_argmax(x[None], (17, 23), False, t[None]))(logits, target)
    want, total = upsample_argmax(logits, (17, 23), False, target)
    assert torch.equal(labels[:, 0], want) and torch.equal(counted.sum(0), total)
    for dtype in (torch.bfloat16, torch.float16):
        x = logits.to(dtype)
        assert torch.equal(upsample_argmax(x, (17, 23))[0], upsample_argmax(x.float(), (17, 23))[0])


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"logits": torch.randn(4, 4, 21)}, ValueError, r"logits must be a feature map \(B, H, W, C\)"),
        ({"target": torch.zeros(1, 8, 8)}, TypeError, "target must be int64, got torch.float32"),
        ({"target": torch.zeros(1, 8, 7, dtype=torch.int64)}, ValueError, r"target must have the size \(8, 8\)"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        upsample_argmax(**{"logits": torch.randn(1, 4, 4, 21), "size": (8, 8), **options})


@needs_the_kernels
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("shape, size", SHAPES, ids=str)
def test_argmax(shape, size, align_corners):
    logits, target, _ = example(shape, size, torch.float32)
    with mvit3_kernels.backend("reference"):
        want, counted = upsample_argmax(logits, size, align_corners, target)  # float64
    found, confusion = upsample_argmax(logits.float(), size, align_corners, target)
    x = logits.permute(0, 3, 1, 2)
    top = F.interpolate(x, size, mode="bilinear", align_corners=align_corners).topk(min(2, shape[3]), 1).values
    clear = top[:, 0] - top[:, -1] > 1e-5 if shape[3] > 1 else torch.ones_like(want, dtype=torch.bool)
    assert clear.float().mean() > 0.99
    assert torch.equal(found[clear], want[clear])
    if clear.all():
        assert torch.equal(confusion, counted)
    assert confusion.sum() == (target != IGNORE).sum()


@needs_the_kernels
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_argmax_of_hostile_values(value):
    """A NaN is the largest, as in torch.argmax."""
    logits = torch.randn(1, 4, 4, 21)
    logits[0, 1, 2, 3] = value
    with mvit3_kernels.backend("reference"):
        want, _ = upsample_argmax(logits, (4, 4))
    assert torch.equal(upsample_argmax(logits, (4, 4))[0], want)


@needs_the_kernels
def test_argmax_of_equal_logits_is_the_first():
    assert not upsample_argmax(torch.ones(1, 4, 4, 21), (64, 64))[0].any()


@pytest.mark.parametrize("size", [(8,), (0, 8), (8, 8, 8), 8, (2.5, 8)])
def test_wrong_size(size):
    with pytest.raises(ValueError, match=r"size must be two positive numbers \(H, W\)"):
        upsample_argmax(torch.randn(1, 4, 4, 21), size)
