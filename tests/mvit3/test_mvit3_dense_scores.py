"""Scores of segmentation and detection against the golden values, and what is left out of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mvit3.coco import STATISTICS, Found, Truth, average_precision
from mvit3.config import RunConfig, TrainConfig
from mvit3.data import Boxes, DataConfig
from mvit3.distributed import World
from mvit3.errors import TrainingError
from mvit3.gallery import Ranking
from mvit3.tasks import evaluate
from mvit3.tasks.detection import BoxMeter, f1
from mvit3.tasks.segmentation import PixelMeter
from mvit3_kernels import create_model
from mvit3_kernels.tasks import assign, ssd_loss

from .. import golden
from ..models.test_dense import make

CPU = torch.device("cpu")
# The images of golden_data by id, and their annotations as DENSE.md gives them: category, corner, size, crowd.
SIZES = {139: (240, 330), 285: (200, 150), 42: (96, 120), 77: (64, 80)}
ANNOTATIONS = {
    139: [(1, 20.5, 30.25, 100, 150, 0), (90, 200, -6, 140, 90, 0), (13, 5, 5, 0, 40, 0), (62, 10, 100, 300, 120, 1),
          (84, 150.2, 120.7, 30, 22.5, 0)],
    285: [(25, 0, 0, 150, 200, 0), (25, 30, 40, 60.5, 80, 0)],
    42: [(67, 10, 20, 5, 4, 0)],
    77: [],
}  # fmt: skip


class Given(nn.Module):
    """A segmentation network whose small logits are what it is given as images."""

    align_corners, output_stride = True, 1

    def small_logits(self, x):
        return x, None


def pixel_meter(classes, gallery=False, **data):
    return PixelMeter(classes, [f"c{i}" for i in range(classes)], DataConfig(**data), CPU, gallery)


@pytest.mark.parametrize(("name", "classes", "ignored"), [("voc", 21, 255), ("ade", 150, -1)])
def test_golden_miou(name, classes, ignored):
    """IoU of each class, pixel accuracy, and the class that is never seen, left out of the mean."""
    stored, batches, losses, pixels = golden.load("miou"), [], 0.0, 0
    for i, (batch, height, width) in enumerate([(2, 33, 29), (2, 40, 31), (1, 17, 50)]):
        shape, seed = (batch, height, width), 301 + 10 * i
        logits = np.random.default_rng(seed).standard_normal((batch, classes, height, width)).astype(np.float32)
        labels = np.random.default_rng(seed + 1).integers(0, classes - 3, shape)
        labels[np.random.default_rng(seed + 2).random(shape) < 0.15] = ignored
        logits += 3 * np.eye(classes, dtype=np.float32)[labels.clip(0, classes - 1)].transpose(0, 3, 1, 2)
        logits[:, classes - 1] -= 1000
        labels[labels == ignored] = 255
        batches.append((torch.from_numpy(logits), torch.from_numpy(labels)))
        losses += float(nn.functional.cross_entropy(*batches[-1], ignore_index=255, reduction="sum").double())
        pixels += int((batches[-1][1] != 255).sum())
    found = evaluate(Given(), iter(batches), RunConfig(), pixel_meter(classes), CPU)
    iou = stored[f"{name}_iou_per_class"]
    got = [np.nan if c["iou"] is None else c["iou"] for c in found.kept["classes"]]
    np.testing.assert_allclose(got, iou, rtol=1e-6, equal_nan=True)
    assert found.values["miou"] == pytest.approx(np.nanmean(iou), rel=1e-6)
    assert found.values["pixel_accuracy"] == pytest.approx(float(stored[f"{name}_acc_global"]), rel=1e-7)
    assert found.values["val_loss"] == pytest.approx(losses / pixels, rel=1e-6)
    confusion = stored[f"{name}_confmat"]
    assert [c["pixels"] for c in found.kept["classes"]] == confusion.sum(1).tolist()
    assert found.kept["confusion"] == (confusion.tolist() if classes == 21 else None)
    last = classes - 1
    assert found.remarks[0] == f"never seen in the validation images, and left out of the mIoU: c{last}"
    assert found.remarks[1].endswith(f"which counts as an IoU of 0: c{last - 2}, c{last - 1}")


@pytest.mark.parametrize("published", ["deeplabv3_mobilevitv3_small_v3", "deeplabv3_mobilevitv3_1.00"])
def test_golden_labels_of_the_evaluation_script(published):
    """With labels at their native size: brought down to whole strides, predicted at the size of the labels."""
    want = golden.load(f"segeval_{published.replace('deeplabv3_', 'deeplabv3_voc_')}")
    model = make(published, torch.float64).eval()
    image = golden.image(7, 1, 3, *want["input_shape"].tolist()).double()
    labels = [torch.from_numpy(want["pred"]).long()]
    found = evaluate(model, iter([(image, labels)]), RunConfig(), pixel_meter(21, native_labels=True), CPU)
    assert found.values["pixel_accuracy"] == found.values["miou"] == 1.0 and found.total == 1


def test_labels_of_several_sizes_and_spoilt_outputs():
    """Images of a batch are counted one by one; one without finite outputs is left out and told."""
    images = torch.randn(3, 3, 6, 6)
    images[1, 0, 0, 0] = torch.nan
    sizes = [(9, 7), (5, 5), (12, 6)]
    labels = [torch.randint(0, 3, size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)]
    meter = pixel_meter(3, native_labels=True, gallery=True)
    found = evaluate(Given(), iter([(images, labels)]), RunConfig(), meter, CPU)
    up = [nn.functional.interpolate(images[i : i + 1], sizes[i], mode="bilinear", align_corners=True) for i in (0, 2)]
    hits = sum(int((one.argmax(1)[0] == labels[i]).sum()) for one, i in zip(up, (0, 2), strict=True))
    assert found.values["pixel_accuracy"] == hits / (9 * 7 + 12 * 6)
    assert (found.total, found.not_finite) == (3, 1)


def test_no_pixel_counts():
    with pytest.raises(TrainingError, match="no pixel of the validation images has a label that counts"):
        evaluate(
            Given(), iter([(torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 255))]), RunConfig(), pixel_meter(3), CPU
        )


@pytest.fixture(scope="module")
def coco():
    """Contiguous labels by category."""
    ids = golden.load("data_v1")["coco_category_ids_in_contiguous_order_1_to_80"].tolist()
    return {category: label for label, category in enumerate(ids, 1)}


def truths(labels):
    found = []
    for i, (image, rows) in enumerate(ANNOTATIONS.items()):
        boxes = np.array([(x, y, x + w, y + h) for _, x, y, w, h, _ in rows], np.float64).reshape(-1, 4)
        category, crowd, area = (
            np.array([row[0] for row in rows], int),
            np.array([row[5] for row in rows], bool),
            np.array([row[3] * row[4] for row in rows], float),
        )
        found.append(Truth(i, SIZES[image], boxes, np.array([labels[c] for c in category.tolist()], int), crowd, area))
    return found


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_golden_map(family, coco):
    """The statistics of pycocotools; crowds and areas are the data set's."""
    stored = golden.load(f"data_{family}")
    found = [
        Found(i, *(stored[f"cocoeval_det{image}_{key}"] for key in ("boxes_norm", "scores", "labels")))
        for i, image in enumerate(SIZES)
    ]
    names = [f"c{label}" for label in range(1, 81)]
    result = average_precision(found, truths(coco), names)
    assert [result.values[key] for key in STATISTICS] == pytest.approx(stored["cocoeval_stats12"][:6], rel=1e-12)
    seen = [c for c in result.classes if c["boxes"]]
    assert {c["name"]: c["boxes"] for c in seen} == {"c1": 1, "c12": 1, "c24": 2, "c61": 1, "c74": 1, "c80": 1}
    assert np.mean([c["ap"] for c in seen]) == pytest.approx(result.values["map"], rel=1e-12)
    assert np.mean([c["ap50"] for c in seen]) == pytest.approx(result.values["map50"], rel=1e-12)
    assert all(c["ap"] is None for c in result.classes if not c["boxes"])
    (remark,) = result.remarks
    assert remark.startswith("without a box in the validation images, and left out of the mAP: c2, c3")
    assert remark.endswith("and 64 more")


def test_nothing_is_found(coco):
    empty = Found(0, np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    assert average_precision([empty], truths(coco)[:1], ["c"] * 80).values["map"] == 0.0
    none = truths(coco)[3]
    assert average_precision([empty._replace(index=3)], [none], ["c"] * 80).values["map"] is None


def test_detections_of_a_network(coco):
    """What the meter hands over: detections of the options, in images that can be read, and the loss by boxes."""
    torch.manual_seed(0)
    model = create_model("ssdlite_mobilevitv3_xxs", 81).eval()
    images = torch.randn(2, 3, 64, 64)
    everything = truths(coco)
    source = SimpleNamespace(
        size=lambda index: everything[index].size, annotations=lambda index: tuple(everything[index][2:])
    )
    boxes = Boxes(
        torch.tensor([[[0.1, 0.1, 0.5, 0.6], [0.2, 0.0, 0.9, 0.4]], [[0.0, 0.0, 0.5, 0.5], [0.0] * 4]]),
        torch.tensor([[3, 7], [1, 0]]),
    )
    config = TrainConfig.from_dict({"detection": {"score_threshold": 0.02, "per_image": 5}})
    meter = BoxMeter(["c"] * 80, source, config.detection, DataConfig(), World(CPU), True)
    found = evaluate(model, iter([(images, boxes, torch.tensor([2, 0]))]), RunConfig(), meter, CPU)
    assert [one.index for one in meter.found] == [2, 0] and all(len(one.scores) <= 5 for one in meter.found)
    assert found.total == 2 and found.kept["classes"][0]["boxes"] == 1
    with torch.no_grad():
        lists = [[one[present > 0] for one, present in zip(part, boxes.labels, strict=True)] for part in boxes]
        loss = ssd_loss(*model(images), assign(*lists, model.anchors((64, 64))))
    assert found.values["val_loss"] == pytest.approx(float(loss), rel=1e-5)
    spoilt = images.clone()
    spoilt[0] = torch.nan
    meter = BoxMeter(["c"] * 80, source, config.detection, DataConfig(), World(CPU), False)
    found = evaluate(model, iter([(spoilt, boxes, torch.tensor([2, 0]))]), RunConfig(), meter, CPU)
    assert (found.total, found.not_finite, [one.index for one in meter.found]) == (2, 1, [0])


def test_score_of_an_image():
    """A box is found once, by a guess of its class."""
    truth = {"boxes": torch.tensor([[0.0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]), "labels": torch.tensor([1, 2])}

    def guess(*rows):
        boxes = torch.tensor([row[:4] for row in rows], dtype=torch.float32).reshape(-1, 4)
        return {
            "boxes": boxes,
            "scores": torch.linspace(0.9, 0.5, len(rows)),
            "labels": torch.tensor([r[4] for r in rows]),
        }

    right, again, other, far = (0, 0, 0.5, 0.5, 1), (0, 0, 0.5, 0.45, 1), (0.5, 0.5, 1, 1, 1), (0.9, 0, 1, 0.1, 2)
    assert f1(truth, guess(right)) == 2 / 3
    assert f1(truth, guess(right, again)) == 2 / 4
    assert f1(truth, guess(other, far)) == 0
    assert f1(truth, guess(right, (0.5, 0.5, 1, 0.9, 2))) == 1
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert f1(none, {**none, "scores": torch.zeros(0)}) == 1 and f1(none, guess(right)) == 0


def test_ranking_of_many_images():
    """Best and worst are exact; those about the median are of an even selection, and few are kept at a time."""
    ranking, made = Ranking(), []
    scores = np.random.default_rng(0).permutation(500) / 500
    for number, score in enumerate(scores.tolist()):
        ranking.add(score, lambda number=number: made.append(number) or {"number": number})
    found = ranking.samples()
    ordered = sorted(scores.tolist())
    assert [s["score"] for s in found["best"]] == ordered[::-1][:4] and [s["score"] for s in found["worst"]] == ordered[
        :4
    ]
    assert all(abs(s["score"] - 0.5) < 0.1 for s in found["median"]) and len(found["median"]) == 4
    assert len(made) < 200
    alike = Ranking()
    for number in range(9):
        alike.add(0.0, lambda number=number: {"number": number})
    found = [s["number"] for group in alike.samples().values() for s in group]
    assert sorted(found) == list(range(9))
