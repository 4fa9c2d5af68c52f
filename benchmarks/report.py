"""Rewrites the measured section of README.md from benchmarks/results/*.json: `python benchmarks/report.py [--check]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->\n"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def conditions(machine: dict) -> str:
    facts = [machine["cpu"], f"{machine['threads']} threads", str(machine["instruction_set"]), f"torch {machine['torch']}"]
    return (
        f"{', '.join(facts)}; copy {machine['copy_gb_s']} GB/s, `torch.mm` {machine['mm_gflop_s']} GFLOP/s; revision {machine['revision']}."
    )


def models(result: dict) -> str:
    compiled = any("compile_ms" in row for row in result["rows"])
    header = ["network", "work", "batch", "eager, best layout", *(["torch.compile"] if compiled else []), "this library", "against eager"]
    header += [*(["against torch.compile"] if compiled else []), "peak memory, eager / ours"]
    rows = []
    for row in result["rows"]:
        eager = min(row["eager_nchw_ms"], row["eager_channels_last_ms"])
        cells = [f"`{row['model']}`", row["work"], str(row["batch"]), f"{eager:.0f} ms"]
        if compiled:
            cells.append(f"{row['compile_ms']:.0f} ms" if "compile_ms" in row else "not measured")
        cells += [f"{row['ours_ms']:.0f} ms", f"{row['against_eager']:.2f}x"]
        if compiled:
            cells.append(f"{row['against_compile']:.2f}x" if "against_compile" in row else "not measured")
        memory = "eager_channels_last_mib" in row
        cells.append(f"{row['eager_channels_last_mib']:.0f} / {row['ours_mib']:.0f} MiB" if memory else "")
        rows.append(cells)
    intro = (
        "Whole networks, float32, 256x256, `python benchmarks/bench_models.py --json --compile`, medians. A training step includes AdamW.\n"
    )
    return f"{intro}{conditions(result['machine'])}\n\n{table(header, rows)}"


def batch_norm_act(result: dict) -> str:
    rows = []
    for row in result["rows"]:
        speed = [f"{row['eager_ms']:.1f} ms", f"{row['ours_ms']:.1f} ms", f"{row['ratio']:.2f}x"]
        rows.append([row["shape"], row["dtype"], *speed, f"{row['eager_mib']:.0f} / {row['ours_mib']:.0f} MiB"])
    header = ["N x C x H x W", "dtype", "eager", "`batch_norm_act`", "ratio of medians", "peak memory, eager / ours"]
    intro = "Batch norm + SiLU, forward and backward in training, channels_last, `python benchmarks/bench_batch_norm_act.py --json`.\n"
    return f"{intro}{conditions(result['machine'])}\n\n{table(header, rows)}"


SECTIONS = {"models_cpu": models, "batch_norm_act_cpu": batch_norm_act}


def section() -> str:
    parts = [write(json.loads(path.read_text())) for name, write in SECTIONS.items() if (path := RESULTS / f"{name}.json").exists()]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether README.md is what the results give")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    new = before + BEGIN + section() + END + after
    if options.check:
        sys.exit(0 if new == text else "README.md differs from benchmarks/results: run `make report`")
    readme.write_text(new)


if __name__ == "__main__":
    main()
