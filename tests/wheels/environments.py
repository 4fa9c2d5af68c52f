"""Installs a wheel beside each torch into a fresh environment and runs `smoke.py` there:
`python -m tests.wheels.environments dist/*.whl --torch 2.11 2.13 newest` (`make wheels-test`)."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

SMOKE = Path(__file__).with_name("smoke.py")


def run(command: list[str | Path], folder: Path) -> None:
    """A command outside of the repository, without what the caller's environment adds to Python."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MVIT3_", "VIRTUAL_ENV"))}
    subprocess.run([str(word) for word in command], check=True, cwd=folder, env=kept)


def install_and_try(wheel: Path, torch: str, python: str, folder: Path) -> None:
    """CalledProcessError where the wheel cannot be installed or does not do what it must."""
    if python == sys.executable:
        venv.create(folder, with_pip=True)
    else:
        run([python, "-m", "venv", folder], folder.parent)
    own = folder / "bin" / "python"
    wanted = "torch" if torch == "newest" else f"torch=={torch}.*"
    run([own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wanted, wheel.resolve()], folder)
    run([own, "-m", "pip", "--disable-pip-version-check", "check"], folder)
    run([own, "-W", "error::UserWarning:mvit3_kernels", SMOKE], folder)
    run([own, "-m", "mvit3_kernels.info"], folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="+", default=["2.11", "2.13", "newest"], help="versions, or newest")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="one for all, or one for each torch")
    options = parser.parse_args()
    if len(options.python) not in (1, len(options.torch)):
        parser.error(f"--python must be one, or {len(options.torch)}, got {len(options.python)}")
    pythons = options.python * (len(options.torch) if len(options.python) == 1 else 1)
    failed = []
    for torch, python in zip(options.torch, pythons, strict=True):
        print(f"--- torch {torch}, {python}", flush=True)
        with tempfile.TemporaryDirectory(prefix="mvit3_wheel_") as folder:
            try:
                install_and_try(options.wheel, torch, python, Path(folder))
            except subprocess.CalledProcessError as error:
                failed.append(f"torch {torch}: {' '.join(error.cmd[:4])} ... ended with {error.returncode}")
    print("\n".join(failed) or f"{options.wheel.name} works beside torch {', '.join(options.torch)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
