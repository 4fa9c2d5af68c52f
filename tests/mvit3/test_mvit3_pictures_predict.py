"""`mvit3 predict` with networks of segmentation and detection."""

import csv
import io
import json
import runpy
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from PIL import Image
from torchvision.transforms.v2 import functional as F

from mvit3.cli import main
from mvit3.config import TrainConfig
from mvit3.data.decode import from_pil
from mvit3.inference import Network
from mvit3.network import build_model
from mvit3.overlay import OPACITY, palette
from mvit3.prediction_dense import with_names
from mvit3.progress import Progress
from mvit3_kernels import tasks

NAMES = ["background", "cat", "dog", "cow"]
NETWORKS = {
    "v1": ("deeplabv3_mobilevitv3_xxs", NAMES),
    "v2": ("pspnet_mobilevitv3_050", NAMES),
    "boxes": ("ssdlite_mobilevitv3_xxs", NAMES[1:]),
    "boxes_v2": ("ssdlite_mobilevitv3_050", NAMES[1:]),
    "classes": ("mobilevitv3_xxs", NAMES),
}
V1_BOXES = {"score_threshold": 0.05, "candidates": 0, "per_class": 200, "per_image": 0}


class Saved:
    """An untrained network in a file as training writes it."""

    def __init__(self, folder, name, names):
        self.config = TrainConfig.from_dict({
            "model": {"name": name},
            "data": {"crop": 64, "resize": 64, "colors": "bgr", "mean": [0.4, 0.5, 0.6]},
            "detection": V1_BOXES if name == "ssdlite_mobilevitv3_xxs" else {},
        })  # fmt: skip
        self.model = build_model(self.config, len(NAMES), torch.device("cpu")).eval()
        self.path, self.names = folder / f"{name}.pt", names
        self.save()

    def save(self, path=None, **more):
        content = {"state_dict": self.model.state_dict(), "ema_state_dict": {}, "weights": "trained"}
        content |= {"config": self.config.to_dict(), "num_classes": len(NAMES), "class_names": self.names}
        torch.save(content | {"progress": asdict(Progress())} | more, path or self.path)
        return str(path or self.path)

    def input(self, pixels, height=64, width=64):
        image = F.resize(torch.from_numpy(pixels).permute(2, 0, 1), [height, width], antialias=True).flip(0) / 255
        return (image - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))[None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    return {kind: Saved(folder, *given) for kind, given in NETWORKS.items()}


def blocks(height, width):
    """Patches of 8 pixels, which an untrained network tells apart."""
    small = np.random.default_rng(height).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return small.repeat(8, 0).repeat(8, 1)[:height, :width]


@pytest.fixture
def images(tmp_path):
    """Of all kinds: two of one size, grey, 16-bit, turned, of nine pixels, broken; two have one name."""
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(blocks(90, 150)).save(folder / "a.png")
    Image.fromarray(blocks(90, 150)[::-1]).save(folder / "a.webp", lossless=True)
    Image.fromarray(blocks(80, 64)[:, :, 0]).save(folder / "grey.png")
    Image.fromarray(blocks(70, 70)[:, :, 1].astype(np.uint16) * 257).save(folder / "deep.png")
    turned = Image.Exif()
    turned[0x112] = 6
    Image.fromarray(blocks(40, 200)).save(folder / "turned.png", exif=turned)
    Image.fromarray(blocks(1, 9)).save(folder / "tiny.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def predict(saved, *arguments):
    """In float32: what is told is held to the network itself."""
    return main(["predict", "--checkpoint", str(saved.path), "--dtype=float32", *map(str, arguments)])


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_segmentation(saved, images, tmp_path, capsys, kind):
    """Labels at the original size are those of the network on the image as its family resizes it; the overlay has their
    colours, and what is told has their counts."""
    network, out = saved[kind], tmp_path / "out"
    assert predict(network, images, "--output", out, "--json") == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert len(rows) == 7 and "1 of 7 images could not be read" in captured.err and str(out) in captured.err
    assert "deep.png: 16-bit pixels" in captured.err
    assert [row["image"].rpartition("/")[2] for row in rows if "error" in row] == ["broken.png"]
    files = [row[key] for row in rows if "error" not in row for key in ("overlay", "labels")]
    assert len(set(files)) == 12 and sorted(files) == sorted(map(str, out.iterdir()))
    seen = set()
    for row in rows:
        if "error" in row:
            continue
        pixels, _ = from_pil(Image.open(row["image"]))
        height, width = pixels.shape[:2]
        labels = Image.open(row["labels"])
        assert labels.mode == "P" and labels.size == (width, height) == (row["width"], row["height"])
        labels = np.asarray(labels)
        short = min(height, width)
        sides = [64, 64] if kind == "v1" else [64 * min(side, 8 * short) // short for side in (height, width)]
        image = network.input(pixels, *sides)
        whole = [side // 16 * 16 for side in sides]
        image = torch.nn.functional.interpolate(image, whole, mode="bilinear", align_corners=kind == "v2")
        with torch.no_grad():
            expected = network.model.label_map(image, (height, width))[0].numpy()
        assert np.mean(labels == expected) > 0.999
        told = {found["index"]: (found["name"], found["pixels"], found["share"]) for found in row["classes"]}
        counts = np.bincount(labels.ravel())
        assert told == {i: (NAMES[i], n, n / labels.size) for i, n in enumerate(counts.tolist()) if n}
        seen |= set(told)
        overlay = np.asarray(Image.open(row["overlay"])).astype(int)
        factor = max(1, 480 // max(height, width))
        middle = overlay[factor // 2 :: factor, factor // 2 :: factor][:height, :width]
        colours = np.array(palette(True))[labels]
        blended = np.where(labels[..., None] == 0, pixels, (1 - OPACITY) * pixels + OPACITY * colours)
        assert np.abs(middle - blended).max() <= 1
    assert len(seen) > 1


def test_what_is_told_of_segmentation(saved, images, tmp_path, capsys):
    network, out = saved["v2"], tmp_path / "out"
    assert predict(network, images, "--output", out, "--csv", "--quiet") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    shares = {}
    for row in rows:
        shares[row["image"]] = shares.get(row["image"], 0) + float(row["share"] or 0)
    assert sorted(shares.values()) == pytest.approx([0, 1, 1, 1, 1, 1, 1])
    assert predict(network, images, images / "missing.png", "--output", out, "--top=1") == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 10 and lines[0].startswith("image ") and lines[-1].endswith("there is no such file")
    first = rows[0]
    assert f"{first['class']} {float(first['share']):.2%}, " in lines[2] and lines[2].endswith(" more")
    assert "missing.png: there is no such file" in captured.err


@pytest.mark.parametrize("kind", ["boxes", "boxes_v2"])
def test_detection(saved, images, tmp_path, capsys, kind):
    """Boxes are those of the network, in pixels of the image and inside it; the file has the data set's categories, and
    COCO's evaluation takes it: against itself it is perfect."""
    network, out = saved[kind], tmp_path / "out"
    path = network.save(tmp_path / "ids.pt", categories=[17, 18, 90])
    arguments = ["predict", "--checkpoint", path, str(images), "--output", str(out), "--threshold=0.01", "--json"]
    assert main([*arguments, "--dtype=float32"]) == 0
    rows = json.loads(capsys.readouterr().out)
    results = json.loads((out / "detections.json").read_text())
    assert sum(len(row.get("boxes", ())) for row in rows) == len(results) > 100
    for place, row in enumerate(rows, 1):
        boxes = row.get("boxes", [])
        scores = [box["score"] for box in boxes]
        assert scores == sorted(scores, reverse=True)
        for box in boxes:
            x, y, w, h = box["bbox"]
            assert x >= 0 and y >= 0 and w > 0 and h > 0
            assert x + w <= row["width"] + 2e-3 and y + h <= row["height"] + 2e-3
            assert (box["name"], box["category_id"]) in zip(NAMES[1:], (17, 18, 90), strict=True)
        mine = [result for result in results if result["image_id"] == place]
        assert [(r["bbox"], r["score"], r["category_id"]) for r in mine] == [
            (b["bbox"], b["score"], b["category_id"]) for b in boxes
        ]
        assert all(result["file_name"] == row["image"].rpartition("/")[2] for result in mine)
    row = next(row for row in rows if row["image"].endswith("turned.png"))
    pixels, _ = from_pil(Image.open(row["image"]))
    assert (row["height"], row["width"]) == (200, 40) == pixels.shape[:2]
    more = {} if kind == "boxes_v2" else {"candidates": None, "per_class": 200, "per_image": None}
    with torch.no_grad():
        outputs = network.model(network.input(pixels))
        (found,) = tasks.detections(*outputs, network.model.anchors((64, 64)), score_threshold=0.01, **more)
    corners = found.boxes.clamp(0, 1) * torch.tensor([40, 200, 40, 200])
    order = found.scores.argsort(descending=True, stable=True)
    ours = torch.tensor([box["bbox"] for box in row["boxes"]])
    ours[:, 2:] += ours[:, :2]
    assert torch.allclose(ours, corners[order], atol=0.02)
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i} for i in range(1, len(rows) + 1)],
        "categories": [{"id": i} for i in (17, 18, 90)],
        # those that COCO's limit of 100 boxes an image leaves, a class of the strongest each
        "annotations": [
            {"id": i, "image_id": r["image_id"], "category_id": r["category_id"], "bbox": r["bbox"], "iscrowd": 0}
            | {"area": r["bbox"][2] * r["bbox"][3]}
            for i, r in enumerate(best(results), 1)
        ],
    }
    truth.createIndex()
    file = tmp_path / "best.json"
    file.write_text(json.dumps(best(results)))
    evaluation = COCOeval_faster(truth, truth.loadRes(str(file)), "bbox", print_function=lambda *_: None)
    evaluation.run()
    assert evaluation.stats[0] == pytest.approx(1)
    assert truth.loadRes(str(out / "detections.json")).getAnnIds()


def best(results):
    """The boxes of each image and class with the highest scores."""
    kept, counts = [], {}
    for result in results:
        key = result["image_id"], result["category_id"]
        counts[key] = counts.get(key, 0) + 1
        kept += [result] * (counts[key] <= 5)
    return kept


def test_what_is_told_of_detection(saved, images, tmp_path, capsys):
    """Boxes above the threshold; an image without a box has a line too. Names that are numbers are COCO's ids."""
    network, out = saved["boxes"], tmp_path / "out"
    arguments = [images / "a.png", images / "broken.png", "--output", out]
    assert predict(network, *arguments, "--threshold=0.01", "--csv") == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert rows[-1]["error"].startswith("cannot be read") and not rows[-1]["score"]
    scores = [float(row["score"]) for row in rows[:-1]]
    threshold = (scores[2] + scores[3]) / 2
    assert predict(network, *arguments, f"--threshold={threshold}") == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[2].startswith(str(images / "a.png")) and f"{scores[0]:.2%}" in lines[2]
    assert f"{float(rows[0]['x']):.1f}, {float(rows[0]['y']):.1f}, " in lines[2]
    for name in ("000139.png", "42.png"):
        (images / "a.png").rename(images / name)
        (images / "a.png").write_bytes((images / name).read_bytes())
    numbers = [images / "000139.png", images / "42.png"]
    assert predict(network, *numbers, "--output", out, f"--threshold={threshold}") == 0
    assert {r["image_id"] for r in json.loads((out / "detections.json").read_text())} == {139, 42}
    capsys.readouterr()
    assert predict(network, *numbers, "--output", out, "--threshold=0.99") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.endswith("no boxes") for line in lines[2:])
    assert json.loads((out / "detections.json").read_text()) == []


def test_no_image_is_written_over(saved, images, capsys):
    """Where files go into the folder of the images, or images have the names that the files would have."""
    (images / "a.png").rename(images / "grey_labels.png")
    (images / "a.webp").rename(images / "tiny_OVERLAY.png")
    (images / "deep.png").rename(images / f"{'e' * 250}.png")
    before = {path: path.read_bytes() for path in images.iterdir()}
    assert predict(saved["v1"], images, "--output", images, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {path: path.read_bytes() for path in before} == before
    names = {row["image"].rpartition("/")[2]: row for row in rows}
    assert names["grey.png"]["labels"].endswith("grey_2_labels.png")
    assert names["tiny.png"]["overlay"].endswith("tiny_2_overlay.png")
    assert names["e" * 250 + ".png"]["labels"].endswith("e" * 200 + "_labels.png")
    assert not [path for path in images.iterdir() if path.name.startswith(".")]


def test_default_folder(saved, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert predict(saved["v1"], images / "a.png") == 0
    assert {path.name for path in (tmp_path / "runs" / "predictions").iterdir()} == {"a_overlay.png", "a_labels.png"}
    assert predict(saved["v1"], images / "a.png", "--run.output", tmp_path / "mine" / "run") == 0
    assert (tmp_path / "mine" / "predictions" / "a_overlay.png").exists()


@pytest.mark.parametrize(
    ("kind", "source", "outputs", "first", "last"),
    [("v1", "voc", 21, ("aeroplane", 1), ("tvmonitor", 20)), ("boxes", "coco", 81, ("person", 1), ("toothbrush", 90))],
)
def test_names_of_a_checkpoint_of_another_origin(saved, kind, source, outputs, first, last):
    """It tells none: those of its recipe's data set, where the outputs are as many."""
    config = replace(saved[kind].config, data=replace(saved[kind].config.data, source=source))
    network = Network(saved[kind].model, config, outputs, (), "as in the file", None)
    named, skip = with_names(network), 1 - (kind == "boxes")
    ids = named.categories or range(1, outputs)
    assert len(named.class_names) == (21 if kind == "v1" else 80)
    assert (named.class_names[skip], ids[0]) == first and (named.class_names[-1], ids[-1]) == last
    for other in (replace(network, num_classes=7), replace(network, class_names=("a",))):
        assert with_names(other) is other


def test_the_picture_of_the_readme(saved, tmp_path, monkeypatch, capsys):
    """Four overlays side by side, in a small file."""
    script = Path(__file__).parents[2] / "docs" / "overlays.py"
    made = tmp_path / "overlays.png"
    checkpoints = [str(saved[kind].path) for kind in ("v1", "boxes")]
    monkeypatch.setattr(sys, "argv", [str(script), *checkpoints, "--output", str(made)])
    runpy.run_path(str(script), run_name="__main__")
    assert Image.open(made).width == 4 * 288 + 3 * 12 and made.stat().st_size < 100_000
    assert capsys.readouterr().out == f"{made}: 1188x{Image.open(made).height}, {made.stat().st_size} bytes\n"


def test_wrong_input(saved, images, tmp_path, capsys):
    """Each is refused before an image is read, in words that name what was given."""
    image = images / "a.png"
    (tmp_path / "file").write_text("")
    spoilt = saved["boxes"].save(tmp_path / "spoilt.pt", state_dict={
        key: value * torch.nan if value.is_floating_point() else value
        for key, value in saved["boxes"].model.state_dict().items()
    })  # fmt: skip
    wrong = [
        (
            saved["v1"].path,
            ["--threshold=0.5"],
            2,
            "--threshold is the least score of a box; deeplabv3_mobilevitv3_xxs",
        ),
        (
            saved["classes"].path,
            ["--output=x"],
            2,
            "--output is for the files of segmentation and detection; mobilevitv3_xxs names",
        ),
        (saved["boxes"].path, ["--threshold=1"], 2, "--threshold must be at least 0 and below 1, got 1.0"),
        (saved["boxes"].path, ["--threshold=nan"], 2, "--threshold must be a number, got 'nan'"),
        (saved["boxes"].path, ["--threshold=low"], 2, "--threshold must be a number, got 'low'"),
        (saved["v1"].path, [f"--output={tmp_path / 'file' / 'x'}"], 2, "is not a folder that can be written"),
        (spoilt, [f"--output={tmp_path / 'out'}"], 1, "the network's output is not finite"),
    ]
    for checkpoint, arguments, status, said in wrong:
        try:
            found = main(["predict", "--checkpoint", str(checkpoint), str(image), *arguments])
        except SystemExit as stop:
            found = stop.code
        error = capsys.readouterr().err.splitlines()[-1]
        assert found == status and said in error, error
