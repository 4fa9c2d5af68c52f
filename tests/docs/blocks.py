"""The fenced blocks of the documentation, and what an HTML comment in front of one says about it.

<!-- given: images = torch.rand(2, 3, 64, 64) -->   Python that the reader has already; runs first
<!-- shortened by: --schedule.epochs 1 -->          options that a test adds to each command of the block
<!-- not run: REASON -->                            only its syntax, options and targets are checked
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMENT = re.compile(r"<!-- (given|shortened by|not run):\s(.*?)\s*-->", re.DOTALL)
# The command that makes what pages have in runs/s, in seconds; a folder is still to be named.
TRAINED = """train --config digits --data.limit_train 32 --data.limit_val 16 --data.batch_size 16 --data.resize 32
    --data.crop 32 --sampler.size 32 --schedule.epochs 1 --schedule.warmup_epochs 0 --quiet"""
RUNNABLE, TEXT = ("python", "sh"), ("text", "yaml")


@dataclass
class Block:
    """A fenced block: `line` is the number of its first line of code."""

    language: str
    line: int
    code: str = ""
    notes: dict[str, str] = field(default_factory=dict)


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str) -> Iterator[Block]:
    """Every fenced block of a page, with the comments that stand right in front of it."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    for found in fence.finditer(text):
        above = text[: found.start()]
        start = len(above)
        notes = {}
        while comment := re.search(r"<!--(?:(?!-->).)*-->\s*\Z", above[:start], re.DOTALL):
            if named := COMMENT.match(comment[0]):
                notes[named[1]] = named[2]
            start = comment.start()
        yield Block(found[1], text[: found.start(2)].count("\n") + 1, found[2], notes)
