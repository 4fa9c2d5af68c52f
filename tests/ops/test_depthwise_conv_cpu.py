"""The CPU kernel of depthwise_conv: held to twice the reference's error, forward and backward, against float64."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import mvit3_kernels
from mvit3_kernels import _native
from mvit3_kernels.ops import BatchNorm, depthwise_conv

pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))

# (batch, height, width, channels), odd on purpose; the last ones fill several runs, rings and parts.
SHAPES = [(2, 7, 13, 5), (3, 16, 16, 16), (1, 33, 5, 40), (2, 30, 70, 24), (1, 5, 130, 33), (5, 9, 8, 320)]
# (stride, dilation, act): every way that the window moves, and rows and columns that no output reads.
GEOMETRY = [
    (1, 1, "silu"),
    (2, 1, "silu"),
    (1, 2, "relu"),
    (2, 2, "silu"),
    (1, 4, "identity"),
    (2, 3, "relu"),
    (2, 6, "silu"),
    (1, 20, "silu"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "weight", "gamma", "beta")


def make(shape: tuple[int, ...], mean: float = 1.0, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw)

    channels = shape[-1]
    return [normal(*shape) + mean, normal(channels, 1, 3, 3) / 3, torch.rand(channels, generator=draw) + 0.5, normal(channels)]


def call(tensors: list[Tensor], stride: int, dilation: int, act: str, training: bool) -> tuple[Tensor, object]:
    x, weight, gamma, beta = tensors
    running = (None, None) if training else ((0.3 * beta).detach(), gamma.detach().square())
    return depthwise_conv(x, weight, BatchNorm(gamma, beta, *running, training), act, stride, dilation)


def results(tensors: list[Tensor], dtype: torch.dtype, stride: int, dilation: int, act: str, training: bool = True) -> dict[str, Tensor]:
    """x in `dtype`; parameters in float32, or float64 beside float64."""
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [t.to(dtype if i == 0 else parameters).requires_grad_() for i, t in enumerate(tensors)]
    y, moments = call(leaves, stride, dilation, act, training)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    found = {"y": y.detach(), **({"moments": torch.cat(moments)} if moments else {})}
    return found | dict(zip(NAMES, torch.autograd.grad(y, leaves, dy), strict=True))


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def allowed(reference: Tensor, exact: Tensor) -> float:
    """The reference's error, at most 0.1: the library's weight gradient of dilated bfloat16 convolutions is off by its own size, or NaN."""
    found = error(reference, exact)
    return found if found < 0.1 else 0.1


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bound(shape, geometry, dtype, training):
    tensors = make(shape, mean=5.0 if shape[-1] == 24 else 1.0)
    tensors[0] = tensors[0].to(dtype).float()
    exact = results(tensors, torch.float64, *geometry, training)
    with mvit3_kernels.backend("reference"):
        reference = results(tensors, dtype, *geometry, training)
    with mvit3_kernels.backend("cpu"):
        found = results(tensors, dtype, *geometry, training)
    assert found.keys() == exact.keys()
    errors = {name: (error(found[name], exact[name]), allowed(reference[name], exact[name])) for name in exact}
    # Pooled: a single gradient of a tiny map is a handful of roundings, by luck none of them in the reference's.
    ours, theirs = (sum(e[i] ** 2 for e in errors.values()) ** 0.5 for i in range(2))
    assert ours <= 2 * theirs + torch.finfo(dtype).eps / 2, errors
    assert all(e[0] < 20 * max(e[1], 1e-7) for e in errors.values()), errors


@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (1, 1, 9, 7), (2, 9, 1, 17), (1, 2, 2, 48), (0, 4, 4, 16)], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
def test_tiny_maps(shape, geometry):
    tensors = make(shape)
    training = shape[:3] != (1, 1, 1) and not (shape[:3] == (1, 2, 2) and geometry[0] == 2)
    exact = results(tensors, torch.float64, *geometry, training)
    with mvit3_kernels.backend("cpu"):
        found = results(tensors, torch.float32, *geometry, training)
    for name, t in found.items():
        assert t.shape == exact[name].shape
        torch.testing.assert_close(t.double(), exact[name], rtol=1e-4, atol=1e-4)


def test_non_contiguous_inputs():
    tensors = make((2, 12, 10, 20))
    wide = torch.full((2, 12, 20, 24), float("nan"))
    wide[:, :, ::2, 2:22] = tensors[0]
    for strided in (tensors[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), wide[:, :, ::2, 2:22]):
        for name, t in results([strided, *tensors[1:]], torch.float32, 2, 1, "silu").items():
            assert torch.equal(t, results(tensors, torch.float32, 2, 1, "silu")[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
def test_nan_and_infinity_reach_what_they_touch_and_nothing_else(value, geometry):
    tensors = make((1, 9, 8, 18))
    tensors[0][0, 4, 4, 2] = value
    with torch.no_grad():
        found, _ = call(tensors, *geometry, False)
        assert torch.equal(found.isfinite(), call([t.double() for t in tensors], *geometry, False)[0].isfinite())
    assert call(tensors, *geometry, True)[0].isnan().any(2).any(1)[0].tolist() == [c == 2 for c in range(18)]


def test_a_constant_map_normalises_to_the_bias():
    x = torch.full((2, 8, 8, 16), 3.0)
    weight = torch.zeros(16, 1, 3, 3)
    weight[:, 0, 1, 1] = 1 / 3
    beta = torch.arange(16.0)
    y, moments = depthwise_conv(x.bfloat16(), weight, BatchNorm(torch.ones(16), beta, None, None, True), "identity")
    assert moments.var.abs().max() == 0
    torch.testing.assert_close(y.float(), beta.expand_as(y), rtol=0, atol=1e-4)


def test_results_repeat_and_threads_agree():
    tensors = make((3, 20, 32, 48))
    threads = torch.get_num_threads()
    try:
        found = {}
        for n in (1, 2):
            torch.set_num_threads(n)
            found[n] = results(tensors, torch.float32, 2, 1, "silu")
            again = results(tensors, torch.float32, 2, 1, "silu")
            assert all(torch.equal(t, again[name]) for name, t in found[n].items())
    finally:
        torch.set_num_threads(threads)
    for name, t in found[1].items():
        assert torch.allclose(t, found[2][name], rtol=1e-4, atol=1e-5 * t.abs().max().item()), name


def test_python_threads_do_not_disturb_each_other():
    jobs = [make((2, 9 + i, 37, 16 + 7 * i), seed=i) for i in range(4)]
    want = [results(job, torch.float32, 1, 1, "silu") for job in jobs]
    wrong: list[str] = []

    def work(i: int) -> None:
        for _ in range(5):
            got = results(jobs[i], torch.float32, 1, 1, "silu")
            wrong.extend(f"{i} {n}" for n, t in got.items() if not torch.allclose(t, want[i][n], rtol=1e-4, atol=1e-4))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [w.start() for w in workers], [w.join() for w in workers]
    assert not wrong


@pytest.mark.parametrize("training", [True, False])
def test_registration(training):
    x, weight, gamma, beta = (t.requires_grad_() for t in make((2, 5, 7, 17)))
    running = (None, None) if training else (beta.detach(), gamma.detach())
    torch.library.opcheck(torch.ops.mvit3.depthwise_conv_forward.default, (x, weight, gamma, beta, *running, training, 1e-5, 1, 2, 1))


def test_nothing_but_x_and_parameters_is_kept():
    tensors = [t.requires_grad_() for t in make((2, 16, 16, 32))]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(tensors, 1, 1, "silu", True)
    assert [t.data_ptr() for t in kept if t.numel() >= tensors[0].numel()] == [tensors[0].data_ptr()]


def test_what_it_refuses():
    tensors = make((2, 4, 5, 3))
    with mvit3_kernels.backend("cpu"), pytest.raises(mvit3_kernels.BackendError, match="float32, bfloat16 and float16"):
        call([t.double() for t in tensors], 1, 1, "silu", True)
    assert call([t.double() for t in tensors], 1, 1, "silu", True)[0].dtype == torch.float64  # free choice: another way is taken


def test_second_derivative_is_refused():
    tensors = [t.requires_grad_() for t in make((2, 4, 5, 3))]
    y, _ = call(tensors, 1, 1, "silu", True)
    (first,) = torch.autograd.grad(y.square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives on the reference only"):
        first.sum().backward()
