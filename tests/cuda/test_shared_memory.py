"""The limit of a kernel's shared memory, which belongs to no thread."""

import subprocess

import pytest

from .emulation import FOLDER, SOURCES, compiler

COMPILER = compiler()


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_limit_only_grows(tmp_path):
    program = str(tmp_path / "shared_memory")
    flags = ["-std=c++17", "-Wall", "-Werror", "-pthread", f"-I{SOURCES}"]
    subprocess.run([*COMPILER, *flags, str(FOLDER / "shared_memory.cpp"), "-o", program], check=True)
    subprocess.run([program], check=True, timeout=60)
