"""The kernels of every op under NVIDIA's compute-sanitizer, on each op's smallest case: no access out of bounds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin")))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["test_kernels_gpu.py", "test_batch_norm_act_gpu.py"])
def test_memcheck(file):
    """In a process of its own; without PyTorch's caching allocator, whose blocks are larger than the tensors in
    them."""
    tool = sanitizer()
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [
        tool,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "99",
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [*command, str(ROOT / "tests" / "gpu" / file), "-k", "test_small_batches or test_strided_map"],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
