"""The CPU kernel of upsample_cross_entropy."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mvit3_kernels
from mvit3_kernels.ops import upsample_cross_entropy

from ..bounds import FLOOR, assert_bound, each
from .cpu_kernel import needs_the_kernels
from .inputs import DTYPES

pytestmark = needs_the_kernels
IGNORE = 255
# (B, h, w, C), (H, W): whole and odd scales, smaller outputs, one pixel, one row, classes below, at and above a vector
SHAPES = [
    ((2, 3, 5, 21), (17, 23)),
    ((1, 4, 4, 150), (64, 64)),
    ((3, 1, 1, 5), (7, 3)),
    ((2, 6, 4, 16), (6, 4)),
    ((2, 8, 8, 17), (5, 5)),
    ((1, 5, 7, 33), (40, 1)),
    ((2, 2, 3, 1), (9, 9)),
    ((4, 8, 8, 21), (128, 128)),
]
OPTIONS = list(itertools.product((False, True), (0.0, 0.1), (False, True)))  # align_corners, smoothing, weighted


def example(shape: tuple[int, ...], size: tuple[int, int], dtype: torch.dtype, scale: float = 3.0):
    """Logits that dtype has, labels, some of them ignored, and weights of the classes."""
    generator = torch.Generator().manual_seed(sum(shape) + sum(size))
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).double()
    target = torch.randint(0, shape[3], (shape[0], *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = IGNORE
    weight = (torch.rand(shape[3], generator=generator) + 0.1).double()
    return logits, target, weight


def results(backend: str, dtype: torch.dtype, logits: Tensor, target: Tensor, *options) -> dict[str, Tensor]:
    """The loss and its gradient."""
    x = logits.to(dtype).detach().clone().requires_grad_()
    align_corners, weight, smoothing = options
    if weight is not None and dtype != torch.float64:
        weight = weight.float()
    with mvit3_kernels.backend(backend):
        loss = upsample_cross_entropy(x, target, align_corners, IGNORE, weight, smoothing)
    (1.7 * loss).backward()
    return {"loss": loss.detach().double(), "d logits": x.grad.double()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("align_corners, smoothing, weighted", OPTIONS)
@pytest.mark.parametrize("shape, size", [one for one in SHAPES if one[0][3] > 1], ids=str)
def test_kernel(shape, size, align_corners, smoothing, weighted, dtype):
    """Error at most twice the reference's in the same dtype, both against float64."""
    logits, target, weight = example(shape, size, dtype)
    options = (align_corners, weight.float().double() if weighted else None, smoothing)
    truth = results("reference", torch.float64, logits, target, *options)
    allowed, found = (results(backend, dtype, logits, target, *options) for backend in ("reference", "cpu"))
    assert_bound(found, allowed, truth, FLOOR, group=each, least=0)


@pytest.mark.parametrize("classes", [2, 21, 150])
@pytest.mark.parametrize("margin", [6.0, 10.0, 14.0])
def test_pixels_that_are_sure(classes, margin):
    """softmax - onehot nearly cancels at the label of such a pixel."""
    logits = torch.randn(2, 6, 6, classes, dtype=torch.float64)
    labels = torch.randint(0, classes, (2, 6, 6))
    logits = (logits + margin * F.one_hot(labels, classes)).float().double()
    target = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    truth, allowed, found = (
        results(backend, dtype, logits, target, False, None, 0.0)
        for backend, dtype in (("reference", torch.float64), ("reference", torch.float32), ("cpu", torch.float32))
    )
    assert_bound(found, allowed, truth, FLOOR, group=each, least=0)


def test_a_weight_with_gradient_is_refused_as_by_pytorch():
    logits, target, weight = example((2, 3, 5, 21), (17, 23), torch.float32)
    with pytest.raises((RuntimeError, NotImplementedError), match="weight"):
        upsample_cross_entropy(logits.float(), target, True, IGNORE, weight.float().requires_grad_()).backward()


def test_threads_and_runs_agree():
    """Bands of an image are added up in a fixed order."""
    logits, target, _ = example((1, 32, 32, 21), (512, 512), torch.float32)
    first, again = (results("cpu", torch.float32, logits, target, False, None, 0.0) for _ in range(2))
    assert all(torch.equal(t, again[name]) for name, t in first.items())
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            other = results("cpu", torch.float32, logits, target, False, None, 0.0)
            assert torch.allclose(other["loss"], first["loss"], rtol=1e-6)
            assert (other["d logits"] - first["d logits"]).abs().max() < 1e-6 * first["d logits"].abs().max()
    finally:
        torch.set_num_threads(threads)


def test_the_largest_logits():
    """PyTorch's own sum overflows."""
    logits, target, _ = example((2, 4, 4, 21), (16, 16), torch.float32)
    logits[0, 1, 2, 3] = 3e38
    want, got = (
        results(*one, logits, target, False, None, 0.0)
        for one in (("reference", torch.float64), ("cpu", torch.float32))
    )
    assert torch.allclose(want["loss"], got["loss"], rtol=1e-5) and got["d logits"].isfinite().all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e4])
def test_hostile_values_are_as_pytorch_has_them(value):
    logits, target, _ = example((2, 4, 4, 21), (16, 16), torch.float32)
    logits[0, 1, 2, 3] = value
    want, got = (results(b, torch.float32, logits, target, False, None, 0.0) for b in ("reference", "cpu"))
    assert torch.equal(want["loss"].isfinite(), got["loss"].isfinite()), (want["loss"], got["loss"])
    assert torch.equal(want["d logits"][1].isfinite(), got["d logits"][1].isfinite())
    if value == 1e4:
        assert torch.allclose(want["d logits"], got["d logits"], rtol=1e-4, atol=1e-7)


def test_all_ignored_and_no_image():
    logits = torch.randn(2, 4, 4, 21, requires_grad=True)
    for smoothing in (0.0, 0.1):
        loss = upsample_cross_entropy(logits, torch.full((2, 8, 8), IGNORE), False, IGNORE, None, smoothing)
        assert loss.isnan()
        assert not torch.autograd.grad(loss, logits)[0].any()  # as PyTorch's: such a batch changes no weight
    assert upsample_cross_entropy(logits[:0], torch.zeros(0, 8, 8, dtype=torch.int64)).isnan()


def test_registration_of_the_kernel():
    logits, target, weight = example((2, 3, 5, 21), (17, 23), torch.float32)
    x = logits.float().requires_grad_()
    op = torch.ops.mvit3.upsample_cross_entropy_forward.default
    torch.library.opcheck(op, (x, target, True, IGNORE, weight.float(), 0.1, True))
    compiled = torch.compile(lambda x: upsample_cross_entropy(x, target, True, IGNORE), fullgraph=True)
    assert torch.equal(compiled(x), upsample_cross_entropy(x, target, True, IGNORE))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_wrong_label_is_an_error(backend):
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    target[0, 5, 5] = 21
    with mvit3_kernels.backend(backend), pytest.raises((RuntimeError, IndexError), match="21"):
        upsample_cross_entropy(torch.randn(1, 4, 4, 21), target)
