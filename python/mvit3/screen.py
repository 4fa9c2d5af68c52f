"""Words, numbers, tables and progress as a person reads them; nothing heavy is imported here."""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")
LINE_SECONDS = 10  # between two lines of progress where stderr is no terminal


def plain(text: str) -> str:
    """A text on one line: names of files and classes may hold line breaks and other control characters."""
    return "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in text)


def width(text: str) -> int:
    """Columns that the `plain` text takes on a terminal: two for a Chinese character, none for an accent by itself."""
    wide = sum((unicodedata.east_asian_width(c) in "WF") - bool(unicodedata.combining(c)) for c in text)
    return len(plain(text)) + wide


def pad(text: str, columns: int, right: bool = False) -> str:
    """The `plain` text in so many columns."""
    space = " " * (columns - width(text))
    return space + plain(text) if right else plain(text) + space


def table(rows: list[list[str]]) -> str:
    """Rows of cells under a header row; the first column to the left, the others to the right."""
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(pad(c, w, i > 0) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def count(value: int, noun: str) -> str:
    """1 image, 2 images."""
    return f"{value} {noun}" + ("" if value == 1 else "es" if noun.endswith("s") else "s")


def duration(seconds: float) -> str:
    """Its two largest units: 48 s, 3 min 20 s, 1 h 12 min, 2 d 3 h."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s" if whole >= 10 else f"{seconds:.1f} s"


class Bar:
    """Progress on stderr with lines above it; silent when `quiet`. A terminal shows a bar in the width that it has, and
    a file or a pipe gets a line now and then, without control characters."""

    def __init__(self, quiet: bool, stream: TextIO | None = None) -> None:
        self.quiet, self.stream, self.bar = quiet, stream or sys.stderr, None
        self.total = self.done = 0
        self._next_line = 0.0

    def begin(self, total: int, done: int = 0) -> None:
        self.total, self.done, self._next_line = total, done, 0.0
        if not self.quiet and self.stream.isatty():
            self.bar = tqdm(
                total=total,
                initial=done,
                file=self.stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar:10}| {elapsed}<{remaining}  {desc}",
                mininterval=0.2,
            )

    def line(self, text: str) -> None:
        """A line that stays, above the bar."""
        if not self.quiet:
            tqdm.write(plain(text), file=self.stream)

    @staticmethod
    def result(text: str) -> None:
        """A line on stdout, at once, above the bar where both are on one terminal."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def update(self, text: str, steps: int = 1) -> None:
        self.done += steps
        if self.bar is not None:
            self.bar.set_description_str(plain(text), refresh=steps == 0)
            self.bar.update(steps)
        elif not self.quiet and self.total and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            print(f"{self.done}/{self.total}  {plain(text)}", file=self.stream, flush=True)

    def over(self, items: Iterable[T], total: int, noun: str) -> Iterator[T]:
        """The items, with a bar of its own for them."""
        self.begin(total)
        for item in items:
            yield item
            self.update(noun)
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
