"""`mvit3 predict` for segmentation and detection: pictures and files of what a network finds, each image told as soon
as it is known."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from mvit3_kernels.tasks import detections

from .checkpoint import CheckpointError
from .config import TrainConfig, check_output
from .data.decode import Decoder
from .data.masks import VOC_CLASSES
from .data.transforms import MAX_RATIO, Resize, as_tensor, normalise, short_side
from .inference import Network
from .names import task_of
from .options import UsageError
from .overlay import VOID, detection_overlay, label_image, name_of, segmentation_overlay, shares
from .prediction import BATCH, CsvWriter, Image, JsonWriter, Reader
from .runtime import autocast, use_ops
from .screen import pad, percent, width
from .tasks.segmentation import whole_strides

PIXELS = 16_000_000  # of the images that are held at once, as they came
LONGEST_NAME = 200  # bytes, of the 255 that a file system takes with what is added
RESULTS = "detections.json"
THRESHOLD = 0.3  # of the scores of boxes that a person looks at


class Size(NamedTuple):
    height: int
    width: int


@dataclass(frozen=True)
class Options:
    """`folder`: of the files; `threshold`: the score that a box must exceed; `top`: classes that a line of text
    names."""

    folder: Path
    threshold: float
    top: int


def options(config: TrainConfig, output: str | None, threshold: float | None, top: int) -> Options:
    """UsageError for what the network's task does not have, and for a folder that cannot be written."""
    name, task = config.model.name, task_of(config.model.name)
    if output is not None and task == "classification":
        raise UsageError(f"--output is for the files of segmentation and detection; {name} names classes")
    if threshold is not None and task != "detection":
        raise UsageError(f"--threshold is the least score of a box; {name} finds no boxes")
    folder = Path(output) if output is not None else Path(config.run.output).with_name("predictions")
    if task != "classification":
        check_output(str(folder), "--output")
    return Options(folder, THRESHOLD if threshold is None else threshold, top)


def with_names(network: Network) -> Network:
    """The network with the names of the classes, and COCO's ids of them, that its data set is known for, where a
    checkpoint of another origin has none."""
    if network.class_names or network.categories:
        return network
    classes = network.num_classes
    if network.config.data.source == "voc" and classes == len(VOC_CLASSES):
        return replace(network, class_names=VOC_CLASSES)
    if network.config.data.source == "coco":
        from torchvision.models.detection import SSD300_VGG16_Weights

        known = enumerate(SSD300_VGG16_Weights.COCO_V1.meta["categories"])  # by id, with gaps
        ids, names = zip(*((i, name) for i, name in known if i and name != "N/A"), strict=True)
        if classes == len(ids) + 1:
            return replace(network, class_names=names, categories=ids)
    return network


class Places:
    """Names of the files of each image in one folder: `<name>_overlay.png`, and with a number where two images have one
    name, or where that would be an image that is read."""

    def __init__(self, folder: Path, images: Sequence[Image]) -> None:
        self.folder, self.real = folder, Path(os.path.realpath(folder))
        self.taken = {_key(Path(os.path.realpath(image.path))) for image in images}
        self.numbers: Counter[str] = Counter()  # of each name, that of its last image

    def of(self, image: Image, kinds: Sequence[str]) -> dict[str, Path]:
        """The file of each kind."""
        name = image.path.stem
        while len(os.fsencode(name)) > LONGEST_NAME:
            name = name[:-1]
        while True:
            self.numbers[name] += 1
            number = self.numbers[name]
            stem = f"{name}_{number}" if number > 1 else name
            files = {kind: f"{stem}_{kind}.png" for kind in kinds}
            keys = {_key(self.real / file) for file in files.values()}
            if not keys & self.taken:
                self.taken |= keys
                return {kind: self.folder / file for kind, file in files.items()}


def _key(path: Path) -> str:
    """Equal for names of one file, on systems too that do not tell capitals from small letters."""
    return str(path).casefold()


def _save(image: PIL.Image.Image, path: Path) -> str:
    """Writes a PNG that is whole or not there; its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, "PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return str(path)


class Segmentation:
    """Classes of pixels. `row` writes the overlay and the labels of an image."""

    def __init__(self, network: Network, options: Options) -> None:
        self.network, self.options, self.names = network, options, network.class_names
        self.crop, self.resize = network.config.data.crop, Resize(network.config.data)
        if network.num_classes > VOID:
            raise UsageError(f"label maps hold at most {VOID} classes, the network has {network.num_classes}")

    def size(self, height: int, width: int) -> Size:
        """Of what the network reads, as its family is evaluated: v1-style a square, unless `data.keep_aspect` is on,
        v2-style the image's shape, whose longer side is at most MAX_RATIO times the shorter one."""
        if not (self.network.model.align_corners or self.network.config.data.keep_aspect):
            return Size(self.crop, self.crop)
        longest = MAX_RATIO * min(height, width)
        return Size(*short_side(min(height, longest), min(width, longest), self.crop))

    def prepare(self, pixels: np.ndarray) -> Tensor:
        return self.resize(as_tensor(pixels), *self.size(*pixels.shape[:2]))

    def find(self, batch: Tensor, size: Size) -> list[np.ndarray]:
        """Labels (H, W) uint8 at `size` of images (N, 3, h, w)."""
        model = self.network.model
        logits, _ = model.small_logits(whole_strides(batch, model))
        _check_finite(logits)
        return list(model.labels(logits.float(), size).byte().cpu().numpy())

    def row(self, pixels: np.ndarray, labels: np.ndarray, files: dict[str, Path]) -> dict[str, object]:
        classes = [
            {"name": name_of(self.names, label), "index": label, "pixels": n, "share": n / labels.size}
            for label, n in shares(labels).items()
        ]
        overlay = _save(segmentation_overlay(pixels, labels, self.names), files["overlay"])
        written = _save(label_image(labels, self.names), files["labels"])
        return {"classes": classes, "overlay": overlay, "labels": written}


class Detection:
    """Boxes. `row` writes the overlay of an image."""

    def __init__(self, network: Network, options: Options) -> None:
        self.network, self.options, self.names = network, options, network.class_names
        self.crop, self.resize = network.config.data.crop, Resize(network.config.data)

    def category(self, label: int) -> int:
        """Of a label from 1 on: its id in the data set that the network was trained on, else the label."""
        categories = self.network.categories
        return categories[label - 1] if label <= len(categories) else label

    def prepare(self, pixels: np.ndarray) -> Tensor:
        return self.resize(as_tensor(pixels), self.crop, self.crop)

    def find(self, batch: Tensor, size: Size) -> list[list[dict[str, object]]]:
        """Of images (N, 3, h, w) their boxes at `size`, clipped to it, the surest first."""
        model = self.network.model
        scores, offsets = model(batch)
        _check_finite(scores, offsets)
        limits = self.network.config.detection.limits() | {"score_threshold": self.options.threshold}
        found = detections(scores, offsets, model.anchors(batch.shape[2:]), **limits)
        sides = torch.tensor((size.width, size.height) * 2, dtype=torch.float64)
        return [self._boxes(one.boxes.cpu().double().clamp(0, 1) * sides, one) for one in found]

    def _boxes(self, corners: Tensor, one) -> list[dict[str, object]]:
        boxes = []
        for (x1, y1, x2, y2), score, label in zip(
            corners.tolist(), one.scores.tolist(), one.labels.tolist(), strict=True
        ):
            box = [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)]
            if box[2] > 0 and box[3] > 0:
                name = name_of(self.names, label - 1)
                boxes.append(
                    {"name": name, "category_id": self.category(label), "label": label, "bbox": box, "score": score}
                )
        return sorted(boxes, key=lambda box: -box["score"])

    def row(self, pixels: np.ndarray, boxes: list[dict[str, object]], files: dict[str, Path]) -> dict[str, object]:
        corners = np.array([box["bbox"] for box in boxes]).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        labels, scores = ([box[key] for box in boxes] for key in ("label", "score"))
        overlay = _save(detection_overlay(pixels, corners, labels, scores, self.names), files["overlay"])
        return {"boxes": boxes, "overlay": overlay}


def _check_finite(*outputs: Tensor) -> None:
    if not all(output.isfinite().all() for output in outputs):
        raise CheckpointError("the network's output is not finite; it tells nothing of these images")


TASKS = {"segmentation": (Segmentation, ("overlay", "labels")), "detection": (Detection, ("overlay",))}


@torch.inference_mode()
def predict(
    network: Network, images: Sequence[Image], options: Options, say: Callable[[str], None] = lambda text: None
) -> Iterator[dict[str, object]]:
    """For each image in turn what is found in it and the files that show it, or why it cannot be read; `say` as in
    `Reader`."""
    data = network.config.data
    task, kinds = TASKS[task_of(network.config.model.name)]
    worker, places = task(network, options), Places(options.folder, images)
    decoder = Decoder("auto" if data.decoder == "nvjpeg" else data.decoder, data.exif_orientation)
    read = Reader(lambda path: decoder.decode(path.read_bytes()), decoder, say)
    held: list[tuple[Image, np.ndarray | None, str]] = []
    for image in images:
        held.append((image, *read(image)))
        pixels = sum(found.size // 3 for _, found, _ in held if found is not None)
        if len(held) == BATCH or pixels >= PIXELS or image is images[-1]:
            yield from _rows(worker, held, lambda image: places.of(image, kinds))
            held = []


def _rows(
    worker: Segmentation | Detection,
    held: Sequence[tuple[Image, np.ndarray | None, str]],
    files: Callable[[Image], dict[str, Path]],
) -> Iterator[dict[str, object]]:
    """Of images that are read: those of one size in one batch."""
    network = worker.network
    run, device = network.config.run, next(network.model.parameters()).device
    groups: dict[Size, list[int]] = {}
    for index, (_, pixels, _) in enumerate(held):
        if pixels is not None:
            groups.setdefault(Size(*pixels.shape[:2]), []).append(index)
    found = {}
    for size, indices in groups.items():
        batch = torch.stack([worker.prepare(held[index][1]) for index in indices])
        batch = normalise(batch.flip(1) if network.config.data.colors == "bgr" else batch, network.config.data)
        layout = torch.channels_last if run.channels_last else torch.contiguous_format
        with use_ops(run.ops), autocast(run, device):
            results = worker.find(batch.to(device, memory_format=layout), size)
        found |= dict(zip(indices, results, strict=True))
    for index, (image, pixels, error) in enumerate(held):
        row = {"image": str(image.path)}
        if pixels is None:
            yield row | {"error": error}
        else:
            row |= {"height": pixels.shape[0], "width": pixels.shape[1]}
            yield row | worker.row(pixels, found[index], files(image))


class Results:
    """The boxes of all images as a file in COCO's result format, which grows image by image and is valid JSON once it
    is closed. An image's id is its name where all names are numbers, as COCO's are, else its place in the list from 1
    on; `file_name` and `category` say both in words."""

    def __init__(self, folder: Path, images: Sequence[Image]) -> None:
        stems = [image.path.stem for image in images]
        numbers = all(stem.isdecimal() for stem in stems) and len(set(map(int, stems))) == len(stems)
        self.ids = iter(map(int, stems) if numbers else range(1, len(stems) + 1))
        self.path = folder / RESULTS
        self.file = self.path.open("w", encoding="utf-8")
        self.writer = JsonWriter(lambda line: self.file.write(f"{line}\n"))

    def begin(self) -> None:
        self.writer.begin()

    def add(self, row: dict[str, object]) -> None:
        image = {"image_id": next(self.ids), "file_name": Path(row["image"]).name}
        for box in row.get("boxes", ()):
            kept = {key: box[key] for key in ("category_id", "bbox", "score")}
            self.writer.add(image | kept | {"category": box["name"]})
        self.file.flush()

    def end(self) -> None:
        self.writer.end()
        self.file.close()


class SegmentationText:
    """A line for each image with its largest classes."""

    def __init__(self, write: Callable[[str], None], images: Sequence[Image], top: int) -> None:
        self.write, self.top = write, top
        self.width = max(width(str(image.path)) for image in images)

    def begin(self) -> None:
        self._line("image", "classes and their share of the pixels")
        self.write("-" * (self.width + 39))

    def add(self, row: dict[str, object]) -> None:
        if "error" in row:
            self._line(row["image"], row["error"])
            return
        parts = [f"{found['name']} {percent(found['share'])}" for found in row["classes"]]
        more = [f"{len(parts) - self.top} more"] if len(parts) > self.top else []
        self._line(row["image"], ", ".join(parts[: self.top] + more))

    def _line(self, image: str, text: str) -> None:
        self.write(f"{pad(image, self.width)}  {pad(text, 0)}".rstrip())

    def end(self) -> None:
        pass


class DetectionText:
    """A table with a row for each box."""

    def __init__(self, write: Callable[[str], None], images: Sequence[Image], names: Sequence[str]) -> None:
        self.write = write
        self.widths = max(width(str(image.path)) for image in images), max(map(width, (*names, "class", "no boxes")))

    def begin(self) -> None:
        self._line("image", "", "class", "score", "x, y, width, height")
        self.write("-" * (sum(self.widths) + 40))

    def add(self, row: dict[str, object]) -> None:
        if not row.get("boxes"):
            self._line(row["image"], "", row.get("error", "no boxes"))
        for place, box in enumerate(row.get("boxes", ()), 1):
            where = ", ".join(f"{value:.1f}" for value in box["bbox"])
            self._line(row["image"] if place == 1 else "", str(place), box["name"], percent(box["score"]), where)

    def _line(self, image: str, place: str, name: str, score: str = "", box: str = "") -> None:
        cells = pad(image, self.widths[0]), f"{place:>3}", pad(name, self.widths[1]), f"{score:>7}", box
        self.write("  ".join(cells).rstrip())

    def end(self) -> None:
        pass


class SegmentationCsv(CsvWriter):
    """A row for each class of each image, and one with the reason for an image that cannot be read."""

    COLUMNS = ("image", "class", "index", "pixels", "share", "error")

    def add(self, row: dict[str, object]) -> None:
        if "error" in row:
            self.rows.writerow([row["image"], "", "", "", "", row["error"]])
        for found in row.get("classes", ()):
            values = (found[key] for key in ("name", "index", "pixels", "share"))
            self.rows.writerow([row["image"], *values, ""])


class DetectionCsv(CsvWriter):
    """A row for each box of each image, in pixels; one without a box for an image that has none, and one with the
    reason for an image that cannot be read."""

    COLUMNS = ("image", "place", "class", "category_id", "score", "x", "y", "width", "height", "error")

    def add(self, row: dict[str, object]) -> None:
        if not row.get("boxes"):
            self.rows.writerow([row["image"], *[""] * 8, row.get("error", "")])
        for place, box in enumerate(row.get("boxes", ()), 1):
            values = (box[key] for key in ("name", "category_id", "score"))
            self.rows.writerow([row["image"], place, *values, *box["bbox"], ""])


Writer = SegmentationText | DetectionText | JsonWriter | CsvWriter | Results


def writers_for(
    network: Network, kind: str, write: Callable[[str], None], images: Sequence[Image], options: Options
) -> list[Writer]:
    """The writer of "text", "json" or "csv", which gives its lines to `write`, and that of the file of all boxes."""
    detection = task_of(network.config.model.name) == "detection"
    if kind == "json":
        writer = JsonWriter(write)
    elif kind == "csv":
        writer = DetectionCsv(write) if detection else SegmentationCsv(write)
    elif detection:
        writer = DetectionText(write, images, network.class_names)
    else:
        writer = SegmentationText(write, images, options.top)
    options.folder.mkdir(parents=True, exist_ok=True)
    return [writer, Results(options.folder, images)] if detection else [writer]
