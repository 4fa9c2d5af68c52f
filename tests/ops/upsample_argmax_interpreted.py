"""upsample_argmax's Triton kernel on CPU tensors, step by step; run by test_upsample_argmax_triton.py."""

import pytest
import torch

import mvit3_kernels
from mvit3_kernels.ops import upsample_argmax
from tests.ops.batch_norm_act_cases import poison
from tests.ops.test_upsample_cross_entropy_cpu import IGNORE, example
from tests.ops.triton_kernel import TritonResults
from tests.ops.upsample_cross_entropy_interpreted import CASES
from tests.triton_tools import compute_like_a_gpu

poison()
compute_like_a_gpu()


def both(logits, size, align_corners, target):
    """What the kernel finds, and the reference in float64."""
    with mvit3_kernels.backend("reference"):
        want = upsample_argmax(logits.double(), size, align_corners, target)
    with mvit3_kernels.backend("triton"):
        return upsample_argmax(logits, size, align_corners, target), want


@pytest.mark.parametrize("shape, size, dtype, align_corners", [case[:4] for case in CASES[::2]], ids=str)
def test_labels(shape, size, dtype, align_corners):
    """Random logits have no ties."""
    logits, target, _ = example(shape, size, dtype)
    for given in (target, None):
        (labels, counted), (want, want_counted) = both(logits.to(dtype), size, align_corners, given)
        assert torch.equal(labels, want)
        assert counted is None if given is None else torch.equal(counted, want_counted)


def test_long_runs_and_labels_that_do_not_count():
    """Runs of one pair down a column, which are counted together; labels out of range."""
    logits = torch.zeros(2, 1, 1, 5)
    logits[..., 3] = 1
    target = torch.tensor([3, 3, 3, 1, 1, -7, 3, IGNORE, 3, 5, 4, 4]).view(1, -1, 1).expand(2, 12, 3)
    (labels, counted), (_, want) = both(logits, (12, 3), False, target)
    assert (labels == 3).all() and torch.equal(counted, want) and counted.sum() == 2 * 3 * 9


@pytest.mark.parametrize("classes", [5, 330])
def test_equal_logits_have_the_first_label(classes):
    assert not upsample_argmax(torch.ones(1, 2, 2, classes), (4, 4))[0].any()
    assert not upsample_argmax(torch.full((1, 2, 2, classes), -torch.inf), (2, 2))[0].any()


@pytest.mark.parametrize(
    "classes, value", [(21, torch.inf), (21, -torch.inf), (21, torch.nan), (330, torch.nan)], ids=str
)
def test_hostile_values(value, classes):
    """A NaN is the largest, as in torch.argmax, and larger than an infinite one."""
    logits, _, _ = example((1, 2, 3, classes), (2, 3), torch.float32)
    logits[0, 1, 1, 3:5] = value
    logits[0, 0, 0, 1], logits[0, 0, 0, classes - 1] = torch.inf, value
    (labels, _), (want, _) = both(logits.float(), (2, 3), False, None)
    assert torch.equal(labels, want)


def test_no_image_and_registration():
    labels, counted = upsample_argmax(torch.randn(0, 2, 2, 5), (4, 4), target=torch.zeros(0, 4, 4, dtype=torch.int64))
    assert labels.shape == (0, 4, 4) and counted.shape == (5, 5) and not counted.any()
    logits, target, _ = example((1, 2, 2, 5), (3, 4), torch.float32)
    op = torch.ops.mvit3.upsample_argmax_inference.default
    torch.library.opcheck(op, (logits.float(), 3, 4, True, target), test_utils=TritonResults.registration_tests)
