"""What this installation can run, and why it cannot run the rest: `python -m mvit3_kernels.info [--json]`."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Sequence

import torch

from . import __version__, _native
from .ops import dispatch


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, object]:
    reason = dispatch.cpu_why_not(torch.empty(0))
    return {
        "available": reason is None,
        "reason": reason,
        "instruction_set": _native.isa(),
        "supported_instruction_sets": _native.supported_isas(),
        "matrix_registers": _native.amx(),
        "threads": torch.get_num_threads(),
        "build": _native.build_info(),
    }


def _triton() -> dict[str, object]:
    device, reason = None, None
    if dispatch.INTERPRETED:
        device, reason = "cpu, interpreted (TRITON_INTERPRET=1)", dispatch.triton_why_not(torch.empty(0))
    elif not dispatch.HAS_TRITON:
        reason = "triton is not installed"
    elif torch.cuda.is_available():
        device, reason = torch.cuda.get_device_name(), dispatch.triton_why_not(torch.empty(0, device="cuda"))
    elif torch.version.cuda is None and torch.version.hip is None:
        reason = f"torch {torch.__version__} is built without GPU support"
    else:
        reason = "torch sees no GPU (torch.cuda.is_available() is False)"
    return {"available": reason is None, "reason": reason, "device": device}


def _cuda() -> dict[str, object]:
    device, reason = None, _native.cuda_why_not()
    if reason is None and not torch.cuda.is_available():
        reason = "they are built, but torch sees no GPU (torch.cuda.is_available() is False)"
    elif reason is None:
        device, reason = torch.cuda.get_device_name(), _native.cuda_why_not(torch.empty(0, device="cuda"))
    return {"available": reason is None, "reason": reason, "device": device}


def collect() -> dict[str, dict]:
    """Versions and, for each backend, whether it is available, its particulars, and the reason where it is not."""
    return {
        "versions": {
            "mvit3_kernels": __version__,
            "torch": torch.__version__,
            "triton": _installed("triton"),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "backends": {
            "reference": {"available": True, "reason": None},
            "cpu": _cpu(),
            "triton": _triton(),
            "cuda": _cuda(),
        },
        "forced_backend": {"name": dispatch.forced_backend()},
    }


def _particulars(name: str, backend: dict) -> str:
    if not backend["available"]:
        return f"no: {backend['reason']}"
    if name == "reference":
        return "yes: plain PyTorch, any device"
    if name == "cpu":
        build = backend["build"]
        return (
            f"yes: {backend['instruction_set']} (this CPU can: {', '.join(backend['supported_instruction_sets'])}), "
            f"{'bfloat16 in matrix registers (AMX), ' * backend['matrix_registers']}"
            f"{backend['threads']} threads; built with {build['compiler']}, torch {build['torch']}"
        )
    return f"yes: {backend['device']}"


def report() -> str:
    """`collect()` as text."""
    found = collect()
    lines = [f"{name:<14} {version or 'not installed'}" for name, version in found["versions"].items()]
    lines += ["", "Backends"]
    lines += [f"  {name:<12} {_particulars(name, backend)}" for name, backend in found["backends"].items()]
    forced = found["forced_backend"]["name"]
    lines.append(f"  forced       {forced or 'none: the best that can take a call'}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mvit3_kernels.info", description="What this installation can run.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    print(json.dumps(collect(), indent=2) if parser.parse_args(arguments).json else report())


if __name__ == "__main__":
    main()
