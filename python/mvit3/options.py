"""How an option is described: help text, valid names, bounds; every configuration class is made of these."""

import difflib
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import get_args, get_type_hints


class UsageError(ValueError):
    """An option that does not exist, or a value that it cannot have; the message names what is valid."""


def nearest(value: str, valid: Iterable[str]) -> str:
    """The valid name that looks most like `value`."""
    return difflib.get_close_matches(value, list(valid), 1, 0.0)[0]


@dataclass(frozen=True)
class Option:
    """Help text and bounds of a field: one of `choices`, or numbers with minimum <= value < below (each one of a tuple)."""

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
                raise UsageError(f"{name} must be one of {', '.join(self.choices)}; got {value!r}, the nearest is {close!r}")
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
    """A section of the configuration, a frozen dataclass: its values are checked against their options as soon as it exists."""

    def __post_init__(self) -> None:
        for (_, _, _, option), f in zip(options(type(self)), fields(self), strict=True):
            option.check(f"{self.section}.{f.name}", getattr(self, f.name))

    @property
    def section(self) -> str:
        """Its name on the command line and in YAML files."""
        return type(self).__name__.removesuffix("Config").lower()
