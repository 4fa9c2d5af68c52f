"""What a wheel must be before anyone gets it: `python -m tests.wheels.check dist/*.whl` (`make wheel`).

One tag for all Pythons, every variant inside, below 12 MB, no path of the machine that built it; and what auditwheel
and abi3audit say, where they are installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

MOST_BYTES = 12 * 2**20
TAG = re.compile(r"-cp310-abi3-(linux|manylinux\w*|macosx\w*)_(x86_64|aarch64|arm64)\.whl$")
# Places of a machine in a compiled file: a home, a checkout, an environment, a folder of temporary files.
PLACES = re.compile(rb"/(?:home|root|work|tmp|build|project|opt|Users|var)/[\w./+-]{3,}")
# What a wheel for x86-64 must have; others have the generic kernels alone.
KERNELS = {"x86_64": ("generic", "avx2", "avx512", "avx512_bf16")}


def places(content: bytes) -> list[str]:
    """Paths of the building machine in a file."""
    return sorted({found.decode() for found in PLACES.findall(content)})


def faults(wheel: Path) -> list[str]:
    """What is wrong with a wheel, a line each."""
    found, tag = [], TAG.search(wheel.name)
    if tag is None:
        found.append("its name is not that of a wheel for every Python from 3.10 on, cp310-abi3")
    if wheel.stat().st_size > MOST_BYTES:
        found.append(f"it has {wheel.stat().st_size / 2**20:.1f} MB, more than {MOST_BYTES / 2**20:.0f}")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        wanted = ["_host", *(f"_cpu_{isa}" for isa in KERNELS.get(tag[2] if tag else "", ("generic",)))]
        missing = [name for name in wanted if f"mvit3_kernels/{name}.abi3.so" not in names]
        found += [f"{name}.abi3.so is not in it" for name in missing]
        found += [f"{name} says that a build failed" for name in names if name.endswith("/_build_failure.txt")]
        for name in names:
            if told := places(archive.read(name)) if name.endswith((".so", ".json", ".txt", "METADATA")) else []:
                found.append(f"{name} tells {len(told)} paths of the building machine: {', '.join(told[:3])}")
    return found


def audits(wheel: Path) -> list[str]:
    """What auditwheel and abi3audit find, where they are installed; what they say is printed."""
    found = []
    for command in (["auditwheel", "show", str(wheel)], ["abi3audit", "--strict", "--summary", str(wheel)]):
        program = shutil.which(command[0], path=Path(sys.executable).parent) or shutil.which(command[0])
        if program is None:
            print(f"{command[0]} is not installed: not asked", flush=True)
        elif subprocess.run([program, *command[1:]]).returncode:
            found.append(f"{command[0]} refuses it")
    return found


def main(arguments: list[str]) -> int:
    if not arguments:
        print("which wheels? python -m tests.wheels.check dist/*.whl", file=sys.stderr)
        return 2
    wrong = 0
    for wheel in map(Path, arguments):
        found = faults(wheel) + audits(wheel)
        wrong += len(found)
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MB", *(found or ["as it must be"]), sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
