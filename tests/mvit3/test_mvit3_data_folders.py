"""What folders and shards hold beside images is left out, counted and said; where classes and data sets get their names
from."""

import gzip
import io
import json
import os
import shutil
import struct
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mvit3.data import AugmentConfig, DataConfig, DataError, SamplerConfig, loaders, validation
from mvit3.data.sources import open_source
from mvit3.options import UsageError


def image(value=0, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path):
    """Four images of each of two classes, in both parts."""
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / "data" / part / label).mkdir(parents=True)
            for i in range(4):
                (tmp_path / "data" / part / label / f"{i}.png").write_bytes(image(i))
    return tmp_path / "data"


def config(root, **data):
    settings = dict(root=str(root), batch_size=2, eval_batch_size=4, resize=8, crop=8, workers=0)
    return SimpleNamespace(
        data=DataConfig(**{**settings, **data}), augment=AugmentConfig(), sampler=SamplerConfig(size=8)
    )


def opened(root, part="train", names=(), **data):
    return open_source(config(root, **data).data, part, names)


def names(source):
    return [os.path.relpath(source.image_name(i), source.root) for i in range(len(source.labels))]


PLAIN = [f"{label}/{i}.png" for label in ("cat", "dog") for i in range(4)]


def test_hidden_names(root):
    """Those of notebooks, of macOS, of network drives: neither classes nor images."""
    for folder in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "cat/.ipynb_checkpoints", "cat/__MACOSX"):
        (root / "train" / folder).mkdir()
        (root / "train" / folder / "0.png").write_bytes(image())
    for name in ("cat/._0.png", "cat/.DS_Store", ".DS_Store", "dog/Thumbs.db"):
        (root / "train" / name).write_bytes(b"no image")
    found = loaders(config(root))
    assert found.class_names == ("cat", "dog") and names(found.train.source) == PLAIN
    assert found.notes == (f"{root}/train: hidden names are left out: 9, the first is .DS_Store",)
    list(found.train.epoch(0))
    assert not found.train.unreadable


def test_links(root):
    """A link up, to itself, to another class, to a folder that is already taken: every image is seen once."""
    (root / "train" / "cat" / "up").symlink_to("..")
    (root / "train" / "cat" / "top").symlink_to(root.parent)
    (root / "train" / "cat" / "other").symlink_to("../dog")
    (root / "train" / "dog" / "self").symlink_to("self")
    (root / "train" / "again").symlink_to("cat")
    (root / "train" / "loop").symlink_to(".")
    found = opened(root)
    assert names(found) == PLAIN or names(found) == [f"again/{i}.png" for i in range(4)] + PLAIN[4:]
    assert any("links to folders that are already taken are left out: 5" in note for note in found.notes)
    assert any("files of other kinds are left out: 1, the first is dog/self" in note for note in found.notes)


def test_links_to_other_places_are_followed(root, tmp_path):
    shutil.move(root / "train" / "dog", tmp_path / "elsewhere")
    (root / "train" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "more").mkdir()
    (tmp_path / "elsewhere" / "more" / "5.png").write_bytes(image())
    (tmp_path / "elsewhere" / "more" / "back").symlink_to(tmp_path / "elsewhere")
    assert names(opened(root)) == [*PLAIN, "dog/more/5.png"]


def test_other_files_are_counted(root):
    """Those that are no images, those beside the classes, a pipe that would be waited for."""
    (root / "train" / "cat" / "notes.txt").write_text("")
    (root / "train" / "cat" / "photo.heic").write_bytes(image())
    (root / "train" / "labels.csv").write_text("")
    (root / "train" / "stray.png").write_bytes(image())
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    found = opened(root)
    assert names(found) == PLAIN
    assert set(found.notes) == {
        f"{root}/train: files of other kinds are left out: 3, the first is cat/notes.txt",
        f"{root}/train: files beside the folders of the classes are left out: 2, the first is labels.csv",
    }


def test_gifs_are_images(root):
    """Their first frame."""
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(root / "train" / "cat" / "a.gif", save_all=True, append_images=frames[1:])
    found = opened(root)
    assert names(found) == [*PLAIN[:4], "cat/a.gif", *PLAIN[4:]] and found.notes == ()
    for path in (root / "val").rglob("*.png"):
        path.unlink()
    frames[0].save(root / "val" / "cat" / "a.GIF", save_all=True, append_images=frames[1:])
    said = []
    val = validation(config(root), ("cat", "dog"))
    val.say = said.append
    ((pixels, labels),) = val
    assert pixels[0].mean((1, 2)).tolist() == [1, 0, 0] and labels.tolist() == [0]
    assert said == [f"{root}/val/cat/a.GIF: of a GIF with several frames the first one is read; this is said once"]


def test_nothing_but_what_is_left_out(root):
    for path in (root / "train").rglob("*.png"):
        path.rename(path.with_name(f"._{path.name}"))
    with pytest.raises(DataError, match=r"holds no image .*hidden names are left out: 8, the first is cat/._0.png"):
        opened(root)
    for name in ("cat", "dog"):
        (root / "train" / name).rename(root / "train" / f".{name}")
    with pytest.raises(DataError, match=r"has no folders; .*hidden names are left out: 2, the first is .cat"):
        opened(root)


# Shards.


def shard(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def samples(count, start=0, **more):
    members = {}
    for i in range(start, start + count):
        members |= {f"{i:03}.png": image(i), f"{i:03}.cls": str(i % 2).encode()}
    return members | more


def shards(folder, train="train-*.tar", val="val.tar", **data):
    return config(folder, source="shards", train=train, val=val, **data)


def values(source):
    return [np.asarray(Image.open(io.BytesIO(source.read(i))))[0, 0, 0] for i in range(len(source.labels))]


def test_wildcards(tmp_path):
    """In the order of their names; brackets in the root are not wildcards; a pattern without a file is refused."""
    folder = tmp_path / "a[1]b"
    folder.mkdir()
    for i in range(3):
        shard(folder / f"train-{i}.tar", samples(4, 4 * i))
    shard(folder / "val.tar", samples(2))
    found = loaders(shards(folder))
    assert values(found.train.source) == list(range(12)) and found.notes == ()
    assert values(opened(folder, source="shards", train="train-[02].tar")) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert values(opened("", source="shards", train=str(tmp_path / "a*b" / "train-{0,1}.tar"))) == list(range(8))
    with pytest.raises(DataError, match=r"no file matches .*trian-\*.tar"):
        loaders(shards(folder, train="trian-*.tar"))


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_shards(tmp_path, mode):
    """Unpacked once, however many processes ask, and said; a changed shard is unpacked again."""
    cache = tmp_path / "cache"
    shard(tmp_path / f"train-0.tar.{mode}", samples(4), f"w:{mode}")
    shard(tmp_path / "val.tar", samples(2))
    settings = shards(tmp_path, train=f"train-*.tar.{mode}", cache=str(cache))
    found = loaders(settings)
    assert values(found.train.source) == [0, 1, 2, 3]
    (copy,) = cache.glob("*.tar")
    assert found.notes == (f"{tmp_path}/train-0.tar.{mode} is compressed and was unpacked to {copy}",)
    written = copy.stat().st_mtime_ns
    loaders(settings)
    assert [path.stat().st_mtime_ns for path in cache.glob("*.tar")] == [written] and not list(cache.glob("*.part"))
    shard(tmp_path / f"train-0.tar.{mode}", samples(6), f"w:{mode}")
    assert values(loaders(settings).train.source) == list(range(6))


def test_a_compressed_shard_that_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    shard(
        tmp_path / "whole.tar",
        {f"{i}.{kind}": os.urandom(5000) if kind == "png" else b"0" for i in range(9) for kind in ("png", "cls")},
    )
    packed = gzip.compress((tmp_path / "whole.tar").read_bytes())
    (tmp_path / "train-0.tar.gz").write_bytes(packed[: len(packed) // 2])
    for _ in range(2):
        found = opened(tmp_path, source="shards", train="train-*.tar.gz")
        assert 3 <= len(found.labels) <= 5
        assert any(
            "is damaged" in note and f"{len(found.labels)} images before that are used" in note for note in found.notes
        )
    assert list((tmp_path / "temporary").glob("mvit3-shards-*/*.tar"))


def test_what_shards_hold_beside_samples(tmp_path):
    more = {
        "._000.png": b"x",
        "__MACOSX/000.png": b"x",
        "007.png": image(),
        "000.jpg": image(kind="JPEG"),
        "001.json": b"{}",
    }
    shard(tmp_path / "train-0.tar", {**samples(4), **more})
    found = opened(tmp_path, source="shards", train="train-0.tar")
    assert values(found) == [0, 1, 2, 3]
    assert set(found.notes) == {
        "train-0.tar: hidden names are left out: 2, the first is train-0.tar:._000.png",
        "train-0.tar: images without a .cls file are left out: 1, the first is train-0.tar:007.png",
        "train-0.tar: second images of a sample are left out: 1, the first is train-0.tar:000.jpg",
    }


@pytest.mark.parametrize(("file", "content"), [
    ("classes.txt", "cat\ndog\nowl\n"),
    ("classes.json", json.dumps(["cat", "dog", "owl"])),
    ("classes.json", json.dumps({"owl": 2, "cat": 0, "dog": 1})),
    ("classes.json", json.dumps({"2": "owl", "0": ["cat", "feline"], "1": "dog"})),
    ("other.txt", "cat\ndog\nowl"),
])  # fmt: skip
def test_class_names_of_shards(tmp_path, file, content):
    """From a file beside them, or one that is named; labels may then be names."""
    shard(tmp_path / "train-0.tar", {**samples(4), "9.png": image(9), "9.cls": b"owl\n"})
    shard(tmp_path / "val.tar", samples(2))
    (tmp_path / file).write_text(content)
    found = loaders(shards(tmp_path, class_map=file if file == "other.txt" else ""))
    assert found.class_names == ("cat", "dog", "owl") == found.val.source.class_names and found.num_classes == 3
    assert found.train.source.labels.tolist() == [0, 1, 0, 1, 2]


def test_labels_are_those_of_training(tmp_path):
    """Where the names beside the shards come in another order; numbers as names say nothing of it; an unknown class is
    refused."""
    shard(tmp_path / "val.tar", {**samples(4), "9.png": image(9), "9.cls": b"dog"})
    (tmp_path / "classes.txt").write_text("cat\ndog")
    known = ("owl", "dog", "cat")
    assert opened(tmp_path, "val", known, source="shards", val="val.tar").labels.tolist() == [2, 1, 2, 1, 1]
    shard(tmp_path / "val.tar", samples(4))
    assert opened(tmp_path, "val", ("0", "1"), source="shards", val="val.tar").labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(
        DataError, match=r"classes.txt has a class 'dog' that training does not know \(1 such, 2 known classes\)"
    ):
        opened(tmp_path, "val", ("cat", "owl"), source="shards", val="val.tar")


def test_class_names_that_do_not_fit(tmp_path):
    shard(tmp_path / "train-0.tar", samples(4))
    shard(tmp_path / "val.tar", samples(2))
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(DataError, match=r"labels of train-\*.tar are 0 to 1, there are 1 classes in .*classes.txt"):
        loaders(shards(tmp_path))
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "classes.json").write_text('{"cat": 1}')
    with pytest.raises(
        DataError, match=r"classes.json does not name classes, a line each or as JSON with labels from 0 on"
    ):
        loaders(shards(tmp_path))
    with pytest.raises(DataError, match=r"nowhere.txt cannot be read: No such file"):
        loaders(shards(tmp_path, class_map="nowhere.txt"))
    (tmp_path / "classes.json").write_text('["cat", "dog"]')
    shard(tmp_path / "train-0.tar", {"0.png": image(), "0.cls": b"cow"})
    with pytest.raises(DataError, match=r"the label 0.cls is not an integer: 'cow' is no class of .*classes.json"):
        loaders(shards(tmp_path))


# Data sets of libraries.


@pytest.fixture
def mnist(tmp_path):
    """Twelve and six images, as torchvision's FashionMNIST keeps them."""
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 12), ("t10k", 6)):
        pixels = np.arange(count, dtype=np.uint8).repeat(28 * 28)
        labels = np.arange(count, dtype=np.uint8) % 10
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
    return tmp_path


@pytest.mark.parametrize("name", ["FashionMNIST", "fashion_mnist"])
def test_torchvision(mnist, name):
    found = loaders(config(mnist, source="torchvision", name=name))
    assert found.num_classes == 10 and found.class_names[0] == "T-shirt/top"
    assert found.train.source.labels.tolist() == [*range(10), 0, 1] and len(found.val.source.labels) == 6
    batches = list(found.val)
    assert [round(float(x[0, 0, 0, 0]) * 255) for x, _ in batches] == [0, 4] and batches[0][0].shape == (4, 3, 8, 8)
    assert found.train.source.image_name(3) == "FashionMNIST train, image 3"
    assert len(list(loaders(config(mnist, source="torchvision", name=name, workers=1)).train.epoch(0))) == 6


def test_torchvision_refusals(mnist):
    with pytest.raises(
        UsageError, match=r"data.name must be a data set of torchvision .*; got 'CIFR10', the nearest is 'CIFAR10'"
    ):
        opened(mnist, source="torchvision", name="CIFR10")
    with pytest.raises(DataError, match=r"CIFAR10 cannot be read from .*--data.download true fetches it"):
        opened(mnist, source="torchvision", name="cifar10")
    with pytest.raises(UsageError, match=r"data.train: SVHN has no split trian"):
        opened(mnist, source="torchvision", name="svhn", train="trian")
    with pytest.raises(UsageError, match=r"data.root must name the folder of the data for data.source torchvision"):
        opened("", source="torchvision", name="cifar10")


class FakeRows(list):
    """Rows of a split with their features, as the package `datasets` gives them."""

    def __init__(self, rows, features):
        super().__init__(rows)
        self.features = features

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    def cast_column(self, column, kind):
        assert column == "img" and not kind.decode
        return self


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for `datasets` that knows one data set."""

    class Image:
        def __init__(self, decode=True):
            self.decode = decode

    class ClassLabel:
        def __init__(self, names):
            self.names = names

    path = tmp_path / "on_disk.png"
    path.write_bytes(image(3))

    def load_dataset(name, cache_dir=None):
        if name != "pets":
            raise FileNotFoundError(f"{name} is not on the hub")
        rows = [{"img": {"bytes": image(i), "path": None}, "species": i % 2} for i in range(3)]
        rows.append({"img": {"bytes": None, "path": str(path)}, "species": 1})
        features = {"img": Image(), "species": ClassLabel(["cat", "dog"]), "id": object()}
        return {"train": FakeRows(rows, features), "test": FakeRows(rows[:2], features)}

    module = SimpleNamespace(Image=Image, ClassLabel=ClassLabel, load_dataset=load_dataset, load_from_disk=None)
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_huggingface(hub):
    found = loaders(config("", source="huggingface", name="pets"))
    assert found.class_names == ("cat", "dog") and found.train.source.labels.tolist() == [0, 1, 0, 1]
    assert values(found.train.source) == [0, 1, 2, 3] and len(found.val.source.labels) == 2
    assert len(list(found.train.epoch(0))) == 2
    with pytest.raises(UsageError, match=r"data.val must be one of the splits of pets, train, test; got dev"):
        opened("", "val", source="huggingface", name="pets", val="dev")
    with pytest.raises(DataError, match=r"cats cannot be loaded by datasets: cats is not on the hub"):
        opened("", source="huggingface", name="cats")
    with pytest.raises(UsageError, match=r"data.name must name the data set"):
        opened("", source="huggingface")


def test_huggingface_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"data.source huggingface needs the package datasets, which is not installed"):
        opened("", source="huggingface", name="pets")


def test_classes_that_validation_shares(hub, mnist):
    """Training's classes are those of validation, or it is refused."""
    with pytest.raises(DataError, match=r"classes of validation, 10 from .* are not those of training, 2 from"):
        open_source(config(mnist, source="torchvision", name="FashionMNIST").data, "val", ("cat", "dog"))
