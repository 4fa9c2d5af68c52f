"""What a page says about figures: cards with a chart, its table and a sentence."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from . import charts
from .charts import Bar, Dot, Roof, Series
from .reading import GRAPHS, PREDICTED, Figure, Source
from .text import count

NAMES = {
    "eager": "eager",
    "eager_nchw": "eager",
    "eager_channels_last": "eager, channels last",
    "compile": "torch.compile",
    "compiled": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "ours": "ours, drop-in",
    "ours_fused": "ours, fuse",
    "ours_graph": "ours, CUDA graph",
    "eager_graph": "eager, CUDA graph",
    "compile_graph": "torch.compile, CUDA graph",
    "ours_compile": "ours, compiled",
    "own": "our own network",
    "composed": "ours, in parts",
    "kernel": "our kernel, forced",
    "sdpa": "PyTorch's SDPA",
    "library": "PyTorch's own op",
}
AGREES = 0.10  # how far two medians of one candidate may lie apart
ALIKE = ("cpu", "threads", "instruction_set", "torch")  # of machines whose figures should agree
KEYS = (("ours", "ours"), ("peer", "eager PyTorch"), ("second", "another peer"))
OWN = ("own", "our own network: beside, not compared")
GPU_KEYS = (
    ("ours", "ours"),
    ("peer", "eager, channels last"),
    ("second", "torch.compile"),
    ("round", "launch by launch"),
    ("square", "as a CUDA graph"),
)


@dataclass(frozen=True)
class Card:
    """A chart with a heading, a sentence, and the table of what it shows."""

    title: str
    note: str
    chart: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    says: str = ""  # what the chart shows, in a sentence
    keys: Sequence[tuple[str, str]] = ()  # colours and what they mean


class Block(NamedTuple):
    """Cards of one origin, with a line about it."""

    title: str
    note: str
    cards: Sequence[Card]


@dataclass(frozen=True)
class Section:
    name: str  # of the link
    title: str
    note: str
    blocks: Sequence[Block] = ()
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    notes: Sequence[str] = field(default_factory=tuple)


Known = dict[tuple[object, str], Figure]  # by what is compared and the candidate


class Comparison(NamedTuple):
    """The best of ours beside the best of what could be run instead, in one dtype."""

    ours: Figure
    peer: Figure

    @property
    def ratio(self) -> float:
        return self.peer.ms / self.ours.ms


def label(candidate: str, kind: str = "network") -> str:
    """A candidate as a person reads it; a single op has one form of ours."""
    plain = candidate.removesuffix("_bfloat16")
    if kind == "op" and plain == "ours":
        return plain
    return NAMES.get(plain, plain.replace("_", " ")) + (", bf16" if plain != candidate else "")


def grouped(figures: Iterable[Figure], key: Callable[[Figure], object]) -> dict[object, list[Figure]]:
    found: dict[object, list[Figure]] = {}
    for figure in figures:
        found.setdefault(key(figure), []).append(figure)
    return found


def timed(figures: Iterable[Figure]) -> list[Figure]:
    return [figure for figure in figures if figure.ms is not None]


def comparisons(figures: Iterable[Figure]) -> list[Comparison]:
    """Of candidates of one piece of work, for each dtype in which there are both."""
    found = []
    for same in grouped(timed(figures), lambda f: f.dtype).values():
        ours, peers = ([f for f in same if f.whose == whose] for whose in ("ours", "peer"))
        if ours and peers:
            fastest = min(ours, key=lambda f: f.ms), min(peers, key=lambda f: f.ms)
            found.append(Comparison(*fastest))
    return found


def verdict(found: Comparison) -> str:
    peer, dtype = label(found.peer.candidate.removesuffix("_bfloat16")), found.ours.dtype
    where = "" if dtype == "float32" else f", in {dtype}"
    return f"{found.ratio:.2f}× as fast as the best peer{where}: {peer}"


def conditions(machine: object) -> str:
    """The facts about a machine on one line."""
    facts = dict(machine)
    said = [str(facts[name]) for name in ("cpu", "device") if facts.get(name)]
    said += [count(facts["threads"], "thread")] if facts.get("threads") else []
    said += [str(facts["instruction_set"])] if facts.get("instruction_set") else []
    said += [f"torch {facts['torch']}"] if facts.get("torch") else []
    if facts.get("copy_gb_s") and facts.get("mm_gflop_s"):
        said += [f"copy {facts['copy_gb_s']} GB/s", f"product {facts['mm_gflop_s']} GFLOP/s"]
    said += [f"revision {facts['revision']}"] if facts.get("revision") else []
    said += [f"load {facts['load_average']}"] if facts.get("load_average") is not None else []
    return ", ".join(said)


def cell(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


# Networks


def times_card(figures: list[Figure]) -> Card:
    rows, table = [], []
    for f in figures:
        text = charts.ms(f.ms) if f.ms is not None else f.result.partition(":")[0]
        rows.append(Bar(label(f.candidate, f.kind), f.ms, text, f.whose, f.low, f.high))
        table.append([label(f.candidate, f.kind), f.dtype, cell(f.ms), cell(f.low), cell(f.high), f.result])
    first, found = figures[0], comparisons(figures)
    said = "; ".join(f"{row.label} {row.text}" for row in rows)
    chart = charts.bars(rows, f"Bars: milliseconds of {first.name}, {first.work}, {first.case}. {said}.")
    head = ("candidate", "dtype", "ms", "p20", "p80", "result")
    says = "; ".join(verdict(one) for one in found)
    keys = [("ours", "ours"), ("peer", "peers"), OWN] if any(f.own for f in figures) else ()
    return Card(first.name, f"{first.work}, {first.case}", chart, head, table, says, keys)


def networks(sources: Sequence[Source]) -> Section | None:
    blocks = []
    for source in sources:
        figures = [f for f in source.figures if f.kind == "network"]
        if figures:
            cards = [times_card(same) for same in grouped(figures, lambda f: f.key).values()]
            blocks.append(Block(source.file, f"{source.what}; {conditions(source.machine)}", cards))
    note = "Milliseconds of a call or of a training step, medians"
    if any(f.kind == "network" and f.low and f.high for s in sources for f in s.figures):
        note += "; a thin line is from the 20th to the 80th percentile, where a file has them"
    return Section("networks", "Whole networks", f"{note}.", blocks) if blocks else None


def memory(sources: Sequence[Source]) -> Section | None:
    """Of networks; that of ops is in the table of all figures."""
    blocks = []
    for source in sources:
        cards = []
        known = [f for f in source.figures if f.kind == "network" and f.memory_mib is not None]
        for same in grouped(known, lambda f: (*f.key, f.dtype)).values():
            if len(same) < 2:
                continue
            rows = [
                Bar(
                    label(f.candidate, f.kind),
                    max(f.memory_mib, 0),
                    f"{f.memory_mib:.0f} MiB",
                    f.whose,
                )
                for f in same
            ]
            first, said = same[0], "; ".join(f"{row.label} {row.text}" for row in rows)
            chart = charts.bars(rows, f"Bars: MiB of {first.name}, {first.work}, {first.case}. {said}.")
            table = [[label(f.candidate, f.kind), cell(f.memory_mib, 1)] for f in same]
            cards.append(
                Card(first.name, f"{first.work}, {first.case}, {first.dtype}", chart, ("candidate", "MiB"), table)
            )
        if cards:
            blocks.append(Block(source.file, f"{source.what}; {conditions(source.machine)}", cards))
    note = (
        "What a call, or a first training step with gradients and optimiser state, adds to the resident memory at its "
        "peak."
    )
    return Section("memory", "Peak memory", note, blocks) if blocks else None


def scaling(sources: Sequence[Source]) -> Section | None:
    """Only figures of one machine, revision and number of threads (or batch) are joined by a line."""
    found: list[tuple[Source, Figure]] = [
        (s, f) for s in sources for f in s.figures if f.kind == "network" and f.ms is not None and f.batch
    ]

    def facts(source: Source, *names: str) -> tuple[object, ...]:
        return tuple(source.machine.get(name) for name in names)

    cards = []
    for across in ("batch", "threads"):
        groups: dict[tuple[object, ...], dict[str, dict[int, float]]] = {}
        for source, f in found:
            fixed = f.batch if across == "threads" else source.machine.get("threads")
            here = facts(source, "cpu", "torch", "revision"), f.name, f.work, f.side, f.case.partition(",")[2], fixed
            x = f.batch if across == "batch" else source.machine.get("threads")
            if x:
                groups.setdefault(here, {}).setdefault(f.candidate, {}).setdefault(x, 1e3 * f.batch / f.ms)
        for (_, name, work, side, _, fixed), candidates in groups.items():
            card = scaling_card(name, f"{work} at {side}", across, fixed, candidates)
            if card:
                cards.append(card)
    note = "Images a second. Lines join figures of one machine and revision."
    return Section("scaling", "Over batch and threads", note, [Block("", "", cards)]) if cards else None


def scaling_card(name: str, work: str, across: str, fixed: int, candidates: dict[str, dict[int, float]]) -> Card | None:
    series, rows = [], []
    for candidate, points in candidates.items():
        if len(points) > 1:
            kind = "ours" if candidate.startswith("ours") else "own" if candidate == "own" else "peer"
            series.append(Series(label(candidate), kind, sorted(points.items())))
            rows += [[label(candidate), str(x), cell(y, 2)] for x, y in sorted(points.items())]
    if not series:
        return None
    other = count(fixed or 0, "thread") if across == "batch" else f"batch {fixed}"
    said = "; ".join(f"{s.label} {', '.join(f'{y:.1f} at {x}' for x, y in s.points)}" for s in series)
    text = f"Lines: images a second of {name}, {work}, {other}, over {across}. {said}."
    return Card(
        f"{name}, over {across}", f"{work}, {other}", charts.lines(series, text, across, "images/s"),
        ("candidate", across, "images/s"), rows,
    )  # fmt: skip


# Ops


def ops(sources: Sequence[Source]) -> Section | None:
    blocks = []
    for title, timed_alone in (("In turns with its peers", False), ("Each by itself", True)):
        chosen = [s for s in sources if (s.what == "pytest benchmarks/") == timed_alone]
        figures = [f for s in chosen for f in s.figures if f.kind == "op"]
        cards = [card for work in ("evaluation", "training", "backward") for card in op_cards(figures, work)]
        cards += [card for source in chosen for card in rooflines(source)]
        if cards:
            machines = dict.fromkeys(conditions(s.machine) for s in chosen if any(f.kind == "op" for f in s.figures))
            what = "pytest benchmarks/" if timed_alone else "bench_*.py"
            where = next(iter(machines)) if len(machines) == 1 else f"{len(machines)} machines or revisions, see Files"
            blocks.append(Block(title, f"{what}; {where}", cards))
    note = (
        "A dot is one shape of the published networks, float32; training is forward and backward. The floor is what "
        "the bare products take, or the bytes that must move at the rate of a copy."
    )
    return Section("ops", "Single ops", note, blocks) if blocks else None


def op_cards(figures: list[Figure], work: str) -> Iterator[Card]:
    ours = [f for f in figures if f.candidate == "ours" and f.work == work and f.dtype == "float32" and f.ms]
    eager = {(f.file, *f.key, f.dtype): f for f in figures if f.candidate == "eager"}
    pairs = [(f, eager[at].ms / f.ms) for f in ours if (at := (f.file, *f.key, f.dtype)) in eager and eager[at].ms]
    floors = [(f, f.of_floor) for f in ours if f.of_floor]
    for title, unit, found in (
        ("Against eager PyTorch", "times as fast, line: as fast", pairs),
        ("Share of the floor", "floor / time, line: at the floor", floors),
    ):
        if found:
            yield strip_card(f"{title}, {work}", unit, found)


def strip_card(title: str, unit: str, found: list[tuple[Figure, float]]) -> Card:
    by_op: dict[str, list[tuple[Figure, float]]] = {}
    for figure, value in found:
        by_op.setdefault(figure.name, []).append((figure, value))
    rows = [
        (op, [Dot(value, "ours", f"{op} {f.case}: {value:.2f}") for f, value in values]) for op, values in by_op.items()
    ]
    table = [
        [op, str(len(values)), *(f"{pick(v for _, v in values):.2f}" for pick in (statistics.median, min, max))]
        for op, values in by_op.items()
    ]
    said = "; ".join(f"{row[0]} median {row[2]}, {row[3]} to {row[4]}" for row in table)
    chart = charts.strip(rows, f"Dots: {title}. {said}.", unit, mark=1.0)
    middle = statistics.median(value for _, value in found)
    note = f"median {middle:.2f} over {count(len(found), 'shape')}"
    return Card(title, note, chart, ("op", "shapes", "median", "least", "most"), table)


def rooflines(source: Source) -> Iterator[Card]:
    """One for each op whose operations and bytes a second are known."""
    copy, product = source.machine.get("copy_gb_s"), source.machine.get("mm_gflop_s")
    if not (copy and product):
        return
    known = [f for f in source.figures if f.gflop_s and f.gb_s and f.dtype == "float32"]
    for op, figures in grouped(known, lambda f: f.name).items():
        dots, table = [], []
        for f in figures:
            kind = "ours" if f.candidate == "ours" else "peer" if f.candidate == "eager" else "second"
            where = f"{label(f.candidate, f.kind)}, {f.work}, {f.case}: {f.gflop_s:.1f} GFLOP/s, {f.gb_s:.1f} GB/s"
            dots.append((f.gflop_s / f.gb_s, Dot(f.gflop_s, kind, where)))
            table.append([f.case, f.work, label(f.candidate, f.kind), cell(f.gflop_s, 1), cell(f.gb_s, 1)])
        best = max((f for f in figures if f.candidate == "ours"), key=lambda f: f.gflop_s, default=None)
        note = f"ours up to {best.gflop_s:.0f} of {product:.0f} GFLOP/s" if best else ""
        text = f"Roofline of {op}: {note}. Copy {copy} GB/s, product {product} GFLOP/s."
        chart = charts.roofline(dots, Roof(copy, product), text)
        yield Card(f"Roofline, {op}", note, chart, ("shape", "work", "candidate", "GFLOP/s", "GB/s"), table, keys=KEYS)


# GPU


def gpu(sources: Sequence[Source]) -> Section | None:
    figures = [f for s in sources for f in s.figures if f.kind == "gpu"]
    if not figures:
        return None
    predicted = {(f.key, f.candidate): f for f in figures if f.result == "predicted"}
    measured = {(f.key, f.candidate): f for f in figures if f.result != "predicted" and f.ms}
    cards = []
    for work in ("training", "inference"):
        chosen = [f for f in figures if f.work == work and f.ms]
        if chosen:
            cards.append(gpu_card(work, chosen, predicted, measured))
    both = predicted.keys() & measured.keys()
    devices = dict.fromkeys(s.machine.get("device", "") for s in sources if s.figures and s.figures[0].kind == "gpu")
    if both:
        off = statistics.median(max(r := predicted[at].ms / measured[at].ms, 1 / r) for at in both)
        have = "prediction has" if len(both) == 1 else "predictions have"
        note = f"{len(both)} {have} been measured; the median factor between the two is {off:.2f}."
    elif predicted:
        note = "Predicted, not measured: a model of the compiled kernels, whose error is not known."
    else:
        note = "Measured."
    return Section("gpu", "On a GPU", f"{note} {', '.join(devices)}.", [Block("", "", cards)])


def gpu_card(work: str, figures: list[Figure], predicted: Known, measured: Known) -> Card:
    """Rows of dots below the name of each network, one for each batch."""
    rows, table = [], []
    for name, of_network in grouped(figures, lambda f: f.name).items():
        rows.append((name, []))
        for batch, same in grouped(of_network, lambda f: f.batch).items():
            rows.append((f"batch {batch}", [gpu_dot(f) for f in same]))
            for candidate in (*PREDICTED.values(), *GRAPHS.values()):
                at = (same[0].key, candidate)
                guess, found = predicted.get(at), measured.get(at)
                if guess or found:
                    ratio = f"{guess.ms / found.ms:.2f}" if guess and found else "not measured" if guess else ""
                    times = cell(guess and guess.ms), cell(found and found.ms)
                    table.append([name, str(batch), label(candidate), *times, ratio])
    state = "predicted" + ("" if measured else ", not measured")
    said = (
        f"Dots: milliseconds of {work} on a GPU by network and batch, launch by launch and as a CUDA graph, {state}; "
        "the table has each."
    )
    chart = charts.strip(rows, said, "ms; hollow: predicted")
    head = ("network", "batch", "candidate", "predicted ms", "measured ms", "predicted / measured")
    return Card(f"{work.capitalize()}, at 256", state, chart, head, table, keys=GPU_KEYS)


def gpu_dot(f: Figure) -> Dot:
    kind = "ours" if f.ours else "second" if f.candidate.startswith("compile") else "peer"
    how = "predicted" if f.result == "predicted" else "measured"
    return Dot(f.ms, kind, f"{label(f.candidate)} {charts.ms(f.ms)}, {how}", how == "predicted", f.graph)


# The same, measured twice


def agreement(sources: Sequence[Source]) -> Section | None:
    """Candidates that two files have, on one kind of machine: how far their medians lie apart, by themselves and once
    the common factor of the two files is taken out."""
    rows, notes = [], []
    for i, first in enumerate(sources):
        for second in sources[i + 1 :]:
            if any(first.machine.get(n) != second.machine.get(n) for n in ALIKE):
                continue
            there = {(f.key, f.candidate): f for f in second.figures if f.kind == "network" and f.ms}
            pairs = [
                (f, there[f.key, f.candidate])
                for f in first.figures
                if f.kind == "network" and f.ms and (f.key, f.candidate) in there
            ]
            if pairs:
                common = statistics.median(b.ms / a.ms for a, b in pairs)
                apart = [b.ms / a.ms / common for a, b in pairs]
                near = sum(max(r, 1 / r) <= 1 + AGREES for r in apart)
                notes.append(
                    f"{first.file} and {second.file}: {count(len(pairs), 'figure')} in both, times of the second are "
                    f"{common:.2f} of the first's; {near} of {len(pairs)} within {AGREES:.0%} once that is taken out."
                )
                rows += [twice_row(a, b, r) for (a, b), r in zip(pairs, apart, strict=True)]
    if not rows:
        return None
    head = ("network", "work", "candidate", "file", "ms", "other file", "ms ", "ratio", "of the common ratio", "agrees")
    note = "The same candidate on the same work in two files of one kind of machine."
    return Section("twice", "Measured twice", note, table=(head, rows), notes=notes)


def twice_row(first: Figure, second: Figure, apart: float) -> list[str]:
    row = [first.name, f"{first.work}, {first.case}", label(first.candidate), first.file, cell(first.ms), second.file]
    agrees = "yes" if max(apart, 1 / apart) <= 1 + AGREES else "no"
    return [*row, cell(second.ms), f"{second.ms / first.ms:.2f}", f"{apart:.2f}", agrees]


def sections(sources: Sequence[Source]) -> list[Section]:
    made = (write(sources) for write in (networks, memory, scaling, ops, gpu, agreement))
    return [section for section in made if section is not None]


def headlines(sources: Sequence[Source]) -> list[tuple[str, str]]:
    """Numbers for the top of the page, each with what it means."""
    figures = [f for s in sources for f in s.figures]
    networks = grouped((f for f in figures if f.kind == "network"), lambda f: (f.file, f.key))
    found = [one for same in networks.values() for one in comparisons(same)]
    said = []
    for work in ("inference", "training"):
        ratios = [one.ratio for one in found if one.ours.work == work]
        if ratios:
            span = f"{min(ratios):.2f}× to {max(ratios):.2f}×, {count(len(ratios), 'comparison')}"
            said.append((f"{statistics.median(ratios):.2f}×", f"as fast as the best peer, {work}: median; {span}"))
    said += memory_headline(figures)
    wrong = sum(f.result == "WRONG" for f in figures)
    checked = sum(f.result in ("right", "WRONG") for f in figures)
    if checked:
        said.append((f"{wrong} of {checked}", "measured results are wrong; what is wrong is not timed"))
    return said


def memory_headline(figures: Iterable[Figure]) -> list[tuple[str, str]]:
    """Ours beside the peers whose memory is known, which are named."""
    held = [f for f in figures if f.kind == "network" and f.work == "training" and f.memory_mib and f.memory_mib > 0]
    shares, names = [], {}
    for same in grouped(held, lambda f: (f.file, f.key, f.dtype)).values():
        ours, peers = ([f for f in same if f.whose == whose] for whose in ("ours", "peer"))
        if ours and peers:
            shares.append(min(f.memory_mib for f in ours) / min(f.memory_mib for f in peers))
            names |= dict.fromkeys(f.candidate for f in peers)
    if not shares:
        return []
    said = ", ".join(dict.fromkeys(label(name) for name in names))
    if len(names) > 1:
        whose = f"of the memory of the peer that needs least ({said}) in training"
    elif next(iter(names)).startswith("eager"):
        whose = f"of eager PyTorch's memory in training ({said})"
    else:
        whose = f"of the memory of {said} in training"
    return [(f"{statistics.median(shares):.0%}", f"{whose}: median of {len(shares)}")]
