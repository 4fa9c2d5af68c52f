"""Builds the CUDA C++ kernels for the host, on the launch emulation, and calls their launchers on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mvit3_kernels import _native

FOLDER = Path(__file__).parent
SOURCES = FOLDER.parents[1] / "csrc" / "cuda"
FLAGS = ["-std=c++17", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas", f"-I{FOLDER}"]
SANITIZED = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


class Call(ctypes.Structure):
    """`Call` of emulated.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "height", "width", "inputs", "expanded", "outputs", "stride", "dilation", "act")
        ),
        *((name, ctypes.c_int32) for name in ("bfloat16", "single", "processors", "backwards", "runs")),
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "expand", "depthwise", "project", "scale", "shift", "z", "moments", "counts")
        ),
        ("parts", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("norms", "y", "dp", "part")),
        ("parts_of_sums", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in ("mean", "covariance", "dx", "gradient", "scaled", "correction", "dexpand", "dfirst_weight")
        ),
        *((name, ctypes.c_void_p) for name in ("dfirst_bias", "dtaps", "dmiddle_weight", "dmiddle_bias", "dproject")),
    )


class DepthwiseCall(ctypes.Structure):
    """`DepthwiseCall` of emulated.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "channels", "stride", "dilation")),
        *((name, ctypes.c_int32) for name in ("type", "single", "processors", "backwards")),
        *((name, ctypes.c_void_p) for name in ("x", "dz", "weight", "z", "dx", "moments", "counts")),
        ("parts", ctypes.c_int64),
        ("dweight", ctypes.c_void_p),
    )


def compiler() -> list[str] | None:
    command = shlex.split(os.environ.get("CXX", "g++"))
    return command if shutil.which(command[0]) else None


@functools.cache
def library(sanitized: bool = False) -> ctypes.CDLL:
    """The kernels for this machine, built once for each state of the sources."""
    files = sorted([*SOURCES.iterdir(), *SOURCES.parent.glob("*.h"), *FOLDER.glob("*.h"), *FOLDER.glob("*.cpp")])
    options = [*FLAGS, *(SANITIZED if sanitized else ["-O2"])]
    state = hashlib.sha256(b"".join(file.read_bytes() for file in files) + " ".join(options).encode()).hexdigest()[:16]
    built = FOLDER.parents[1] / "build" / "emulated" / f"{state}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        unfinished = built.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [*compiler(), *options, str(FOLDER / "emulated.cpp"), "-o", str(unfinished)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        unfinished.rename(built)
    return ctypes.CDLL(str(built))


def joined(moments: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Mean and biased variance from those of parts: means and sums of squared differences (2, parts, channels), and
    numbers of values (parts,)."""
    (means, squares), counts = moments.double(), counts.double()[:, None]
    mean = (means * counts).sum(0) / counts.sum()
    var = (squares + counts * (means - mean).square()).sum(0) / counts.sum()
    return {"mean": mean.float(), "var": var.float()}


def call(name: str, *, processors: int = 3, backwards: bool = False, runs: bool = True, **values: Tensor | int) -> None:
    """runs: whether the device copies whole runs of bytes, as from sm_90 on."""
    weight = values["expand"]
    run(
        Call,
        name,
        values,
        weight,
        bfloat16=values["x"].dtype is torch.bfloat16,
        processors=processors,
        backwards=backwards,
        runs=runs,
    )


def call_depthwise(name: str, *, processors: int = 3, backwards: bool = False, **values: Tensor | int) -> None:
    number = (torch.float32, torch.bfloat16, torch.float16).index(values["x"].dtype)
    run(DepthwiseCall, name, values, values["weight"], type=number, processors=processors, backwards=backwards)


def run(
    layout: type[ctypes.Structure], name: str, values: dict[str, Tensor | int], weight: Tensor, **options: int
) -> None:
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    assert all(t.is_contiguous() and t.device.type == "cpu" for t in tensors.values())
    arguments = {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in values.items()}
    function = getattr(library("libasan" in os.environ.get("LD_PRELOAD", "")), name)
    function.restype = None
    function(ctypes.byref(layout(**arguments, **options, single=weight.dtype is torch.float32)))


def run_sanitized(code: str) -> None:
    """Runs a program in the repository under GCC's address and undefined-behaviour sanitizers."""
    paths = [subprocess.run([*compiler(), f"-print-file-name={n}"], capture_output=True, text=True).stdout.strip()
             for n in ("libasan.so", "libstdc++.so")]  # fmt: skip
    if not all(os.path.isabs(path) for path in paths):
        pytest.skip("the compiler has no sanitizers")
    root = FOLDER.parents[1]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0",
        "MVIT3_BACKEND": "",
        "OMP_NUM_THREADS": "1",
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    code = f"{code}\nprint('checked')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "checked" in done.stdout, done.stdout + done.stderr


def resources(part: str = "") -> list[tuple[str, int, int]]:
    """Name, registers and bytes of stack of the kernels of the built extension, for every device that it holds code
    for: sm_80, sm_90."""
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = next(Path(_native.__file__).parent.glob("_cuda.*"))
    text = subprocess.run([cuobjdump, "-res-usage", file], check=True, capture_output=True, text=True).stdout
    assert set(re.findall(r"arch = sm_(\d+)", text)) == {"80", "90"}
    found = re.findall(r"Function (\w+):\s*REG:(\d+) STACK:(\d+)", text)
    return [(name, int(registers), int(stack)) for name, registers, stack in found if part in name]
