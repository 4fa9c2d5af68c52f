"""Readers and validation of dense prediction against what the published pipelines made of the same files, bit by bit
where they use Pillow; shards; batches that depend on the seed, the epoch and their number alone."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from mvit3.data import Boxes, DataError, loaders, validation
from mvit3.data.identity import difference, identity
from mvit3.data.sources import open_source
from mvit3_kernels.models.detection import anchors_of
from mvit3_kernels.tasks import assign
from tests.golden import load

from .dense_data import V1, V2, config, make_ade20k, make_coco, make_voc, pixels, voc_mask

FAMILIES = {"v1": (V1, "mobilevitv3_s"), "v2": (V2, "mobilevitv3_100")}
# Grey levels: Pillow's are exact, OpenCV's bilinear is up to one level away.
LEVELS = {"v1": 1.01, "v2": 1e-4}
MEANS = {"v1": 0.04, "v2": 1e-4}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    make_coco(folder / "coco")
    make_voc(folder / "VOCdevkit/VOC2012")
    make_ade20k(folder / "ADEChallengeData2016")
    return folder


def check_image(image, golden, key, family):
    assert tuple(image.shape) == tuple(golden[f"{key}_image_shape"])
    assert np.abs(image.mean((1, 2)).numpy() - golden[f"{key}_image_mean_per_channel"]).max() * 255 < MEANS[family]
    assert np.abs(image[:, ::64, ::64].numpy() - golden[f"{key}_image_grid"]).max() * 255 < LEVELS[family]


def check_labels(labels, golden, key):
    values, counts = np.unique(labels, return_counts=True)
    order = np.argsort(np.where(values == 255, -1 if -1 in golden[f"{key}_label_values"] else 255, values))
    assert counts[order].tolist() == golden[f"{key}_label_counts"].tolist()
    grid = golden[f"{key}_label_grid"]
    assert (labels[::64, ::64] == np.where(grid == -1, 255, grid)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_coco_validation(root, family):
    pixels_of, network = FAMILIES[family]
    golden = load(f"data_{family}")
    options = dict(size=320, train="train2017", val="val2017", eval_batch_size=1, **pixels_of)
    found = loaders(config(f"ssdlite_{network}", "coco", root / "coco", **options))
    assert found.num_classes == 81 and found.class_names[:2] == ("thing 1", "thing 2")
    assert found.train.source.ids.tolist() == golden["train_image_ids"].tolist()
    source = found.val.source
    assert [source.image_id(i) for i in range(4)] == golden["val_image_ids"].tolist()
    categories = golden["coco_category_ids_in_contiguous_order_1_to_80"].tolist()
    assert source.categories == dict(enumerate(categories, 1))
    assert source.size(1) == (200, 150) and source.annotations(0).crowd.tolist() == [False, False, True, False]
    for images, boxes, (index,) in found.val:
        key = f"det{source.image_id(int(index))}"
        check_image(images[0], golden, key, family)
        own = source.annotations(int(index)).single()
        assert own.labels.tolist() == golden[f"{key}_labels"].tolist()
        want = golden[f"{key}_boxes_xyxy_px"].astype(np.float64)
        clipped = want.clip(0, np.tile(source.size(int(index))[::-1], 2))  # as v1 does not
        np.testing.assert_allclose(own.boxes, clipped, atol=1e-5)
        if family == "v2" or (clipped == want).all():
            targets = assign(list(boxes.boxes), list(boxes.labels), anchors_of(320, 320, family == "v2"))
            positive = targets.labels[0].nonzero()[:, 0]
            assert positive.tolist() == golden[f"{key}_pos_index"].tolist()
            assert targets.labels[0, positive].tolist() == golden[f"{key}_pos_labels"].tolist()
            np.testing.assert_allclose(targets.offsets[0, positive], golden[f"{key}_pos_targets"], atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_voc_validation(root, family):
    """While training at 512x512; in the evaluation with labels as they are, v2 with images that keep their aspect."""
    pixels_of, network = FAMILIES[family]
    golden = load(f"data_{family}")
    for key, options in (
        ("voc_val", {}),
        ("voc_eval_resized", dict(native_labels=True, keep_aspect=family == "v2", eval_batch_size=1)),
    ):
        c = config(f"deeplabv3_{network}", "voc", root, size=512, **{"eval_batch_size": 2, **options}, **pixels_of)
        images, labels = zip(*((i, y) for x, ys in validation(c) for i, y in zip(x, ys, strict=True)), strict=True)
        for i in range(2):
            check_image(images[i], golden, f"{key}{i}", family)
            check_labels(labels[i].numpy(), golden, f"{key}{i}")
            assert labels[i].dtype == torch.int64


def test_ade20k_validation(root):
    c = config("pspnet_mobilevitv3_100", "ade20k", root, size=512, eval_batch_size=1, batch_size=1, **V2)
    found = loaders(c)
    assert found.num_classes == 150 and len(found.train.source.labels) == 1
    ((images, labels),) = found.val
    check_image(images[0], load("data_v2"), "ade_val0", "v2")
    check_labels(labels[0].numpy(), load("data_v2"), "ade_val0")


def test_lists_of_voc(root, tmp_path):
    """SBD's list takes masks of its own where they are; a line may name image and mask; a list may be any file."""
    make_voc(tmp_path)
    augmented = np.full((180, 260), 3, np.uint8)
    (tmp_path / "SegmentationClassAug").mkdir()
    Image.fromarray(augmented).save(tmp_path / "SegmentationClassAug/2007_000000.png")
    (tmp_path / "ImageSets/Segmentation/trainaug.txt").write_text("2007_000000\n2007_000001\n")
    (tmp_path / "own.txt").write_text("/JPEGImages/2007_000001.jpg /SegmentationClass/2007_000001.png\n\n")
    c = config("deeplabv3_mobilevitv3_s", "voc", tmp_path, train="trainaug", val="own.txt").data
    train, val = (open_source(c, part, task="segmentation") for part in ("train", "val"))
    assert (train.truth(0) == 3).all() and (train.truth(1) == voc_mask(1, 333, 250)).all()
    assert len(val.labels) == 1 and (val.truth(0) == voc_mask(1, 333, 250)).all()
    assert val.class_names[0] == "background" and len(val.class_names) == 21


def test_plain_masks(tmp_path):
    """Classes are counted, or named by a file; palettes are indices; hidden names are left out and said."""
    for part in ("train", "val"):
        for i, kind in enumerate(("P", "L")):
            for folder in ("images", "masks"):
                (tmp_path / folder / part / "deep").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels(i, 40, 60)).save(tmp_path / f"images/{part}/deep/{i}.jpg")
            mask = Image.fromarray((voc_mask(i, 40, 60) % 5).astype(np.uint8))
            if kind == "P":
                mask.putpalette(list(range(255, 240, -1)))
            mask.save(tmp_path / f"masks/{part}/deep/{i}.png")
    (tmp_path / "images/train/.hidden.jpg").write_bytes(b"")
    c = config("deeplabv3_mobilevitv3_s", "masks", tmp_path)
    found = loaders(c)
    assert found.class_names == ("0", "1", "2", "3", "4")
    assert any("hidden names are left out: 1" in note for note in found.notes)
    images, labels = next(found.train.epoch(0))
    assert images.shape == (2, 3, 64, 64) and labels.shape == (2, 64, 64) and set(labels.unique().tolist()) <= {
        0, 1, 2, 3, 4, 255,
    }  # fmt: skip
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\ne\nf\n")
    assert open_source(c.data, "val", task="segmentation").class_names == tuple("abcdef")
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(tmp_path / "masks/val/deep/1.png")
    before, after = identity(found.val.source), identity(open_source(c.data, "val", task="segmentation"))
    assert difference(before, before) == "" and "1 of 2 images" in difference(identity(found.train.source), after)


def test_shards(tmp_path):
    """The same samples as from files, in two shards, one of them cut off."""

    def png(array):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        return file.getvalue()

    def write(name, samples):
        with tarfile.open(tmp_path / name, "w") as tar:
            for file, data in samples:
                member = tarfile.TarInfo(file)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

    def boxes(*found):
        return json.dumps([{"bbox": box, "category_id": category} for box, category in found]).encode()

    images = [pixels(i, 40, 60) for i in range(4)]
    masks = [voc_mask(i, 40, 60) for i in range(4)]
    write("s-0.tar", [("0.jpg", png(images[0])), ("0.png", png(masks[0])), ("1.png", png(images[1])),
                      ("1.seg.png", png(masks[1])), ("2.jpg", png(images[2]))])  # fmt: skip
    write(
        "s-1.tar",
        [
            ("3.jpg", png(images[3])),
            ("3.mask.png", png(masks[3])),
            ("4.jpg", png(images[0])),
            ("5.mask.png", png(masks[3])),
        ],
    )
    c = config("deeplabv3_mobilevitv3_s", "shards", tmp_path, train="s-*.tar", val="s-0.tar", num_classes=21)
    found = loaders(c)
    source = found.train.source
    assert len(source.labels) == 3 and found.num_classes == 21
    for index, i in enumerate((0, 1, 3)):
        assert (source.truth(index) == masks[i]).all()
        assert (np.array(Image.open(io.BytesIO(source.read(index)))) == images[i]).all()
    assert any(
        "images without a label image (.png) are left out: 2, the first is s-0.tar:2.jpg" in n for n in found.notes
    )
    assert any(
        "label images without an image are left out: 1, the first is s-1.tar:5.mask.png" in n for n in found.notes
    )
    lossy = io.BytesIO()
    Image.fromarray(masks[0]).save(lossy, "JPEG")
    write("lossy.tar", [("0.jpg", png(images[0])), ("0.png", lossy.getvalue())])
    with pytest.raises(DataError, match=r"1 of 1 .*masks must be PNG or another lossless format, this one is JPEG"):
        loaders(config("deeplabv3_mobilevitv3_s", "shards", tmp_path, train="lossy.tar", num_classes=21))
    write("b.tar", [("0.jpg", png(images[0])), ("0.json", boxes(([5, 6, 7, 8], 1), ([50, 30, 20, 20], 2))),
                    ("1.jpg", png(images[1])), ("1.json", b'{"annotations": []}')])  # fmt: skip
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    c = config("ssdlite_mobilevitv3_s", "shards", tmp_path, train="b.tar", val="b.tar", batch_size=1)
    found = loaders(c)
    assert found.class_names == ("cat", "dog", "bird") and found.num_classes == 4
    assert len(found.train.source.labels) == 1 and len(found.val.source.labels) == 2
    assert found.val.source.annotations(0).boxes.tolist() == [[5, 6, 12, 14], [50, 30, 60, 40]]
    assert any("clipped: 1" in note for note in found.notes) and any(
        "not trained on: 1" in note for note in found.notes
    )
    assert any("b.tar: classes without a box to learn from: 1 of 3, bird" in note for note in found.notes)
    ((images, target, indices),) = found.val
    assert target.labels.tolist() == [[1, 2], [0, 0]] and indices.tolist() == [0, 1]
    torch.testing.assert_close(target.boxes[0, 0], torch.tensor([5 / 60, 6 / 40, 12 / 60, 14 / 40]))
    assert not target.boxes[1].any()


def flat(batch):
    return [x for part in batch for x in (part if isinstance(part, Boxes) else [part])]


@pytest.mark.parametrize(
    ("network", "augment"),
    [
        ("ssdlite_mobilevitv3_xxs", dict(photometric=True)),
        ("ssdlite_mobilevitv3_xxs", dict(photometric=True, style="v1", color_jitter=0.2)),
        ("deeplabv3_mobilevitv3_xxs", dict(blur=0.5, rotate=10, short_side=(40, 90), max_class_share=0.75)),
        ("pspnet_mobilevitv3_xxs", dict(photometric=True, style="v1", short_side=(40, 90))),
    ],
)  # fmt: skip
def test_batches_of_training(network, augment):
    """The same on any number of processes, with loading processes, and from any batch on; another seed, other ones."""

    def batches(seed=3, start=0, rank=0, world=1, **data):
        c = config(
            network, "digits", augment=augment, size=64, limit_train=16, limit_val=2, **{"batch_size": 4, **data}
        )
        return [flat(b) for b in loaders(c, seed=seed, rank=rank, world_size=world).train.epoch(1, start)]

    whole = batches()
    assert len(whole) == 4
    for batch in whole:
        images, *target = batch
        assert images.shape == (4, 3, 64, 64) and images.is_contiguous(memory_format=torch.channels_last)
        assert 0 <= images.min() < 0.4 and 0.6 < images.max() <= 1
        if network.startswith("ssdlite"):
            boxes, labels = target
            present = labels > 0
            assert boxes.shape[:2] == labels.shape and labels.max() <= 10 and present.any(1).all()
            assert (boxes[present][:, 2:] > boxes[present][:, :2]).all() and 0 <= boxes.min() <= boxes.max() <= 1
            assert not boxes[~present].any() and boxes.dtype == torch.float32 and labels.dtype == torch.int64
        else:
            (labels,) = target
            assert labels.shape == (4, 64, 64) and set(labels.unique().tolist()) <= {*range(11), 255}
    loaded = batches(workers=1)
    assert all(torch.equal(a, b) for one, two in zip(whole, loaded, strict=True) for a, b in zip(one, two, strict=True))
    later = batches(start=2)
    assert all(
        torch.equal(a, b) for one, two in zip(whole[2:], later, strict=True) for a, b in zip(one, two, strict=True)
    )
    second = batches(rank=1, world=2, batch_size=2)
    assert all(torch.equal(one[0][2:], two[0]) for one, two in zip(whole, second, strict=True))
    assert not torch.equal(batches(seed=4)[0][0], whole[0][0])
