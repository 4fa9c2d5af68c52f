"""Batches from folders, shards and digits: the same on any number of processes and from any batch on; failures of
files, provoked."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import make_images
from mvit3.data import AugmentConfig, DataConfig, DataError, SamplerConfig, loaders, validation
from mvit3.data.loader import TrainLoader, loading_processes
from mvit3.data.sources import open_source
from mvit3.options import UsageError

from .batches import config, equal


def test_folder(images):
    found = loaders(config(images))
    assert (found.num_classes, found.class_names, found.notes) == (3, ("class_00", "class_01", "class_02"), ())
    batches = list(found.train.epoch(0))
    assert (
        len(batches) == len(found.train) and sum(len(labels) for _, labels in batches) == found.images_per_epoch <= 48
    )
    for pixels, labels in batches:
        assert pixels.dtype == torch.float32 and labels.dtype == torch.int64
        assert (
            pixels.shape[:2] == (len(labels), 3)
            and pixels.shape[2] in (24, 32, 40)
            and pixels.is_contiguous(memory_format=torch.channels_last)
        )
        assert pixels.min() >= 0 and pixels.max() <= 1
    assert found.train.wait_seconds > 0
    val = list(found.val)
    assert [len(labels) for _, labels in val] == [5, 5, 2] and torch.cat([labels for _, labels in val]).tolist() == [
        0
    ] * 4 + [1] * 4 + [2] * 4


def test_same_batches_on_any_number_of_processes(images):
    """One process of 8 and two of 4, with loading processes and without."""
    whole = list(loaders(config(images), seed=3).train.epoch(1))
    parts = [
        loaders(config(images, batch_size=4, workers=workers), seed=3, rank=rank, world_size=2)
        for rank, workers in ((0, 0), (1, 2))
    ]
    joined = [
        tuple(torch.cat(pair) for pair in zip(*two, strict=True))
        for two in zip(*(p.train.epoch(1) for p in parts), strict=True)
    ]
    assert equal(joined, whole)
    val = list(loaders(config(images)).val)
    first, second = (list(p.val) for p in parts)
    assert equal([first[0], second[0], first[1]], val)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_at_any_batch(images, workers, monkeypatch):
    """The same batches, without reading the images of those before; an epoch that was left early does not disturb the
    next one."""
    train = loaders(config(images, workers=workers)).train
    whole, next_epoch = list(train.epoch(0)), list(train.epoch(1))
    assert not equal(whole, next_epoch)
    assert equal(list(train.epoch(0, 3)), whole[3:])
    left = train.epoch(0)
    next(left)
    del left
    assert equal(list(train.epoch(1)), next_epoch)
    assert list(train.epoch(0, len(train))) == []
    if not workers:
        read = []
        original = train.source.read
        monkeypatch.setattr(type(train.source), "read", lambda self, index: read.append(index) or original(index))
        rest = list(train.epoch(0, 3))
        assert len(read) == sum(len(labels) for _, labels in rest)


def test_seed_and_generators(images):
    """Another seed, another order and other crops; the generator that dropout draws from is left alone."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = list(loaders(config(images), seed=1).train.epoch(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(
        torch.cat([y for _, y in one]), torch.cat([y for _, y in loaders(config(images), seed=2).train.epoch(0)])
    )
    torch.manual_seed(9)
    assert equal(list(loaders(config(images), seed=1).train.epoch(0)), one)


def test_limits_keep_every_class(images):
    found = loaders(config(images, limit_train=12, limit_val=6))
    assert np.bincount(found.train.source.labels).tolist() == [4, 4, 4] and np.bincount(
        found.val.source.labels
    ).tolist() == [2, 2, 2]
    for pixels, labels in validation(config(images, limit_val=6)):
        assert len(pixels) == len(labels)
    assert len(open_source(config(images, limit_val=100).data, "val").labels) == 12


def test_digits():
    """1,437 and 360 digits; without augmentation an epoch holds the images as they are."""
    data = dict(source="digits", batch_size=64, resize=64, crop=64)
    found = loaders(config(augment=dict(crop=False, flip=0.0), sampler=dict(size=64), **data))
    assert (found.num_classes, len(found.train), len(found.train.source.labels), len(found.val.source.labels)) == (
        10,
        22,
        1437,
        360,
    )
    pixels, labels = next(iter(found.train.epoch(0)))
    assert pixels.shape == (64, 3, 64, 64) and torch.equal(pixels[:, 0], pixels[:, 2])
    known = {
        image.tobytes(): label
        for image, label in zip(found.train.source.images, found.train.source.labels, strict=True)
    }
    stored = pixels.mul(255).round().byte().permute(0, 2, 3, 1)
    assert [known[image.contiguous().numpy().tobytes()] for image in stored] == labels.tolist()
    assert loading_processes(config(**{**data, "workers": -1}).data, torch.device("cuda")) == 0


def test_loading_processes(images, monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert loading_processes(config(images, workers=3).data, cpu) == 3
    assert loading_processes(config(images, workers=-1).data, cpu) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert loading_processes(config(images, workers=-1).data, gpu) == 8


def test_channels_and_normalising(images):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    plain, bgr = (torch.cat([x for x, _ in validation(config(images, colors=colors))]) for colors in ("rgb", "bgr"))
    assert torch.equal(plain.flip(1), bgr)
    found = torch.cat([x for x, _ in validation(config(images, mean=mean, std=std))])
    torch.testing.assert_close(found, (plain - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    train = [
        list(loaders(config(images, colors=colors, augment=dict(rand_augment=2, erase=1.0))).train.epoch(0))
        for colors in ("rgb", "bgr")
    ]
    assert all(torch.equal(x.flip(1), y) for (x, _), (y, _) in zip(*train, strict=True))


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_to_loading_processes(images, stop):
    """One to stop is for the training process, which goes on until it has saved; a process that was killed is an error
    that says so."""
    train = loaders(config(images, workers=1, prefetch=1)).train
    batches = train.epoch(0)
    first = next(batches)
    for worker in train._loader._iterator._workers:
        os.kill(worker.pid, stop)
    if stop == signal.SIGKILL:
        with pytest.raises(
            DataError, match=r"a process that loads training images died: .*data.workers 0 does without"
        ):
            list(batches)
    else:
        assert len([first, *batches]) == len(train)


# Files that cannot be read.


def break_images(root, part="train"):
    """A JPEG whose header is overwritten, one cut off, an empty one; returns their names."""
    paths = sorted((root / part / "class_01").iterdir())[:3]
    data = paths[0].read_bytes()
    paths[0].write_bytes(b"\0" * 300 + data[300:])
    data = paths[1].read_bytes()
    paths[1].write_bytes(data[: len(data) * 3 // 4])
    paths[2].write_bytes(b"")
    return {str(path) for path in paths}


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_replaced_and_named(own, workers):
    broken = break_images(own)
    train = loaders(config(own, max_corrupt=0.1, workers=workers), seed=1).train
    labels = torch.cat([labels for epoch in range(3) for _, labels in train.epoch(epoch)])
    assert len(labels) == 3 * train.sampler.images  # batches keep their size
    assert train.unreadable.keys() == broken
    reasons = list(train.unreadable.values())
    assert (
        any("empty" in r for r in reasons)
        and any("truncated" in r for r in reasons)
        and any("identify" in r for r in reasons)
    )
    parts = [
        loaders(config(own, batch_size=4, max_corrupt=0.1), seed=1, rank=rank, world_size=2).train for rank in (0, 1)
    ]
    assert torch.equal(
        torch.cat([y for pair in zip(*(p.epoch(0) for p in parts), strict=True) for _, y in pair]),
        labels[: len(labels) // 3],
    )


def test_too_many_unreadable_images(own):
    break_images(own)
    train = loaders(config(own, max_corrupt=0.05)).train
    with pytest.raises(
        DataError,
        match=r"3 of 48 training images cannot be read, more than data.max_corrupt allows \(5.00%\): .*class_01",
    ):
        for epoch in range(3):
            list(train.epoch(epoch))
    for path in (own / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(
        DataError, match=r"16 training images in turn cannot be read, the last one .*train/class_0.*: the file is empty"
    ):
        list(loaders(config(own, max_corrupt=0.99)).train.epoch(0))


def test_a_whole_class_that_is_unreadable(own):
    """Images of other classes stand in for it: batches keep their size."""
    for path in (own / "train" / "class_01").iterdir():
        path.write_bytes(b"")
    train = loaders(config(own, max_corrupt=0.5)).train
    labels = torch.cat([labels for _, labels in train.epoch(0)])
    assert len(labels) == train.sampler.images and set(labels.tolist()) == {0, 2}


def test_an_image_that_vanishes(own):
    train = loaders(config(own, max_corrupt=0)).train
    subprocess.run(["rm", "-r", str(own / "train" / "class_02")], check=True)
    with pytest.raises(DataError, match=r"class_02.*No such file"):
        list(train.epoch(0))


def test_unreadable_images_are_left_out_of_validation(own):
    broken = break_images(own, "val")
    val = validation(config(own, max_corrupt=0.3))
    assert (
        torch.cat([labels for _, labels in val]).tolist() == [0] * 4 + [1] + [2] * 4 and val.unreadable.keys() == broken
    )
    with pytest.raises(DataError, match="3 of 12 validation images"):
        list(validation(config(own, max_corrupt=0.2)))


def test_unreadable_images_on_the_gpus_way(own):
    """With images decoded in the main process, as on a GPU, a broken one takes the CPU's way and is replaced there."""
    whole = list(loaders(config(own, max_corrupt=0.1, augment=dict(erase=0.5))).train.epoch(0))
    settings = config(own, max_corrupt=0.1, decoder="nvjpeg", augment=dict(erase=0.5))
    train = TrainLoader(open_source(settings.data, "train"), settings, 0, 0, 1, torch.device("cpu"))
    assert equal(list(train.epoch(0)), whole)
    broken = break_images(own)
    path = sorted((own / "train" / "class_02").iterdir())[0]
    data = path.read_bytes()
    start = data.index(b"\xff\xda") + 20
    path.write_bytes(data[:start] + data[-2:])  # ends as it should, but has hardly any pixels
    on_cpu = loaders(config(own, max_corrupt=0.1, augment=dict(erase=0.5)), seed=2).train
    expected = [list(on_cpu.epoch(epoch)) for epoch in range(2)]
    train = TrainLoader(open_source(settings.data, "train"), settings, 2, 0, 1, torch.device("cpu"))
    assert all(equal(list(train.epoch(epoch)), expected[epoch]) for epoch in range(2))
    assert broken <= train.unreadable.keys() == on_cpu.unreadable.keys()


def test_a_class_that_validation_lacks(own):
    """Labels stay those of training, and it is said."""
    subprocess.run(["rm", "-r", str(own / "val" / "class_01")], check=True)
    found = loaders(config(own))
    assert torch.cat([labels for _, labels in found.val]).tolist() == [0] * 4 + [2] * 4
    assert len(found.notes) == 1 and "has no folder for class 'class_01'" in found.notes[0] and "/val" in found.notes[0]
    for path in (own / "train" / "class_01").iterdir():
        path.unlink()
    assert "class_01 holds no image" in loaders(config(own)).notes[0]


def test_folders_that_cannot_be_used(own, tmp_path):
    (own / "val" / "class_99").mkdir()
    with pytest.raises(
        DataError,
        match=r"val/class_99 is a class that training does not know \(1 such folder, 3 known classes: class_0",
    ):
        loaders(config(own))
    with pytest.raises(DataError, match=r"nowhere/train cannot be read: No such file or directory"):
        loaders(config(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be read: Not a directory"):
        loaders(config(tmp_path, train="file"))
    (tmp_path / "flat").mkdir()
    with pytest.raises(DataError, match="flat has no folders; it must hold one folder per class"):
        loaders(config(tmp_path, train="flat"))
    (tmp_path / "flat" / "class").mkdir()
    with pytest.raises(DataError, match="flat holds no image"):
        loaders(config(tmp_path, train="flat"))
    with pytest.raises(UsageError, match=r"data.root must name the folder of the images for data.source folder"):
        loaders(config(""))


def test_a_folder_without_permission(own):
    """As a user who may not read it; root may read everything, so this process gives that up for the moment."""
    (own / "train").chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            for folder in (own, *own.parents):
                if folder.stat().st_mode & 0o005 != 0o005 and len(folder.parts) > 2:
                    folder.chmod(folder.stat().st_mode | 0o055)
            os.seteuid(65534)
        with pytest.raises(DataError, match=r"train cannot be read: Permission denied"):
            loaders(config(own))
    finally:
        os.seteuid(user)
        (own / "train").chmod(0o755)


def test_gpu_decoding_is_refused_before_anything_is_read():
    with pytest.raises(UsageError, match=r"data.decoder nvjpeg needs a CUDA device"):
        loaders(config("nowhere", decoder="nvjpeg"))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (DataConfig, dict(source="folders"), r"data.source must be one of .*, the nearest is 'folder'"),
        (DataConfig, dict(decoder="nvjpg"), r"the nearest is 'nvjpeg'"),
        (DataConfig, dict(resize=200), r"data.crop must be at most data.resize, 200, got 256"),
        (DataConfig, dict(mean=(0.5,)), r"data.mean must be three numbers, got \[0.5\]"),
        (DataConfig, dict(std=(1, 0, 1)), r"data.std must be at least 0.001"),
        (DataConfig, dict(workers=-2), r"data.workers must be at least -1"),
        (AugmentConfig, dict(crop_scale=(1, 0.5)), r"augment.crop_scale must be two numbers, the smaller one first"),
        (AugmentConfig, dict(flip=1.5), r"augment.flip must be at least 0"),
        (AugmentConfig, dict(policy="rand-m9", rand_augment=2), "exclude each other"),
        (SamplerConfig, dict(sizes=(0, 32)), r"sampler.sizes must be at least 1"),
    ],
)
def test_impossible_options(section, values, message):
    with pytest.raises(UsageError, match=message):
        section(**values)


def test_making_images_again_gives_the_same_files(images, tmp_path):
    script = Path(make_images.__file__)
    arguments = ["--output", str(tmp_path), "--images", "6", "--classes", "3", "--width", "72", "--height", "54"]
    subprocess.run([sys.executable, str(script), *arguments], check=True, capture_output=True)
    made = sorted(tmp_path.rglob("*.jpg"))
    assert len(made) == 6 and all(
        path.read_bytes() == (images / path.relative_to(tmp_path)).read_bytes() for path in made
    )
