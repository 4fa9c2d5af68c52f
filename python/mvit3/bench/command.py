"""`mvit3 bench`: whole networks on this machine, beside what could be run instead."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import importlib.util
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import mvit3_kernels

from ..errors import Failure
from ..options import UsageError, nearest
from ..runtime import usable_cpus
from ..screen import Bar, number, table
from .candidates import CANDIDATES, HALF, Prepared, Subject, Work, missing, prepare, runs, step_memory
from .hosts import HOSTS
from .measure import Row, document, interleaved, machine, replace_file

SMALLEST = 32  # what the networks divide an image by
# Values that the last batch norm must have in training. Of 2, gradients of eager in float32 err by up to 1.3 of their
# norm, of 4 by 8e-4 at most; in bfloat16 of 3 by more than the norm, of 8 by up to a quarter.
FEWEST, FEWEST_HALF = 4, 8
OP = "networks"  # in the file
PEERS = {
    "eager": "eager_nchw",
    "channels_last": "eager_channels_last",
    "compile": "compile",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
}
NAMES = {candidate: name for name, candidate in PEERS.items()}


def bench(args: argparse.Namespace, work: Work, bar: Bar) -> tuple[dict[str, object], list[Row]]:
    """Facts about the machine, and a row for each network and candidate: median, 20th and 80th percentile of the
    milliseconds of a call, images a second, MiB that a first call adds at its peak, the error of what it computes as a
    share of the norm of eager's in float64, and `result`: "right", "WRONG", or "failed: " with the reason. What is not
    right is not timed. Written to `args.output` after each network.

    Raises:
        UsageError: a peer or a network that there is not, or an output that cannot be. Failure: a host that is not
        installed.
    """
    subjects = [Subject(name, args.host or "") for name in networks(args.names, args.host)]
    names = candidates(args.peers, args.dtype == "bfloat16")
    if args.output:
        check_output(Path(args.output))
    names = [c for c in names if any(runs(c, subject, work) for subject in subjects)]
    absent = {c: reason for c in names if (reason := missing(c))}
    for c, reason in absent.items():
        bar.line(f"without {NAMES.get(c, c)}: {reason}")
    names = [c for c in names if c not in absent]
    bar.line("measuring the rates of a copy and of torch.mm")
    facts = machine()
    facts["peers"] = {c: importlib.metadata.version(c) for c in ("onnxruntime", "openvino") if c in names}
    plan = {subject: [c for c in names if runs(c, subject, work)] for subject in subjects}
    bar.begin(sum(len(chosen) for chosen in plan.values()) * (work.rounds + 1 + (not args.no_memory)))
    rows: list[Row] = []
    for subject, chosen in plan.items():
        rows += measure(subject, work, chosen, not args.no_memory, bar)
        if args.output:
            replace_file(Path(args.output), document(OP, rows, facts))
    bar.close()
    return facts, rows


def work_of(args: argparse.Namespace) -> Work:
    """What is done with each network; UsageError where it cannot be."""
    training = args.mode == "train"
    batch, least = args.batch or (8 if training else 1), 2 if training else 1
    if batch < least or args.batch == 0:
        raise UsageError(f"--batch must be at least {least} to {args.mode}, got {args.batch}")
    if args.size < SMALLEST:
        raise UsageError(f"--size must be at least {SMALLEST}, got {args.size}")
    if args.threads < 0:
        raise UsageError(f"--threads must be at least 0, got {args.threads}")
    if args.threads > (most := usable_cpus()):
        raise UsageError(f"--threads must be at most {most}, the CPUs that this process may use, got {args.threads}")
    if args.rounds is not None and args.rounds < 1:
        raise UsageError(f"--rounds must be at least 1, got {args.rounds}")
    half = args.dtype == "bfloat16"
    if training and half and args.host:
        raise UsageError("--mode train --dtype bfloat16 is of this package's networks, not of --host")
    values, fewest = batch * math.ceil(args.size / SMALLEST) ** 2, FEWEST_HALF if half else FEWEST
    if training and values < fewest:
        raise UsageError(
            f"--batch {batch} at --size {args.size} leaves the last batch norm {values} values; to train in "
            f"{args.dtype} it needs {fewest}, of fewer all gradients are mostly rounding"
        )
    rounds, burst = (5, 2) if training else (12, 5 if batch < 8 else 2)
    return Work("training" if training else "inference", batch, args.size, args.rounds or rounds, burst)


def check_output(path: Path) -> None:
    """Makes the folder of a result file. UsageError where the file cannot be written, or would take the place of one
    that is no result of this command."""
    if path.is_dir():
        raise UsageError(f"--output {path} is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}."):
            pass
    except OSError as error:
        raise UsageError(f"--output {path} cannot be written: {error.strerror}") from None
    if path.exists() and not is_result(path):
        raise UsageError(f"--output {path} is there and is no result file of mvit3 bench; it is not replaced")


def is_result(path: Path) -> bool:
    """Whether this command wrote the file."""
    try:
        found = json.loads(path.read_text()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("op") == OP and {"schema", "machine", "rows"} <= found.keys()


def networks(patterns: Sequence[str], host: str | None) -> list[str]:
    """The classifiers that match, of this library or of a host; without a pattern the one that is known best."""
    if host and importlib.util.find_spec(host) is None:
        raise Failure(f"--host {host} is not installed: pip install {host}")
    every = HOSTS[host].names() if host else mvit3_kernels.list_models()
    patterns = patterns or [HOSTS[host].default if host else "mobilevitv3_s"]
    found = {pattern: fnmatch.filter(every, pattern) for pattern in patterns}
    for pattern, names in found.items():
        if not names:
            where = f" of {host}" if host else ""
            raise UsageError(f"there is no classifier {pattern!r}{where}; the nearest is {nearest(pattern, every)!r}")
    return list(dict.fromkeys(name for names in found.values() for name in names))


def candidates(peers: str, half: bool) -> list[str]:
    """Peers and ours, by the names of candidates.py; with `half` those of bfloat16 too."""
    words = [word for word in peers.split(",") if word]
    for word in words:
        if word not in PEERS:
            raise UsageError(
                f"--peers must be some of {','.join(PEERS)}; got {word!r}, the nearest is {nearest(word, PEERS)!r}"
            )
    chosen = [candidate for word, candidate in PEERS.items() if word in words]
    kinds = {c.partition("_")[0] for c in chosen} | {"ours"}
    return [*chosen, *(c for c in CANDIDATES if c.startswith("ours"))] + [
        c for c in HALF if half and c.partition("_")[0] in kinds
    ]


def measure(subject: Subject, work: Work, names: list[str], memory: bool, bar: Bar) -> list[Row]:
    """A row for each of the candidates."""

    def told(doing: str) -> None:
        bar.update(f"{subject.name}: {doing}", 0)

    found = prepare(subject, work, names, lambda c: told(f"preparing {NAMES.get(c, c)}"))
    bar.update(f"{subject.name}: prepared", len(names))
    runners = {c: candidate.step for c, candidate in found.right.items()}
    times = interleaved(
        runners,
        work.rounds,
        warmup=1,
        burst=work.burst,
        told=lambda c: bar.update(f"{subject.name}: {NAMES.get(c, c)}"),
    )
    bar.update(f"{subject.name}: timed", work.rounds * (len(names) - len(runners)))
    rows = []
    for c in names:
        row = _row(subject, work, c, found)
        if c in times:
            row |= {key: times[c][key] for key in ("median_ms", "p20_ms", "p80_ms")}
            row["images_per_s"] = 1e3 * work.batch / times[c]["median_ms"]
        if memory:
            told(f"memory of {NAMES.get(c, c)}")
            # a first call of torch.compile is its compiler's
            if c in times and not c.startswith("compile") and Path("/proc/self/clear_refs").exists():
                row["memory_mib"] = step_memory(c, subject, work)
            bar.update(f"{subject.name}: memory")
        rows.append(row)
    return rows


def _row(subject: Subject, work: Work, candidate: str, found: Prepared) -> Row:
    row: Row = {"network": subject.name, "host": subject.host or None, "work": work.name}
    row |= {"batch": work.batch, "side": work.side, "candidate": NAMES.get(candidate, candidate)}
    row["dtype"] = "bfloat16" if candidate in HALF else "float32"
    if candidate in found.failed:
        error = found.failed[candidate]
        text = (str(error).strip().splitlines() or [""])[0]
        return row | {"result": f"failed: {type(error).__name__}: {text}"}
    return row | {
        "error": found.errors[candidate],
        "result": "WRONG" if candidate in found.wrong else "right",
    }


def text(facts: dict[str, object], rows: list[Row]) -> str:
    """What a person reads: a table, and below it what failed. "ours is": the faster of ours of the same dtype."""
    cells = [["network", "candidate", "ms", "p20", "p80", "images/s", "ours is", "MiB", "error", "result"]]
    fastest = {}
    for row in rows:
        if row["candidate"].startswith("ours") and "median_ms" in row:
            key = row["network"], row["dtype"]
            fastest[key] = min(row["median_ms"], fastest.get(key, row["median_ms"]))
    for row in rows:
        key = row["network"], row["dtype"]
        cell = [row["network"], row["candidate"]]
        cell += [number(row.get(key), 2) for key in ("median_ms", "p20_ms", "p80_ms")]
        cell.append(number(row.get("images_per_s"), 1))
        peer = not row["candidate"].startswith("ours") and "median_ms" in row and key in fastest
        cell.append(f"{row['median_ms'] / fastest[key]:.2f}x as fast" if peer else "")
        cell.append(number(row.get("memory_mib"), 1))
        cell += [f"{row['error']:.1e}" if "error" in row else "", row["result"].partition(":")[0]]
        cells.append(cell)
    first = rows[0]
    said = f"{first['work']}, batch {first['batch']}, {first['side']}x{first['side']}; {facts['cpu']}, "
    said += f"{facts['threads']} threads, {facts['instruction_set']}, torch {facts['torch']}, {facts['revision']}"
    said += f", load {facts['load_average']}"
    failed = [f"{row['candidate']} on {row['network']} {row['result']}" for row in rows if row["result"][0] == "f"]
    return "\n".join([table(cells), "", said, *failed])
