"""`mvit3 predict`: classes of images, each told as soon as it is known."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .checkpoint import CheckpointError
from .data import DataError, DecodeError, evaluation_transform
from .data.sources import IMAGE_EXTENSIONS, Skipped, read_class_names, side_file, walk_images
from .inference import Network
from .runtime import autocast, use_ops
from .screen import percent

BATCH = 32


@dataclass(frozen=True)
class Image:
    """A file to be read, or why it is none. `named`: it was given by its own name, not found in a folder."""

    path: Path
    named: bool
    error: str = ""


def find_images(paths: Sequence[Path], say: Callable[[str], None] = lambda text: None) -> list[Image]:
    """Files as given, folders by the images in them; `say` is told what is left out there, as in training."""
    found: list[Image] = []
    for path in paths:
        if path.is_dir():
            skipped = Skipped()
            inside = [Image(image, False) for image in walk_images(path, skipped)]
            found += inside or [Image(path, True, f"holds no image ({', '.join(IMAGE_EXTENSIONS)})")]
            for note in skipped.notes(path):
                say(note)
        else:
            found.append(Image(path, True, "" if path.exists() else "there is no such file"))
    return found


def with_names(network: Network) -> Network:
    """The network with the class names of the side file of its shards, where its checkpoint has only numbers."""
    data, numbers = network.config.data, tuple(map(str, range(network.num_classes)))
    if network.class_names not in ((), numbers) or not (data.class_map or (data.source == "shards" and data.root)):
        return network
    side = side_file(data.class_map, data.root, ())
    if side is None:
        return network
    names = read_class_names(side)
    if len(names) != network.num_classes:
        raise DataError(f"{side} names {len(names)} classes, the network has {network.num_classes}")
    return replace(network, class_names=names)


@torch.inference_mode()
def predict(
    network: Network, images: Sequence[Image], top: int, say: Callable[[str], None] = lambda text: None
) -> Iterator[dict[str, object]]:
    """For each image in turn its most probable classes, or why it cannot be read; `say` is told once of each kind of image that is read in
    a way that is a choice, such as 16-bit ones."""
    transform, run, said = evaluation_transform(network.config), network.config.run, set()
    device = next(network.model.parameters()).device
    for begin in range(0, len(images), BATCH):
        pixels, rows = [], []
        for image in images[begin : begin + BATCH]:
            rows.append({"image": str(image.path)})
            try:
                if image.error:
                    rows[-1]["error"] = image.error
                else:
                    pixels.append(transform(image.path))
                    for remark in set(transform.decoder.take_remarks()) - said:
                        said.add(remark)
                        say(f"{image.path}: {remark}; this is said once")
            except (DecodeError, OSError) as error:
                rows[-1]["error"] = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        if pixels:
            batch = torch.stack(pixels).to(device)
            batch = batch.contiguous(memory_format=torch.channels_last) if run.channels_last else batch
            with use_ops(run.ops), autocast(run, device):
                logits = network.model(batch).float()
            if not logits.isfinite().all():
                raise CheckpointError(f"the network's output is not finite for images like {rows[0]['image']}; it tells no class")
            probabilities = logits.softmax(1)
            values, classes = probabilities.topk(min(top, network.num_classes))
            readable = (row for row in rows if "error" not in row)
            for row, p, c in zip(readable, values.tolist(), classes.tolist(), strict=True):
                names = [network.class_names[i] if i < len(network.class_names) else str(i) for i in c]
                row["classes"] = [{"name": n, "index": i, "probability": v} for n, i, v in zip(names, c, p, strict=True)]
        yield from rows


class TextWriter:
    """A table; its widths are known before its rows."""

    def __init__(self, write: Callable[[str], None], images: Sequence[Image], class_names: Sequence[str]) -> None:
        self.write = write
        self.widths = max(len(str(image.path)) for image in images), max(map(len, (*class_names, "class")))

    def begin(self) -> None:
        self._line("image", " ", "class", "probability")
        self.write("-" * (sum(self.widths) + 18))

    def add(self, row: dict[str, object]) -> None:
        if "error" in row:
            self._line(row["image"], " ", row["error"], "")
        for place, guess in enumerate(row.get("classes", ()), 1):
            self._line(row["image"] if place == 1 else "", str(place), guess["name"], percent(guess["probability"]))

    def end(self) -> None:
        pass

    def _line(self, image: str, place: str, name: str, probability: str) -> None:
        self.write(f"{image:{self.widths[0]}}  {place}  {name:{self.widths[1]}}  {probability:>11}".rstrip())


class JsonWriter:
    """A list with an object for each image, closed whatever happens."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write, self.first = write, True

    def begin(self) -> None:
        self.write("[")

    def add(self, row: dict[str, object]) -> None:
        text = json.dumps(row)
        self.write(text if self.first else f",{text}")
        self.first = False

    def end(self) -> None:
        self.write("]")


class CsvWriter:
    """A row for each class of each image, and one with the reason for an image that cannot be read."""

    COLUMNS = ("image", "place", "class", "index", "probability", "error")

    def __init__(self, write: Callable[[str], None]) -> None:
        self.rows = csv.writer(self, lineterminator="")
        self.lines = write

    def write(self, line: str) -> None:  # for csv.writer
        self.lines(line)

    def begin(self) -> None:
        self.rows.writerow(self.COLUMNS)

    def add(self, row: dict[str, object]) -> None:
        if "error" in row:
            self.rows.writerow([row["image"], "", "", "", "", row["error"]])
        for place, guess in enumerate(row.get("classes", ()), 1):
            self.rows.writerow([row["image"], place, guess["name"], guess["index"], guess["probability"], ""])

    def end(self) -> None:
        pass


def writer_for(
    kind: str, write: Callable[[str], None], images: Sequence[Image], class_names: Sequence[str]
) -> TextWriter | JsonWriter | CsvWriter:
    """The writer of "text", "json" or "csv", which gives its lines to `write`."""
    if kind == "text":
        return TextWriter(write, images, class_names)
    return JsonWriter(write) if kind == "json" else CsvWriter(write)
