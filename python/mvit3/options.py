"""How an option is described: help text, valid names, bounds; every configuration class is made of these."""

import difflib
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import get_args, get_origin, get_type_hints


def written(value: object) -> str:
    """A value as a command line or a YAML file writes it."""
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(written, value))}]"
    return {None: "null", "": "empty"}.get(value, str(value).lower() if isinstance(value, bool) else str(value))


SHOWN = 25  # valid names that a message lists; of more it gives the nearest


class UsageError(ValueError):
    """An option that does not exist, or a value that it cannot have; the message names what is valid."""


def nearest(value: str, valid: Iterable[str]) -> str:
    """The valid name that looks most like `value`."""
    return difflib.get_close_matches(value, list(valid), 1, 0.0)[0]


def nearest_options(flag: str, flags: Iterable[str]) -> list[str]:
    """The options whose last part looks most like that of `flag`: --momentum means --optimizer.momentum or
    --ema.momentum."""

    def alike(one: str, other: str) -> float:
        return round(difflib.SequenceMatcher(None, one, other).ratio(), 2)

    wanted = flag.lstrip("-").replace("-", "_").lower()
    scores = {}
    for known in flags:
        name = known.lstrip("-")
        scores[known] = (
            alike(wanted.rpartition(".")[2], name.rpartition(".")[2]),
            alike(wanted, name) if "." in wanted else 0.0,
        )
    return [known for known, score in scores.items() if score == max(scores.values())]


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def form(kind: object, default: object = None) -> str:
    """What a value of this type looks like, in plain words; a list with an example."""
    if get_origin(kind) is tuple:
        numbers, example = {int: ("whole numbers", "160,192"), float: ("numbers", "0.5,1")}.get(
            get_args(kind)[0], ("names", "a,b")
        )
        shown = written(default) if default and isinstance(default, tuple) else f"[{example}]"
        return f"a list of {numbers} such as {shown}"
    if get_args(kind):
        return " or ".join(form(one) for one in get_args(kind))
    return WORDS.get(kind, "text")


@dataclass(frozen=True)
class Option:
    """Help text and bounds of a field: one of `choices`, or numbers with minimum <= value < below (each one of a
    tuple)."""

    help: str
    choices: Collection[str] = ()
    minimum: float = -math.inf
    below: float = math.inf

    def check(self, name: str, value: object) -> None:
        """Raises UsageError where the option `name` cannot have this value."""
        if isinstance(value, (tuple, list)):
            for item in value:
                self.check(name, item)
        elif self.choices:
            if value not in self.choices:
                close = nearest(str(value), self.choices)
                valid = (
                    f"one of {', '.join(self.choices)}"
                    if len(self.choices) <= SHOWN
                    else f"one of {len(self.choices)} names"
                )
                raise UsageError(f"{name} must be {valid}; got {value!r}, the nearest is {close!r}")
        elif isinstance(value, (int, float)) and not self.minimum <= value < self.below:  # NaN fails too
            limit = f"and below {self.below}" if self.below < math.inf else "and finite"
            raise UsageError(f"{name} must be at least {self.minimum} {limit}, got {value}")


def options(config: type) -> Iterator[tuple[str, type, object, Option]]:
    """Flag, type, default (MISSING where it has none) and `Option` of each field of a configuration class."""
    hints = get_type_hints(config, include_extras=True)
    for f in fields(config):
        kind, spec = get_args(hints[f.name])
        yield f"--{f.name.replace('_', '-')}", kind, f.default, spec


class Section:
    """A section of the configuration, a frozen dataclass: its values are checked against their options as soon as it
    exists."""

    def __post_init__(self) -> None:
        for (_, _, _, option), f in zip(options(type(self)), fields(self), strict=True):
            option.check(f"{self.section}.{f.name}", getattr(self, f.name))

    @property
    def section(self) -> str:
        """Its name on the command line and in YAML files."""
        return type(self).__name__.removesuffix("Config").lower()
