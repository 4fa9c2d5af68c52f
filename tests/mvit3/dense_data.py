"""Small data sets for dense prediction on disk, made as the golden values' recipe says."""

import json
from types import SimpleNamespace

import numpy as np
from PIL import Image

from mvit3.data import AugmentConfig, DataConfig, SamplerConfig

SIZES = {139: (240, 330), 285: (200, 150), 42: (96, 120), 77: (64, 80)}
OBJECTS = (
    (139, 1, [20.5, 30.25, 100, 150], 0),
    (139, 90, [200, -6, 140, 90], 0),
    (139, 13, [5, 5, 0, 40], 0),
    (139, 62, [10, 100, 300, 120], 1),
    (139, 84, [150.2, 120.7, 30, 22.5], 0),
    (285, 25, [0, 0, 150, 200], 0),
    (285, 25, [30, 40, 60.5, 80], 0),
    (42, 67, [10, 20, 5, 4], 0),
)
NOT_IN_COCO = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
# The two families' pixels.
V1 = {"interpolation": "bilinear", "antialias": False, "colors": "bgr"}
V2 = {"interpolation": "bicubic", "antialias": True, "colors": "rgb"}


def config(network, source, root="", augment=None, size=64, **data):
    """A configuration with the sections that concern data."""
    values = dict(source=source, root=str(root), batch_size=2, eval_batch_size=2, resize=size, crop=size, workers=0)
    return SimpleNamespace(
        model=SimpleNamespace(name=network),
        data=DataConfig(**{**values, **data}),
        augment=AugmentConfig(**(augment or {})),
        sampler=SamplerConfig(size=size),
    )


def pixels(seed, height, width):
    """(H, W, 3) uint8, squares of 8x8 pixels."""
    small = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
    return small.repeat(8, 0).repeat(8, 1)[:height, :width]


def save(path, array):
    """Without loss, whatever the file is called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, "PNG")


def make_coco(root):
    """The content of the file, also written for both parts."""
    names = [i for i in range(1, 91) if i not in NOT_IN_COCO]
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": height, "width": width} for i, (height, width) in SIZES.items()
        ],
        "categories": [{"id": i, "name": f"thing {i}"} for i in names],
        "annotations": [
            {
                "id": i,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": crowd,
            }
            for i, (image, category, box, crowd) in enumerate(OBJECTS)
        ],
    }
    for part in ("train2017", "val2017"):
        for i, size in SIZES.items():
            save(root / part / f"{i}.jpg", pixels(i, *size))
        write_coco(root, content, part)
    return content


def write_coco(root, content, part="train2017"):
    file = root / "annotations" / f"instances_{part}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))


def voc_mask(i, height, width):
    mask = np.random.default_rng(800 + i).integers(0, 22, (height // 4 + 1, width // 4 + 1))
    mask = np.where(mask == 21, 255, mask).astype(np.uint8)
    return mask.repeat(4, 0).repeat(4, 1)[:height, :width]


def make_voc(root):
    """Two images, in the lists train and val."""
    for i, size in enumerate(((180, 260), (333, 250))):
        save(root / f"JPEGImages/2007_00000{i}.jpg", pixels(700 + i, *size))
        save(root / f"SegmentationClass/2007_00000{i}.png", voc_mask(i, *size))
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for part in ("train", "val"):
        (lists / f"{part}.txt").write_text("2007_000000\n2007_000001\n")


def make_ade20k(root):
    """One image in both parts."""
    mask = np.random.default_rng(810).integers(0, 151, (190 // 4 + 1, 270 // 4 + 1)).astype(np.uint8)
    for part in ("training", "validation"):
        save(root / f"images/{part}/ADE_1.jpg", pixels(710, 190, 270))
        save(root / f"annotations/{part}/ADE_1.png", mask.repeat(4, 0).repeat(4, 1)[:190, :270])
