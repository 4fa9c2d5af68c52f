"""Whole networks on the CPU, training steps and inference, beside the best that a user could run instead.

    python benchmarks/bench_models.py [--json] [--quick] [--dtype bfloat16] [--peers onnxruntime ...]
        [--models mobilevitv3_s ...] [--work training-8 ...]

float32, the same number of threads for all, one process, candidates in turns, medians. The peers are the same networks
in plain PyTorch (mvit3.bench.plain): eager in both layouts, torch.compile (frozen for inference; minutes to compile),
ONNX Runtime and OpenVINO. Those two are for inference only and optional (`pip install .[bench]`): one that is missing
is left out. What every candidate computes, outputs in inference and gradients in training, is compared with eager's in
float64 before it is timed.

With `--dtype bfloat16`, `fuse` with that dtype and training steps under autocast, beside float32 peers and beside eager
autocast, torch.compile under autocast and OpenVINO told to compute in bfloat16. Recorded in
results/models_bfloat16_cpu.json, and what it has of float32 in results/models_cpu.json, too.

A training step is forward, cross-entropy, backward and AdamW, with the dropouts of the recipe; gradients are compared
without them, so that all compute the same function.
Its memory is what a first step (gradients and optimiser state included) adds to the resident set at its peak.
`<candidate>_built_ms` and `_first_ms` are what comes before the timed calls: making the candidate of a network
(exporting, loading, fusing) and its first call (compiling, packing weights). `--json` replaces the rows that it
measures and keeps the others.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import RESULTS, write
from mvit3.bench import candidates
from mvit3.bench.candidates import CANDIDATES, HALF, Candidate, Subject, Work, missing, step_memory
from mvit3.bench.measure import interleaved, machine

WORK = {
    Work("training", 8, 256, 7): ("mobilevitv3_s", "mobilevitv3_100"),
    Work("training", 32, 128, 7): ("mobilevitv3_xxs",),
    Work("inference", 1, 256, 12, 5): (
        "mobilevitv3_s",
        "mobilevitv3_100",
        "mobilevitv3_xxs",
        "mobilevitv2_100",
        "mobilevit_s",
    ),
    Work("inference", 32, 256, 7): ("mobilevitv3_s", "mobilevitv3_100"),
}


def prepare(name: str, work: Work, names: Sequence[str]) -> tuple[dict[str, Candidate], dict[str, object]]:
    """The candidates, ready to be timed after their results were compared, and the first columns of their row."""
    found = candidates.prepare(Subject(name), work, names).all_right()
    row: dict[str, object] = {"model": name, "work": work.name, "batch": work.batch, "side": work.side}
    for c in found.right:
        row |= {f"{c}_built_ms": found.built_ms[c], f"{c}_first_ms": found.first_ms[c]}
    errors = found.errors
    halves = {"bfloat16_error": max(errors[c] for c in errors if c in HALF)} if HALF.keys() & errors.keys() else {}
    return found.right, {**row, "error": max(errors[c] for c in errors if c not in HALF), **halves}


def measure(work: Work, found: dict[str, Candidate], quick: bool) -> dict[str, object]:
    rounds = max(3, work.rounds // 3) if quick else work.rounds
    times = interleaved({c: candidate.step for c, candidate in found.items()}, rounds, warmup=1, burst=work.burst)
    return {f"{c}_ms": t["median_ms"] for c, t in times.items()}


def with_ratios(row: dict[str, object]) -> dict[str, object]:
    """Adds the fastest peer, the faster of ours, and how many times as fast that is; of bfloat16, how many times as
    fast as the fastest peer of each dtype ours is."""
    times = {c: row[f"{c}_ms"] for c in CANDIDATES if f"{c}_ms" in row}
    halves = {c: row[f"{c}_ms"] for c in HALF if f"{c}_ms" in row}
    if half := {c for c in halves if c.startswith("ours")}:
        ours = halves.pop(half.pop())
        for dtype, peers in (
            ("float32", {c: t for c, t in times.items() if not c.startswith("ours")}),
            ("bfloat16", halves),
        ):
            if peers:
                best = min(peers, key=peers.get)
                row = {**row, f"best_{dtype}_peer": best, f"{dtype}_ratio": peers[best] / ours}
        return row
    peers, ours = ({c: t for c, t in times.items() if c.startswith("ours") == mine} for mine in (False, True))
    if not (peers and ours):
        return row
    peer, best = min(peers, key=peers.get), min(ours, key=ours.get)
    return {**row, "best_peer": peer, "best_ours": best, "ratio": peers[peer] / ours[best]}


def of_float32(row: dict[str, object]) -> dict[str, object]:
    """What a row would have been without the candidates of bfloat16, which took their turns beside the others."""
    half = ("bfloat16_", "float32_ratio", "best_", *(f"{c}_" for c in HALF))
    return with_ratios({name: value for name, value in row.items() if not name.startswith(half)})


def record(rows: list[dict[str, object]], facts: dict[str, object], name: str) -> None:
    """Writes the rows to results/<name>.json, beside the other rows there of what this benchmark still measures."""

    def key(row: dict[str, object]) -> tuple[object, ...]:
        return tuple(row.get(name) for name in ("model", "work", "batch", "side"))

    path = RESULTS / f"{name}.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    wanted = {(name, work.name, work.batch, work.side) for work in WORK for name in WORK[work]}
    rest = wanted - {key(row) for row in rows}
    write("models", [*(row for row in kept if key(row) in rest), *rows], facts, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="record in results/models_cpu.json, and that of the dtype")
    parser.add_argument("--quick", action="store_true", help="a third of the rounds, no memory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=[c for c in CANDIDATES | HALF if not c.startswith("ours")],
        help="default: all that are installed",
    )
    parser.add_argument("--models", nargs="+", help="default: those of each work")
    parser.add_argument("--work", nargs="+", choices=[str(w) for w in WORK], default=[str(w) for w in WORK])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    half = options.dtype == "bfloat16"
    known = CANDIDATES | HALF if half else CANDIDATES
    names = [c for c in known if c.startswith("ours") or options.peers is None or c in options.peers]
    absent = {c: reason for c in names if (reason := missing(c))}
    facts = machine()
    facts["peers"] = {
        c: importlib.metadata.version(c) for c in ("onnxruntime", "openvino") if c in names and c not in absent
    }
    print(
        ", ".join(f"{name} {value}" for name, value in facts.items()),
        *(f"without {c}: {reason}" for c, reason in absent.items()),
        sep="\n",
    )
    rows: list[dict[str, object]] = []
    for work in WORK:
        for name in WORK[work] if str(work) in options.work else ():
            if options.models and name not in options.models:
                continue
            found, row = prepare(name, work, [c for c in names if c not in absent])
            row |= measure(work, found, options.quick)
            del found
            if work.training and not options.quick:
                row |= {f"{c}_mib": step_memory(c, Subject(name), work) for c in ("eager_channels_last", "ours")}
            rows.append({**with_ratios(row), "revision": facts["revision"]})
            print(
                *(
                    f"{column}: {value:.4g}" if isinstance(value, float) else f"{column}: {value}"
                    for column, value in rows[-1].items()
                ),
                sep=", ",
            )
            if options.json:  # row by row: a run that is cut short loses its last row only
                if half:
                    record(rows[-1:], facts, "models_bfloat16_cpu")
                record([of_float32(rows[-1])], facts, "models_cpu")


if __name__ == "__main__":
    main()
