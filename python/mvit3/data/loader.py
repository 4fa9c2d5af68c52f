"""Batches for training and validation."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..names import task_of
from ..options import UsageError
from . import dense, gpu
from .config import AugmentConfig, DataConfig, SamplerConfig
from .decode import DecodeError
from .errors import DataError
from .sampler import BatchSampler, Sample
from .sources import Source, open_source
from .targets import Indexed, Target, collate, tensors, to_device
from .transforms import EvaluationTransform, TrainTransform, normalise

# Images (N, 3, H, W) float32 channels_last, normalised, and their targets: classes (N,) int64, labels (N, H, W) int64
# or a list of (H, W), Boxes; in the evaluation of detection then the indices of the images (N,) int64.
Batch = tuple
Unreadable = tuple[int, str]  # index and reason


@dataclass(frozen=True)
class Met:
    """What was met while an image was loaded: unreadable images, and remarks about readable ones, such as 16-bit
    pixels."""

    unreadable: list[Unreadable] = field(default_factory=list)
    remarks: list[tuple[int, str]] = field(default_factory=list)


HostBatch = tuple[Tensor | list, object, Met, int]  # images, targets, what was met, places left empty
REPLACEMENTS = 16  # images tried for one place in a batch, before something else must be wrong
REMARKS = 20  # different ones that are said of the images of a part
# from one to the next of them, as a share of all: the golden section leaves a folder that is unreadable as a whole at
# once
HOP = 0.618


_TRAINING = {
    "classification": TrainTransform,
    "segmentation": dense.SegmentationTraining,
    "detection": dense.DetectionTraining,
}
_EVALUATION = {
    "classification": EvaluationTransform,
    "segmentation": dense.SegmentationEvaluation,
    "detection": dense.DetectionEvaluation,
}


class _Sections(Protocol):
    """A configuration with the sections that concern data, and where it is not one of a classifier `model`."""

    data: DataConfig
    augment: AugmentConfig
    sampler: SamplerConfig


def _task(config: _Sections) -> str:
    """A configuration without a network is one of a classifier."""
    return task_of(config.model.name) if hasattr(config, "model") else "classification"


class _Training(Dataset):
    """Sample -> (pixels or plan, target, what was met). Another image of the source stands in for an unreadable one,
    always the same, so that batches keep their size; the randomness stays that of the place in the epoch."""

    def __init__(self, source: Source, config: _Sections, seed: int) -> None:
        self.source, self.labels, self.seed = source, source.labels, seed
        self.plans = config.data.decoder == "nvjpeg"
        self.dense = _task(config) != "classification"
        self.transform = _TRAINING[_task(config)](config.data, config.augment)

    def __getitem__(self, sample: Sample) -> tuple[Tensor | gpu.Plan | None, Target, Met]:
        return self.load(sample, self.plans)

    def load(self, sample: Sample, plans: bool = False) -> tuple[Tensor | gpu.Plan | None, Target, Met]:
        """`plans`: leaves to the GPU what it can do."""
        index, size, epoch, position = sample
        key = self.seed, epoch, position
        met, decoder = Met(), self.transform.decoder
        for _ in range(REPLACEMENTS):
            try:
                encoded, target = self.source.read(index), int(self.labels[index])
                if plans and gpu.can_decode(encoded, decoder.turn):
                    box, flip = self.transform.geometry(*decoder.size(encoded), key)
                    return gpu.Plan(encoded, box, flip, size, key, sample), target, met
                if self.dense:
                    pixels, target = self.transform(encoded, self.source.truth(index), size, key)
                else:
                    pixels = self.transform(encoded, size, key)
                met.remarks.extend((index, remark) for remark in decoder.take_remarks())
                return pixels, target, met
            except (DecodeError, OSError) as error:
                met.unreadable.append((index, str(error)))
                index = (index + max(1, round(HOP * len(self.labels)))) % len(self.labels)
        return None, -1, met


class _Validation(Dataset):
    """Index -> (pixels or None, target, what was met)."""

    def __init__(self, source: Source, config: _Sections) -> None:
        self.source, self.labels = source, source.labels
        self.dense = _task(config) != "classification"
        self.transform = _EVALUATION[_task(config)](config.data)

    def __getitem__(self, index: int) -> tuple[Tensor | None, Target, Met]:
        try:
            if self.dense:
                pixels, target = self.transform(self.source.read(index), self.source.truth(index), index)
            else:
                pixels, target = self.transform.pixels(self.source.read(index)), int(self.labels[index])
        except (DecodeError, OSError) as error:
            return None, -1, Met([(index, str(error))])
        return pixels, target, Met([], [(index, remark) for remark in self.transform.decoder.take_remarks()])


def _collate(samples: list[tuple]) -> HostBatch:
    """Pixels as one tensor (N, H, W, 3) uint8, or a list where some wait for the GPU."""
    met = Met(
        [found for *_, met in samples for found in met.unreadable],
        [found for *_, met in samples for found in met.remarks],
    )
    usable = [sample for sample in samples if sample[0] is not None]
    images, targets = [image for image, *_ in usable], collate([target for _, target, _ in usable])
    empty = len(samples) - len(usable)
    if not images or any(isinstance(image, gpu.Plan) for image in images):
        return images, targets, met, empty
    return torch.stack([image.permute(1, 2, 0) for image in images]), targets, met, empty


def _start_worker(_: int) -> None:
    """A loading process lives until the training process lets it go or dies: a signal to stop is for the latter, which
    first saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(0)


def _end_workers() -> None:
    """Before the process ends, whatever ends it: workers do not hear the SIGTERM by which multiprocessing ends them
    before it waits."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch makes an error of a worker's end
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def loading_processes(config: DataConfig, device: torch.device) -> int:
    """How many processes load images for one training process. On a CPU one suffices: it is the network that takes the
    cores."""
    if config.workers >= 0:
        return config.workers
    if config.source == "digits":  # in memory
        return 0
    if device.type == "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class _Loader:
    """What the loaders of training and validation share: batches on the device, time spent waiting for them, unreadable
    images."""

    def __init__(
        self,
        part: str,
        source: Source,
        data: DataConfig,
        device: torch.device,
        dataset: Dataset,
        batches,
        persistent: bool,
    ) -> None:
        self.part, self.source, self.data, self.device = part, source, data, device
        self.unreadable: dict[str, str] = {}
        self.remarks: dict[str, str] = {}  # remark about images -> the first of them
        self.say: Callable[[str], None] = lambda text: None  # is told each remark once
        self.wait_seconds = 0.0
        workers = loading_processes(data, device)
        self._loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            prefetch_factor=data.prefetch if workers else None,
            persistent_workers=persistent and workers > 0,
            worker_init_fn=_start_worker,
            # the loader seeds its processes, which is not to touch the generator that dropout draws from
            generator=torch.Generator(),
        )

    def _to_device(self, images: Tensor | list, targets: object) -> Batch:
        images = normalise(images.to(self.device, non_blocking=True).permute(0, 3, 1, 2), self.data)
        targets = to_device(targets, self.device)
        return (images, *targets) if isinstance(targets, Indexed) else (images, targets)

    def _ahead(self, batches: Iterator[HostBatch]) -> Iterator[Batch]:
        """Brings the next batch to the GPU, on a stream of its own, before it gives the present one."""
        stream, staged = torch.cuda.Stream(self.device), None
        for batch in batches:
            present = staged
            with torch.cuda.stream(stream):
                staged = self._to_device(*batch), stream.record_event()
            if present is not None:
                yield self._ready(*present)
        if staged is not None:
            yield self._ready(*staged)

    def _ready(self, batch: Batch, event: torch.cuda.Event) -> Batch:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        for tensor in tensors(batch):
            tensor.record_stream(current)  # its memory is not given away before the step has used it
        return batch

    def _note(self, met: Met) -> None:
        """Says what is new; remembers unreadable images. DataError where there are too many of them."""
        for index, remark in met.remarks:
            if remark not in self.remarks:
                self.remarks[remark] = self.source.image_name(index)
                if len(self.remarks) <= REMARKS:
                    self.say(f"{self.remarks[remark]}: {remark}; this is said once")
        unreadable = met.unreadable
        for index, reason in unreadable:
            self.unreadable[self.source.image_name(index)] = reason
        total = len(self.source.labels)
        if unreadable and len(self.unreadable) > self.data.max_corrupt * total:
            some = "; ".join(f"{name}: {reason}" for name, reason in islice(self.unreadable.items(), 5))
            raise DataError(
                f"{len(self.unreadable)} of {total} {self.part} images cannot be read, more than data.max_corrupt "
                "allows "
                f"({self.data.max_corrupt:.2%}): {some}"
            )

    def _not_filled(self, unreadable: list[Unreadable]) -> None:
        """What becomes of a batch with less images than it should have."""

    def _host(self) -> Iterator[tuple[Tensor | list, object]]:
        """Batches as the loading processes give them."""
        batches = iter(self._loader)
        if self._loader.num_workers:
            atexit.unregister(_end_workers)
            # the last to be registered is the first to be called, before those that wait for workers
            atexit.register(_end_workers)
        while True:
            try:
                images, targets, met, empty = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker (pid"):  # an error inside it is told as it is
                    raise
                # It was killed, as by a machine that is out of memory.
                raise DataError(
                    f"a process that loads {self.part} images died: {error}; data.workers 0 does without"
                ) from error
            self._note(met)
            if empty:
                self._not_filled(met.unreadable)
            if len(images):
                yield images, targets

    def _batches(self) -> Iterator[Batch]:
        self.wait_seconds = 0.0
        batches = (
            self._ahead(self._host())
            if self.device.type == "cuda"
            else (self._to_device(*batch) for batch in self._host())
        )
        started = time.perf_counter()
        for batch in batches:
            self.wait_seconds += time.perf_counter() - started
            yield batch
            started = time.perf_counter()
        self.wait_seconds += time.perf_counter() - started


class TrainLoader(_Loader):
    """Batches of this process for training.

    `say` is told once of each kind of image that is read in a way that is a choice (`remarks`). `wait_seconds`: time
    that the caller waited for data in the epoch that runs or ran last. `unreadable`: name and reason of each image that
    another one stood in for, since the start.
    """

    def __init__(
        self, source: Source, config: _Sections, seed: int, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.sampler = BatchSampler(config.sampler, config.data.batch_size, len(source.labels), seed, rank, world_size)
        self._dataset = _Training(source, config, seed)
        super().__init__("training", source, config.data, device, self._dataset, self.sampler, persistent=True)

    def __len__(self) -> int:
        """Batches of an epoch, the same on every process."""
        return len(self.sampler)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from `start_batch` on: images (N, 3, H, W) float32, channels_last, normalised, and
        classes (N,) int64, labels of pixels (N, H, W) int64 or `Boxes`, on the device. They depend on the seed, the
        epoch and the number of the batch alone. DataError where too many images are unreadable."""
        self.sampler.epoch, self.sampler.start = epoch, start_batch
        yield from self._batches()

    def _not_filled(self, unreadable: list[Unreadable]) -> None:
        index, reason = unreadable[-1]
        raise DataError(
            f"{REPLACEMENTS} training images in turn cannot be read, the last one {self.source.image_name(index)}: "
            f"{reason}"
        )

    def _to_device(self, images: Tensor | list, targets: object) -> Batch:
        if isinstance(images, list):
            images, targets = self._on_gpu(images, targets)
        return super()._to_device(images, targets)

    def _on_gpu(self, images: list[Tensor | gpu.Plan], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Does what plans say; an image that the GPU cannot decode takes the CPU's way, where another one may stand in
        for it."""
        plans = [image for image in images if isinstance(image, gpu.Plan)]
        done = iter(gpu.pixels(plans, self._dataset.transform, self.device))
        for i, image in enumerate(images):
            pixels = next(done) if isinstance(image, gpu.Plan) else image
            if pixels is None:
                pixels, labels[i], met = self._dataset.load(image.sample)
                self._note(met)
                if pixels is None:
                    self._not_filled(met.unreadable)
            images[i] = pixels.to(self.device).permute(1, 2, 0)
        return torch.stack(images), labels


class EvaluationLoader(_Loader):
    """Batches of this process for evaluation: every world_size-th one, in the order of the source, so that batches are
    the same on any number of processes. An unreadable image is left out, and named in `unreadable`."""

    def __init__(self, source: Source, config: _Sections, rank: int, world_size: int, device: torch.device) -> None:
        count, size = len(source.labels), config.data.eval_batch_size
        self.batches = [
            range(start, min(start + size, count)) for start in range(rank * size, count, world_size * size)
        ]
        super().__init__(
            "validation", source, config.data, device, _Validation(source, config), self.batches, persistent=False
        )

    def __len__(self) -> int:
        """Batches of this process."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        """images (N, 3, crop, crop) float32, channels_last, normalised, and classes (N,) int64; or labels of pixels (N,
        crop, crop) int64, with data.native_labels a list of (H, W); or `Boxes` and the indices of the images in
        `source` (N,) int64. On the device."""
        return self._batches()


@dataclass(frozen=True)
class Loaders:
    """Images of both parts. `notes`: what a person should know before the run, a line each; `images_per_epoch`: over
    all processes."""

    train: TrainLoader
    val: EvaluationLoader
    num_classes: int  # outputs of a network; in detection one more than class names, output 0 being the background
    class_names: tuple[str, ...]
    images_per_epoch: int
    notes: tuple[str, ...]


def loaders(
    config: _Sections, *, rank: int = 0, world_size: int = 1, seed: int = 0, device: torch.device | str = "cpu"
) -> Loaders:
    """Loaders of the sections `data`, `augment` and `sampler` of a configuration, for process `rank` of `world_size`.

    UsageError where the options cannot be met, DataError where images or labels cannot be used; both before any image
    is decoded.
    """
    device = torch.device(device)
    if config.data.decoder == "nvjpeg":
        gpu.check(device, config.augment)
    task = _task(config)
    train = open_source(config.data, "train", task=task)
    if config.sampler.aug_repeats > len(train.labels):
        raise UsageError(
            f"sampler.aug_repeats must be at most the training images, {len(train.labels)}, got "
            f"{config.sampler.aug_repeats}"
        )
    val = open_source(config.data, "val", train.class_names, task)
    loader = TrainLoader(train, config, seed, rank, world_size, device)
    return Loaders(
        loader,
        EvaluationLoader(val, config, rank, world_size, device),
        len(train.class_names) + (task == "detection"),
        train.class_names,
        loader.sampler.images,
        train.notes + val.notes,
    )


def validation(
    config: _Sections,
    class_names: Sequence[str] = (),
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> EvaluationLoader:
    """The validation part alone; `class_names`: the classes of the network, in its order, where the folders are not all
    of them. With data.val empty, data.root itself is that part. `source.notes` has what a person should know."""
    return EvaluationLoader(
        open_source(config.data, "val", class_names, _task(config)), config, rank, world_size, torch.device(device)
    )
