"""The compiled extension: finds it, loads the variant for this CPU, and keeps the reason where that fails."""

from __future__ import annotations


def why_not() -> str | None:
    """None when the compiled CPU kernels are loaded, else the reason."""
    return "the extension is not built"
