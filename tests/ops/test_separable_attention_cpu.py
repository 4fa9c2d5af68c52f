"""The CPU kernel of separable_attention: held to twice the reference's error, forward and backward, against float64."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import mvit3_kernels
from mvit3_kernels import _native
from mvit3_kernels.ops import LayerNorm, Linear, separable_attention

from .inputs import mapped, named, seed
from .measure import pooled, relative_errors

pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))

# (batch, height, width, channels) and patch size, odd on purpose; the later ones fill several tiles, panels and ranges of rows.
MAPS = [
    ((2, 4, 6, 5), (2, 2)),
    ((1, 1, 1, 3), (1, 1)),
    ((3, 1, 14, 17), (1, 2)),
    ((2, 7, 13, 9), (1, 1)),
    ((2, 8, 8, 33), (8, 8)),
    ((5, 9, 12, 16), (3, 2)),
    ((1, 16, 16, 96), (2, 2)),
    ((3, 32, 32, 64), (2, 2)),
    ((1, 32, 30, 130), (2, 2)),
    ((2, 8, 8, 256), (2, 2)),
    ((17, 8, 8, 40), (2, 2)),
]
OPTIONS = {
    "per-sample": {},
    "per-token": {"per_sample": False},
    "no-bias": {"bias": False},
    "dropouts": {"attention_dropout": 0.3, "output_dropout": 0.2},
    "large-mean": {"mean": 30.0},
}


def make(shape, patch_size=(2, 2), mean=0.0, per_sample=True, bias=True, attention_dropout=0.0, output_dropout=0.0, start=0):
    draw, d = torch.Generator().manual_seed(start), shape[-1]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    def linear(outputs: int) -> Linear:
        return Linear(normal(outputs, d, 1, 1) / d**0.5, 0.3 * normal(outputs) if bias else None)

    return {
        "x": normal(*shape) + mean,
        "norm": LayerNorm(1 + 0.3 * normal(d), 0.3 * normal(d), 1e-5, per_sample),
        "qkv": linear(1 + 2 * d),
        "out_proj": linear(d),
        "patch_size": patch_size,
        "attention_dropout": attention_dropout,
        "output_dropout": output_dropout,
        "seed": seed() if attention_dropout or output_dropout else None,
    }


def results(arguments, dtype: torch.dtype, parameters: torch.dtype | None = None) -> dict[str, Tensor]:
    """y and the gradients of everything differentiable."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        leaves[name] = t.to(dtype if name == "x" else parameters or dtype).requires_grad_()
        return leaves[name]

    y = separable_attention(**mapped(arguments, leaf))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d {name}": g for name, g in zip(leaves, grads, strict=True)}


def on(backend: str, *args: object) -> dict[str, Tensor]:
    with mvit3_kernels.backend(backend):
        return results(*args)


def in_dtype(arguments, dtype: torch.dtype):
    return mapped(arguments, lambda _, t: t.to(dtype).double() if t.is_floating_point() else t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape, patch_size", MAPS, ids=str)
def test_bound(shape, patch_size, option, dtype):
    arguments = in_dtype(make(shape, patch_size, **OPTIONS[option]), dtype)
    truth = on("reference", arguments, torch.float64)
    allowed = relative_errors(on("reference", arguments, dtype), truth)
    for parameters in (dtype, torch.float32):
        errors = relative_errors(on("cpu", arguments, dtype, parameters), truth)
        for gradients in (False, True):
            # Half a rounding is what storing the exact result costs.
            assert pooled(errors, gradients) <= 2 * pooled(allowed, gradients) + torch.finfo(dtype).eps / 2, (errors, allowed)


@pytest.mark.parametrize("shape, patch_size", MAPS, ids=str)
def test_inference_is_training_without_gradients(shape, patch_size):
    arguments = mapped(make(shape, patch_size), lambda _, t: t.float())
    with torch.no_grad(), mvit3_kernels.backend("cpu"):
        found = separable_attention(**arguments)
    assert torch.equal(found, on("cpu", arguments, torch.float32)["y"])


def test_scores_far_apart():
    """Maxima that grow from tile to tile, and exponentials that vanish."""
    arguments = make((2, 40, 30, 16))
    arguments["qkv"].weight[0] *= 40
    arguments["x"] *= torch.linspace(0.1, 10, 40)[:, None, None]
    truth = on("reference", arguments, torch.float64)
    errors, allowed = (relative_errors(on(backend, arguments, torch.float32), truth) for backend in ("cpu", "reference"))
    for gradients in (False, True):
        assert pooled(errors, gradients) <= 2 * pooled(allowed, gradients) + 6e-8, (errors, allowed)


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch):
    found = on("cpu", make((batch, 4, 6, 5)), torch.float32)
    assert found["y"].shape == (batch, 4, 6, 5)
    assert batch or not any(t.any() for t in found.values())


def test_non_contiguous_inputs():
    arguments = make((2, 6, 8, 12))
    want = on("cpu", arguments, torch.float32)
    arguments["x"] = arguments["x"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    arguments["out_proj"] = arguments["out_proj"]._replace(weight=arguments["out_proj"].weight[..., 0, 0].T.contiguous().T)
    for name, t in on("cpu", arguments, torch.float32).items():
        assert torch.equal(t.view_as(want[name]), want[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("per_sample", [False, True])
def test_nan_and_infinity_reach_the_output(per_sample, value):
    arguments = make((3, 8, 8, 20), per_sample=per_sample)
    arguments["x"][1, 4, 5, 2] = value
    found, want = (on(backend, arguments, torch.float32) for backend in ("cpu", "reference"))
    assert torch.equal(found["y"].isnan(), want["y"].isnan()) and want["y"].isnan().any()
    assert torch.equal(found["d x"].isnan(), want["d x"].isnan())


def test_arguments_are_not_changed():
    arguments = mapped(make((2, 4, 6, 8), attention_dropout=0.2), lambda name, t: t.float() if name != "seed" else t)
    before = named(mapped(arguments, lambda _, t: t.clone()))
    on("cpu", arguments, torch.float32)
    assert all(torch.equal(t, before[name]) for name, t in named(arguments).items())


@pytest.mark.parametrize("shape", [(3, 32, 32, 24), (1, 32, 32, 64), (4, 16, 16, 64)], ids=str)
def test_results_repeat_and_threads_agree(shape):
    arguments = make(shape, attention_dropout=0.1, output_dropout=0.1)
    threads = torch.get_num_threads()
    found = {}
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found[n] = on("cpu", arguments, torch.float32)
            again = on("cpu", arguments, torch.float32)
            assert all(torch.equal(t, again[name]) for name, t in found[n].items())
    finally:
        torch.set_num_threads(threads)
    for n in (2, 3):
        for name, t in found[1].items():
            assert torch.allclose(t, found[n][name], rtol=1e-4, atol=1e-5 * t.abs().max().item()), name


def test_python_threads_do_not_disturb_each_other():
    jobs = [make((1 + i % 2, 8 + 2 * i, 32, 24 + i), start=i) for i in range(4)]
    want = [on("cpu", job, torch.float32) for job in jobs]
    wrong: list[str] = []

    def work(i: int) -> None:
        for _ in range(5):
            got = on("cpu", jobs[i], torch.float32)
            wrong.extend(f"{i} {n}" for n, t in got.items() if not torch.allclose(t, want[i][n], rtol=1e-4, atol=1e-4))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [w.start() for w in workers], [w.join() for w in workers]
    assert not wrong


@pytest.mark.parametrize("option", OPTIONS)
def test_registration(option):
    arguments = mapped(make((2, 4, 6, 5), **OPTIONS[option]), lambda _, t: t.float().requires_grad_() if t.is_floating_point() else t)
    x, norm, qkv, out_proj, patch_size, *dropout = arguments.values()
    inputs = (x, *norm, *qkv, *out_proj, *patch_size)
    torch.library.opcheck(torch.ops.mvit3.separable_attention_training.default, (*inputs, *dropout))
    detached = tuple(t.detach() if isinstance(t, Tensor) else t for t in inputs)
    torch.library.opcheck(torch.ops.mvit3.separable_attention_inference.default, detached)
    y, *kept = torch.ops.mvit3.separable_attention_training(*detached, *dropout)
    backward = (torch.ones_like(y), *detached[:3], *detached[4:9], *kept, *patch_size, *dropout)
    torch.library.opcheck(torch.ops.mvit3.separable_attention_backward.default, backward)


def test_compiles_whole():
    torch._dynamo.reset()
    arguments = mapped(make((2, 4, 6, 8)), lambda _, t: t.float().requires_grad_())
    compiled = torch.compile(separable_attention, fullgraph=True, backend="aot_eager")
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            torch.testing.assert_close(compiled(**arguments), separable_attention(**arguments), rtol=0, atol=0)


def test_what_it_refuses():
    with mvit3_kernels.backend("cpu"), pytest.raises(mvit3_kernels.BackendError, match=r"float32, bfloat16 and float16, x is torch\.float64"):
        separable_attention(**make((2, 4, 6, 5)))


def test_the_kernel_checks_what_it_is_given():
    x, norm, qkv, out_proj, *_ = mapped(make((2, 4, 6, 5)), lambda _, t: t.float()).values()
    op = torch.ops.mvit3.separable_attention_inference
    with pytest.raises(RuntimeError, match="patch_size must divide the map"):
        op(x, *norm, *qkv, *out_proj, 3, 2)
    with pytest.raises(RuntimeError, match=r"1 \+ 2D rows"):
        op(x, *norm, qkv.weight[:-1], qkv.bias, *out_proj, 2, 2)
    with pytest.raises(RuntimeError, match=r"out_proj\.weight must have 5 x 5"):
        op(x, *norm, *qkv, out_proj.weight[:-1], out_proj.bias, 2, 2)


def test_second_derivative_is_refused():
    arguments = mapped(make((2, 4, 6, 5)), lambda _, t: t.float().requires_grad_())
    (first,) = torch.autograd.grad(separable_attention(**arguments).square().sum(), arguments["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives on the reference only"):
        first.sum().backward()
