"""Small files of benchmark results, of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MACHINE = {
    "cpu": "a CPU",
    "threads": 2,
    "instruction_set": "avx2",
    "torch": "2.15",
    "python": "3.12",
    "revision": "abc",
    "load_average": 0.1,
    "copy_gb_s": 40.0,
    "mm_gflop_s": 200.0,
}


def bench_row(candidate: str, median: float | None, **more: Any) -> dict[str, Any]:
    row = {"network": "mobilevitv3_s", "host": None, "work": "inference", "batch": 1, "side": 256}
    row |= {"candidate": candidate, "dtype": "float32", "error": 1e-6, "result": "right"}
    if median is not None:
        row |= {"median_ms": median, "p20_ms": 0.9 * median, "p80_ms": 1.2 * median, "images_per_s": 1e3 / median}
        row |= {"memory_mib": 10 * median}
    return row | more


def bench(rows: list[dict[str, Any]], **machine: Any) -> dict[str, Any]:
    return {"schema": 1, "op": "networks", "machine": MACHINE | machine, "rows": rows}


def bench_rows(scale: float = 1.0) -> list[dict[str, Any]]:
    return [
        bench_row("eager", 40.125 * scale),
        bench_row("openvino", 25.5 * scale),
        bench_row("ours", 30.75 * scale),
        bench_row("ours_fused", 20.0625 * scale),
    ]


def models(scale: float = 1.0, **more: float) -> dict[str, Any]:
    row = {"model": "mobilevitv3_s", "work": "inference", "batch": 1, "side": 256, "eager_nchw_built_ms": 900.0}
    row |= {"eager_nchw_ms": 40 * scale, "openvino_ms": 26 * scale, "ours_ms": 31 * scale, "ours_fused_ms": 20 * scale}
    return {"schema": 1, "op": "models", "machine": dict(MACHINE), "rows": [row | more]}


def timed_op(candidate: str, seconds: float, gflop: float | None = 0.5, gb: float | None = 0.02) -> dict[str, Any]:
    info = MACHINE | {"device": "cpu", "op": "patch_attention", "mode": "training", "dtype": "float32"}
    info |= {"candidate": candidate, "error": 1e-7, "memory_mib": 3.5}
    info |= {"gflop_s": gflop and gflop / seconds, "gb_s": gb and gb / seconds}
    stats = {"median": seconds, "q1": 0.9 * seconds, "q3": 1.1 * seconds}
    info["case"] = "8-144-32-float32-"
    return {"group": f"patch_attention-{info['case']}training", "stats": stats, "extra_info": info}


def pytest_file() -> dict[str, Any]:
    ops = [timed_op("ours", 0.00425), timed_op("eager", 0.00825), timed_op("sdpa", 0.0065)]
    return {"machine_info": {}, "benchmarks": ops}


def predicted() -> dict[str, Any]:
    rows = [
        {
            "network": "mobilevitv3_s",
            "mode": "train",
            "batch": 32,
            "candidate": c,
            "predicted_ms": t,
            "graph_ms": t - 0.5,
            "limit": "launches",
            "launches": 576,
        }
        for c, t in (("ours", 10.25), ("compile", 7.5), ("eager", 8.625))
    ]
    return {"what": "predicted, not measured", "device": "a GPU", "torch": "2.15", "rows": rows}


def measured() -> dict[str, Any]:
    row = {"model": "mobilevitv3_s", "batch": 32, "error": 1e-3, "peak_bytes": 2**30, "correct": True}
    rows = [
        row | {"candidate": "ours", "images_per_s_alone": 3000.0},
        row | {"candidate": "ours", "interleaved": True, "seconds": 0.0205},
        row | {"candidate": "eager_channels_last", "interleaved": True, "seconds": 0.017, "correct": False},
    ]
    return {"piece": "train", "facts": {"device": "a GPU", "torch": "2.15"}, "rows": rows}


def write(folder: Path, **documents: Any) -> list[str]:
    """Files by these names; their paths."""
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(document if isinstance(document, str) else json.dumps(document))
    return [str(folder / f"{name}.json") for name in documents]
