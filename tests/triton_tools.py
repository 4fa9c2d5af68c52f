"""Tools for testing Triton kernels where there is no GPU: the interpreter, and compilation for a GPU that is not
there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

SHARED_MEMORY_LIMITS = {80: 166912, 86: 101376, 90: 232448}  # bytes that one block may use, by compute capability
ROOT = Path(__file__).resolve().parent.parent


def run_interpreted(module: str) -> None:
    """Runs a test module with Triton's interpreter, in a process of its own: TRITON_INTERPRET is read when a kernel is
    defined.

    Name the module without the prefix `test_`, so that pytest does not collect it by itself.
    """
    import numpy
    import pytest
    import triton

    if triton.__version__.startswith("3.6.") and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip(
            f"the interpreter of triton {triton.__version__} cannot run a loop with numpy {numpy.__version__}, "
            "only below 2.4"
        )
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(ROOT / "tests" / module)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise AssertionError(f"{module} failed under the interpreter:\n{result.stdout[-8000:]}{result.stderr[-2000:]}")


def patch_once_a_launch() -> None:
    """From here on the functions that an interpreted kernel calls find triton.language as its launch patched it. Each
    would patch it again, and search some hundred names for that: two fifths of the time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()  # of the modules that a function may know the language by

    def patch_new(fn):
        known = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if known <= patched:
            return interpreter._LangPatchScope()  # nothing to restore
        patched.update(known)
        return patch(fn)

    def fresh(self, *args, **options):
        patched.clear()
        return launch(self, *args, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_new, fresh


def compute_like_a_gpu() -> None:
    """From here on the interpreter rounds float32 to the nearest bfloat16, as a GPU does, where by itself it cuts
    digits off; and it multiplies matrices of bfloat16 by value, where by itself it multiplies their bits."""
    import numpy
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert, multiply = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def by_value(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *more: multiply(
        self, by_value(a), by_value(b), *more
    )

    def rounding(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        return (
            torch.from_numpy(numpy.array(data, numpy.float32)).bfloat16().view(torch.int16).numpy().view(numpy.uint16)
        )

    interpreter._convert_float = rounding
    patch_once_a_launch()


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on the GPU. stack: bytes per thread; above 0 the kernel spills registers to memory. shared:
    bytes per block."""

    registers: int
    stack: int
    shared: int
    # Widest global load, in bits per thread.
    load_bits: int


class Compiled(list):
    """Kernels, in the order of their launches, and the grid of each."""

    def __init__(self) -> None:
        super().__init__()
        self.grids: list[tuple[int, ...]] = []


@contextmanager
def offline(architecture: int | str, compiling: bool = True) -> Iterator[Compiled]:
    """Inside, a launch compiles its kernel for a GPU that need not be there, and adds it to the list, instead of
    running it, or notes its grid alone: 90 is NVIDIA sm_90, "gfx942" an AMD GPU. So a launcher may be called on meta
    tensors."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import KernelInterface, MockTensor

    nvidia = isinstance(architecture, int)
    target = GPUTarget("cuda", architecture, 32) if nvidia else GPUTarget("hip", architecture, 64)
    stub = SimpleNamespace(
        get_current_target=lambda: target,
        # the key of the kernel cache: never that of a real device
        get_current_device=lambda: f"offline {architecture}",
        get_current_stream=lambda device: 0,
    )
    compiled = Compiled()

    def described(arg):
        if isinstance(arg, tuple):
            return tuple(described(part) for part in arg)
        return MockTensor(arg.dtype) if isinstance(arg, torch.Tensor) else arg

    def compile_only(kernel, grid):
        def launch(*args, **options):
            compiled.grids.append(tuple(grid))
            if compiling:
                compiled.append(kernel.warmup(*described(args), grid=(1,), **options))

        return launch

    previous, launch = driver._active, KernelInterface.__getitem__  # not driver.active, which looks for a GPU
    driver.set_active(stub)
    KernelInterface.__getitem__ = compile_only
    try:
        yield compiled
    finally:
        KernelInterface.__getitem__ = launch
        driver.set_active(previous)


def resources(kernel) -> Resources:
    """Reads the resources off a kernel compiled for NVIDIA."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
    loads = [
        int(n or 1) * int(bits) for n, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
    ]
    copies = [
        8 * int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], *(\w+)", kernel.asm["ptx"])
    ]
    return Resources(registers, stack, kernel.metadata.shared, max(loads + copies, default=0))
