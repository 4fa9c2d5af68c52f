"""upsample_cross_entropy's Triton kernels on CPU tensors, step by step; test_upsample_cross_entropy_triton.py runs
them."""

import pytest
import torch
import torch.nn.functional as F

import mvit3_kernels
from mvit3_kernels.ops import triton_upsampling, upsample_cross_entropy
from tests.bounds import FLOOR, assert_bound, each
from tests.ops.batch_norm_act_cases import poison
from tests.ops.test_upsample_cross_entropy_cpu import IGNORE, example, results
from tests.ops.triton_kernel import TritonResults
from tests.triton_tools import compute_like_a_gpu

poison()
compute_like_a_gpu()
F32 = torch.float32


def hold(logits, target, dtype, *options):
    truth, allowed, found = (
        results(*one, logits, target, *options)
        for one in (("reference", torch.float64), ("reference", dtype), ("triton", dtype))
    )
    assert_bound(found, allowed, truth, FLOOR, group=each, least=0)


# (B, h, w, C), (H, W), dtype, align_corners, weighted, label_smoothing: uneven bands and columns, several blocks of
# columns, of classes, groups of classes, threads for a column; smaller outputs, one pixel, an axis that stays as it is
CASES = [
    ((2, 2, 3, 5), (3, 37), F32, True, True, 0.1),
    ((1, 3, 2, 21), (5, 19), F32, False, False, 0.0),
    ((1, 2, 2, 21), (3, 17), torch.bfloat16, True, True, 0.1),
    ((1, 2, 3, 70), (4, 5), torch.float16, False, True, 0.0),
    ((1, 7, 9, 3), (2, 4), F32, True, False, 0.0),
    ((1, 2, 40, 3), (1, 35), F32, False, False, 0.1),
    ((1, 1, 1, 6), (9, 3), F32, False, True, 0.1),
    ((1, 2, 3, 4), (2, 8), F32, False, False, 0.0),
    ((1, 2, 2, 330), (2, 3), F32, True, True, 0.1),
    ((1, 1, 2, 330), (2, 2), F32, False, False, 0.0),
]


@pytest.mark.parametrize("shape, size, dtype, align_corners, weighted, smoothing", CASES, ids=str)
def test_bound(shape, size, dtype, align_corners, weighted, smoothing):
    logits, target, weight = example(shape, size, dtype)
    hold(logits, target, dtype, align_corners, weight.float().double() if weighted else None, smoothing)


@pytest.mark.parametrize("margin", [6.0, 14.0])
@pytest.mark.parametrize("classes", [5, 330])
def test_pixels_that_are_sure(classes, margin):
    """softmax - onehot nearly cancels at the label of such a pixel."""
    logits = torch.randn(1, 2, 2, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[[1, 3], [4, 1]]])
    logits = (logits + margin * F.one_hot(labels, classes)).float().double()
    hold(logits, labels.repeat_interleave(2, 1).repeat_interleave(2, 2), F32, False, None, 0.0)


@pytest.mark.parametrize(
    "shape, value",
    [((2, 1, 3, 5), value) for value in (torch.inf, -torch.inf, torch.nan, 3e38)] + [((2, 1, 3, 330), torch.nan)],
    ids=str,
)
def test_hostile_values_are_as_pytorch_has_them(shape, value):
    """They spoil what they spoil there: neither other pixels of the map, nor other images."""
    logits, target, _ = example(shape, (2, 35), F32)
    target[:] = torch.where(target == IGNORE, 0, target)  # of a pixel that does not count PyTorch has NaN, times 0
    logits[0, 0, 2, 3] = value
    want, got = (results(b, F32, logits, target, True, None, 0.0) for b in ("reference", "triton"))
    for name, t in want.items():
        if value != 3e38:
            assert torch.equal(t.isnan(), got[name].isnan()), name
        assert got[name].isfinite().all() or not t.isfinite().all() or name == "loss"


def test_masked_classes():
    """-inf at a class that is no label, where no pixel reads it with a share of 0."""
    logits, target, _ = example((1, 3, 3, 5), (6, 6), F32)
    target[target == 2] = 3
    logits[0, 2, 2, 2] = -torch.inf
    hold(logits, target, F32, False, None, 0.0)


def test_all_ignored_and_no_image():
    logits = torch.randn(1, 2, 2, 5, requires_grad=True)
    for smoothing in (0.0, 0.1):
        loss = upsample_cross_entropy(logits, torch.full((1, 4, 4), IGNORE), False, IGNORE, None, smoothing)
        assert loss.isnan()
        assert not torch.autograd.grad(loss, logits)[0].any()  # as PyTorch's: such a batch changes no weight
    none = logits[:0].detach().requires_grad_()
    loss = upsample_cross_entropy(none, torch.zeros(0, 8, 8, dtype=torch.int64))
    assert loss.isnan() and torch.autograd.grad(loss, none)[0].shape == none.shape


@pytest.mark.parametrize("classes", [5, 330])
@pytest.mark.parametrize("wrong", [-1, 1000])
def test_a_wrong_label_is_an_error(wrong, classes):
    target = torch.zeros(1, 3, 4, dtype=torch.int64)
    target[0, 1, 2] = wrong
    with pytest.raises(RuntimeError, match=rf"target must hold labels of 0 to {classes - 1} or ignore_index"):
        upsample_cross_entropy(torch.randn(1, 2, 2, classes), target)


def test_runs_and_losses_without_gradient_agree():
    logits, target, _ = example((1, 2, 2, 5), (5, 34), F32)
    first, again = (results("triton", F32, logits, target, False, None, 0.1) for _ in range(2))
    assert all(torch.equal(t, again[name]) for name, t in first.items())
    loss = upsample_cross_entropy(logits.float(), target, False, IGNORE, None, 0.1)
    assert not loss.requires_grad and torch.equal(loss.double(), first["loss"])


@pytest.mark.parametrize("classes", [5, 70])
def test_every_configuration_computes_the_same(monkeypatch, classes):
    logits, target, weight = example((1, 2, 2, classes), (5, 18), F32)
    listed, found = triton_upsampling.configurations(classes), []
    for config in listed:
        monkeypatch.setattr(triton_upsampling, "configurations", lambda _, config=config: [config])
        found.append(results("triton", F32, logits, target, False, weight, 0.1))
    assert len(found) == 2
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_registration():
    logits, target, weight = example((1, 2, 2, 5), (3, 4), F32)
    x = logits.float().requires_grad_()
    op = torch.ops.mvit3.upsample_cross_entropy_forward.default
    inputs = (x, target, True, IGNORE, weight.float(), 0.1, True)
    torch.library.opcheck(op, inputs, test_utils=TritonResults.registration_tests)
    compiled = torch.compile(lambda x: upsample_cross_entropy(x, target, True, IGNORE), fullgraph=True)
    assert torch.equal(compiled(x), upsample_cross_entropy(x, target, True, IGNORE))


def test_what_it_refuses():
    x, target = torch.randn(1, 2, 2, 5), torch.zeros(1, 4, 4, dtype=torch.int64)
    with mvit3_kernels.backend("triton"):
        for logits, labels, reason in (
            (x.double(), target, "x is torch.float64"),
            (x[..., :1], target, "of one class the loss is 0"),
            (x, target[:, :1, :1].expand(1, 2**15, 2**16), "count outputs in 32 bits"),
        ):
            with pytest.raises(mvit3_kernels.BackendError, match=reason):
                upsample_cross_entropy(logits, labels)
