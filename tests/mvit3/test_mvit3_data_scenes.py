"""The embedded scenes: what is told of them is what is drawn, and the parts have nothing in common."""

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms, box_iou

from mvit3.data import loaders
from mvit3.data.digits import load_digits
from mvit3.data.scenes import LAYOUTS, OVERLAP, SIZE, Scenes, load_scenes
from mvit3.data.sources import open_source

from .dense_data import config

LOOKED_AT = 40


@pytest.mark.parametrize("task", LAYOUTS)
@pytest.mark.parametrize("part", ["train", "val"])
def test_boxes_and_masks(part, task):
    """Boxes are tight around what is visible of an object, of which most is; all objects survive the suppression of
    boxes that overlap by half."""
    counts = set()
    for pixels, mask, boxes, labels, area in (load_scenes(part, task)[i] for i in range(LOOKED_AT)):
        assert pixels.shape == (SIZE, SIZE, 3) and pixels.dtype == mask.dtype == np.uint8
        assert len(boxes) == len(labels) == len(area) and set(np.unique(mask)) == {0, *labels}
        counts.add(len(labels))
        for label in set(labels.tolist()):
            own, (rows, columns) = boxes[labels == label], np.where(mask == label)
            around = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            assert (*own[:, :2].min(0), *own[:, 2:].max(0)) == around
            assert area[labels == label].sum() == len(rows)
        assert (area > 0.25 * (boxes[:, 2:] - boxes[:, :2]).prod(1)).all()
        overlaps = box_iou(*(torch.from_numpy(boxes),) * 2).fill_diagonal_(0)
        assert overlaps.max() <= OVERLAP
        kept = batched_nms(torch.from_numpy(boxes), torch.ones(len(boxes)).double(), torch.from_numpy(labels), 0.5)
        assert len(kept) == len(boxes)
    least, most = LAYOUTS[task].objects
    # a digit without a place is left out
    assert set(range(least, most + 1)) <= counts and max(counts) == most and min(counts) > 0


def test_parts_are_apart():
    digits = load_digits()
    rows = [{image.numpy().tobytes() for image in part.images[:, 0]} for part in (digits.train, digits.val)]
    assert len(rows[0] & rows[1]) <= 1  # of 1,797 digits two are alike
    for task in LAYOUTS:
        assert len(Scenes("train", task).digits) == len(digits.train)
        assert not (load_scenes("train", task)[0].pixels == load_scenes("val", task)[0].pixels).all()


def test_scenes_depend_on_their_index_alone():
    for i in (7, 3):
        for ours, again in zip(load_scenes("val", "detection")[i], Scenes("val", "detection")[i], strict=True):
            assert (ours == again).all()


def test_sources_of_both_tasks():
    boxes, masks = (
        open_source(config(f"{name}_mobilevitv3_xxs", "digits", limit_val=9).data, "val", task=task)
        for name, task in (("ssdlite", "detection"), ("deeplabv3", "segmentation"))
    )
    assert len(boxes.labels) == len(masks.labels) == 9 and LAYOUTS["detection"].scenes["val"] > 9
    assert boxes.read(4).shape == masks.read(4).shape and boxes.image_name(4) == masks.image_name(4)
    assert boxes.class_names == tuple("0123456789") and masks.class_names == ("background", *"0123456789")
    truth = boxes.annotations(4)
    drawn = load_scenes("val", "detection")[4 * LAYOUTS["detection"].scenes["val"] // 9]
    assert (truth.boxes == drawn.boxes).all() and (truth.labels == drawn.labels).all()
    assert masks.truth(4).shape == boxes.size(4) == (SIZE, SIZE)
    assert (
        boxes.categories == {i: i for i in range(1, 11)}
        and boxes.image_id(4) == 4 * LAYOUTS["detection"].scenes["val"] // 9
    )
    for name, outputs in (("ssdlite", 11), ("pspnet", 11), (None, 10)):
        network = f"{name}_mobilevitv3_xxs" if name else "mobilevitv3_xxs"
        assert loaders(config(network, "digits")).num_classes == outputs
