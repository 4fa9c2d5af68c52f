"""The compiled extension: finds it, loads the variant for this CPU, and keeps the reason where that fails."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import torch

ISAS = ("generic", "avx2", "avx512", "avx512_bf16")
ENVIRONMENT = "MVIT3_ISA"
_FOLDER = Path(__file__).parent
_FAILURE_FILE = _FOLDER / "_build_failure.txt"  # written by setup.py where it could not compile, as is the next one
_CUDA_FAILURE_FILE = _FOLDER / "_cuda_build_failure.txt"

_isa: str | None = None
_reason: str | None = None
_build: dict[str, str] = {}
_supported: list[str] = []
_cuda_reason: str | None = None


def why_not() -> str | None:
    """None when the compiled CPU kernels are loaded, else the reason."""
    return _reason


def cuda_why_not(x: torch.Tensor | None = None) -> str | None:
    """None when the compiled CUDA C++ kernels are loaded and can run on the device of `x`, else the reason; without x,
    whether they are loaded."""
    if _cuda_reason is not None or x is None:
        return _cuda_reason
    if not x.is_cuda:
        return f"x is on {x.device}"
    return _device_why_not(x.device.index)


@torch.compiler.assume_constant_result  # torch.compile asks while it traces, and the driver is not in its graph
def _device_why_not(index: int) -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA"
    if torch.cuda.get_device_capability(index) < (8, 0):
        return f"{torch.cuda.get_device_name(index)} has compute capability below 8.0"
    return None


def isa() -> str | None:
    """The instruction set of the loaded kernels: "avx512_bf16", "avx512", "avx2" or "generic"; None when none are
    loaded."""
    return _isa


def amx() -> bool:
    """Whether products of bfloat16 run in the CPU's matrix registers (AMX)."""
    return _reason is None and torch.ops.mvit3.amx() == "registers"


def prefers_bfloat16() -> bool:
    """Whether products of bfloat16 are faster here than those of float32."""
    return _reason is None and torch.ops.mvit3.prefers_bfloat16()


def release_memory() -> int:
    """Gives memory that the CPU kernels keep for their next tensors, and fused networks for their next calls, back to
    the system, unless a tensor or a call uses it now. Returns its bytes. Any thread may call it at any time."""
    return torch.ops.mvit3.release_memory() if _reason is None else 0


def build_info() -> dict[str, str]:
    """Compiler, flags and torch version that the extension was built with; empty when there is no extension."""
    return dict(_build)


def supported_isas() -> list[str]:
    """The instruction sets that this CPU supports, best first; empty when there is no extension to ask."""
    return list(_supported)


def _not_built(failure: Path = _FAILURE_FILE, what: str = "the extension") -> str:
    cause = failure.read_text().strip() if failure.exists() else f"no compiled file in {_FOLDER}"
    return f"{what} was not built: {cause}"


def _variant(name: str) -> Path | None:
    return next(_FOLDER.glob(f"_cpu_{name}.*"), None)


def _choose(supported: list[str]) -> str:
    """The variant to load: the one that MVIT3_ISA names, else the best that is built and that this CPU supports."""
    wanted = os.environ.get(ENVIRONMENT)
    if not wanted:
        return next((name for name in supported if _variant(name)), supported[0])
    if wanted not in supported:
        raise RuntimeError(
            f"environment variable {ENVIRONMENT}={wanted}: this CPU supports only {', '.join(supported)}"
        )
    return wanted


def _load() -> None:
    global _isa, _reason, _build, _supported
    wanted = os.environ.get(ENVIRONMENT)
    if wanted and wanted not in ISAS:
        raise ValueError(f"environment variable {ENVIRONMENT} must be one of {', '.join(ISAS)}, got {wanted!r}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        _reason = "TRITON_INTERPRET=1 runs the Triton kernels on CPU tensors instead"
        return
    try:
        _host = importlib.import_module(f"{__package__}._host")
    except ModuleNotFoundError:
        built = [file.name for file in _FOLDER.glob("_host.*")]
        _reason = f"the extension was built for another Python: {', '.join(built)}" if built else _not_built()
        return
    except ImportError as error:
        _reason = f"the extension's host module does not load: {error}"
        return
    _build, _supported = _host.build_info(), _host.supported_isas()
    name = _choose(_supported)
    file = _variant(name)
    if file is None:
        _reason = _not_built()
        return
    try:
        torch.ops.load_library(str(file))
    except (OSError, RuntimeError) as error:
        _reason = f"{file.name} does not load: {error}"
        return
    _isa = name


def _load_cuda() -> None:
    global _cuda_reason
    file = next(_FOLDER.glob("_cuda.*"), None)
    if file is None:
        _cuda_reason = _not_built(_CUDA_FAILURE_FILE, "the CUDA extension")
        return
    try:
        torch.ops.load_library(str(file))
    except (OSError, RuntimeError) as error:
        _cuda_reason = f"{file.name} does not load: {error}"


_load()
_load_cuda()
