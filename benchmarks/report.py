"""Rewrites the measured section of README.md from benchmarks/results/*.json: `python benchmarks/report.py
[--check]`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->\n"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def conditions(machine: dict) -> str:
    ceilings = f"copy {machine['copy_gb_s']} GB/s, `torch.mm` {machine['mm_gflop_s']} GFLOP/s"
    return f"{'; '.join([where(machine), ceilings, revision(machine)])}."


def where(machine: dict) -> str:
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    return f"{machine['cpu']}, {threads}, {machine['instruction_set']}, torch {machine['torch']}"


def revision(machine: dict) -> str:
    """Of the sources, where it is one that can be looked up; else that it is not."""
    name = machine["revision"]
    return "uncommitted sources" if name.endswith("+changes") else f"revision {name}"


PEERS = {
    "eager_nchw": "eager",
    "eager_channels_last": "eager, channels_last",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
HALF_PEERS = {
    "eager_bfloat16": "eager, autocast",
    "compile_bfloat16": "torch.compile, autocast",
    "openvino_bfloat16": "OpenVINO",
}
HALF_TRAINING = ("eager_bfloat16", "compile_bfloat16")


def networks(result: dict, script: str, intro: str) -> str:
    """A line for each work of a network; `script` measured it, `intro` says what."""

    def milliseconds(time: float | None) -> str:
        return "" if time is None else f"{time:.{0 if time >= 100 else 1}f} ms"

    rows = []
    for row in result["rows"]:
        times = {c: row[f"{c}_ms"] for c in PEERS if f"{c}_ms" in row}
        best = min(times, key=times.get)
        eager = min(t for c, t in times.items() if c.startswith("eager"))
        ours = min(row[f"{c}_ms"] for c in ("ours", "ours_fused") if f"{c}_ms" in row)
        memory = [f"{row[f'{c}_mib']:.0f}" for c in ("eager_channels_last", "ours") if f"{c}_mib" in row]
        work = f"{row['work']} {row['batch']} at {row['side']}"
        name = f"`{row['model']}`" + (f", {row['classes']} classes" if "classes" in row else "")
        cells = [name, work, milliseconds(eager), f"{milliseconds(times[best])} ({PEERS[best]})"]
        cells += [
            milliseconds(row.get("ours_ms")),
            milliseconds(row.get("ours_fused_ms")),
            f"{times[best] / ours:.2f}x",
            f"{eager / ours:.2f}x",
        ]
        rows.append([*cells, " / ".join(memory) + " MiB" * bool(memory)])
    header = [
        "network",
        "work, batch at size",
        "best eager",
        "best peer",
        "drop-in",
        "`fuse`",
        "against best peer",
        "against eager",
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["machine"].get("peers", {}).items())
    peers = (
        "The peers are\neager PyTorch, torch.compile (frozen for inference) and, for inference, ONNX Runtime and "
        f"OpenVINO in their best settings{f' ({versions})' if versions else ' where they were measured'}.\n"
    )
    said = f"{intro}, float32, `python benchmarks/{script}.py --json`, medians. A training step includes AdamW. {peers}"
    return f"{said}{conditions(result['machine'])}\n\n{table([*header, 'peak memory, eager / ours'], rows)}"


def models(result: dict) -> str:
    return networks(result, "bench_models", "Whole networks")


def training_bfloat16(result: dict) -> str:
    rows = []
    for row in (row for row in result["rows"] if row["work"] == "training"):
        half = {c: row[f"{c}_ms"] for c in HALF_PEERS if f"{c}_ms" in row}
        cells = [f"`{row['model']}`", f"{row['batch']} at {row['side']}"]
        cells += [f"{row[c]:.0f} ms" if c in row else "" for c in ("eager_bfloat16_ms", "compile_bfloat16_ms")]
        cells += [f"{row['ours_ms']:.0f} ms", f"{row['ours_bfloat16_ms']:.0f} ms"]
        rows.append(
            [*cells, *(f"{half[c] / row['ours_bfloat16_ms']:.2f}x" if c in half else "" for c in HALF_TRAINING)]
        )
    header = ["network", "batch at size", *(HALF_PEERS[c] for c in HALF_TRAINING), "ours, float32", "ours, autocast"]
    header += ["against eager", "against torch.compile"]
    if not rows:
        return ""
    return f"\nTraining steps under autocast, of the same run.\n\n{table(header, rows)}"


def models_bfloat16(result: dict) -> str:
    rows = []
    for row in (row for row in result["rows"] if row["work"] == "inference"):
        cells = [f"`{row['model']}`", f"{row['batch']} at {row['side']}"]
        for dtype, names in (("float32", PEERS), ("bfloat16", HALF_PEERS)):
            best = row.get(f"best_{dtype}_peer")
            cells.append(f"{row[f'{best}_ms']:.1f} ms ({names[best]})" if best else "")
        ratios = [
            f"{row[f'{dtype}_ratio']:.2f}x" if f"{dtype}_ratio" in row else "" for dtype in ("float32", "bfloat16")
        ]
        rows.append([*cells, f"{row['ours_fused_ms']:.1f} ms", f"{row['ours_fused_bfloat16_ms']:.1f} ms", *ratios])
    header = ["network", "batch at size", "best float32 peer", "best bfloat16 peer"]
    header += ["`fuse`", "`fuse`, bfloat16", "against float32 peer", "against bfloat16 peer"]
    return (
        "Inference with products of bfloat16, `python benchmarks/bench_models.py --dtype bfloat16 --json`, medians, "
        f"beside peers of both dtypes.\n{conditions(result['machine'])}\n\n{table(header, rows)}"
        f"{training_bfloat16(result)}"
    )


def hosts(result: dict) -> str:
    rows = []
    for row in result["rows"]:
        peers = {c: row[f"{c}_ms"] for c in PEERS if f"{c}_ms" in row}
        best = min(peers, key=peers.get)
        eager = min(t for c, t in peers.items() if c.startswith("eager"))
        cells = [f"`{row['network']}`", f"{row['work']} {row['batch']} at {row['side']}", f"{eager:.1f} ms"]
        cells += [f"{peers[best]:.1f} ms ({PEERS[best]})", f"{row['fused_ms']:.1f} ms", f"{row['own_ms']:.1f} ms"]
        rows.append([*cells, f"{peers[best] / row['fused_ms']:.2f}x", f"{row['against_eager']:.2f}x"])
    header = ["network", "work, batch at size", "best eager", "best peer", "`fuse(host)`", "our own network"]
    intro = (
        "Networks of timm and transformers, fused in place, float32, `python benchmarks/bench_hosts.py --json`, "
        "medians. A training step includes AdamW.\n"
    )
    return f"{intro}{conditions(result['machine'])}\n\n{table([*header, 'against best peer', 'against eager'], rows)}"


def dense(result: dict) -> str:
    return networks(result, "bench_dense", "Segmentation and detection, with their losses or what follows the network")


def batch_norm_act(result: dict) -> str:
    rows = []
    for row in result["rows"]:
        speed = [f"{row['eager_ms']:.1f} ms", f"{row['ours_ms']:.1f} ms", f"{row['ratio']:.2f}x"]
        rows.append([row["shape"], row["dtype"], *speed, f"{row['eager_mib']:.0f} / {row['ours_mib']:.0f} MiB"])
    header = ["N x C x H x W", "dtype", "eager", "`batch_norm_act`", "ratio of medians", "peak memory, eager / ours"]
    intro = (
        "Batch norm + SiLU, forward and backward in training, channels_last, "
        "`python benchmarks/bench_batch_norm_act.py --json`.\n"
    )
    return f"{intro}{conditions(result['machine'])}\n\n{table(header, rows)}"


OPS = (
    "inverted_residual",
    "pointwise",
    "dropout",
    "feed_forward",
    "patch_attention",
    "separable_attention",
    "depthwise_conv",
    "conv3x3",
)


def ops(results: dict[str, dict]) -> str:
    """A table for each machine, with a line for each op and mode: medians over the measured shapes, with the least and
    the greatest."""

    def spread(values: list[float], form: Callable[[float], str]) -> str:
        return f"{form(statistics.median(values))} ({form(min(values))} to {form(max(values))})"

    tables: dict[str, list[list[str]]] = {}
    for name, result in results.items():
        by_mode: dict[tuple[str, str], list[dict]] = {}
        for row in result["rows"]:
            if row.get("dtype", result["machine"].get("dtype", "float32")) == "float32":
                by_mode.setdefault((row.get("op", name), row["mode"]), []).append(row)
        for (op, mode), rows in by_mode.items():
            speed = spread([row["against_eager"] for row in rows], lambda v: f"{v:.1f}x")
            floor = spread([row["of_floor"] for row in rows], lambda v: f"{100 * v:.0f} %")
            here = f"{where(result['machine'])}; {revision(result['machine'])}"
            tables.setdefault(here, []).append([f"`{op}`", mode, str(len(rows)), speed, floor])
    header = ["op", "mode", "shapes", "against eager: median (least to most)", "share of the floor"]
    intro = (
        "Single ops at the shapes of their networks, float32, `make bench`. "
        "Training is forward and backward. The\n"
        "floor is the larger of the bare products (`torch.mm`) and the bytes at the rate of a copy. "
        "All rows: `benchmarks/results/`.\n"
    )
    return intro + "".join(f"\n{here}.\n\n{table(header, lines)}" for here, lines in tables.items())


def section() -> str:
    def read(name: str) -> dict | None:
        path = RESULTS / f"{name}_cpu.json"
        return json.loads(path.read_text()) if path.exists() else None

    tables = {"models": models, "hosts": hosts, "models_bfloat16": models_bfloat16, "dense": dense}
    tables["batch_norm_act"] = batch_norm_act
    parts = [write(result) for name, write in tables.items() if (result := read(name))]
    single = {name: result for name in OPS if (result := read(name))}
    return "\n".join([*parts, *([ops(single)] if single else [])])


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
