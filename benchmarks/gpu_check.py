"""Whether this machine can measure anything: `python -m benchmarks.gpu_check` prints what there is, and fails at once
where something is missing. Without the CUDA extension, say, "ours" would quietly be another way through the ops."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from mvit3_kernels import info


def missing(found: Mapping[str, Any]) -> list[str]:
    """What `info.collect()` lacks for a measurement, each with its reason."""
    return [
        f"backend {name}: {found['backends'][name]['reason']}"
        for name in ("triton", "cuda")
        if not found["backends"][name]["available"]
    ]


def main() -> None:
    print(info.report())
    lacking = missing(info.collect())
    if lacking:
        sys.exit("nothing is measured here:\n" + "\n".join(lacking))


if __name__ == "__main__":
    main()
