"""Records of a run for other programs: a CSV file with a row for each epoch, and TensorBoard events."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Writes a file that is always whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    """The history, whole each time: a run that goes on from an earlier step leaves no rows of what was undone."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write(path, text.getvalue())


class TensorBoard:
    """Scalars by the step; events that a resumed run does again replace the old ones."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        self.writer = SummaryWriter(str(folder), purge_step=step)

    def add(self, step: int, **scalars: float | None) -> None:
        for name, value in scalars.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()
