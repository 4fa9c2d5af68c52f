"""`mvit3 predict`: classes of images, each told as soon as it is known."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import torch

from .checkpoint import CheckpointError
from .data import DataError, DecodeError, evaluation_transform
from .data.decode import Decoder
from .data.folders import IMAGE_EXTENSIONS, Skipped, walk_images
from .data.shards import read_class_names, side_file
from .inference import Network
from .names import task_of
from .options import UsageError
from .runtime import autocast, use_ops
from .screen import pad, percent, width

BATCH = 32
T = TypeVar("T")


@dataclass(frozen=True)
class Image:
    """A file to be read, or why it is none. `named`: it was given by its own name, not found in a folder."""

    path: Path
    named: bool
    error: str = ""


def find_images(names: Sequence[str | Path], say: Callable[[str], None] = lambda text: None) -> list[Image]:
    """Files as given, or by the wildcards of a shell, folders by the images in them; `say` is told what is left out
    there, as in training. UsageError for an empty name, which would be the present folder."""
    found: list[Image] = []
    for name in map(os.fspath, names):
        if not name:
            raise UsageError("the name of an image is empty")
        matched = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.lexists(name) else [name]
        if not matched:
            found.append(Image(Path(name), True, "no file matches"))
        found += [image for path in matched for image in _images(Path(path), say)]
    return found


def _images(path: Path, say: Callable[[str], None]) -> list[Image]:
    """A file as it is, a folder by the images in it."""
    if not path.is_dir():
        return [Image(path, True, "" if path.exists() else "there is no such file")]
    skipped = Skipped()
    inside = [Image(image, False) for image in walk_images(path, skipped)]
    for note in skipped.notes(path):
        say(note)
    return inside or [Image(path, True, f"holds no image ({', '.join(IMAGE_EXTENSIONS)})")]


def with_names(network: Network) -> Network:
    """The network with the class names of the side file of its shards, where its checkpoint has only numbers."""
    data, outputs = network.config.data, network.num_classes
    if task_of(network.config.model.name) == "detection":
        outputs -= 1  # the background has no name
    numbers = tuple(map(str, range(outputs)))
    if network.class_names not in ((), numbers) or not (data.class_map or (data.source == "shards" and data.root)):
        return network
    side = side_file(data.class_map, data.root, ())
    if side is None:
        return network
    names = read_class_names(side)
    if len(names) != outputs:
        raise DataError(f"{side} names {len(names)} classes, the network has {outputs}")
    return replace(network, class_names=names)


class Reader(Generic[T]):
    """Reads images one by one. `say` is told once of each kind of image that is read in a way that is a choice, such as
    16-bit ones."""

    def __init__(self, read: Callable[[Path], T], decoder: Decoder, say: Callable[[str], None]) -> None:
        self.read, self.decoder, self.say, self.said = read, decoder, say, set()

    def __call__(self, image: Image) -> tuple[T | None, str]:
        """What `read` makes of it, and why it cannot be read."""
        if image.error:
            return None, image.error
        try:
            value = self.read(image.path)
        except (DecodeError, OSError) as error:
            return None, f"cannot be read: {getattr(error, 'strerror', None) or error}"
        for remark in set(self.decoder.take_remarks()) - self.said:
            self.said.add(remark)
            self.say(f"{image.path}: {remark}; this is said once")
        return value, ""


@torch.inference_mode()
def predict(
    network: Network, images: Sequence[Image], top: int, say: Callable[[str], None] = lambda text: None
) -> Iterator[dict[str, object]]:
    """For each image in turn its most probable classes, or why it cannot be read; `say` as in `Reader`."""
    transform, run = evaluation_transform(network.config), network.config.run
    read = Reader(transform, transform.decoder, say)
    device = next(network.model.parameters()).device
    for begin in range(0, len(images), BATCH):
        pixels, rows = [], []
        for image in images[begin : begin + BATCH]:
            rows.append({"image": str(image.path)})
            found, error = read(image)
            if error:
                rows[-1]["error"] = error
            else:
                pixels.append(found)
        if pixels:
            batch = torch.stack(pixels).to(device)
            batch = batch.contiguous(memory_format=torch.channels_last) if run.channels_last else batch
            with use_ops(run.ops), autocast(run, device):
                logits = network.model(batch).float()
            if not logits.isfinite().all():
                raise CheckpointError(
                    f"the network's output is not finite for images like {rows[0]['image']}; it tells no class"
                )
            probabilities = logits.softmax(1)
            values, classes = probabilities.topk(min(top, network.num_classes))
            readable = (row for row in rows if "error" not in row)
            for row, p, c in zip(readable, values.tolist(), classes.tolist(), strict=True):
                names = [network.class_names[i] if i < len(network.class_names) else str(i) for i in c]
                row["classes"] = [
                    {"name": n, "index": i, "probability": v} for n, i, v in zip(names, c, p, strict=True)
                ]
        yield from rows


class TextWriter:
    """A table; its widths are known before its rows."""

    def __init__(self, write: Callable[[str], None], images: Sequence[Image], class_names: Sequence[str]) -> None:
        self.write = write
        self.widths = max(width(str(image.path)) for image in images), max(map(width, (*class_names, "class")))

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
        cells = pad(image, self.widths[0]), place, pad(name, self.widths[1]), f"{probability:>11}"
        self.write("  ".join(cells).rstrip())


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
        self.rows = csv.writer(self, lineterminator="\n")  # a field that holds one is quoted
        self.lines = write

    def write(self, line: str) -> None:  # for csv.writer
        self.lines(line.removesuffix("\n"))

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
