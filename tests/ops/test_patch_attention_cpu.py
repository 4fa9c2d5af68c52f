"""The CPU kernel of patch_attention: held to twice the reference's error, forward and backward, against float64."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch import Tensor

import mvit3_kernels
from mvit3_kernels import _native
from mvit3_kernels.ops import patch_attention
from mvit3_kernels.ops.random import random_words

from ..bounds import check_bound

pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))

# (batch, height, width, heads, head width, patch): odd on purpose; blocks of queries and keys that are full, short and single.
SHAPES = [
    (2, 4, 6, 2, 2, (2, 2)),
    (1, 7, 13, 3, 9, (1, 1)),
    (2, 6, 4, 1, 15, (3, 2)),
    (3, 8, 8, 4, 60, (2, 2)),
    (1, 22, 12, 2, 17, (2, 1)),
    (1, 34, 30, 1, 36, (2, 2)),
    (2, 2, 2, 5, 64, (2, 2)),
    (1, 20, 30, 2, 24, (1, 2)),
    (1, 1, 33, 1, 1, (1, 1)),
    (1, 3, 1, 2, 70, (1, 1)),
]


def make(shape: tuple, seed: int = 0) -> tuple[Tensor, tuple]:
    batch, height, width, heads, dim, patch = shape
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, height, width, 3 * heads * dim, generator=draw), (heads, patch)


def key(value: int = 11) -> Tensor:
    return torch.tensor(value * 0x0123_4567_89AB_CDEF % 2**62)


def results(qkv: Tensor, heads: int, patch: tuple, dropout: float = 0.0, seed: Tensor | None = None) -> dict[str, Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = patch_attention(qkv, heads, patch, dropout, seed)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    return {"out": out.detach(), "dqkv": torch.autograd.grad(out, qkv, dout)[0]}


def forced(qkv: Tensor, *arguments: object) -> dict[str, Tensor]:
    with mvit3_kernels.backend("cpu"):
        return results(qkv, *arguments)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bound(shape, dtype, dropout):
    qkv, arguments = make(shape)

    def run(given: dict, backend: str) -> dict[str, Tensor]:
        with mvit3_kernels.backend(backend):
            return results(given["qkv"], *arguments, dropout, key() if dropout else None)

    check_bound(run, {"qkv": qkv}, "cpu", dtype, dtype)


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_batches(batch):
    qkv, arguments = make((batch, 4, 6, 2, 5, (2, 2)))
    found, exact = forced(qkv, *arguments), results(qkv.double(), *arguments)
    for name, t in exact.items():
        torch.testing.assert_close(found[name], t.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_large_scores(scale):
    """Scores of many hundreds: one key takes all, in both directions of the sign, and in later blocks of keys as in the first."""
    qkv, arguments = make((1, 20, 30, 1, 8, (1, 1)))
    qkv[..., :8] *= scale
    found, exact = forced(qkv, *arguments), results(qkv.double(), *arguments)
    assert found["out"].isfinite().all() and found["dqkv"].isfinite().all()
    assert (found["out"] - exact["out"]).abs().max() < scale * 1e-4


def test_equal_scores_give_the_mean():
    qkv, _ = make((1, 16, 18, 1, 4, (1, 1)))
    qkv[..., :4] = 0
    mean = qkv[..., 8:].mean((1, 2), keepdim=True)
    torch.testing.assert_close(forced(qkv, 1, (1, 1))["out"], mean.expand(1, 16, 18, 4))


def test_log_sum_exp():
    """What is kept for backward is the binary logarithm of the sum that the softmax divides by."""
    qkv, (heads, patch) = make((2, 6, 4, 2, 3, (2, 2)))
    _, lse = torch.ops.mvit3.patch_attention_forward(qkv, heads, *patch, 0.0, None)
    q, k, _ = qkv.view(2, 3, 2, 2, 2, 3, 2, 3).permute(5, 0, 2, 4, 6, 1, 3, 7).reshape(3, 2, 4, 2, 6, 3)
    scores = q @ k.transpose(-2, -1) / math.sqrt(3)
    torch.testing.assert_close(lse, scores.logsumexp(-1) / math.log(2))


@pytest.mark.parametrize("p", [0.1, 0.9])
def test_dropout_mask_is_the_reference_mask(p):
    """With values that are one-hot in the key, the output is the row of probabilities itself."""
    tokens, heads, batch = 35, 2, 3
    qkv = torch.zeros(batch, 5, 7, 3 * heads * tokens)
    qkv.view(batch, tokens, 3, heads, tokens)[:, :, 2] = torch.eye(tokens)[None, :, None]
    out = forced(qkv, heads, (1, 1), p, key())["out"].view(batch, tokens, heads, tokens).transpose(1, 2)
    kept = random_words(key(), 0, batch, heads * tokens * tokens).view_as(out) >= int(p * 2**32)
    torch.testing.assert_close(out, kept / (tokens * (1 - p)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_contiguous_inputs(dtype):
    qkv, arguments = make((2, 6, 10, 2, 7, (2, 2)))
    qkv = qkv.to(dtype)
    strided = qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    wide = torch.full((2, 6, 20, 44), float("nan"), dtype=dtype)[:, :, ::2, 1:-1].copy_(qkv)
    want = forced(qkv, *arguments)
    for other in (strided, wide):
        assert not other.is_contiguous()
        assert all(torch.equal(t, want[name]) for name, t in forced(other, *arguments).items())
    leaf = qkv.requires_grad_()
    out = patch_attention(leaf, *arguments)
    (grad,) = torch.autograd.grad(out.sum(), leaf)  # an expanded gradient
    (same,) = torch.autograd.grad(patch_attention(leaf, *arguments), leaf, torch.ones_like(out))
    assert torch.equal(grad, same)


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_reach_the_output(value, part):
    """A bad key spoils its group, a bad query itself, a bad value one channel of its group; other groups stay as they are."""
    qkv, arguments = make((2, 12, 14, 2, 5, (2, 2)))
    at = ("query", "key", "value").index(part) * 10 + 7  # the second head
    qkv[1, 4, 5, at] = value
    found = forced(qkv, *arguments)["out"]
    exact = patch_attention(qkv.double(), *arguments)
    assert torch.equal(found.isfinite(), exact.isfinite())
    if value != value:
        assert torch.equal(found.isnan(), exact.isnan())
    clean = exact.isfinite()
    torch.testing.assert_close(found[clean], exact[clean].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_results_repeat_and_threads_agree(dropout):
    qkv, arguments = make((3, 18, 20, 2, 12, (2, 2)))
    seed = key() if dropout else None
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            found.append(forced(qkv, *arguments, dropout, seed))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], other[name]) for other in found for name in other)


def test_python_threads_do_not_disturb_each_other():
    jobs = [make((2, 4 + 2 * i, 14, 2, 5 + i, (2, 2)), seed=i) for i in range(4)]
    want = [forced(qkv, *arguments) for qkv, arguments in jobs]
    wrong: list[str] = []

    def work(i: int) -> None:
        qkv, arguments = jobs[i]
        for _ in range(10):
            wrong.extend(f"{i} {name}" for name, t in results(qkv, *arguments).items() if not torch.equal(t, want[i][name]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [w.start() for w in workers], [w.join() for w in workers]
    assert not wrong


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_registration(dropout):
    qkv, (heads, patch) = make((2, 4, 6, 2, 3, (2, 2)))
    arguments = (heads, *patch, dropout, key() if dropout else None)
    torch.library.opcheck(torch.ops.mvit3.patch_attention_forward.default, (qkv.requires_grad_(), *arguments))
    qkv = qkv.detach()
    out, lse = torch.ops.mvit3.patch_attention_forward(qkv, *arguments)
    torch.library.opcheck(torch.ops.mvit3.patch_attention_backward.default, (torch.randn_like(out), qkv, out, lse, *arguments))


def test_the_registered_kernels_check_what_they_get():
    """Called directly, past the public function's checks, they refuse rather than read elsewhere."""
    qkv, _ = make((1, 4, 6, 2, 3, (2, 2)))
    op, back = torch.ops.mvit3.patch_attention_forward, torch.ops.mvit3.patch_attention_backward
    for arguments in ((5, 2, 2, 0.0, None), (2, 3, 2, 0.0, None), (0, 2, 2, 0.0, None), (2, 2, 2, 0.5, None)):
        with pytest.raises(RuntimeError):
            op(qkv, *arguments)
    out, lse = op(qkv, 2, 2, 2, 0.0, None)
    for dout, other_lse in ((out[:, :2], lse), (out.double(), lse), (out, lse[:, :2]), (out, lse.double())):
        with pytest.raises(RuntimeError):
            back(dout, qkv, out, other_lse, 2, 2, 2, 0.0, None)


def test_compile():
    torch._dynamo.reset()
    qkv, arguments = make((2, 8, 8, 2, 5, (2, 2)))
    compiled = torch.compile(lambda x: patch_attention(x * 2, *arguments, 0.2, key()), fullgraph=True, backend="aot_eager")
    leaf, twin = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    out, want = compiled(leaf), patch_attention(twin * 2, *arguments, 0.2, key())
    out.square().sum().backward()
    want.square().sum().backward()
    assert torch.equal(out, want) and torch.equal(leaf.grad, twin.grad)


def test_what_it_refuses():
    qkv, arguments = make((2, 4, 6, 2, 3, (2, 2)))
    with mvit3_kernels.backend("cpu"), pytest.raises(mvit3_kernels.BackendError, match="float32, bfloat16 and float16"):
        patch_attention(qkv.double(), *arguments)
    assert patch_attention(qkv.double(), *arguments).dtype == torch.float64  # free choice: the reference


def test_second_derivative_is_refused():
    qkv, arguments = make((2, 4, 6, 2, 3, (2, 2)))
    qkv.requires_grad_()
    (first,) = torch.autograd.grad(patch_attention(qkv, *arguments).square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives on the reference only"):
        first.sum().backward()
