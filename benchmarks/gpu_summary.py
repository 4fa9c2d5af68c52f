"""One screen from a folder of GPU results: `python benchmarks/gpu_summary.py FOLDER`. What failed or gave a wrong
result is said, and counts as failure."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def rows_of(folder: Path) -> Iterator[tuple[str, Row]]:
    """Each row of each result, with the piece that it belongs to."""
    for path in sorted(folder.glob("gpu_*.json")):
        found = json.loads(path.read_text())
        if "piece" in found:
            yield from ((found["piece"], row) for row in found["rows"])


def summary(folder: Path) -> tuple[list[str], list[str]]:
    """Lines of final results, and of what went wrong."""
    lines, bad = [], []
    for piece, row in rows_of(folder):
        candidate = row.get("candidate", "")
        where = f"{piece} {row.get('op', '')} {row.get('mode', '')} {candidate}"
        where = " ".join(where.split())
        if "failure" in row:
            bad.append(f"failed: {where}: {row['failure'][:120]}")
        elif row.get("correct") is False and (row.get("interleaved") or piece == "smoke"):
            bad.append(f"wrong: {where}: {', '.join(row.get('wrong', ['all']))}")
        elif "smoke" in row:
            lines.append(f"smoke: {row['smoke']} ops and modes, {row['bad']} calls of them wrong or failed")
        elif row.get("interleaved"):
            lines.append(f"{where:<60} {row['images_per_s']:>12.1f} images/s")
    for path in sorted(folder.glob("gpu_tests_*.txt")):
        last = path.read_text().strip().splitlines()[-1:]
        if path.stem != "gpu_tests_shards":
            lines.append(f"{path.stem:<40} {last[0] if last else 'no output'}")
    return lines, bad


def main() -> None:
    lines, bad = summary(Path(sys.argv[1]))
    print("\n".join(["== summary", *lines, *(bad or ["nothing failed"])]))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
