"""Wrong files of dense prediction: an error, or a note with a count and a name, before the work begins."""

import copy
import os

import numpy as np
import pytest
from PIL import Image

from mvit3.data import DataError, loaders
from mvit3.data.sources import open_source
from mvit3.options import UsageError

from .dense_data import config, make_ade20k, make_coco, make_voc, save, write_coco

DETECTION, SEGMENTATION = "ssdlite_mobilevitv3_xxs", "deeplabv3_mobilevitv3_xxs"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    return root, make_coco(root)


def coco(made, change, part="train"):
    """A part of a file that was changed."""
    root, content = made
    content = copy.deepcopy(content)
    change(content)
    write_coco(root, content)
    return open_source(config(DETECTION, "coco", root, **{part: "train2017"}).data, part, task="detection")


def setting(*keys):
    """A change of a file: all keys lead to a place, the last one is its new content."""

    def change(content):
        *path, last, value = keys
        for key in path:
            content = content[key]
        content[last] = value

    return change


def crowds_alone(content):
    for entry in content["annotations"]:
        entry["iscrowd"] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting("images", []), "names no images"),
        (lambda c: c.pop("images"), "is no file of COCO instances: it lacks the list 'images' of images, annotations"),
        (setting("categories", {}), "it lacks the list 'categories'"),
        (setting("annotations", []), "has no box that can be used"),
        (setting("images", 0, {"id": 1}), "has an image without id, file_name, height and width"),
        (setting("images", 0, "width", 0), "image 139.jpg has no pixels, 0x240"),
        (setting("images", 1, "id", 139), "names two images 139: 139.jpg and 285.jpg"),
        (setting("categories", 1, "name", "thing 1"), "names category 'thing 1' twice"),
        (setting("categories", 1, {"name": "x"}), "has a category without an id"),
        (setting("annotations", 0, "bbox", [1, 2, 3]), r"annotation 0 of 139.jpg: it has no bbox .* but \[1, 2, 3\]"),
        (crowds_alone, "has no box that can be used"),
        (setting("annotations", 0, "bbox", [1, 2, True, 3]), r"it has no bbox .* but \[1, 2, True, 3\]"),
        (setting("annotations", 0, "area", "large"), "annotation 0 of 139.jpg: its area must be a number .* 'large'"),
        (setting("annotations", 1, 7), "entry 1 of 'annotations' must be an object, got 7"),
        (setting("images", 0, "width", None), r"without id, file_name, height and width: {[^()]*'width': None}$"),
        (setting("images", 0, "file_name", "../val2017/139.jpg"), "a path below .* got '../val2017/139.jpg'"),
        (setting("images", 0, "file_name", "/139.jpg"), "a path below the folder of the images, got '/139.jpg'"),
        (setting("images", 0, "file_name", "1.jpg"), "1 of 3 images of .* are not in .*train2017, the first is 1.jpg"),
        (setting("images", 0, "width", 331), "139.jpg, 330x240 and not 331x240; data.max_corrupt allows 1.00%"),
    ],
)
def test_coco_that_cannot_be_used(made, change, message):
    with pytest.raises(DataError, match=message):
        coco(made, change)


def test_crowds_are_no_boxes_of_validation(made):
    with pytest.raises(DataError, match="has no box that can be used"):
        coco(made, crowds_alone, "val")


@pytest.mark.parametrize(
    ("change", "message", "boxes"),
    [
        (
            setting("annotations", 0, "bbox", [20, 30, 0, 9]),
            "without an area inside their image are left out: 2",
            6,
        ),
        (setting("annotations", 0, "bbox", [-50, 0, 50, 9]), "left out: 2, the first is annotation 0 of 139.jpg", 6),
        (setting("annotations", 0, "bbox", [float("nan"), 0, 50, 9]), "left out: 2, the first is annotation 0", 6),
        (setting("annotations", 0, "bbox", [-5, 0, 50, 999]), "clipped: 2, the first is annotation 0 of 139.jpg", 7),
        (
            setting("annotations", 0, "image_id", 8),
            "of images that it does not name are left out: 1",
            6,
        ),
        (setting("annotations", 0, "category_id", 12), "of categories that it does not name are left out: 1", 6),
        (setting("annotations", 0, "area", None), "a box to learn from: 75 of 80, thing 2, thing 3, thing 4", 7),
        (setting("annotations", 0, "iscrowd", None), "thing 10, thing 11 and 65 more", 7),
        (setting("annotations", 7, "image_id", 285), "images without annotations are not trained on: 2", 7),
    ],
)
def test_boxes_that_cannot_be_used(made, change, message, boxes):
    source = coco(made, change)
    assert any(message in note for note in source.notes), source.notes
    assert sum(len(source.annotations(i).labels) for i in range(len(source.labels))) == boxes
    for i in range(len(source.labels)):
        height, width = source.size(i)
        found = source.annotations(i).boxes
        assert (found >= 0).all() and (found[:, 2] <= width).all() and (found[:, 3] <= height).all()


def test_coco_that_is_not_there(made):
    root, content = made
    write_coco(root, content)
    (root / "annotations/instances_x.json").write_text('{"images": [')
    for data, message in (
        (dict(train="train"), "there is no folder .*train with images; data.train names it"),
        (dict(annotations="a.json"), "a.json cannot be read: No such file.*; data.annotations names another file"),
        (
            dict(annotations="annotations/instances_x.json"),
            "instances_x.json is damaged, it is no JSON",
        ),
    ):
        with pytest.raises(DataError, match=message):
            open_source(
                config(DETECTION, "coco", root, **{"train": "train2017", **data}).data, "train", task="detection"
            )
    with pytest.raises(DataError, match=r"has a category 'thing 1' that training does not know .80 such, 2 known"):
        open_source(config(DETECTION, "coco", root, val="val2017").data, "val", ("a", "b"), "detection")


def masks(tmp_path, count=4, **data):
    """Images and masks, all but the first of which are in order."""
    for i in range(count):
        save(tmp_path / f"images/train/{i}.jpg", np.zeros((40, 60, 3), np.uint8))
        if not os.path.lexists(tmp_path / f"masks/train/{i}.png"):
            save(tmp_path / f"masks/train/{i}.png", np.full((40, 60), i % 3, np.uint8))
    values = {"num_classes": 3, "val": "train", **data}
    return config(SEGMENTATION, "masks", tmp_path, **values)


def corrupt(tmp_path, kind):
    """A first mask that is wrong."""
    file = tmp_path / "masks/train/0.png"
    file.parent.mkdir(parents=True)
    if kind == "size":
        save(file, np.zeros((60, 40), np.uint8))
    elif kind == "label":
        save(file, np.full((40, 60), 3, np.uint8))
    elif kind == "color":
        save(file, np.zeros((40, 60, 3), np.uint8))
    elif kind == "lossy":
        Image.fromarray(np.zeros((40, 60), np.uint8)).save(file, "JPEG")
    elif kind == "damaged":
        file.write_bytes(b"no image")
    else:
        file.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("size", r"0.jpg: mask and image differ in size, 40x60 and 60x40"),
        ("label", r"0.jpg: the mask has label 3, which is none of 3 classes"),
        ("color", r"0.jpg: a mask has one channel, palette or grey, this one is RGB"),
        ("lossy", r"0.jpg: masks must be PNG or another lossless format, this one is JPEG"),
        ("damaged", r"0.jpg: the mask is no image: cannot identify image file"),
        ("missing", r"1 of 4 files of .*images/train are missing, the first is .*0.png"),
    ],
)
def test_masks_that_cannot_be_used(tmp_path, kind, message):
    """One of four is too much; where a share is allowed, it is said, and an image stands in for it."""
    corrupt(tmp_path, kind)
    with pytest.raises(DataError, match=message + r"; data.max_corrupt allows 1.00%"):
        loaders(masks(tmp_path))
    found = loaders(masks(tmp_path, max_corrupt=0.3), seed=1)
    assert any("they are left out" in note for note in found.notes)
    if kind == "missing":
        assert len(found.train.source.labels) == 3
    else:
        values = {int(labels.unique()[0]) for _, batch in found.train.epoch(0) for labels in batch}
        assert values <= {0, 1, 2, 255} and len(found.train.unreadable) == 1
        assert sum(len(labels) for _, labels in found.val) == 3


@pytest.mark.parametrize(
    ("values", "kind", "data", "message"),
    [
        ((255, 255), "PNG", {}, "none of 2 masks of data.train has a pixel with a label"),
        ((255, 255), "PNG", {"num_classes": 0}, "none of 2 masks has a label"),
        ((0, 0), "PNG", {"num_classes": 0}, "2 masks have no label but 0; a segmentation needs two classes"),
        ((0, 1), "JPEG", {"num_classes": 0}, "none of 2 masks has a label: masks must be PNG or another lossless"),
    ],
)
def test_masks_to_learn_nothing_from(tmp_path, values, kind, data, message):
    (tmp_path / "masks/train").mkdir(parents=True)
    for i, value in enumerate(values):
        Image.fromarray(np.full((40, 60), value, np.uint8)).save(tmp_path / f"masks/train/{i}.png", kind)
    with pytest.raises(DataError, match=message):
        loaders(masks(tmp_path, 2, **data))


def test_masks_of_validation_without_a_label(tmp_path):
    c = masks(tmp_path, 3, val="val")
    save(tmp_path / "images/val/0.jpg", np.zeros((40, 60, 3), np.uint8))
    save(tmp_path / "masks/val/0.png", np.full((40, 60), 255, np.uint8))
    with pytest.raises(DataError, match=r"none of 1 mask of data.val has a pixel with a label"):
        loaders(c)


def test_ade20k_of_void_alone(tmp_path):
    make_ade20k(tmp_path)
    save(tmp_path / "annotations/training/ADE_1.png", np.zeros((190, 270), np.uint8))
    with pytest.raises(DataError, match=r"none of 1 mask of data.train has a pixel with a label"):
        loaders(config(SEGMENTATION, "ade20k", tmp_path))


def test_notes_about_masks(tmp_path):
    """Classes without a pixel, and masks of no image."""
    c = masks(tmp_path, 2, num_classes=14)
    save(tmp_path / "masks/train/orphan.png", np.zeros((40, 60), np.uint8))
    pixel, *orphans = sorted(loaders(c).notes)[::-1]
    assert pixel.endswith("2 masks of data.train: classes without a pixel to learn from: 12 of 14, "
                          "2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more")  # fmt: skip
    assert len(orphans) == 2 and orphans[0] == orphans[1]
    assert orphans[0].endswith(
        f"masks without an image are left out: 1, the first is {tmp_path}/masks/train/orphan.png"
    )


def test_folders_that_are_not_there(tmp_path):
    make_voc(tmp_path / "voc")
    make_ade20k(tmp_path / "ade")
    (tmp_path / "voc/ImageSets/Segmentation/val.txt").write_text("2007_000000\n2007_000009\n")
    for source, data, message in (
        ("voc", dict(root=tmp_path), "has no folder JPEGImages, nor has VOC2012 or VOCdevkit/VOC2012 below it"),
        ("voc", dict(root=tmp_path / "voc", train="trainaug"), "no list .*trainaug.txt; the lists are train, val"),
        ("voc", dict(root=tmp_path / "voc"), r"1 of 2 files of .*val.txt are missing, the first is .*2007_000009.png"),
        ("ade20k", dict(root=tmp_path / "voc"), "has no folder images"),
        ("ade20k", dict(root=tmp_path / "ade", train="x"), "there is no folder .*images/x with images"),
        ("masks", dict(root=tmp_path / "ade", train="training"), "no folder .*masks/training with the masks"),
        ("masks", dict(root=tmp_path / "ade", class_map="x.txt", masks="annotations/{part}", train="training"),
         "data.class_map: there is no file .*x.txt"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            loaders(config(SEGMENTATION, source, **data))


def test_sources_of_another_task(tmp_path):
    for network, source, message in (
        (SEGMENTATION, "coco", "must be one of digits, shards, voc, ade20k, masks for segmentation, got 'coco'"),
        (DETECTION, "folder", "data.source must be one of digits, shards, coco for detection, got 'folder'"),
        ("mobilevitv3_xxs", "voc", "data.source voc has no class for each image; it needs a network for dense"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            loaders(config(network, source, tmp_path))
    with pytest.raises(UsageError, match=r"data.root must name the folder of the images for data.source voc"):
        loaders(config(SEGMENTATION, "voc"))


def test_images_are_read_as_they_are_stored(tmp_path):
    """A mask is drawn on the pixels of the file: an EXIF tag does not turn them."""
    c = masks(tmp_path, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "images/train/0.jpg", "JPEG", exif=exif)
    assert not loaders(c).notes
    assert sum(len(labels) for _, labels in loaders(c).val) == 3
