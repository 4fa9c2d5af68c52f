"""Builds the compiled extension: the CPU kernels once per instruction set, and a small host module that says which of them to load.

Everything else about the package is in pyproject.toml. A machine that cannot compile still gets a working, pure-Python install: the
reason is printed and kept in the package, where `python -m mvit3_kernels.info` shows it.
"""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = "mvit3_kernels"
FAILURE_FILE = "_build_failure.txt"  # read by mvit3_kernels/_native.py

# NaN and infinity must come out as in PyTorch, so -ffast-math is out; these parts of it are safe.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]
# The oldest torch whose stable ABI has all that the kernels use; the result loads in that version and all later ones.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
ISA_FLAGS = {"generic": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl"]
    ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
# MVIT3_SANITIZE=<ISA>: that variant alone, which checks its use of memory and for undefined behaviour while it runs (`make sanitize`).
LINK_FLAGS: list[str] = []
if sanitized := os.environ.get("MVIT3_SANITIZE"):
    LINK_FLAGS = ["-fsanitize=address,undefined"]
    FLAGS += ["-O1", "-g1", "-fno-omit-frame-pointer", *LINK_FLAGS, "-fno-sanitize-recover=all"]
    ISA_FLAGS = {sanitized: ISA_FLAGS[sanitized]}

NO_BUILD = None
try:
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except Exception as error:  # torch's import may fail in many ways, all of them a reason to go on without the extension
    NO_BUILD = f"{type(error).__name__}: {error}"
    BuildExtension = build_ext


def compiler_version(command: list[str]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    first_line = (done.stdout or done.stderr or "no output").splitlines()[0]
    if done.returncode:
        raise RuntimeError(f"the C++ compiler {' '.join(command)!r} does not run: {first_line}")
    return first_line


class BuildOrExplain(BuildExtension):
    """Builds what can be built; a failure is printed and recorded, and does not fail the install."""

    def run(self) -> None:
        self.failures: list[str] = []
        super().run()
        self.record()

    def build_extensions(self) -> None:
        try:
            if NO_BUILD is not None:
                raise RuntimeError(NO_BUILD)
            self.write_build_info()
            super().build_extensions()
        except Exception as error:
            self.failures.append(f"{type(error).__name__}: {error}")
            for extension in self.extensions:
                extension.optional = True  # setuptools then accepts that its file is missing

    def write_build_info(self) -> None:
        version = compiler_version(getattr(self.compiler, "compiler_so_cxx", ["c++"])[:1])
        facts = {"COMPILER": version, "FLAGS": " ".join(FLAGS), "TORCH": torch.__version__}
        header = Path(self.build_temp) / "build_info.h"
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text("".join(f'#define MVIT3_{name} "{value}"\n' for name, value in facts.items()))
        for extension in self.extensions:
            extension.include_dirs.append(str(header.parent.resolve()))

    def build_extension(self, extension: Extension) -> None:
        try:
            super().build_extension(extension)
        except Exception as error:
            self.failures.append(f"{extension.name}: {error}")
            extension.optional = True

    def record(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        file = (Path(__file__).parent if in_place else Path(self.build_lib)) / PACKAGE / FAILURE_FILE
        file.unlink(missing_ok=True)
        if self.failures:
            reason = "\n".join(self.failures)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(reason + "\n")
            print(
                f"\n{PACKAGE}: compiled CPU kernels were NOT built, the pure-Python reference runs instead.\nReason: {reason}\n", flush=True
            )


def extensions() -> list[Extension]:
    sources = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
    headers = sorted(str(path) for path in Path("csrc/cpu").glob("*.h"))
    variants = [
        CppExtension(
            f"{PACKAGE}._cpu_{isa}",
            sources,
            depends=headers,
            extra_compile_args=FLAGS + STABLE_ABI + flags,
            extra_link_args=LINK_FLAGS,
            py_limited_api=True,
        )
        for isa, flags in ISA_FLAGS.items()
    ]
    host = Extension(
        f"{PACKAGE}._host",
        ["csrc/host.cpp"],
        include_dirs=[pybind11.get_include()],
        extra_compile_args=FLAGS,
        extra_link_args=LINK_FLAGS,
        language="c++",
    )
    return [host, *variants]


setup(
    # A list that is never empty: a pure-Python install made by this file still passes through build_ext, which records the reason.
    ext_modules=extensions() if NO_BUILD is None else [Extension(f"{PACKAGE}._host", ["csrc/host.cpp"])],
    cmdclass={"build_ext": BuildOrExplain},
)
