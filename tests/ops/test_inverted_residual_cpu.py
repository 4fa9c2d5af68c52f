"""The CPU kernel of inverted_residual: held to twice the reference's error, forward and backward, against float64."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch import Tensor

import mvit3_kernels
from mvit3_kernels import _native
from mvit3_kernels.ops import BatchNorm, ConvNorm, inverted_residual

OP = sys.modules["mvit3_kernels.ops.inverted_residual"]
WAYS = ("stored", "recomputed")
pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))

# (batch, height, width, channels, expanded, outputs), odd on purpose; the last ones fill several tiles, panels and ranges of rows.
SHAPES = [
    (2, 7, 13, 5, 9, 5),
    (2, 40, 16, 1, 20, 1),
    (1, 33, 5, 8, 40, 8),
    (3, 16, 16, 16, 64, 33),
    (2, 30, 70, 24, 48, 24),
    (2, 9, 130, 48, 200, 17),
]
GEOMETRY = [(1, 1, "silu"), (2, 1, "silu"), (1, 2, "relu"), (2, 2, "silu"), (1, 4, "silu"), (3, 1, "silu")]
NAMES = tuple(f"{part}.{field}" for part in ("expand", "depthwise", "project") for field in ("weight", "gamma", "beta"))


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Both ways through training: with the expanded tensor kept, and with it made again in backward."""
    monkeypatch.setattr(OP, "_stores", lambda *_: request.param == "stored")


def make(shape: tuple[int, ...], mean: float = 1.0, seed: int = 0) -> list[Tensor]:
    """x, then weight, norm weight and norm bias of each convolution."""
    batch, height, width, channels, wide, outputs = shape
    draw = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw)

    parameters = []
    for size, inputs in (((wide, channels, 1, 1), channels), ((wide, 1, 3, 3), 9), ((outputs, wide, 1, 1), wide)):
        parameters += [normal(*size) / inputs**0.5, torch.rand(size[0], generator=draw) + 0.5, normal(size[0])]
    return [normal(batch, height, width, channels) + mean, *parameters]


def call(tensors: list[Tensor], stride: int, dilation: int, act: str, training: bool) -> tuple[Tensor, list[Tensor]]:
    x, *p = tensors
    statistics = [] if training else [(0.3 * beta, gamma.square()) for gamma, beta in zip(p[1::3], p[2::3], strict=True)]
    parts = []
    for i in range(3):
        mean, var = (None, None) if training else (s.detach() for s in statistics[i])
        parts.append(ConvNorm(p[3 * i], BatchNorm(p[3 * i + 1], p[3 * i + 2], mean, var, training)))
    if stride == 3:  # the op takes 1 and 2; the kernel any
        return inverted_residual(x, *parts, stride=2, dilation=3, act=act)
    return inverted_residual(x, *parts, stride=stride, dilation=dilation, act=act)


def results(tensors: list[Tensor], dtype: torch.dtype, *options: object) -> dict[str, Tensor]:
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    y, moments = call(leaves, *options, True)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    found = {"y": y.detach(), **{f"moments[{i}]": torch.cat(pair) for i, pair in enumerate(moments)}}
    return found | dict(zip(("x", *NAMES), torch.autograd.grad(y, leaves, dy), strict=True))


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def check_training(shape, geometry, mean, dtype=torch.float32):
    tensors = [t.to(dtype) for t in make(shape, mean)]
    exact = results(tensors, torch.float64, *geometry)
    with mvit3_kernels.backend("reference"):
        reference = results(tensors, dtype, *geometry)
    with mvit3_kernels.backend("cpu"):
        found = results(tensors, dtype, *geometry)
    # Pooled: a single gradient of a tiny map is a handful of roundings, by luck none of them in the reference's.
    assert found.keys() == exact.keys()
    errors = {name: (error(found[name], exact[name]), error(reference[name], exact[name])) for name in exact}
    if shape[3] == 1:  # the norm takes away all that a single weight does, so its gradient is eps and rounding
        del errors["expand.weight"]
    ours, theirs = (sum(e[i] ** 2 for e in errors.values()) ** 0.5 for i in range(2))
    assert ours <= 2 * theirs, errors
    assert all(e[0] < 50 * max(e[1], torch.finfo(dtype).eps) for e in errors.values()), errors


@pytest.mark.parametrize("mean", [1.0, 5.0])
@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training(shape, geometry, mean, way):
    check_training(shape, geometry, mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("geometry", [(1, 1, "silu"), (2, 1, "relu")], ids=str)  # the reference's dilated gradient in bfloat16 is wrong
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_in_16_bits(shape, geometry, dtype, way):
    check_training(shape, geometry, 1.0, dtype)


def test_training_of_few_positions():
    for geometry in GEOMETRY[:2]:
        check_training((2, 3, 5, 8, 16, 8), geometry, 1.0)


# Those with few rows are cut by channels.
EVALUATED = [*SHAPES, (0, 4, 4, 3, 6, 3), (1, 1, 1, 3, 6, 3), (2, 2, 1, 8, 16, 8), (1, 8, 9, 200, 400, 200), (1, 7, 33, 16, 100, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
@pytest.mark.parametrize("shape", EVALUATED, ids=str)
def test_evaluation(shape, geometry, dtype):
    tensors = [t.to(dtype) for t in make(shape)]
    with torch.no_grad():
        exact, _ = call([t.double() for t in tensors], *geometry, False)
        with mvit3_kernels.backend("reference"):
            reference, _ = call(tensors, *geometry, False)
        with mvit3_kernels.backend("cpu"):
            found, moments = call(tensors, *geometry, False)
    assert found.shape == exact.shape and moments == (None, None, None)
    if exact.numel():
        assert error(found, exact) <= 2 * error(reference, exact) + torch.finfo(dtype).eps / 2


def test_non_contiguous_inputs(way):
    tensors = make((2, 12, 10, 6, 12, 6))
    strided = [tensors[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), *tensors[1:]]
    for name, t in results(strided, torch.float32, 1, 1, "silu").items():
        assert torch.allclose(t, results(tensors, torch.float32, 1, 1, "silu")[name], rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_the_output(value, way):
    tensors = make((1, 8, 8, 6, 12, 6))
    tensors[0][0, 4, 4, 2] = value
    with torch.no_grad():
        found, _ = call(tensors, 1, 1, "silu", False)
        assert torch.equal(found.isnan(), call([t.double() for t in tensors], 1, 1, "silu", False)[0].isnan())
    assert call(tensors, 1, 1, "silu", True)[0].isnan().all()


def test_results_repeat_and_threads_agree(way):
    tensors = make((3, 20, 12, 8, 32, 8))
    threads = torch.get_num_threads()
    try:
        found = {}
        for n in (1, 2):
            torch.set_num_threads(n)
            found[n] = results(tensors, torch.float32, 1, 1, "silu")
            again = results(tensors, torch.float32, 1, 1, "silu")
            assert all(torch.equal(t, again[name]) for name, t in found[n].items())
    finally:
        torch.set_num_threads(threads)
    for name, t in found[1].items():
        assert torch.allclose(t, found[2][name], rtol=1e-4, atol=1e-4 * t.abs().max().item()), name


def test_python_threads_do_not_disturb_each_other(way):
    jobs = [make((2, 9 + i, 7, 6, 12 + i, 6), seed=i) for i in range(4)]
    want = [results(job, torch.float32, 1, 1, "silu") for job in jobs]
    wrong: list[str] = []

    def work(i: int) -> None:
        for _ in range(5):
            got = results(jobs[i], torch.float32, 1, 1, "silu")
            wrong.extend(f"{i} {n}" for n, t in got.items() if not torch.allclose(t, want[i][n], rtol=1e-4, atol=1e-4))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [w.start() for w in workers], [w.join() for w in workers]
    assert not wrong


@pytest.mark.parametrize("store", [True, False])
def test_registration(store):
    tensors = [t.requires_grad_() for t in make((2, 5, 7, 3, 6, 3))]
    x, *p = tensors
    learned = [v for i in range(3) for v in (*p[3 * i : 3 * i + 3], 1e-5)]
    torch.library.opcheck(torch.ops.mvit3.inverted_residual_training.default, (x, *learned, 1, 1, 1, store))
    fixed = [
        v.detach() if isinstance(v, Tensor) else v for i in range(3) for v in (*p[3 * i : 3 * i + 3], p[3 * i + 2], p[3 * i + 1], 1e-5)
    ]
    torch.library.opcheck(torch.ops.mvit3.inverted_residual_inference.default, (x.detach(), *fixed, 2, 1, 1))


@pytest.mark.parametrize(
    "reason, change",
    [
        ("float32, bfloat16 and float16", lambda t: [t[0].double(), *t[1:]]),
        ("x is empty", lambda t: [t[0][:0], *t[1:]]),
    ],
)
def test_what_it_refuses(reason, change):
    tensors = change(make((2, 4, 5, 3, 6, 3)))
    with mvit3_kernels.backend("cpu"), pytest.raises(mvit3_kernels.BackendError, match=reason):
        call(tensors, 1, 1, "silu", True)
    assert call(tensors, 1, 1, "silu", True)[0].shape[0] == tensors[0].shape[0]  # free choice: another way is taken


def test_evaluation_with_gradients_takes_another_way():
    tensors = [t.requires_grad_() for t in make((2, 4, 5, 3, 6, 3))]
    with mvit3_kernels.backend("cpu"), pytest.raises(mvit3_kernels.BackendError, match="gradients in training only"):
        call(tensors, 1, 1, "silu", False)
    y, _ = call(tensors, 1, 1, "silu", False)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), tensors))


def test_second_derivative_is_refused():
    tensors = [t.requires_grad_() for t in make((2, 4, 5, 3, 6, 3))]
    y, _ = call(tensors, 1, 1, "silu", True)
    (first,) = torch.autograd.grad(y.square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives on the reference only"):
        first.sum().backward()
