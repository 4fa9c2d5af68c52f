import os
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mvit3_kernels
from mvit3_kernels import BackendError, backend
from mvit3_kernels.ops import BatchNorm, batch_norm_act, dispatch, pointwise_conv

from .inputs import Draw, replaced
from .test_batch_norm_act import TestBatchNormAct as BatchNormAct

CPU_KERNEL = dispatch.Kernel("cpu", lambda x: None if x.dtype == torch.float32 else f"x is {x.dtype}")
TRITON_KERNEL = dispatch.Kernel("triton", lambda x: None if x.shape[0] < 4 else "x is too long")


def chosen(x: torch.Tensor, kernels=(CPU_KERNEL, TRITON_KERNEL)) -> str:
    kernel = dispatch.select("toy", kernels, x)
    return "reference" if kernel is None else kernel.backend


def test_free_choice_takes_the_first_kernel_that_can():
    assert chosen(torch.zeros(2)) == "cpu"
    assert chosen(torch.zeros(2).double()) == "triton"
    assert chosen(torch.zeros(5).double()) == "reference"
    assert chosen(torch.zeros(2), ()) == "reference"
    assert CPU_KERNEL.can_run(torch.zeros(2)) and not CPU_KERNEL.can_run(torch.zeros(2).double())


@pytest.mark.parametrize(
    "name, x, reason",
    [
        ("cpu", torch.zeros(2).double(), "x is torch.float64"),
        ("triton", torch.zeros(5), "x is too long"),
        ("cuda", torch.zeros(2), "the op has no kernel for this backend"),
    ],
)
def test_forced_and_impossible(name, x, reason):
    with backend(name), pytest.raises(BackendError) as info:
        chosen(x)
    assert str(info.value) == f"toy cannot run on backend {name!r}: {reason}"


def test_forced_and_possible():
    for name in ("cpu", "triton", "reference"):
        with backend(name):
            assert chosen(torch.zeros(2)) == name


def test_the_wrong_device_is_the_reason():
    arguments = BatchNormAct.arguments(Draw())
    for name in ("x", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"):
        arguments, _ = replaced(arguments, name, lambda t: t.float().to("meta"))
    with backend("cpu"), pytest.raises(BackendError, match="batch_norm_act cannot run on backend 'cpu': x is on meta"):
        batch_norm_act(**arguments)


def test_contexts_nest_and_restore():
    before = dispatch.forced_backend()
    with backend("cpu"):
        with backend("reference"):
            assert dispatch.forced_backend() == "reference"
        assert dispatch.forced_backend() == "cpu"
        with pytest.raises(ZeroDivisionError), backend("triton"):
            assert dispatch.forced_backend() == "triton"
            1 / 0  # noqa: B018
        assert dispatch.forced_backend() == "cpu"
    assert dispatch.forced_backend() == before


def test_unknown_name():
    with (
        pytest.raises(ValueError, match="backend must be one of reference, cpu, triton, cuda, got 'gpu'"),
        backend("gpu"),
    ):
        raise AssertionError("the block must not be entered")


def test_contexts_are_per_thread():
    seen = []
    with backend("cuda"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.forced_backend()))
        thread.start()
        thread.join()
        assert dispatch.forced_backend() == "cuda"
    assert seen == [dispatch.forced_backend()]


def test_backward_keeps_the_backend_of_its_forward():
    """A context that is left before the backward pass does not change it, and one that is entered then does not
    either."""
    draw = Draw()
    x, weight = draw(2, 3, 5, 4).requires_grad_(), draw.linear(3, 4)
    grads = []
    for name in ("reference", "cuda"):
        with backend("reference"):
            y, _ = pointwise_conv(x, weight)
        with backend(name):
            grads.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert torch.equal(*grads)


def test_compiled_code_follows_the_context():
    torch._dynamo.reset()
    kernels = (dispatch.Kernel("cpu", lambda x: None),)  # one that always runs, also where no extension is built

    def toy(x):
        return x + (1 if dispatch.select("toy", kernels, x) is None else 2)

    compiled, zero = torch.compile(toy, fullgraph=True, backend="eager"), torch.zeros(3)
    for name, value in ((None, 2), ("reference", 1), (None, 2), ("cpu", 2)):
        with nullcontext() if name is None else backend(name):
            assert compiled(zero)[0] == value


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    root = os.path.dirname(os.path.dirname(mvit3_kernels.__file__))
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_environment_variable():
    code = """
from mvit3_kernels import backend
from mvit3_kernels.ops.dispatch import forced_backend
print(forced_backend())
with backend("triton"):
    print(forced_backend())
"""
    done = run(code, MVIT3_BACKEND="reference")
    assert done.stdout.split() == ["reference", "triton"], done.stderr
    assert run(code, MVIT3_BACKEND="").stdout.split() == ["None", "triton"]


def test_bad_environment_variable():
    done = run("import mvit3_kernels", MVIT3_BACKEND="gpu")
    assert done.returncode != 0
    assert (
        "ValueError: environment variable MVIT3_BACKEND must be one of reference, cpu, triton, cuda, got 'gpu'"
        in done.stderr
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("capability", "installed", "reason"),
    [((7, 5), True, "Old has compute capability"), ((9, 0), False, "not installed")],
)
def test_a_gpu_without_kernels_is_said_once(capability, installed, reason, compiled, monkeypatch, caplog):
    """Its calls run on the reference, under torch.compile(fullgraph=True) too."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Old")
    for name, value in {"_gpus": {}, "_logged": set(), "HAS_TRITON": installed}.items():
        monkeypatch.setattr(dispatch, name, value)
    found = []

    def record(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def call(x, w):
        return batch_norm_act(x, BatchNorm(w, w, None, None, True), "silu")[0]

    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, backend=record)
    with FakeTensorMode():
        for channels in (8, 16):
            x, w = torch.empty(2, 5, 7, channels, device="cuda"), torch.empty(channels, device="cuda")
            assert call(x, w).shape == x.shape
        assert not any("mvit3" in target for target in found)
        with pytest.raises(BackendError, match=reason), backend("triton"):
            batch_norm_act(x, BatchNorm(w, w, None, None, True))
    [entry] = [record for record in caplog.records if record.name == "mvit3_kernels"]
    assert reason in entry.getMessage()
