"""Texts of the page: numbers of things, and names that are too long for a chart."""

from __future__ import annotations

LONGEST = 200  # letters of a name outside a table


def count(number: int, thing: str) -> str:
    """1 file, 2 files."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def cut(text: str, most: int = LONGEST) -> str:
    """Its beginning, with an ellipsis where something is left out."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
