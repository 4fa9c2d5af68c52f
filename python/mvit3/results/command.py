"""`mvit3 report`: one HTML page from files of benchmark results, and pictures of it."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import Failure
from ..options import UsageError
from .browser import browser, chromium
from .page import TITLE, page
from .reading import read_all, shown
from .sections import agreement

PAGE = "report.html"


class Shot(NamedTuple):
    """A picture of the top of the page."""

    name: str
    width: int
    height: int
    dark: bool


SHOTS = (Shot("report.png", 1180, 820, False), Shot("report-phone.png", 390, 860, True))


def report(args: argparse.Namespace) -> int:
    """Writes the page, and the pictures where `args.png` names a folder; all files are read, and all is made, before
    anything is written.

    Raises:
        UsageError: an output that cannot be. Failure: a file that is no result, or no Chromium for the pictures.
    """
    output, folder = Path(args.output or PAGE), args.png and Path(args.png)
    if output.is_dir():
        raise UsageError(f"--output {output} is a folder")
    if folder and folder.exists() and not folder.is_dir():
        raise UsageError(f"--png {folder} is a file; it must be a folder")
    files = [Path(name) for name in args.files]
    for written in [output, *(folder / shot.name for shot in SHOTS if folder)]:
        spare(written, files)
    replaceable(output)
    sources = read_all(files)
    text = page(sources)
    taken = pictures(text) if folder else {}
    replace(output, text.encode())
    for name, picture in taken.items():
        replace(folder / name, picture)
    twice = agreement(sources)
    told = {
        "page": shown(str(output)),
        "pictures": [shown(str(folder / name)) for name in taken],
        "figures": {source.file: len(source.figures) for source in sources},
        "twice": list(twice.notes) if twice else [],
    }
    if args.json:
        print(json.dumps(told, indent=1))
    else:
        print("\n".join([*told["twice"], told["page"], *told["pictures"]]))
    return 0


def spare(output: Path, files: Sequence[Path]) -> None:
    """UsageError where this would be written over a file that is read, by whatever name."""
    for file in files:
        same = output.resolve() == file.resolve()
        if same or (output.exists() and file.exists() and output.samefile(file)):
            raise UsageError(f"{output} would replace {file}, which is to be read")


def replaceable(output: Path) -> None:
    """UsageError where a file is there that is no page."""
    if not output.exists():
        return
    if not output.is_file():
        raise UsageError(f"--output {output} is no ordinary file")
    if output.suffix.lower() in (".html", ".htm"):
        return
    with output.open("rb") as file:
        begin = file.read(1000)
    if f"<title>{TITLE}</title>".encode() not in begin:
        raise UsageError(f"--output {output} is there and is no page of mvit3 report; name a new file or one in .html")


def pictures(text: str) -> dict[str, bytes]:
    """PNGs of a page, by name."""
    if chromium() is None:
        raise Failure("--png needs Chromium, which is not there (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as folder, browser() as running:
        file = Path(folder) / PAGE
        file.write_text(text, encoding="utf-8")
        found = {}
        for shot in SHOTS:
            running.show(file, shot.width, shot.height, shot.dark)
            found[shot.name] = running.picture()
        return found


def replace(path: Path, content: bytes) -> None:
    """Whoever reads finds the old file or the new one, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mvit3-", dir=path.parent) as folder:  # no file of that name is there
        part = Path(folder) / "part"
        part.write_bytes(content)
        os.replace(part, path)
