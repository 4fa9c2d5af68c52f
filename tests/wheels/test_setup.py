"""What setup.py would build, and what a source distribution has: told without compiling."""

from __future__ import annotations

import os
import platform
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no source tree")


@pytest.fixture
def built(monkeypatch):
    """The names of the extensions, with `machine` and variables of the environment."""

    def names(machine: str = "x86_64", **environment: str) -> set[str]:
        told = {}
        for name in ("MVIT3_VARIANTS", "MVIT3_SANITIZE", "CXX"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(setuptools, "setup", lambda **options: told.update(options))
        runpy.run_path("setup.py")
        return {extension.name.removeprefix("mvit3_kernels._") for extension in told["ext_modules"]}

    return names


X86 = {"cpu_generic", "cpu_avx2", "cpu_avx512", "cpu_avx512_bf16"}


@pytest.mark.parametrize(("machine", "variants"), [
    ("x86_64", X86), ("AMD64", X86), ("aarch64", {"cpu_generic"}), ("arm64", {"cpu_generic"}),
])  # fmt: skip
def test_variants_of_an_architecture(built, machine, variants):
    assert built(machine) == {"host", "cuda", *variants}


def test_variants_that_are_named(built):
    assert built(MVIT3_VARIANTS="avx2,generic") == {"host", "cuda", "cpu_generic", "cpu_avx2"}
    assert built(MVIT3_SANITIZE="avx512") == {"host", "cuda", "cpu_avx512"}
    for names, machine in (("avx2,sse9", "x86_64"), ("avx2", "aarch64")):
        with pytest.raises(SystemExit, match=r"MVIT3_VARIANTS must be all, native or some of generic.*, got '"):
            built(machine, MVIT3_VARIANTS=names)


BASE = ("__x86_64__", "__SSE2__")
AVX2 = (*BASE, "__AVX2__", "__FMA__", "__F16C__", "__BMI__", "__BMI2__")
AVX512 = (*AVX2, *(f"__AVX512{part}__" for part in ("F", "BW", "CD", "DQ", "VL")))


@pytest.mark.parametrize(("macros", "variant"), [
    (BASE, "generic"),
    (AVX2, "avx2"),
    (tuple(name for name in AVX2 if name != "__F16C__"), "generic"),
    (AVX512, "avx512"),
    ((*AVX512, "__AVX512BF16__"), "avx512_bf16"),
    ((*AVX2, "__AVX512BF16__"), "avx2"),
])  # fmt: skip
def test_native_is_what_the_compiler_knows_of_the_cpu(built, tmp_path, macros, variant):
    compiler = tmp_path / "compiler"
    lines = "\n".join(f"#define {name} 1" for name in macros)
    compiler.write_text(f"#!/bin/sh\ncase \"$*\" in *-march=native*) echo '{lines}';; esac\n")
    compiler.chmod(0o755)
    assert built(MVIT3_VARIANTS="native", CXX=str(compiler)) == {"host", "cuda", f"cpu_{variant}"}


def test_native_without_a_compiler_is_left_to_the_build(built):
    assert built(MVIT3_VARIANTS="native", CXX="no-such-compiler") == {"host", "cuda", "cpu_generic"}


# Not in a source distribution: what is of use in a repository alone.
LEFT_OUT = (".github/", ".gitignore")


def test_source_distribution_has_what_the_repository_has(tmp_path):
    """Enough to build, to read and to test; and nothing that was built."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a repository: its list of files is what this compares with")
    made_in = ["egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    command = [sys.executable, "setup.py", "--quiet", *made_in]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "MVIT3_CUDA": "0"})
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        found = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {"PKG-INFO", "setup.cfg", *(name for name in found if name.startswith("mvit3_kernels.egg-info/"))}
    wanted = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert found - made == {name for name in wanted if not name.startswith(LEFT_OUT)}
