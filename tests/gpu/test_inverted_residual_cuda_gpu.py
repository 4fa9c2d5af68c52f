"""The CUDA C++ kernels of inverted_residual on a GPU: shapes of the networks at 256x256 and the odd ones of the launch
emulation."""

import pytest
import torch
from torch import Tensor

from mvit3_kernels import _native
from tests.cuda import emulation
from tests.gpu.replays import check_graph, check_repeats
from tests.ops.test_inverted_residual_cuda import CASES, arguments, check

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(_native.cuda_why_not() is not None, reason=str(_native.cuda_why_not())),
]

RESULTS = (
    "dx", "gradient", "scaled", "correction", "dexpand", "dfirst_weight", "dfirst_bias", "dtaps",
    "dmiddle_weight", "dmiddle_bias", "dproject",
)  # fmt: skip
NAMES = ("filter", "inference", "backward")
STAGES = {
    f"{shape}, stride {stride}": (shape, stride, 1, "silu", dtype, torch.float32)
    for shape, stride, dtype in (
        ((4, 128, 128, 16, 64, 32), 1, torch.bfloat16),
        ((4, 128, 128, 32, 128, 64), 2, torch.bfloat16),
        ((4, 64, 64, 64, 256, 64), 1, torch.bfloat16),
        ((4, 64, 64, 64, 256, 64), 1, torch.float16),
        ((4, 64, 64, 64, 256, 96), 2, torch.bfloat16),
        ((4, 64, 64, 128, 256, 128), 1, torch.bfloat16),
        ((4, 32, 32, 128, 512, 256), 2, torch.float16),
    )
}


def on_gpu(*case) -> dict:
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in arguments(*case).items()}


def run(name: str, a: dict) -> dict[str, Tensor]:
    geometry = (a["stride"], a["dilation"], a["act"])
    front = (a["x"], a["expand"], a["scale"], a["shift"], a["depthwise"])
    if name == "filter":
        z, *moments = torch.ops.mvit3.inverted_residual_filter(*front, *geometry, 100)
        return {"z": z, **emulation.joined(*moments)}
    if name == "backward":
        first = [a[k] for k in ("dp", "z", "part", "project", "x", "mean", "covariance")]
        norms = a["norms"][: 8 * len(a["expand"])].view(2, 4, -1)
        fixed = (v for w, norm in zip((a["expand"], a["depthwise"]), norms, strict=True) for v in (w, *norm, 1e-5))
        results = torch.ops.mvit3.inverted_residual_filter_backward(*first, *fixed, *geometry)
        found = dict(zip(RESULTS, results, strict=True))
        return {key: value for key, value in found.items() if value.numel()}
    fixed, norms = [], a["norms"]
    for weight in (a["expand"], a["depthwise"], a["project"]):
        norm, norms = norms[: 4 * len(weight)].view(4, -1), norms[4 * len(weight) :]
        fixed += [weight, *norm, 1e-5]
    return dict(y=torch.ops.mvit3.inverted_residual_inference(a["x"], *fixed, *geometry))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", [*CASES, *STAGES])
def test_bound(name, case):
    check(name, on_gpu(*{**CASES, **STAGES}[case]), run)


@pytest.mark.parametrize("name", NAMES)
def test_repeats_to_the_bit_and_on_another_stream(name):
    a = on_gpu((8, 64, 64, 64, 256, 64), 1, 1, "silu", torch.bfloat16, torch.bfloat16)
    check_repeats(lambda: run(name, a))


@pytest.mark.parametrize("name", NAMES)
def test_in_a_graph(name):
    a = on_gpu((2, 32, 32, 64, 256, 64), 1, 1, "silu", torch.bfloat16, torch.float32)
    check_graph(lambda: run(name, a))


def test_more_than_2_to_the_31_elements():
    a = on_gpu((1, 64, 64, 16, 64, 16), 1, 1, "silu", torch.bfloat16, torch.float32)
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    want, batch = {name: run(name, a) for name in NAMES}, 2**31 // (64 * 64 * 64) + 2
    many = {k: v.expand(batch, -1, -1, -1).contiguous() if k in ("x", "z", "dp") else v for k, v in a.items()}
    assert many["z"].numel() > 2**31
    for name, key in (("filter", "z"), ("inference", "y"), ("backward", "dx")):
        assert torch.equal(run(name, many)[key][-1], want[name][key][0]), name
