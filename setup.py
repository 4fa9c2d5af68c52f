"""Builds the compiled extensions: the CPU kernels once per instruction set, a small host module that says which of them
to load, and the CUDA C++ kernels where nvcc is (whether torch is a CUDA build or not; MVIT3_CUDA=0 leaves them out).
All keep to Python's limited API and torch's stable ABI, so one wheel serves every Python from 3.10 and torch from 2.11.

Everything else about the package is in pyproject.toml. A machine that cannot compile still gets a working, pure-Python
install: the reason is printed and kept in the package, where `python -m mvit3_kernels.info` shows it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = "mvit3_kernels"
FAILURE_FILE = "_build_failure.txt"  # read by mvit3_kernels/_native.py, as is the next one
CUDA_FAILURE_FILE = "_cuda_build_failure.txt"

# NaN and infinity must come out as in PyTorch, so -ffast-math is out; these parts of it are safe.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wno-psabi",
]
# The oldest Python that a wheel serves, as csrc/host.cpp has it.
WHEEL_TAG = "cp310"
# The oldest torch whose stable ABI has all that the kernels use; the result loads in that version and all later ones.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
ISA_FLAGS = {"generic": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl"]
    ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
# MVIT3_VARIANTS: those of them that are built. A wheel has all; "native" is the one for this machine, in a quarter of
# the time.
VARIANTS = os.environ.get("MVIT3_VARIANTS", "all")
# MVIT3_SANITIZE=<ISA>: that variant alone, which checks its use of memory and for undefined behaviour while it runs
# (`make sanitize`).
LINK_FLAGS: list[str] = []
if sanitized := os.environ.get("MVIT3_SANITIZE"):
    LINK_FLAGS = ["-fsanitize=address,undefined"]
    FLAGS += ["-O1", "-g1", "-fno-omit-frame-pointer", *LINK_FLAGS, "-fno-sanitize-recover=all"]
    ISA_FLAGS = {sanitized: ISA_FLAGS[sanitized]}

# Code for sm_80 also runs on sm_86 and sm_89; later devices compile the PTX at first use.
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--cudart=static", "--threads=2"]
CUDA_CODE = [(80, "sm_80"), (90, "sm_90"), (90, "compute_90")]

NO_BUILD = None
try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths, library_paths
except Exception as error:  # torch's import may fail in many ways, all of them a reason to go on without the extension
    NO_BUILD = f"{type(error).__name__}: {error}"
    BuildExtension = build_ext


def hide_paths() -> list[str]:
    """Messages of the kernels name source files: they must not tell where the build was. No part of FLAGS, which the
    build says."""
    places = {Path.cwd(): "mvit3_kernels", **{Path(path).parent: "torch" for path in include_paths()[:1]}}
    return [f"-ffile-prefix-map={place}={name}" for place, name in places.items()]


def variants() -> list[str]:
    """The variants to build: all, those that MVIT3_VARIANTS names, or the best one for the CPU of this machine, whose
    features the compiler knows by the names of its flags."""
    if VARIANTS == "all":
        return list(ISA_FLAGS)
    if VARIANTS == "native":
        command = [*os.environ.get("CXX", "c++").split(), "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
        try:
            found = subprocess.run(command, capture_output=True, text=True).stdout
        except OSError:
            found = ""  # the build will say so
        has = set(re.findall(r"#define __(\w+?)__ 1$", found, re.MULTILINE))
        return [isa for isa, flags in ISA_FLAGS.items() if has >= {flag[2:].upper() for flag in flags}][-1:]
    names = VARIANTS.split(",")
    if unknown := [name for name in names if name not in ISA_FLAGS]:
        raise SystemExit(f"MVIT3_VARIANTS must be all, native or some of {','.join(ISA_FLAGS)}, got {unknown[0]!r}")
    return names


def compiler_version(command: list[str]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    first_line = (done.stdout or done.stderr or "no output").splitlines()[0]
    if done.returncode:
        raise RuntimeError(f"the C++ compiler {' '.join(command)!r} does not run: {first_line}")
    return first_line


def find_nvcc() -> str:
    if os.environ.get("MVIT3_CUDA") == "0":
        raise RuntimeError("MVIT3_CUDA=0 was set for the build")
    if sanitized:
        raise RuntimeError("MVIT3_SANITIZE builds the CPU kernels alone")
    if VARIANTS == "native" and not torch.cuda.is_available():
        raise RuntimeError("MVIT3_VARIANTS=native was set for the build, and this machine has no GPU")
    folders = [Path(home, "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    nvcc = next(filter(None, (shutil.which("nvcc", path=path) for path in (None, *folders))), None)
    if nvcc is None:
        raise RuntimeError("nvcc is neither in PATH nor under CUDA_HOME")
    return nvcc


class BuildOrExplain(BuildExtension):
    """Builds what can be built; a failure is printed and recorded, and does not fail the install."""

    def run(self) -> None:
        self.failures: list[str] = []
        self.cuda_failure: str | None = None
        editable = getattr(self, "editable_mode", False)
        if not sanitized:  # kept, so that a change compiles what it changes, and a wheel what no install had
            self.build_temp = str(Path("build", f"objects.{sysconfig.get_platform()}"))
        if self.inplace or editable:
            for old in Path(PACKAGE).glob("_*.so"):  # what is not built now would be loaded beside what is
                old.unlink()
        super().run()
        self.record(FAILURE_FILE, "CPU", "\n".join(self.failures))
        self.record(CUDA_FAILURE_FILE, "CUDA C++", self.cuda_failure)

    def build_extensions(self) -> None:
        try:
            if NO_BUILD is not None:
                raise RuntimeError(NO_BUILD)
            self.write_build_info()
            super().build_extensions()
        except Exception as error:
            self.failures.append(f"{type(error).__name__}: {error}")
            self.cuda_failure = self.cuda_failure or self.failures[-1]
            for extension in self.extensions:
                extension.optional = True  # setuptools then accepts that its file is missing

    def write_build_info(self) -> None:
        version = compiler_version(getattr(self.compiler, "compiler_so_cxx", ["c++"])[:1])
        facts = {"COMPILER": version, "FLAGS": " ".join(FLAGS), "TORCH": torch.__version__}
        lines = [f'#define MVIT3_{name} "{value}"\n' for name, value in facts.items()]
        # Best first. "generic" is always there: without the file of a variant the next one is loaded.
        features = {
            "generic": [],
            **{isa: [flag.removeprefix("-m") for flag in flags] for isa, flags in ISA_FLAGS.items()},
        }
        isas = ", ".join(
            f"{{{json.dumps(isa)}, {{{json.dumps(names)[1:-1]}}}}}" for isa, names in reversed(features.items())
        )
        lines.append(f"#define MVIT3_ISAS {{{isas}}}\n")
        header = Path(self.build_temp) / "build_info.h"
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text("".join(lines))
        for extension in self.extensions:
            extension.include_dirs.append(str(header.parent.resolve()))

    def build_extension(self, extension: Extension) -> None:
        cuda = extension.name == f"{PACKAGE}._cuda"
        # A folder each: variants are made of the same sources, and what is there already is not compiled again.
        folder, self.build_temp = self.build_temp, str(Path(self.build_temp, extension.name.rpartition(".")[2]))
        try:
            if cuda:
                self.build_cuda(extension)
            else:
                super().build_extension(extension)
        except Exception as error:
            if cuda:
                self.cuda_failure = str(error)
            else:
                self.failures.append(f"{extension.name}: {error}")
            extension.optional = True
        finally:
            self.build_temp = folder

    def build_cuda(self, extension: Extension) -> None:
        """By nvcc itself, bindings and linking too: BuildExtension wants torch to be a CUDA build of nvcc's version,
        the kernels do not."""
        target = Path(self.get_ext_fullpath(extension.name))
        target.unlink(missing_ok=True)  # what cannot be built must not leave an old one
        units = [*extension.sources, *(file for file in extension.depends if file.endswith(".cu"))]
        nvcc, folder = find_nvcc(), Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX", "").split()
        common = [nvcc, *CUDA_FLAGS, *(["-ccbin", compiler[0]] if len(compiler) == 1 else [])]
        code = [part for number, name in CUDA_CODE for part in ("-gencode", f"arch=compute_{number},code={name}")]
        headers = [file for file in extension.depends if file.endswith(".h")]
        objects = [str(folder / f"{Path(source).name}.o") for source in units]
        for source, made in zip(units, objects, strict=True):
            if is_newer(Path(made), [source, *headers]):
                continue
            options = code if source.endswith(".cu") else [*STABLE_ABI, *(f"-I{path}" for path in include_paths())]
            options = [*options, *(f"-Xcompiler={flag}" for flag in hide_paths())]
            run_nvcc([*common, *options, "-c", source, "-o", made])
        libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
        run_nvcc([*common, "-shared", "--no-device-link", *objects, *libraries, "-o", str(target)])

    def record(self, name: str, kind: str, reason: str | None) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        file = (Path(__file__).parent if in_place else Path(self.build_lib)) / PACKAGE / name
        file.unlink(missing_ok=True)
        if reason:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(reason + "\n")
            print(
                f"\n{PACKAGE}: compiled {kind} kernels were NOT built, what else there is runs instead.\nReason: "
                f"{reason}\n",
                flush=True,
            )


def is_newer(target: Path, inputs: list[str]) -> bool:
    """Whether a file is there, made after its inputs and this file changed."""
    return target.exists() and all(Path(i).stat().st_mtime < target.stat().st_mtime for i in (__file__, *inputs))


def run_nvcc(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed: {(done.stderr or done.stdout).strip()[-2000:]}")


def extensions() -> list[Extension]:
    sources = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
    shared = sorted(str(path) for path in Path("csrc").glob("*.h"))
    headers = [*shared, *sorted(str(path) for path in Path("csrc/cpu").glob("*.h"))]
    cpu = [
        CppExtension(
            f"{PACKAGE}._cpu_{isa}",
            sources,
            depends=headers,
            extra_compile_args=FLAGS + STABLE_ABI + ISA_FLAGS[isa] + hide_paths(),
            extra_link_args=LINK_FLAGS,
            py_limited_api=True,
        )
        for isa in variants()
    ]
    host = Extension(
        f"{PACKAGE}._host",
        ["csrc/host.cpp"],
        depends=[__file__],
        extra_compile_args=FLAGS,
        extra_link_args=LINK_FLAGS,
        language="c++",
        py_limited_api=True,
    )
    cuda = Extension(
        f"{PACKAGE}._cuda",
        sorted(str(path) for path in Path("csrc/cuda").glob("*.cpp")),
        # With a .cu among the sources BuildExtension would refuse to build anything unless nvcc's version is that of
        # torch.
        depends=[*shared, *sorted(str(p) for pattern in ("*.cu", "*.h") for p in Path("csrc/cuda").glob(pattern))],
        py_limited_api=True,
    )
    return [host, *cpu, cuda]


setup(
    # A list that is never empty: a pure-Python install made by this file still passes through build_ext, which records
    # the reason.
    ext_modules=extensions() if NO_BUILD is None else [Extension(f"{PACKAGE}._host", ["csrc/host.cpp"])],
    cmdclass={"build_ext": BuildOrExplain},
    options={"bdist_wheel": {"py_limited_api": WHEEL_TAG}},
)
