"""Training recipes: one YAML file each, named after the network, with every value that the publication states."""

from __future__ import annotations

from pathlib import Path

from ..options import UsageError, nearest

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The recipes that there are, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def path(name: str) -> Path:
    """The file of a recipe. UsageError where there is none of this name."""
    if name not in names():
        raise UsageError(
            f"there is no recipe {name!r}, the nearest is {nearest(name, names())!r}; there are {', '.join(names())}"
        )
    return _FOLDER / f"{name}.yaml"


def is_recipe(file: Path) -> bool:
    """Whether a file is one of the recipes that there are."""
    return file.parent == _FOLDER
