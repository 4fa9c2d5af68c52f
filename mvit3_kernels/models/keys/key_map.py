"""How a table of name pieces becomes a translation of whole names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

# The published name of a stage's last norm counts its layers, so it is known only when all names of the stage have been
# seen.
LAST_NORM = "global_rep.#last."


@dataclass(frozen=True)
class KeyMap:
    """The names of one network in one library.

    Args:
        name: what a report calls them.
        signature: a piece that occurs in these names and in no others.
        pieces: a piece of a name (whole words between dots, dot at the end included) to its published counterpart, each
            applied wherever it stands; where several fit, the longest. A counterpart that holds "#i." is the i-th of
            several tensors that are published as one, stacked along the first dimension.
    """

    name: str
    signature: str
    pieces: dict[str, str] = field(repr=False)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(r"(?<![^.])(?:" + "|".join(map(re.escape, sorted(self.pieces, key=len, reverse=True))) + ")")

    def matches(self, keys: Iterable[str]) -> bool:
        return any(self.signature in key for key in keys)

    def translate(self, keys: Iterable[str]) -> list[tuple[str, int, str]]:
        """(published name, place in the stack, key) of each key; a word that no piece covers stays as it is."""
        names, depths = [], {}
        for key in keys:
            name, place = self._pattern.sub(lambda piece: self.pieces[piece[0]], key), 0
            if part := re.search(r"#(\d)\.", name):
                name, place = name.replace(part[0], ""), int(part[1])
            if layer := re.match(r"(.*)global_rep\.(\d+)\.", name):
                depths[layer[1]] = max(depths.get(layer[1], 0), int(layer[2]) + 1)
            names.append((name, place, key))
        return [
            (
                name.replace("#last", str(depths.get(name.split("global_rep.")[0], 0))) if LAST_NORM in name else name,
                place,
                key,
            )
            for name, place, key in names
        ]
