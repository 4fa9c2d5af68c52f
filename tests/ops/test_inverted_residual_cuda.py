"""The CUDA C++ kernels of inverted_residual where no GPU is: their bodies run on the launch emulation of tests/cuda
against the plain meaning in float64; their error is at most twice that of the same steps in plain PyTorch, each of
which rounds to the dtype of the map."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from mvit3_kernels import _native
from mvit3_kernels.ops.inverted_residual.cost import MOST_INPUTS_IN_BACKWARD
from mvit3_kernels.ops.types import ACTIVATIONS

from ..bounds import FLOOR, assert_bound, each
from ..cuda import emulation
from .inputs import Draw

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="no C++ compiler for the launch emulation")

# (B, H, W, C, E, O), stride, dilation, act, dtype of x, dtype of weights. Tiles are 8 x 16 or 4 x 8 outputs, 32 or 64
# expanded channels; 150 channels come in two slices, and the gradient of more than 64 is another kernel's.
CASES = {
    "odd": ((2, 9, 19, 5, 35, 7), 1, 1, "silu", torch.bfloat16, torch.float32),
    "odd, stride 2": ((2, 9, 19, 5, 35, 7), 2, 1, "silu", torch.bfloat16, torch.float32),
    "three groups": ((1, 10, 17, 16, 96, 24), 1, 1, "silu", torch.float16, torch.float32),
    "three groups, stride 2": ((1, 10, 17, 16, 96, 24), 2, 1, "silu", torch.bfloat16, torch.float32),
    "residual": ((1, 8, 17, 16, 64, 16), 1, 1, "silu", torch.float16, torch.float16),
    "even, stride 2": ((1, 16, 18, 24, 48, 40), 2, 1, "relu", torch.float16, torch.float32),
    "identity": ((3, 3, 2, 8, 16, 24), 1, 1, "identity", torch.bfloat16, torch.bfloat16),
    "dilated": ((1, 11, 21, 8, 16, 8), 1, 2, "relu", torch.bfloat16, torch.bfloat16),
    "many channels": ((1, 4, 5, 150, 40, 70), 1, 1, "silu", torch.bfloat16, torch.bfloat16),
    "many channels, stride 2": ((1, 9, 7, 136, 40, 264), 2, 1, "silu", torch.bfloat16, torch.float32),
    "48 channels": ((1, 9, 17, 48, 40, 72), 1, 1, "silu", torch.float16, torch.float32),
    "48 channels, stride 2": ((1, 10, 17, 48, 40, 72), 2, 1, "silu", torch.bfloat16, torch.float32),
    "100 channels": ((1, 9, 17, 100, 72, 24), 1, 1, "silu", torch.bfloat16, torch.float32),
    "128 channels": ((1, 9, 18, 128, 40, 128), 1, 1, "relu", torch.float16, torch.float32),
    "104 channels, stride 2": ((1, 10, 17, 104, 44, 72), 2, 1, "silu", torch.bfloat16, torch.bfloat16),
    # signs of e decide over gradients; more outputs than one slice has where shared memory is smallest
    "relu": ((1, 12, 16, 32, 64, 32), 1, 1, "relu", torch.bfloat16, torch.bfloat16),
    "relu, stride 2": ((1, 12, 16, 16, 64, 384), 2, 1, "relu", torch.bfloat16, torch.float32),
    "one pixel": ((1, 1, 1, 3, 2, 1), 2, 1, "silu", torch.float16, torch.float32),
}
INPUTS = (
    "x",
    "expand",
    "depthwise",
    "project",
    "scale",
    "shift",
    "norms",
    "dp",
    "z",
    "part",
    "mean",
    "covariance",
)
EXACT = ("dmiddle_weight", "dmiddle_bias", "dproject")  # sums of float32


def arguments(
    shape: tuple[int, ...], stride: int, dilation: int, act: str, dtype: torch.dtype, weights: torch.dtype
) -> dict:
    batch, height, width, inputs, expanded, outputs = shape
    draw, out = Draw(0), (batch, -(-height // stride), -(-width // stride))

    def vector(low: float, high: float) -> Tensor:
        return (low + (high - low) * draw(expanded).sigmoid()).float()

    x = (draw(batch, height, width, inputs) + 0.5).to(dtype)
    rows = x.double().flatten(0, 2)
    deviations, pixels = rows - rows.mean(0), out[0] * out[1] * out[2]
    norms = [draw(n) if i % 2 else 0.5 + draw(n).square() for n in (expanded, expanded, outputs) for i in (0, 1, 1, 0)]
    return dict(
        x=x,
        expand=(draw(expanded, inputs) / inputs**0.5).to(weights),
        depthwise=(draw(expanded, 1, 3, 3) / 2).to(weights),
        project=(draw(outputs, expanded) / expanded**0.5).to(weights),
        scale=vector(0.5, 1.5), shift=vector(-1, 1), norms=torch.cat(norms).float(),
        dp=draw(*out, outputs).to(dtype), z=draw(*out, expanded).to(dtype),
        part=0.1 * pixels * draw(9, outputs + 2, expanded).float(),
        mean=(rows.mean(0) + 0.25).float(),  # of one pixel too N is not 0 then
        covariance=(deviations.T @ deviations / len(rows)).float(),
        stride=stride, dilation=dilation, act=ACTIVATIONS.index(act),
    )  # fmt: skip


def run(name: str, a: dict, **options: int) -> dict[str, Tensor]:
    """What the kernel of that name writes; memory that it does not write stays NaN."""
    (batch, height, width, inputs), (outputs, expanded), stride = a["x"].shape, a["project"].shape, a["stride"]
    out = (batch, -(-height // stride), -(-width // stride))
    parts = 2 * options.get("processors", 3) - 1  # more than some maps have tiles

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    dtype = a["x"].dtype
    results = {
        "filter": dict(z=empty(*out, expanded, dtype=dtype), moments=empty(2, parts, expanded), counts=empty(parts)),
        "inference": dict(y=empty(*out, outputs, dtype=dtype)),
        "backward": dict(
            dtaps=empty(expanded, 1, 3, 3),
            dmiddle_weight=empty(expanded),
            dmiddle_bias=empty(expanded),
            dproject=empty(outputs, expanded),
        ),
    }[name]
    if name == "backward" and inputs > MOST_INPUTS_IN_BACKWARD:
        shape = (batch, height, width, expanded)
        results |= dict(gradient=empty(*shape, dtype=dtype), scaled=empty(expanded, inputs, dtype=dtype))
    elif name == "backward":
        results |= dict(dx=empty(*a["x"].shape, dtype=dtype), correction=empty(2, expanded))
        results |= dict(dexpand=empty(expanded, inputs), dfirst_weight=empty(expanded), dfirst_bias=empty(expanded))
    sizes = dict(batch=batch, height=height, width=width, inputs=inputs, expanded=expanded, outputs=outputs)
    sizes |= dict(parts=parts, parts_of_sums=len(a["part"]))
    emulation.call(f"run_{name}", **sizes, **{**a, **results}, **options)
    return (
        {"z": results["z"], **emulation.joined(results["moments"], results["counts"])} if name == "filter" else results
    )


def activate(value: Tensor, act: int) -> Tensor:
    return (value, F.silu(value), F.relu(value))[act]


def slope(value: Tensor, act: int) -> Tensor:
    with torch.enable_grad():
        leaf = value.detach().requires_grad_()
        return torch.autograd.grad(activate(leaf, act).sum(), leaf)[0]


def filtered(value: Tensor, a: dict) -> Tensor:
    padding = a["dilation"]
    taps = a["depthwise"].to(value.dtype)
    moved = value.permute(0, 3, 1, 2)
    return F.conv2d(moved, taps, None, a["stride"], padding, a["dilation"], len(taps)).permute(0, 2, 3, 1)


def meaning(name: str, a: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """The plain meaning, with every step in `dtype` (norms in float32 at least, as in PyTorch)."""
    wider = torch.promote_types(dtype, torch.float32)

    def affine(value: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return (value.to(wider) * scale.to(wider) + shift.to(wider)).to(dtype)

    # The dtype of the products is that of x: the weights are rounded to it, as under autocast.
    a = {k: v.to(a["x"].dtype).to(dtype) if k in ("x", "expand", "project", "dp", "z") else v for k, v in a.items()}
    act, expanded = a["act"], len(a["expand"])
    affines, rstds = [], []
    for n, part in zip(
        (expanded, expanded, len(a["project"])),
        a["norms"].split([4 * expanded, 4 * expanded, 4 * len(a["project"])]),
        strict=True,
    ):
        weight, bias, mean, var = part.to(wider).view(4, n)
        affines.append((weight / (var + 1e-5).sqrt(), bias - mean * weight / (var + 1e-5).sqrt()))
        rstds.append(1 / (var + 1e-5).sqrt())
    if name == "inference":
        value = filtered(activate(affine(a["x"] @ a["expand"].T, *affines[0]), act), a)
        y = affine(activate(affine(value, *affines[1]), act) @ a["project"].T, *affines[2])
        return dict(y=y + a["x"] if a["stride"] == 1 and y.shape == a["x"].shape else y)
    scale, shift = (a["scale"], a["shift"]) if name == "filter" else affines[0]
    pre = affine(a["x"] @ a["expand"].T, scale, shift)
    value = activate(pre, act)
    if name == "filter":
        return dict(z=filtered(value, a))
    normal = affine(a["z"], *affines[1])
    g = (a["dp"] @ a["project"]) * slope(normal, act)
    *dproject, total, weighted = a["part"].to(wider).sum(0)
    middle_mean, pixels = a["norms"][6 * expanded : 7 * expanded].to(wider), g[..., 0].numel()
    dmiddle_weight = rstds[1] * (weighted - middle_mean * total)
    c2 = -affines[1][0] * rstds[1] * dmiddle_weight / pixels
    c1 = -affines[1][0] * total / pixels - c2 * middle_mean
    dz = affine(g, affines[1][0], c1 + c2 * a["z"].to(wider)).permute(0, 3, 1, 2)
    geometry = dict(stride=a["stride"], padding=a["dilation"], dilation=a["dilation"], groups=expanded)
    value = value.permute(0, 3, 1, 2)
    da = conv2d_input(value.shape, a["depthwise"].to(dtype), dz, **geometry).permute(0, 2, 3, 1)
    dtaps = conv2d_weight(value.contiguous(), a["depthwise"].shape, dz.contiguous(), **geometry)
    grad = da * slope(pre, act)
    rows, weight, x_mean = grad.flatten(0, 2), a["expand"].to(wider), a["mean"].to(wider)
    dbias = rows.sum(0).to(wider)
    product = (rows.T @ a["x"].flatten(0, 2)).to(wider) - dbias[:, None] * x_mean
    dweight = rstds[0] * (weight * product).sum(1)
    weight_covariance = weight @ a["covariance"].to(wider)
    return dict(
        dx=(grad * scale.to(dtype)) @ a["expand"],
        dexpand=scale[:, None] * (product - (dweight * rstds[0])[:, None] * weight_covariance),
        dfirst_weight=dweight, dfirst_bias=dbias,
        correction=torch.stack((scale * rstds[0] * dweight, scale * dbias)) / len(rows),
        gradient=grad, scaled=(weight * scale[:, None]).to(dtype), dtaps=dtaps,
        dmiddle_weight=dmiddle_weight, dmiddle_bias=total, dproject=torch.stack(dproject),
    )  # fmt: skip


def check(name: str, a: dict, run: Callable[[str, dict], dict[str, Tensor]] = run) -> dict[str, Tensor]:
    found, peer, truth = run(name, a), meaning(name, a, a["x"].dtype), meaning(name, a, torch.float64)
    assert all(t.isfinite().all() for t in found.values())
    for key in found.keys() & {*EXACT}:
        most = float(truth[key].abs().max())
        torch.testing.assert_close(found[key].double(), truth[key], rtol=1e-5, atol=1e-5 * most)
    both = (found.keys() & truth.keys()) - {*EXACT}
    assert both
    assert_bound(*({key: results[key] for key in both} for results in (found, peer, truth)), FLOOR, group=each, least=0)
    return found


@pytest.mark.parametrize("name", ["filter", "inference", "backward"])
@pytest.mark.parametrize("case", CASES)
def test_bound(name, case):
    a = arguments(*CASES[case])
    before = {k: v.clone() for k, v in a.items() if isinstance(v, Tensor)}
    found = check(name, a)
    assert all(torch.equal(a[k], v) for k, v in before.items())
    if name == "filter":  # the moments of z as it is stored
        rows = found["z"].double().flatten(0, 2)
        torch.testing.assert_close(found["mean"].double(), rows.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["var"].double(), rows.var(0, unbiased=False), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["filter", "inference", "backward"])
@pytest.mark.parametrize("shape, stride", [((2, 17, 20, 24, 70, 24), 1), ((1, 9, 19, 150, 40, 136), 2)], ids=str)
def test_blocks_and_the_order_of_warps(name, shape, stride):
    """Sums go through more or fewer blocks; a missing barrier would show in the order of the warps."""
    a = arguments(shape, stride, 1, "silu", torch.bfloat16, torch.float32)
    first = run(name, a)
    for options in (dict(backwards=True), dict(runs=False), dict(runs=False, backwards=True)):
        for key, value in run(name, a, **options).items():
            assert torch.equal(value, first[key]), key
    for key, value in run(name, a, processors=1).items():
        if value.dtype is torch.bfloat16:
            assert torch.equal(value, first[key]), key
        else:
            largest = max(float(first[key].abs().max()), 1.0)  # the gradient of the expansion is a difference
            torch.testing.assert_close(value, first[key], rtol=1e-5, atol=1e-5 * largest)


def test_moments_of_large_and_of_constant_channels():
    a = arguments((2, 9, 19, 8, 32, 8), 1, 1, "identity", torch.float16, torch.float32)
    a["depthwise"].zero_()[:, 0, 1, 1] = 1.0
    a["scale"][:16] = 0.0  # constant channels
    a["shift"][:] = 100.0
    a["scale"][16:] /= 8
    found = run("filter", a)
    rows = found["z"].double().flatten(0, 2)
    assert torch.equal(found["var"][:16], torch.zeros(16))
    # The mean is 2,000 standard deviations: what a difference of squares would leave of the variance is noise of its
    # own size.
    torch.testing.assert_close(found["var"].double(), rows.var(0, unbiased=False), rtol=1e-4, atol=0)
    torch.testing.assert_close(found["mean"].double(), rows.mean(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name, inputs", [("filter", 16), ("inference", 16), ("backward", 16), ("backward", 72)])
def test_unaligned_memory(name, inputs):
    a = arguments((1, 8, 17, inputs, 32, 16), 1, 1, "silu", torch.bfloat16, torch.float32)
    first = run(name, a)

    def moved(t: Tensor) -> Tensor:
        memory = t.new_empty(t.numel() + 1)
        memory[1:] = t.flatten()
        return memory[1:].view(t.shape)

    for key, value in run(name, {k: moved(v) if isinstance(v, Tensor) else v for k, v in a.items()}).items():
        assert torch.equal(value, first[key]), key


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value):
    """A bad pixel reaches what its neighbourhood reaches in the plain meaning, and nothing else."""
    a = arguments((1, 9, 19, 8, 32, 16), 1, 1, "silu", torch.bfloat16, torch.float32)
    a["x"][0, 4, 7, 3] = value
    for name, key in (("filter", "z"), ("inference", "y")):
        found, truth = run(name, a)[key], meaning(name, a, torch.bfloat16)[key]
        assert not truth.isfinite().all()
        assert torch.equal(found.isfinite(), truth.isfinite()), name


@pytest.mark.parametrize("stride", [1, 2])
def test_one_channel_overflows(stride):
    """The taps come as products with diagonal matrices, in which 0 times infinity would reach the other channels."""
    a = arguments((1, 9, 19, 8, 64, 64), stride, 1, "relu", torch.float16, torch.float32)
    a["x"][0, 4, 7] = 8.0
    a["expand"][5], a["scale"][5], a["shift"][5] = 60000.0, 1.0, 0.0
    found, truth = run("filter", a)["z"], meaning("filter", a, torch.float16)["z"]
    assert not truth[..., 5].isfinite().all()
    assert torch.equal(found.isfinite(), truth.isfinite())


def test_one_channel_overflows_in_front_of_relu():
    """What was minus infinity is 0 behind ReLU, and so is all that it could have reached."""
    a = arguments((1, 9, 19, 8, 64, 64), 1, 1, "relu", torch.float16, torch.float32)
    a["x"][0, 4, 7] = 8.0
    a["expand"][5], a["depthwise"][5] = 60000.0, -1.0
    a["norms"][: 4 * 64].view(4, 64)[:, 5] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    found, truth = run("inference", a)["y"], meaning("inference", a, torch.float16)["y"]
    assert truth.isfinite().all() and found.isfinite().all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sanitizers are loaded with LD_PRELOAD")
def test_under_the_sanitizers():
    """Every access of shared and of global memory, of odd shapes, under GCC's address and undefined-behaviour
    sanitizers."""
    emulation.run_sanitized(
        "from tests.ops.test_inverted_residual_cuda import CASES, arguments, check\n"
        "for case in ('odd', 'odd, stride 2', 'many channels, stride 2'):\n"
        "    for name in ('filter', 'inference', 'backward'):\n"
        "        check(name, arguments(*CASES[case]))\n"
    )


@pytest.mark.skipif(_native.cuda_why_not() is not None, reason=str(_native.cuda_why_not()))
def test_resources_of_the_compiled_kernels():
    """Of the built extension, for every device that it holds code for: a kernel that spills has a stack."""
    found = [kernel for kernel in emulation.resources() if "Depthwise" not in kernel[0]]
    assert {part for name, *_ in found for part in re.findall("Filter|Inference|Backward", name)} == {
        "Filter",
        "Inference",
        "Backward",
    }
    for name, registers, stack in found:
        assert stack == 0, name
        assert 8 < registers <= 128, name  # two blocks of 256 threads


@pytest.mark.skipif(_native.cuda_why_not() is not None, reason=str(_native.cuda_why_not()))
@pytest.mark.parametrize("op", ["filter", "inference", "filter_backward"])
def test_registration(op):
    name = f"mvit3::inverted_residual_{op}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
