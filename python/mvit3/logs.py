"""Records of a run for other programs: a CSV file with a row for each epoch, and TensorBoard events."""

from __future__ import annotations

import csv
import io
import os
import uuid
from pathlib import Path

from .errors import Failure


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


class WeightsAndBiases:
    """Scalars by the step in a project of Weights & Biases; a run that goes on is one run there, by the name in
    `wandb.id`."""

    def __init__(self, project: str, folder: Path, config: dict[str, object], step: int) -> None:
        import wandb  # takes seconds to import

        name = folder / "wandb.id"
        if not step or not name.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write(name, uuid.uuid4().hex)
        try:
            self.run = wandb.init(
                project=project,
                name=folder.name,
                dir=str(folder),
                config=config,
                id=name.read_text(encoding="utf-8"),
                resume="allow",
            )
        except Exception as error:  # it has errors of many kinds: no key, no connection
            raise Failure(f"run.wandb {project}: Weights & Biases cannot be logged to: {error}") from error

    def add(self, step: int, **scalars: float | None) -> None:
        self.run.log({name: value for name, value in scalars.items() if value is not None}, step=step)

    def close(self) -> None:
        self.run.finish()
