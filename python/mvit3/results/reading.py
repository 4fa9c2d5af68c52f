"""Files of benchmark results, as figures of one form.

A figure is one candidate on one piece of work: a network, an op, or a step that a model of a GPU predicts. Every reader
takes a whole file or none of it: what is not understood is an error that names the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Failure
from .text import count, cut

ALLOWED = (
    "allowed are results of `mvit3 bench --output`, those in benchmarks/results, and those of "
    "`pytest benchmarks/ --benchmark-json`"
)
LARGEST = 1e15
BYTES = 20_000_000  # of a file
SCHEMA = 1  # of bench/measure.py
NETWORKS = ("models", "dense", "hosts")  # documents with a row for each network and a column for each candidate
# Candidates that have two names.
SAME = {
    "eager": "eager_nchw",
    "channels_last": "eager_channels_last",
    "fused": "ours_fused",
}
NO_CANDIDATE = ("floor", "mm")  # columns of milliseconds that are limits
# What bench_<op>.py measures.
OPS = (
    "batch_norm_act",
    "conv3x3",
    "depthwise_conv",
    "dropout",
    "feed_forward",
    "inverted_residual",
    "patch_attention",
    "pointwise",
    "separable_attention",
    "upsample",
)
# Columns of an op's row that say what was found, not what was done.
FOUND = ("mode", "dtype", "op", "ratio", "best_ratio", "of_floor", "of_copy", "gflop_s", "gb_s", "error", "runs")
ORDER = ("mvit3 bench", "bench_models.py", "bench_hosts.py", "bench_dense.py", "bench_training.py")
# What the model of a GPU calls a candidate, and what that is called where it is measured; then as a CUDA graph.
PREDICTED = {"eager": "eager_channels_last", "compile": "compile", "ours": "ours"}
GRAPHS = {name: f"{name}_graph" for name in PREDICTED}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """One candidate on one piece of work: milliseconds of a call, and what else is known of it.

    Attributes:
        kind: "network", "op", or "gpu".
        work: "training", "inference" or "evaluation"; of an op, training is forward and backward.
        case: batch and size, or the shape.
        low, high: 20th and 80th percentile, of pytest-benchmark the quartiles.
        of_floor: the least that any method takes, as a share of the time.
        result: "right", "WRONG", "failed: " with the reason, or "predicted".
    """

    file: str
    kind: str
    name: str
    work: str
    case: str
    candidate: str
    ms: float | None
    dtype: str = "float32"
    batch: int | None = None
    side: int | None = None
    low: float | None = None
    high: float | None = None
    memory_mib: float | None = None
    gflop_s: float | None = None
    gb_s: float | None = None
    of_floor: float | None = None
    error: float | None = None
    result: str = "right"

    def __post_init__(self) -> None:
        for name in ("name", "work", "case", "candidate", "dtype", "result"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be text, got {getattr(self, name)!r}")
        for name in ("batch", "side"):
            value = getattr(self, name)
            if value is not None and not whole(value):
                raise TypeError(f"{name} must be a whole number of at least 1, got {value!r}")

    @property
    def ours(self) -> bool:
        return self.candidate.startswith("ours")

    @property
    def own(self) -> bool:
        """This library's network of a host's name: beside `fuse` of the host's, neither that nor a peer."""
        return self.candidate == "own"

    @property
    def whose(self) -> str:
        return "ours" if self.ours else "own" if self.own else "peer"

    @property
    def graph(self) -> bool:
        """Whether its launches are one CUDA graph."""
        return self.candidate.endswith("_graph")

    @property
    def key(self) -> tuple[object, ...]:
        """What candidates that can be compared have in common."""
        return self.kind, self.name, self.work, self.case


@dataclass(frozen=True)
class Source:
    """A file: what wrote it, facts about the machine, its figures, and a remark where it has no more to show."""

    file: str
    what: str
    machine: Row = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    remark: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.machine, Mapping):
            raise TypeError(f"the machine must be facts by name, got {self.machine!r}")
        for name in ("cpu", "device", "instruction_set", "torch", "revision", "load_average"):
            if not isinstance(self.machine.get(name), str | int | float | None):
                raise TypeError(f"{name} of the machine must be a word or a number, got {self.machine[name]!r}")
        threads = self.machine.get("threads")
        if threads is not None and not whole(threads):
            raise TypeError(f"threads of the machine must be a number of at least 1, got {threads!r}")
        for name in ("copy_gb_s", "mm_gflop_s"):
            positive(self.machine, name)
        for name, value in (("device", self.machine.get("device", "")), ("what", self.remark)):
            if not isinstance(value, str):
                raise TypeError(f"{name} must be text, got {value!r}")


def whole(value: object) -> bool:
    return type(value) is int and 1 <= value < LARGEST


def number(row: Row, name: str) -> float | None:
    """A number; None where there is none. ValueError for anything else."""
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, str):  # errors are written with two digits
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:  # nor NaN
        raise ValueError(f"{name} must be a number below {LARGEST:g}, got {value!r}")
    return value


def positive(row: Row, name: str) -> float | None:
    value = number(row, name)
    if value is not None and value <= 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    if value is not None and value < 1 / LARGEST:
        raise ValueError(f"{name} must be at least {1 / LARGEST:g}, got {value}")
    return value


def at(row: Row) -> str:
    classes = f", {row['classes']} classes" if "classes" in row else ""
    return f"batch {row['batch']} at {row['side']}{classes}"


def of_bench(file: str, rows: list[Row], machine: Row) -> Iterator[Figure]:
    """A row for each network and candidate."""
    for row in rows:
        host = f"{row['host']}/" if row["host"] else ""
        ms = positive(row, "median_ms")
        if (row["result"] == "right") != (ms is not None):
            raise ValueError(f"{row['candidate']} on {row['network']} is {row['result']} with median_ms {ms}")
        yield Figure(
            file,
            "network",
            host + row["network"],
            row["work"],
            at(row),
            SAME.get(row["candidate"], row["candidate"]),
            ms,
            row["dtype"],
            row["batch"],
            row["side"],
            positive(row, "p20_ms"),
            positive(row, "p80_ms"),
            memory_mib=number(row, "memory_mib"),
            error=number(row, "error"),
            result=row["result"],
        )


def of_networks(file: str, rows: list[Row], machine: Row) -> Iterator[Figure]:
    for row in rows:
        for candidate in candidates(row):
            yield Figure(
                file,
                "network",
                row.get("model") or row["network"],
                row["work"],
                at(row),
                SAME.get(candidate, candidate),
                positive(row, f"{candidate}_ms"),
                "bfloat16" if candidate.endswith("_bfloat16") else "float32",
                row["batch"],
                row["side"],
                memory_mib=number(row, f"{candidate}_mib"),
            )


def of_training(file: str, rows: list[Row], machine: Row) -> Iterator[Figure]:
    """Steps of `mvit3 train`, images and all."""
    names = {"reference": "reference ops", "fused": "ours"}
    for row in rows:
        candidate = names.get(row["candidate"], row["candidate"])
        case = f"{at(row)}, precision {row['precision']}, mvit3 train"
        yield Figure(
            file,
            "network",
            row["model"],
            "training",
            case,
            candidate,
            positive(row, "step_ms"),
            batch=row["batch"],
            side=row["side"],
            memory_mib=number(row, "peak_mib"),
        )


def of_op(file: str, rows: list[Row], machine: Row, op: str) -> Iterator[Figure]:
    for row in rows:
        words = [
            f"{name} {value}" if isinstance(value, int | float) else value
            for name, value in row.items()
            if name not in FOUND and not name.endswith(("_ms", "_mib")) and not name.startswith("against_")
        ]
        for candidate in candidates(row):
            ours = candidate == "ours"
            yield Figure(
                file,
                "op",
                row.get("op", op),
                row.get("mode", "training"),
                ", ".join(words),
                candidate,
                positive(row, f"{candidate}_ms"),
                row.get("dtype", machine.get("dtype", "float32")),
                memory_mib=number(row, f"{candidate}_mib"),
                error=number(row, "error") if ours else None,
                **{name: positive(row, name) if ours else None for name in ("gflop_s", "gb_s", "of_floor")},
            )


def candidates(row: Row) -> list[str]:
    """The names of what has a time in this row."""
    names = [key.removesuffix("_ms") for key in row if key.endswith("_ms") and row[key] is not None]
    found = [name for name in names if not name.endswith(("_built", "_first")) and name not in NO_CANDIDATE]
    if not found:
        raise ValueError("a row without a time")
    return found


def of_pytest(file: str, document: Row) -> Source:
    figures, machine = [], {}
    for one in document["benchmarks"]:
        info, stats = one["extra_info"], one["stats"]
        machine = machine or {name: info.get(name) for name in MACHINE}
        words = info["case"].removesuffix("evaluation").strip("-").replace("-", ", ")
        figures.append(
            Figure(
                file,
                "op",
                info["op"],
                info["mode"],
                words,
                info["candidate"],
                1e3 * positive(stats, "median"),
                info.get("dtype", "float32"),
                low=1e3 * positive(stats, "q1"),
                high=1e3 * positive(stats, "q3"),
                memory_mib=number(info, "memory_mib"),
                error=number(info, "error") if info["candidate"] == "ours" else None,
                **{name: positive(info, name) for name in ("gflop_s", "gb_s")},
            )
        )
    return Source(file, "pytest benchmarks/", machine, tuple(figures))


MACHINE = (
    "cpu",
    "threads",
    "instruction_set",
    "torch",
    "python",
    "revision",
    "load_average",
    "copy_gb_s",
    "mm_gflop_s",
)


def of_results(file: str, document: Row) -> Source:
    """What `bench/measure.py` writes."""
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema {document['schema']}, known is {SCHEMA}")
    op, rows, machine = document["op"], document["rows"], document["machine"]
    networks = {"networks": of_bench, "training": of_training, **dict.fromkeys(NETWORKS, of_networks)}
    if op not in networks and op not in OPS:
        raise ValueError(f"op {op!r} is none of {', '.join([*networks, *OPS])}")
    figures = networks[op](file, rows, machine) if op in networks else of_op(file, rows, machine, op)
    what = {"networks": "mvit3 bench", "training": "bench_training.py", **{n: f"bench_{n}.py" for n in NETWORKS}}
    return Source(file, what.get(op, f"bench_{op}.py"), machine, tuple(figures))


def of_model(file: str, document: Row) -> Source:
    """Predictions of benchmarks/gpu_model. The CUDA graph of each candidate is one of its own."""
    figures = []
    for row in document["rows"]:
        work = {"train": "training", "infer": "inference"}[row["mode"]]
        case, named = f"batch {row['batch']} at 256", (file, "gpu", row["network"], work)
        more = {"batch": row["batch"], "side": 256, "dtype": "bfloat16", "result": "predicted"}
        figures.append(Figure(*named, case, PREDICTED[row["candidate"]], positive(row, "predicted_ms"), **more))
        if row.get("graph_ms") is not None:
            figures.append(Figure(*named, case, GRAPHS[row["candidate"]], positive(row, "graph_ms"), **more))
    machine = {"device": document["device"], "torch": document["torch"]}
    return Source(file, "benchmarks/gpu_model", machine, tuple(figures), document["what"])


def of_kernels(file: str, document: Row) -> Source:
    machine = {"device": document["device"], "torch": document["torch"]}
    return Source(
        file,
        "benchmarks/gpu_model",
        machine,
        remark=f"{count(len(document['kernels']), 'compiled kernel')}, for its predictions",
    )


def of_gpu(file: str, document: Row) -> Source:
    """What benchmarks/gpu_all.sh measures: networks and ops; other pieces are named only."""
    piece, figures = document["piece"], []
    for row in document["rows"]:
        if piece in ("train", "infer") and row.get("interleaved"):
            work, case = {"train": "training", "infer": "inference"}[piece], f"batch {row['batch']} at 256"
            figures.append(
                Figure(
                    file,
                    "gpu",
                    row["model"],
                    work,
                    case,
                    row["candidate"],
                    1e3 * positive(row, "seconds"),
                    "bfloat16",
                    row["batch"],
                    256,
                    memory_mib=row["peak_bytes"] / 2**20 if row.get("peak_bytes") is not None else None,
                    error=number(row, "error"),
                    result="right" if row["correct"] else "WRONG",
                )
            )
    facts = document["facts"]
    rows = count(len(document["rows"]), "row")
    remark = "" if figures else f"{rows} of the piece {piece}, which the page does not show"
    return Source(file, "benchmarks/gpu_all.sh", facts, tuple(figures), remark)


# What a document has, and who reads it.
KINDS: tuple[tuple[set[str], Callable[[str, Row], Source]], ...] = (
    ({"schema", "op", "machine", "rows"}, of_results),
    ({"machine_info", "benchmarks"}, of_pytest),
    ({"what", "device", "torch", "rows"}, of_model),
    ({"what", "device", "torch", "kernels"}, of_kernels),
    ({"piece", "facts", "rows"}, of_gpu),
)


def parsed(path: Path) -> object:
    """What a JSON file holds. Failure where it is none, larger than BYTES, or holds text that cannot be written."""
    try:
        with path.open("rb") as file:
            content = file.read(BYTES + 1)  # which ends for a device too
        if len(content) > BYTES:
            raise Failure(f"{path} has more than {BYTES / 1e6:.0f} MB; {ALLOWED}")
        document = json.loads(content.decode("utf-8-sig"), parse_constant=lambda _: None)  # NaN: not measured
        json.dumps(document, ensure_ascii=False).encode()
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None
    except RecursionError:
        raise Failure(f"{path} is nested too deeply; {ALLOWED}") from None
    except UnicodeEncodeError:  # JSON can name the halves of a character one by one
        raise Failure(f"{path} holds half of a character, a lone surrogate; {ALLOWED}") from None
    except ValueError:
        raise Failure(f"{path} is not JSON; {ALLOWED}") from None
    return document


def read(path: Path, name: str) -> Source:
    """The figures of a file, under a short name. Failure where it is none of those kinds or not whole."""
    document = parsed(path)
    reader = next((read for has, read in KINDS if isinstance(document, dict) and has <= document.keys()), None)
    if reader is None:
        raise Failure(f"{path} is no file of benchmark results; {ALLOWED}")
    try:
        source = reader(name, document)
    except KeyError as error:
        raise Failure(f"{path} is not whole: {cut(str(error))} is missing in a row; {ALLOWED}") from None
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise Failure(f"{path} is not whole: {cut(str(error))}; {ALLOWED}") from None
    if not source.figures and not source.remark:
        raise Failure(f"{path} has no results")
    return source


def shown(path: str) -> str:
    """The name of a file as text, whatever bytes it has."""
    return os.fsencode(path).decode("utf-8", "replace")


def read_all(paths: list[Path]) -> list[Source]:
    """Files by their names, or by their paths where two have the same; whole networks first, then by name."""
    paths = list(dict.fromkeys(paths))
    names = [path.name for path in paths]
    found = [read(path, shown(path.name if names.count(path.name) == 1 else str(path))) for path in paths]

    def place(source: Source) -> tuple[int, str]:
        return ORDER.index(source.what) if source.what in ORDER else len(ORDER), source.file

    return sorted(found, key=place)
