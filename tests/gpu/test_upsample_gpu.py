"""The Triton kernels of upsample_cross_entropy and upsample_argmax on a GPU: DeepLabv3's shapes on VOC and ADE20K, and
odd ones."""

import pytest
import torch
import torch.nn.functional as F

import mvit3_kernels
from mvit3_kernels.ops import upsample_argmax, upsample_cross_entropy
from tests.bounds import FLOOR, assert_bound, each
from tests.ops.inputs import DTYPES
from tests.ops.test_upsample_cross_entropy_cpu import IGNORE, SHAPES, example, results

pytestmark = pytest.mark.usefixtures("poisoned")
F32, F64 = torch.float32, torch.float64
LARGE = [((2, 32, 32, 21), (512, 512)), ((1, 32, 32, 150), (512, 512)), ((1, 5, 7, 1000), (31, 65))]


def drawn(shape, size, dtype=F32):
    return tuple(t.cuda() for t in example(shape, size, dtype))


def hold(logits, target, dtype, *options):
    truth, allowed, found = (
        results(*one, logits, target, *options) for one in (("reference", F64), ("reference", dtype), ("triton", dtype))
    )
    assert_bound(found, allowed, truth, FLOOR, group=each, least=0)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("smoothing, weighted", [(0.0, False), (0.1, True)])
@pytest.mark.parametrize(
    "shape, size, dtype",
    [(*one, F32) for one in SHAPES if one[0][3] > 1] + [(*one, dtype) for one in LARGE for dtype in DTYPES],
    ids=str,
)
def test_loss(shape, size, dtype, align_corners, smoothing, weighted):
    logits, target, weight = drawn(shape, size, dtype)
    hold(logits, target, dtype, align_corners, weight.float().double() if weighted else None, smoothing)


@pytest.mark.parametrize("classes", [2, 21, 150, 400])
@pytest.mark.parametrize("margin", [6.0, 14.0])
def test_pixels_that_are_sure(classes, margin):
    logits, labels = torch.randn(2, 6, 6, classes, dtype=F64).cuda(), torch.randint(0, classes, (2, 6, 6)).cuda()
    logits = (logits + margin * F.one_hot(labels, classes)).float().double()
    hold(logits, labels.repeat_interleave(4, 1).repeat_interleave(4, 2), F32, False, None, 0.0)


@pytest.mark.parametrize("shape, size", LARGE, ids=str)
def test_runs_are_identical(shape, size):
    logits, target, _ = drawn(shape, size)
    first, again = (results("triton", F32, logits, target, True, None, 0.1) for _ in range(2))
    assert all(torch.equal(t, again[name]) for name, t in first.items())
    labels = [upsample_argmax(logits.float(), size, True, target) for _ in range(2)]
    assert all(torch.equal(*both) for both in zip(*labels, strict=True))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("shape, size", SHAPES + LARGE, ids=str)
def test_labels(shape, size, align_corners):
    logits, target, _ = drawn(shape, size)
    with mvit3_kernels.backend("reference"):
        want, _ = upsample_argmax(logits, size, align_corners)
    with mvit3_kernels.backend("triton"):
        found, confusion = upsample_argmax(logits.float(), size, align_corners, target)
    large = F.interpolate(logits.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=align_corners)
    top = large.topk(min(2, shape[3]), 1).values
    clear = top[:, 0] - top[:, -1] > 1e-5 if shape[3] > 1 else torch.ones_like(want, dtype=torch.bool)
    assert clear.float().mean() > 0.99 and torch.equal(found[clear], want[clear])
    counted = target != IGNORE
    pairs = target[counted] * shape[3] + found[counted]
    assert torch.equal(confusion.flatten(), torch.bincount(pairs, minlength=shape[3] ** 2))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_labels_of_hostile_values(value):
    logits, _, _ = drawn((1, 4, 4, 21), (4, 4))
    logits[0, 1, 2, 3] = value
    with mvit3_kernels.backend("reference"):
        want, _ = upsample_argmax(logits, (4, 4))
    assert torch.equal(upsample_argmax(logits.float(), (4, 4))[0], want)


def test_nothing_waits_for_the_gpu():
    """Neither way copies anything to the host, so both can be recorded."""
    torch.use_deterministic_algorithms(False)
    logits, target, _ = drawn((2, 8, 8, 21), (64, 64))
    x = logits.float().requires_grad_()

    def run():
        loss = upsample_cross_entropy(x, target, True, IGNORE)
        return loss.detach(), *torch.autograd.grad(loss, x), *upsample_argmax(x, (64, 64), True, target)

    want = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(*both) for both in zip(found, want, strict=True))


def test_memory():
    """Nothing has the size of the labels times the classes."""
    torch.use_deterministic_algorithms(False)
    logits, target, _ = drawn((4, 32, 32, 150), (512, 512))
    x = logits.float().requires_grad_()
    torch.autograd.grad(upsample_cross_entropy(x, target, True, IGNORE), x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(upsample_cross_entropy(x, target, True, IGNORE), x)
    assert torch.cuda.max_memory_allocated() - before < 12 * x.numel() * 4 < target.numel() * 150 * 4 / 10
