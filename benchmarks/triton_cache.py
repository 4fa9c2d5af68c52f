"""A warm cache of Triton's compiled kernels, made without a GPU and carried to one, where compiling them takes minutes.

    python -m benchmarks.triton_cache pack cache.tar.gz --networks mobilevitv3_s      here: compiles for sm_90
    python -m benchmarks.triton_cache unpack cache.tar.gz                             there, before anything runs

A kernel is found again if Triton, its compiler and the kernel's source are the same; otherwise it is compiled, as if
there were no cache, and `unpack` says so.
"""

from __future__ import annotations

import argparse
import json
import os
import tarfile
import tempfile
from pathlib import Path

HERE = "@cache@"  # stands for the folder of the cache in files that name it
KEY = "triton_key"


def folder() -> Path:
    """Where Triton looks."""
    from triton import knobs

    return Path(knobs.cache.dir)


def key() -> str:
    """What Triton mixes into the name of each kernel: its own sources and version."""
    from triton.runtime.cache import triton_key

    return triton_key()


def move(cache: Path, before: str, after: str) -> int:
    """Replaces the folder's path in the lists of files that Triton keeps of each kernel. Returns how many there are."""
    groups = list(cache.rglob("__grp__*.json"))
    for path in groups:
        listed = json.loads(path.read_text())
        listed["child_paths"] = {name: at.replace(before, after, 1) for name, at in listed["child_paths"].items()}
        path.write_text(json.dumps(listed))
    return len(groups)


def pack(cache: Path, archive: Path) -> int:
    count = move(cache, str(cache), HERE)
    (cache / KEY).write_text(key())
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cache, arcname=".")
    return count


def unpack(archive: Path, cache: Path) -> tuple[int, bool]:
    """Kernels that were unpacked, and whether this Triton will find them."""
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(cache, filter="data")
    return move(cache, HERE, str(cache)), (cache / KEY).read_text() == key()


def fill(networks: list[str], batches: list[int]) -> None:
    """Compiles every kernel of these networks, for sm_90, into the cache."""
    from benchmarks.gpu_model.trace import trace

    for network in networks:
        for training in (True, False):
            for batch in batches:
                trace(network, training, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("archive", type=Path)
    parser.add_argument("--networks", nargs="+", default=["mobilevitv3_s"])
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 1])
    options = parser.parse_args()
    if options.action == "unpack":
        count, fits = unpack(options.archive, folder())
        print(f"{count} kernels unpacked" + ("" if fits else "; this Triton is another one and will compile them anew"))
        return
    with tempfile.TemporaryDirectory() as made:
        os.environ["TRITON_CACHE_DIR"] = made
        fill(options.networks, options.batches)
        print(f"{pack(Path(made), options.archive)} kernels packed")


if __name__ == "__main__":
    main()
