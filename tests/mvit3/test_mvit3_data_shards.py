"""Tar shards: the same batches as from folders; damaged, fetched and refused ones."""

import os
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from mvit3.data import DataError, loaders
from mvit3.data.shards import _fetch
from mvit3.options import UsageError

from .batches import config, equal


def write_shards(images, folder, part, per_shard=20):
    """The images of a part as tar files of pairs, in the order of the folder, by the standard library."""
    paths = sorted((images / part).rglob("*.jpg"))
    for shard in range(0, len(paths), per_shard):
        with tarfile.open(folder / f"{part}-{shard // per_shard:02d}.tar", "w") as tar:
            for number, path in enumerate(paths[shard : shard + per_shard]):
                label = folder / "label"
                label.write_text(path.parent.name[-1] + "\n")
                tar.add(path, f"{number:04d}.jpg")
                tar.add(label, f"{number:04d}.cls")


@pytest.fixture
def shards(images, tmp_path):
    for part in ("train", "val"):
        write_shards(images, tmp_path, part)
    return tmp_path


def shard_config(root, train="train-{00..02}.tar", val="val-00.tar", **options):
    return config(root, source="shards", train=train, val=val, **options)


def test_shards_hold_the_same_batches(images, shards):
    found, expected = loaders(shard_config(shards)), loaders(config(images))
    assert (found.num_classes, found.class_names, found.notes) == (3, ("0", "1", "2"), ())
    assert equal(list(found.train.epoch(2)), list(expected.train.epoch(2))) and equal(
        list(found.val), list(expected.val)
    )
    assert found.train.source.image_name(0) == f"{shards}/train-00.tar:0000.jpg"
    assert equal(list(loaders(shard_config(shards, workers=2)).train.epoch(2, 1)), list(expected.train.epoch(2, 1)))


def test_shards_that_webdataset_wrote(shards):
    import webdataset

    buffer = np.array(Image.new("RGB", (40, 40), (10, 20, 30)))
    with webdataset.TarWriter(str(shards / "written.tar")) as writer:
        for i in range(8):
            writer.write({"__key__": f"some.folder/{i}", "png": buffer, "cls": i % 2, "json": {"more": 1}})
    found = loaders(
        shard_config(shards, train="written.tar", val="written.tar", augment=dict(flip=0.0), sampler=dict(size=32))
    )
    assert found.num_classes == 2 and found.train.source.labels.tolist() == [0, 1] * 4
    pixels, _ = next(iter(found.train.epoch(0)))
    torch.testing.assert_close(pixels, torch.tensor([10.0, 20, 30]).div(255).view(1, 3, 1, 1).expand(8, 3, 32, 32))


def test_shards_from_urls(shards, tmp_path):
    """Fetched once by webdataset's openers; later runs read the copies."""
    cache = tmp_path / "cache"
    train = f"pipe:cat {shards}/train-{{00..02}}.tar"
    settings = shard_config("", train=train, val=f"file://{shards}/val-00.tar", cache=str(cache))
    found = list(loaders(settings).train.epoch(0))
    assert equal(found, list(loaders(shard_config(shards)).train.epoch(0)))
    copies = {path: path.stat().st_mtime_ns for path in cache.glob("*.tar")}
    assert len(copies) == 4 and not list(cache.glob("*.part"))
    for path in shards.glob("*.tar"):
        path.unlink()
    assert equal(list(loaders(settings).train.epoch(0)), found)
    assert {path: path.stat().st_mtime_ns for path in cache.glob("*.tar")} == copies
    with pytest.raises(UsageError, match=r"data.cache must name a folder for shards that come from a URL"):
        loaders(shard_config("", train=train, val="x"))
    with pytest.raises(DataError, match="cannot be fetched"):
        loaders(shard_config("", train=f"pipe:cat {shards}/nothing.tar", val="x", cache=str(cache)))
    assert not list(cache.glob("*.part"))


def test_a_shard_is_fetched_once(shards, tmp_path):
    """However many processes ask at the same time."""
    url = f"pipe:echo >> {tmp_path}/fetched; sleep 0.2; cat {shards}/val-00.tar"
    with ThreadPoolExecutor(3) as pool:
        copies = set(pool.map(lambda _: _fetch(url, str(tmp_path / "cache")), range(3)))
    assert [path.read_bytes() for path in copies] == [(shards / "val-00.tar").read_bytes()]
    assert (tmp_path / "fetched").read_text() == "\n"


@pytest.mark.parametrize("where", ["data", "header", "end mark"])
def test_a_shard_cut_in_the_middle(shards, where):
    """What lies before the cut is used, and it is said."""
    path = shards / "train-01.tar"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    place = {
        "data": members[20].offset_data + 100,
        "header": members[20].offset + 100,
        "end mark": members[-1].offset_data + 512,
    }[where]
    path.write_bytes(path.read_bytes()[:place])
    found = loaders(shard_config(shards))
    kept = 20 if where == "end mark" else 10
    assert found.notes == (f"{path} is cut off; {kept} images before that are used",)
    assert len(found.train.source.labels) == 28 + kept
    list(found.train.epoch(0))
    assert not found.train.unreadable


def test_a_shard_cut_while_it_is_used(shards):
    train = loaders(shard_config(shards, max_corrupt=0.9)).train
    path = shards / "train-01.tar"
    os.truncate(path, path.stat().st_size // 2)
    list(train.epoch(0))
    assert train.unreadable and all(
        "train-01.tar" in name and "shorter than it was" in reason for name, reason in train.unreadable.items()
    )


def test_shards_that_cannot_be_used(shards):
    for content, message in (
        (b"no tar file" * 100, "cannot be read as a tar file"),
        (b"", "cannot be read as a tar file"),
    ):
        (shards / "bad.tar").write_bytes(content)
        with pytest.raises(DataError, match=message):
            loaders(shard_config(shards, train="bad.tar"))
    with pytest.raises(DataError, match="No such file"):
        loaders(shard_config(shards, train="train-{00..03}.tar"))
    label = shards / "label"
    label.write_text("cat")
    with tarfile.open(shards / "bad.tar", "w") as tar:
        tar.add(label, "0.cls")
    with pytest.raises(DataError, match=r"bad.tar: the label 0.cls is not an integer"):
        loaders(shard_config(shards, train="bad.tar"))
    with tarfile.open(shards / "bad.tar", "w") as tar:
        tar.add(label, "0.txt")
    with pytest.raises(DataError, match=r"holds no sample, which is an image and a .cls file of the same name"):
        loaders(shard_config(shards, train="bad.tar"))
    with pytest.raises(DataError, match=r"labels of train.* are 0 to 2, there are 2 classes"):
        loaders(shard_config(shards, num_classes=2))
