"""The check of wheels finds what is wrong with one."""

from __future__ import annotations

import zipfile

import pytest

from .check import KERNELS, faults, main

GOOD = [f"mvit3_kernels/{name}.abi3.so" for name in ("_host", *(f"_cpu_{isa}" for isa in KERNELS["x86_64"]))]


def wheel(folder, files, name="mvit3_kernels-0.1.0-cp310-abi3-linux_x86_64.whl"):
    with zipfile.ZipFile(folder / name, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return folder / name


def test_a_good_wheel(tmp_path):
    assert faults(wheel(tmp_path, dict.fromkeys(GOOD, b"\x7fELF csrc/cpu/gemm.cpp /lib64/ld-linux.so"))) == []


@pytest.mark.parametrize(("change", "name", "fault"), [
    ({"mvit3_kernels/_host.abi3.so": b"\0/home/me/mvit3/csrc/host.cpp\0"}, None, "/home/me/mvit3/csrc/host.cpp"),
    ({"mvit3_kernels/_build_failure.txt": b"no compiler"}, None, "says that a build failed"),
    ({"mvit3_kernels/_host.abi3.so": None}, None, "_host.abi3.so is not in it"),
    ({}, "mvit3_kernels-0.1.0-cp311-cp311-linux_x86_64.whl", "not that of a wheel for every Python"),
    ({"mvit3_kernels/big": bytes(13 * 2**20)}, None, "13.0 MB"),
])  # fmt: skip
def test_faults(tmp_path, change, name, fault):
    files = {k: v for k, v in {**dict.fromkeys(GOOD, b"\x7fELF"), **change}.items() if v is not None}
    assert any(fault in line for line in faults(wheel(tmp_path, files, *([name] if name else []))))


def test_without_a_wheel(capsys):
    assert main([]) == 2 and "which wheels?" in capsys.readouterr().err
