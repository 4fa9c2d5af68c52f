"""The loader of the compiled extension, and the build where there is no compiler. Each case runs in a process of its
own."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mvit3_kernels
from mvit3_kernels import _native
from tests.ops.inputs import DTYPES

PACKAGE = Path(mvit3_kernels.__file__).parent
SETUP = Path(__file__).parents[1] / "setup.py"

needs_kernels = pytest.mark.skipif(_native.why_not() is not None, reason=f"no compiled kernels: {_native.why_not()}")

STATE = "from mvit3_kernels import _native; print(_native.isa(), _native.why_not(), sep='|')"
RESULT = """
import torch, mvit3_kernels
from mvit3_kernels.ops import BatchNorm, batch_norm_act
generator = torch.Generator().manual_seed(0)
x = torch.randn(2, 9, 11, 24, generator=generator, requires_grad=True)
with mvit3_kernels.backend("cpu"):
    norm = BatchNorm(torch.linspace(0.5, 1, 24), torch.linspace(-1, 1, 24), None, None, True)
    y, moments = batch_norm_act(x, norm, "silu")
y.backward(torch.randn(y.shape, generator=generator))
torch.save((y.detach(), *moments, x.grad), PATH)
"""

PRODUCT = """
import torch, mvit3_kernels
from mvit3_kernels.ops import Linear, pointwise_conv
with mvit3_kernels.backend("cpu"):
    weight = Linear(torch.full((1, 255), 1 + 0.9 / 256), None)
    print(pointwise_conv(torch.ones(1, 1, 1, 255).bfloat16(), weight)[0].item())
"""


def python(code: str, folder: Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess:
    """Runs `code` with the package in `folder`, without the settings of this process."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MVIT3_") and k != "TRITON_INTERPRET"}
    env = {**kept, "PYTHONPATH": str(folder), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=folder)


def state(folder: Path = PACKAGE.parent, **environment: str) -> tuple[str, str]:
    done = python(STATE, folder, **environment)
    assert done.returncode == 0, done.stderr
    isa, reason = done.stdout.strip().split("|", 1)
    return isa, reason


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, whose files a test may damage."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@needs_kernels
def test_loaded():
    assert _native.isa() in _native.supported_isas()
    assert _native.supported_isas()[-1] == "generic"
    assert _native.build_info().keys() == {"compiler", "flags", "torch"}


@needs_kernels
@pytest.mark.parametrize("isa", _native.ISAS)
def test_isa_is_chosen_and_agrees(isa, tmp_path):
    if isa not in _native.supported_isas():
        pytest.skip(f"this CPU has no {isa}")
    assert state(MVIT3_ISA=isa) == (isa, "None")
    results = {}
    for name in ("generic", isa):
        path = tmp_path / f"{name}.pt"
        done = python(RESULT.replace("PATH", repr(str(path))), MVIT3_ISA=name)
        assert done.returncode == 0, done.stderr
        results[name] = torch.load(path)
    torch.testing.assert_close(results[isa], results["generic"], rtol=2e-6, atol=2e-6)


SELECTED = (
    "models/test_bound.py",
    "inference/test_fuse.py::test_sizes",
    "ops/test_fuzz.py",
    "ops/test_edges_cpu.py",
    *(
        f"ops/test_batch_norm_act_cpu.py::test_{name}"
        for name in ("activation_range", "not_finite", "unaligned_memory", "constant_channels")
    ),
    *(
        f"ops/test_batch_norm_act_cpu.py::TestBatchNormActCpu::test_bound[{shape}-training-{option}-{dtype}]"
        for shape in ((1, 1, 3, 5), (1, 1, 17, 3), (3, 1, 1, 130), (1, 5, 3, 1023), (2, 41, 37, 48))
        for option in ("silu", "silu-residual")
        for dtype in DTYPES
    ),
)


@pytest.mark.parametrize("isa", _native.supported_isas()[1:])
def test_kernels_of_every_isa(isa):
    """The rest of the suite runs on the best instruction set: here whole networks, in training and fused, random calls
    of every op, and what is hard for vector code run on the others."""
    files = [str(Path(__file__).parent / selected) for selected in SELECTED]
    done = python(
        f"import pytest; raise SystemExit(pytest.main(['-q', '-p', 'no:cacheprovider', *{files}]))", MVIT3_ISA=isa
    )
    assert done.returncode == 0 and "passed" in done.stdout and "skipped" not in done.stdout, done.stdout + done.stderr


@needs_kernels
@pytest.mark.parametrize("isa", _native.ISAS)
def test_bfloat16_products_round_float32_weights_where_the_cpu_multiplies_bfloat16(isa):
    """As autocast does. 255 weights of 1 + 0.9 / 256 are 255 ones in bfloat16; their sum in float32, 255.9, would be
    stored as 256."""
    if isa not in _native.supported_isas():
        pytest.skip(f"this CPU has no {isa}")
    done = python(PRODUCT, MVIT3_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == (255 if isa == "avx512_bf16" else 256)


@needs_kernels
@pytest.mark.skipif(not SETUP.exists(), reason="no source tree")
def test_every_flag_of_a_variant_is_asked_of_the_cpu():
    """A variant runs only where the CPU has all that its compiler was allowed to use."""
    flags = dict(re.findall(r'ISA_FLAGS\["(\w+)"\] = \[(.*)\]', SETUP.read_text()))
    host = importlib.import_module("mvit3_kernels._host")
    variants = dict(host.isa_features())
    assert variants.keys() == {"generic", *flags} or os.environ.get("MVIT3_SANITIZE")
    for isa, needed in variants.items():
        assert set(re.findall(r'"-m(\w+)"', flags.get(isa, ""))) <= set(needed)
        assert isa == host.isas_of(needed)[0]
        for missing in needed:
            assert isa not in host.isas_of([name for name in needed if name != missing]), missing
    assert host.isas_of([]) == ["generic"]
    assert "f16c" in variants.get("avx2", ["f16c"])
    if sys.platform == "linux" and "flags" in (cpu := Path("/proc/cpuinfo").read_text()):
        known = set(
            re.search(r"^flags\s*: (.*)$", cpu, re.MULTILINE)[1].replace("_", "").replace("bmi1", "bmi").split()
        )
        assert set(host.cpu_features()) <= known


def test_bad_isa():
    done = python(STATE, MVIT3_ISA="sse9")
    assert done.returncode != 0
    assert (
        "ValueError: environment variable MVIT3_ISA must be one of generic, avx2, avx512, avx512_bf16, got 'sse9'"
        in done.stderr
    )


@needs_kernels
def test_isa_that_the_cpu_lacks(copy):
    """Played with a host module that knows only the generic instruction set."""
    for file in (copy / PACKAGE.name).glob("_host.*"):
        file.unlink()
    (copy / PACKAGE.name / "_host.py").write_text(
        "def supported_isas(): return ['generic']\ndef build_info(): return {}\n"
    )
    assert state(copy) == ("generic", "None")
    done = python(STATE, copy, MVIT3_ISA="avx2")
    assert done.returncode != 0
    assert "MVIT3_ISA=avx2: this CPU supports only generic" in done.stderr


@needs_kernels
def test_missing_variant_falls_back(copy):
    best = _native.supported_isas()[0]
    for file in (copy / PACKAGE.name).glob(f"_cpu_{best}.*"):
        file.unlink()
    assert state(copy)[0] == [*_native.supported_isas(), "None"][1]
    for file in (copy / PACKAGE.name).glob("_cpu_*"):
        file.unlink()
    isa, reason = state(copy)
    assert isa == "None" and reason.startswith("the extension was not built: no compiled file in")


@needs_kernels
def test_missing_extension(copy):
    for file in [*(copy / PACKAGE.name).glob("_cpu_*"), *(copy / PACKAGE.name).glob("_host.*")]:
        file.unlink()
    (copy / PACKAGE.name / "_build_failure.txt").write_text("no compiler\n")
    assert state(copy) == ("None", "the extension was not built: no compiler")
    done = python(RESULT.replace("PATH", "None"), copy)
    assert (
        "BackendError: batch_norm_act cannot run on backend 'cpu': the extension was not built: no compiler"
        in done.stderr
    )


@needs_kernels
def test_damaged_file(copy):
    for file in (copy / PACKAGE.name).glob("_cpu_*"):
        file.unlink()
        file.write_bytes(b"not a library")
    isa, reason = state(copy)
    assert isa == "None" and "does not load" in reason and "_cpu_" in reason


def test_interpreter_takes_the_place_of_the_kernels():
    assert state(TRITON_INTERPRET="1") == ("None", "TRITON_INTERPRET=1 runs the Triton kernels on CPU tensors instead")


def test_cuda_kernels_say_why_they_are_missing(copy):
    code = "import torch; from mvit3_kernels import _native; print(_native.cuda_why_not(torch.empty(0)))"
    for file in (copy / PACKAGE.name).glob("_cuda*"):
        file.unlink()
    assert "the CUDA extension was not built: no compiled file in" in python(code, copy).stdout
    (copy / PACKAGE.name / "_cuda_build_failure.txt").write_text("nvcc is neither in PATH nor under CUDA_HOME\n")
    assert (
        python(code, copy).stdout.strip()
        == "the CUDA extension was not built: nvcc is neither in PATH nor under CUDA_HOME"
    )
    (copy / PACKAGE.name / "_cuda.abi3.so").write_bytes(b"not a library")
    assert "_cuda.abi3.so does not load" in python(code, copy).stdout


@pytest.mark.skipif(_native.cuda_why_not() is not None, reason=str(_native.cuda_why_not()))
def test_cuda_kernels_load_without_a_gpu():
    assert _native.cuda_why_not(torch.empty(0)) == "x is on cpu"


COMPILERS = {
    "does not run": "#!/bin/sh\nexit 1\n",
    "Error compiling objects": """#!/bin/sh
[ "$1" = --version ] && echo fake 1.0 && exit 0
echo no header >&2
exit 1
""",
}


@pytest.mark.skipif(not SETUP.exists(), reason="no source tree")
@pytest.mark.skipif(sys.platform == "win32", reason="the fake compilers are shell scripts")
@pytest.mark.parametrize("expected", COMPILERS)
def test_build_without_a_compiler(expected, tmp_path):
    """The build ends well, says why, and leaves a package that works and repeats the reason."""
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(SETUP.with_name(name), tmp_path)
    for name in ("csrc", "mvit3_kernels", "python"):
        shutil.copytree(
            SETUP.with_name(name),
            tmp_path / name,
            ignore=shutil.ignore_patterns("*.so", "__pycache__", "*build_failure.txt"),
        )
    compiler = tmp_path / "fake"
    compiler.write_text(COMPILERS[expected])
    compiler.chmod(0o755)
    env = {**os.environ, "CC": str(compiler), "CXX": str(compiler), "MVIT3_CUDA": "0"}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "compiled CPU kernels were NOT built" in done.stdout and expected in done.stdout
    isa, reason = state(tmp_path)
    assert isa == "None" and reason.startswith("the extension was not built:") and expected in reason
    cause = (tmp_path / "mvit3_kernels" / "_cuda_build_failure.txt").read_text()
    assert cause == "MVIT3_CUDA=0 was set for the build\n" or expected in cause


@pytest.mark.skipif(not SETUP.exists(), reason="no source tree")
def test_build_that_must_be_loaded():
    """Without the extension every test of a CPU kernel is skipped: that must not look like success in CI or in `make
    sanitize`."""
    if os.environ.get("CI"):
        assert _native.why_not() is None, _native.why_not()
    if sanitized := os.environ.get("MVIT3_SANITIZE"):
        assert _native.isa() == sanitized and "sanitize" in _native.build_info()["flags"], _native.why_not()


@pytest.mark.skipif(_native.why_not() is not None, reason="the compiled kernels are not built")
def test_memory_is_kept_and_released():
    import mvit3_kernels
    from mvit3_kernels.ops import BatchNorm, batch_norm_act

    x, one = torch.randn(4, 64, 64, 64), torch.ones(64)
    run = lambda: batch_norm_act(x, BatchNorm(one, one, one, one, False))[0]  # noqa: E731
    first = run()
    held = run()
    address, want = first.data_ptr(), held.clone()
    del first
    again = run()
    assert again.data_ptr() == address  # the freed range serves the next tensor
    del again
    assert mvit3_kernels.release_memory() >= want.numel() * 4
    assert torch.equal(held, want)  # what is in use stays
    assert torch.equal(run(), want)
