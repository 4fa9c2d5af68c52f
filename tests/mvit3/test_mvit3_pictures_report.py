"""The report of a run of segmentation or detection."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mvit3.overlay import OPACITY, box_color, palette
from mvit3.progress import Progress
from mvit3.report import write_html
from mvit3.report_dense import KINDS, pictures
from mvit3.scores import SCORES

from .test_mvit3_report import Page

NAMES = ["background", "<b>cat", "dog", "cow"]


def shown(text):
    """The pictures of a page."""
    found = re.findall(r'alt="(\w+)" src="data:image/jpeg;base64,([^"]+)"', text)
    return [(alt, np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)) for alt, data in found]


def masks(score, label):
    truth, guess = torch.zeros(2, 32, 48, dtype=torch.uint8)
    truth[:, 8:24], truth[:, 40:], guess[:, :16] = label, 255, 3
    return {"score": score, "pixels": torch.full((32, 48, 3), 100, dtype=torch.uint8), "truth": truth, "guess": guess}


def boxes(score, label):
    corners = torch.tensor([[0.25, 0.5, 0.75, 0.875]])
    truth = {"boxes": corners, "labels": torch.tensor([label])}
    guess = {"boxes": corners - 0.25, "labels": torch.tensor([3]), "scores": torch.tensor([0.875])}
    return {"score": score, "pixels": torch.full((64, 96, 3), 100, dtype=torch.uint8), "truth": truth, "guess": guess}


def samples(make):
    return {
        kind: [make(score, 1 + (kind == "worst"))] * 2 for kind, score in zip(KINDS, (0.9, 0.5, 0.125), strict=True)
    }


def test_masks_of_truth_and_prediction():
    text = "".join(pictures(samples(masks), NAMES, "segmentation"))
    assert [alt for alt, _ in shown(text)] == ["truth", "prediction"] * 6
    hues = [np.array(color) for color in palette(True)]
    for i, (alt, pixels) in enumerate(shown(text)):
        label = 3 if alt == "prediction" else 2 if i >= 8 else 1
        inside, ground = (4, 44) if alt == "prediction" else (12, 44)
        assert np.abs(pixels[16, inside] - (1 - OPACITY) * 100 - OPACITY * hues[label]).max() < 12
        assert np.abs(pixels[16, ground] - 100).max() < 12  # background, and what has no label
    assert re.findall("<h2>(.*?)</h2>", text) == ["Predictions beside the truth", *KINDS.values()]
    assert text.count("<b>IoU 90.00%</b>, 40.00% of the pixels right") == 2 and "<b>IoU 12.50%" in text
    legend = dict(re.findall(r'<li><i style="background:([^"]*)"></i>(.*?)</li>', text))
    assert {name: color for color, name in legend.items()} == {
        "background": "none",
        **{name: f"rgb{palette(True)[i]}" for i, name in enumerate(("&lt;b&gt;cat", "dog", "cow"), 1)},
    }


def test_boxes_of_truth_and_prediction():
    text = "".join(pictures(samples(boxes), NAMES[1:], "detection"))
    for i, (alt, pixels) in enumerate(shown(text)):
        label = 3 if alt == "prediction" else 2 if i >= 8 else 1
        row, column = (38, 46) if alt == "prediction" else (50, 70)
        assert np.abs(pixels[row, column] - box_color(label)).max() < 40, (i, alt)
        assert np.abs(pixels[60, 4] - 100).max() < 12
    assert text.count("<b>F1 50.00%</b>, 1 there, 1 found") == 2
    assert "&lt;b&gt;cat" in text and "<b>cat" not in text


def test_without_samples_there_is_no_heading():
    assert pictures({}, NAMES, "segmentation") == []
    only = "".join(pictures({"worst": [boxes(0.0, 1)]}, NAMES[1:], "detection"))
    assert re.findall("<h2>(.*?)</h2>", only) == ["Predictions beside the truth", "Worst"]


@pytest.fixture(params=["segmentation", "detection"])
def page(request, run, tmp_path):
    """A report with all that there can be, and the result that it tells."""
    task, scores = request.param, SCORES[request.param]
    network, make, names = {
        "segmentation": ("deeplabv3_mobilevitv3_xxs", masks, NAMES),
        "detection": ("ssdlite_mobilevitv3_xxs", boxes, NAMES[1:]),
    }[task]
    old = dict.fromkeys([f"{prefix}{key}" for prefix in ("", "ema_") for key in SCORES["classification"].row])
    history = [
        {key: value for key, value in row.items() if key not in old}
        | {f"{prefix}{key}": 0.25 for prefix in ("", "ema_") for key in scores.row}
        for row in run.result["history"]
    ]
    counted = [900, 0, 50, 7]
    classes = [
        {"name": name, scores.counted: n} | dict.fromkeys(list(scores.classes)[1:], 0.625 if n else None)
        for name, n in zip(names, counted, strict=False)
    ]
    own = dict.fromkeys(scores.heads, 0.25) | {f"best_{scores.best}": 0.25, "history": history, "classes": classes}
    result = {key: value for key, value in run.result.items() if "accuracy" not in key} | own | {"model": network}
    progress = Progress(samples=samples(make), confusion=[[800, 100, 0, 0], [0] * 4, [50, 0, 0, 0], [0, 0, 0, 7]])
    if task == "detection":
        progress.confusion = None
    write_html(tmp_path / "report.html", result, progress)
    return task, scores, (tmp_path / "report.html").read_text()


def test_report_of_dense_prediction(page):
    task, scores, text = page
    found = Page(text)
    assert (
        found.words["h1"] == [f"25.00% {scores.name}, average weights, finished"] or "trained" in found.words["h1"][0]
    )
    assert "ccuracy" not in text.replace("pixel accuracy", "")
    assert len(found.all("img")) == 12
    assert {svg["aria-label"] for svg in found.all("svg")} == {"loss", scores.name, "learning rate", "speed"}
    bars = re.findall(r'class="number bar" style="--share:([\d.]+%)">\1<', text)
    assert bars == ["62.50%"] * (3 if task == "segmentation" else 2) and scores.missing in found.words["td"]
    named = [scores.classes[scores.of_class], *list(scores.heads.values())[1:3]]
    assert all(name in text for name in named)
    if task == "segmentation":
        rows = re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td>.*?>(\d+)</td>.*?>([\d.]+%)<", text)
        assert ("background", "&lt;b&gt;cat", "100", "11.11%") in rows and (
            "dog",
            "background",
            "50",
            "100.00%",
        ) in rows


def test_report_of_dense_prediction_fits_any_screen(page):
    """As that of a classifier: no table with more than four columns on a telephone, nothing of a fixed width above
    its."""
    _, _, text = page
    style = text[text.index("<style>") : text.index("</style>")]
    assert "repeat(auto-fill,minmax(min(100%,270px),1fr))" in style and "figure.pair img{width:100%" in style
    for table in re.findall(r"<table>.*?</table>", text):
        head = re.findall(r"<th[^>]*>", table[: table.index("</tr>")])
        assert sum("more" not in cell for cell in head) <= 4
