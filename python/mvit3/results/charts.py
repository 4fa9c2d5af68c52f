"""Charts as inline SVG, as wide as a telephone: in a page they are not scaled, so that their text stays readable.

Every chart is one image for a screen reader, with a text in place of it; colours are classes of style.css.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from .text import LONGEST, cut

WIDTH = 344
LABELS, VALUES = 128, 62  # columns of a bar chart, left and right of the bars
ROW = 22
LONG = 26  # letters of a label of a row of dots
LETTER = 6.4  # width of a letter of the text, but for capitals
NAME = int(LABELS / LETTER)  # letters of a label beside a bar or a line
LEVELS = {"ours": -4, "peer": 0, "second": 4}


def ms(value: float) -> str:
    """Milliseconds with about three digits."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 4}f} ms"


def short(value: float) -> str:
    """A number of an axis: 0.01, 1, 20, 1.5k."""
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def image(height: float, text: str, parts: Iterable[str], width: int = WIDTH) -> str:
    said = escape(cut(text, 20 * LONGEST), quote=True)
    inside = "".join(parts)
    size = f'viewBox="0 0 {width} {height:g}" width="{width}" height="{height:g}"'
    return f'<svg {size} role="img" aria-label="{said}">{inside}</svg>'


def words(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def dot(x: float, y: float, kind: str, title: str, hollow: bool = False, square: bool = False) -> str:
    kind, said = f"{kind} hollow" if hollow else kind, f"<title>{escape(cut(title))}</title>"
    if square:  # on its corner
        return (
            f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" transform="rotate(45 {x:.1f} {y:.1f})" '
            f'class="{kind}">{said}</rect>'
        )
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{kind}">{said}</circle>'


class Bar(NamedTuple):
    """`value` None: there is no bar, and `text` says why."""

    label: str
    value: float | None
    text: str
    kind: str  # "ours", "peer", or "own": not compared
    low: float | None = None
    high: float | None = None


def bars(rows: Sequence[Bar], text: str) -> str:
    """Bars from zero, with a whisker from the 20th to the 80th percentile where that is known."""
    left, right = LABELS, WIDTH - VALUES
    largest = max((max(row.value, row.high or 0) for row in rows if row.value is not None), default=1.0)
    scale = (right - left) / largest
    parts = []
    for i, row in enumerate(rows):
        top = i * ROW
        parts.append(words(0, top + 15, cut(row.label, NAME), "strong" if row.kind == "ours" else ""))
        if row.value is None:
            parts.append(words(left, top + 15, cut(row.text, 2 * NAME), "wrong"))
            continue
        length = max(row.value * scale, 1)
        title = f"<title>{escape(f'{cut(row.label)}: {row.text}')}</title>"
        parts.append(f'<rect x="{left}" y="{top + 4}" width="{length:.1f}" height="14" rx="2" class="{row.kind}">')
        parts.append(f"{title}</rect>")
        if row.low is not None and row.high is not None:
            parts.append(line(left + row.low * scale, top + 11, left + row.high * scale, top + 11, "whisker"))
        parts.append(words(WIDTH, top + 15, row.text, "value strong" if row.kind == "ours" else "value", "end"))
    return image(ROW * len(rows) + 2, text, parts)


class Log:
    """A logarithmic axis from `first` to `last`, in pixels, whose ends are whole steps."""

    def __init__(self, values: Iterable[float], first: float, last: float, base: float = 10.0) -> None:
        values = list(values)
        self.low = base ** math.floor(math.log(min(values), base) + 1e-9)
        self.high = base ** math.ceil(math.log(max(values), base) - 1e-9)
        if self.low == self.high:
            self.high *= base
        self.first, self.last, self.base = first, last, base

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.first + share * (self.last - self.first)

    def ticks(self) -> list[float]:
        steps = round(math.log(self.high / self.low, self.base))
        every = max(1, math.ceil(steps / 6))
        values = [self.low * self.base**i for i in range(0, steps + 1, every)]
        if steps == 1 and self.base == 10:
            values = [self.low * factor for factor in (1, 2, 5, 10)]
        return values


class Dot(NamedTuple):
    value: float
    kind: str
    title: str
    hollow: bool = False
    square: bool = False


def strip(rows: Sequence[tuple[str, Sequence[Dot]]], text: str, unit: str, mark: float | None = None) -> str:
    """A line of dots for each label, on a common logarithmic axis; `mark` is a line through all of them. Dots of
    several kinds lie a little above each other; a label without dots is the heading of those below it."""
    rows = [(cut(label, LONG), dots) for label, dots in rows]
    values = [d.value for _, dots in rows for d in dots] + ([mark] if mark else [])
    left, bottom = max(len(label) for label, dots in rows if dots) * LETTER + 14, ROW * len(rows) + 4
    base = 2.0 if max(values) / min(values) < 8 else 10.0  # a decade would be mostly empty
    axis = Log(values, left, WIDTH - 12, base)
    several = len({d.kind for _, dots in rows for d in dots}) > 1
    parts = [line(axis(tick), 0, axis(tick), bottom, "grid") for tick in axis.ticks()]
    parts += [words(axis(tick), bottom + 14, short(tick), "value", "middle") for tick in axis.ticks()]
    parts.append(words(WIDTH - 6, bottom + 30, unit, "value", "end"))
    if mark:
        parts.append(line(axis(mark), 0, axis(mark), bottom, "mark"))
    for i, (label, dots) in enumerate(rows):
        parts.append(words(0, ROW * i + 16, label, "" if dots else "strong over"))
        parts += [dot(axis(d.value), ROW * i + 12 + several * LEVELS[d.kind], *d[1:]) for d in dots]
    return image(bottom + 36, text, parts)


class Series(NamedTuple):
    label: str
    kind: str
    points: Sequence[tuple[float, float]]


def spread(wanted: Sequence[float], least: float, last: float) -> list[float]:
    """Heights of labels, at least so far from each other, near where they should be and above `last`."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    found = list(wanted)
    for before, here in itertools.pairwise(order):
        found[here] = max(found[here], found[before] + least)
    over = max(0.0, max(found) - last)
    for here in reversed(order):
        limit = last - least * (len(order) - 1 - order.index(here))
        found[here] = min(found[here], limit) if over else found[here]
    return found


def lines(series: Sequence[Series], text: str, across: str, up: str) -> str:
    """Lines over powers of two, with their names at their ends."""
    left, right, top, bottom = 34, WIDTH - LABELS, 22, 200
    x = Log([p[0] for s in series for p in s.points], left + 4, right - 4, 2.0)
    y = Log([p[1] for s in series for p in s.points], bottom, top, 2.0)
    parts = [line(left, y(tick), right, y(tick), "grid") for tick in y.ticks()]
    parts += [words(left - 4, y(tick) + 4, short(tick), "value", "end") for tick in y.ticks()]
    parts += [words(x(tick), bottom + 16, short(tick), "value", "middle") for tick in x.ticks()]
    parts += [words(0, 12, up, "value"), words(right, bottom + 32, across, "value", "end")]
    ends = spread([y(s.points[-1][1]) for s in series], 14, bottom)
    for s, end in zip(series, ends, strict=True):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in s.points)
        parts.append(f'<polyline points="{path}" class="{s.kind} path"/>')
        parts += [dot(x(a), y(b), s.kind, f"{s.label}: {short(a)}, {b:.4g}") for a, b in s.points]
        parts.append(line(x(s.points[-1][0]) + 5, y(s.points[-1][1]), right + 4, end, "grid"))
        parts.append(words(right + 7, end + 4, cut(s.label, NAME - 1), "strong" if s.kind == "ours" else ""))
    return image(bottom + 38, text, parts)


class Roof(NamedTuple):
    """What the machine can do: GB/s of a copy, GFLOP/s of a product."""

    copy: float
    product: float

    def at(self, intensity: float) -> float:
        return min(self.product, intensity * self.copy)


def roofline(dots: Sequence[tuple[float, Dot]], roof: Roof, text: str) -> str:
    """Operations a second over operations for each byte, below the rates of a copy and of a product."""
    left, right, top, bottom = 38, WIDTH - 8, 22, 200
    ridge = roof.product / roof.copy
    x = Log([a for a, _ in dots] + [ridge], left, right)
    y = Log([d.value for _, d in dots] + [roof.product, roof.at(x.low)], bottom, top)
    parts = [line(left, y(tick), right, y(tick), "grid") for tick in y.ticks()]
    parts += [line(x(tick), top, x(tick), bottom, "grid") for tick in x.ticks()]
    parts += [words(left - 4, y(tick) + 4, short(tick), "value", "end") for tick in y.ticks()]
    parts += [words(x(tick), bottom + 16, short(tick), "value", "middle") for tick in x.ticks()]
    corners = [(x.low, roof.at(x.low)), (ridge, roof.product), (x.high, roof.product)]
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in corners)
    parts.append(f'<polyline points="{path}" class="mark path"/>')
    parts += [words(0, 12, "GFLOP/s", "value"), words(right, bottom + 32, "operations for each byte", "value", "end")]
    peers_first = sorted(dots, key=lambda pair: pair[1].kind == "ours")
    parts += [dot(x(a), y(d.value), d.kind, d.title, d.hollow) for a, d in peers_first]
    return image(bottom + 38, text, parts)
