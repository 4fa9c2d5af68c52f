"""The part of a report that shows predictions of segmentation and detection beside the truth."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from .overlay import VOID, Color, box_color, draw_boxes, has_background, name_of, paint, palette
from .screen import percent, plain

KINDS = {"best": "Best", "median": "In the middle", "worst": "Worst"}
LEGEND = 40  # classes that the legend names
QUALITY = 88  # of JPEG: a page of a few hundred kB

STYLE = """
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,270px),1fr));gap:1rem}
figure.pair{display:grid;grid-template-columns:1fr 1fr;gap:2px}
figure.pair img{width:100%;border:0}
figure.pair figcaption{grid-column:1/3}
.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.1em 1em}
.legend i{display:inline-block;width:.9em;height:.9em;margin-right:.4em;border:1px solid #222;vertical-align:-.1em}
"""


def pictures(samples: Mapping[str, Sequence[Mapping[str, object]]], names: Sequence[str], task: str) -> list[str]:
    """HTML of the best, the middle and the worst images of a validation: truth to the left, prediction to the right.

    Args:
        samples: by "best", "median" and "worst", plain values and tensors as `gallery.Ranking` keeps them.
        names: of the classes; of a detector without its background.
        task: "segmentation" or "detection".
    """
    score, sides = ("IoU", _masks) if task == "segmentation" else ("F1", _boxes)
    legend: dict[str, Color | None] = {}
    parts = []
    for kind, title in KINDS.items():
        figures = []
        for sample in samples.get(kind, ()):
            truth, guess, seen = sides(sample, names)
            legend |= seen
            caption = f"{score} {percent(sample['score'])}"
            figures.append(
                f'<figure class="pair">{_image(truth, "truth")}{_image(guess, "prediction")}'
                f"<figcaption><b>{caption}</b>{html.escape(_said(sample, names, task))}</figcaption></figure>"
            )
        if figures:
            parts += [f"<h2>{title}</h2>", '<div class="pairs">', *figures, "</div>"]
    return [_intro(score, legend), *parts] if parts else []


def _intro(score: str, legend: Mapping[str, Color | None]) -> str:
    how = {
        "IoU": "the mean over the classes that are in the image or predicted in it",
        "F1": "of its boxes, where a prediction overlaps a true box of its class by half",
    }[score]
    items = [
        f'<li><i style="background:{f"rgb{color}" if color else "none"}"></i>{html.escape(name)}</li>'
        for name, color in sorted(legend.items())[:LEGEND]
    ]
    if len(legend) > LEGEND:
        items.append(f"<li>and {len(legend) - LEGEND} more</li>")
    return (
        f"<h2>Predictions beside the truth</h2><p>Truth to the left, prediction to the right; {score} of an image is "
        f'{how}.</p><ul class="legend">{"".join(items)}</ul>'
    )


def _masks(
    sample: Mapping[str, object], names: Sequence[str]
) -> tuple[Image.Image, Image.Image, dict[str, Color | None]]:
    """Truth, prediction, and the colours of the classes in them."""
    picture = Image.fromarray(np.asarray(sample["pixels"]))
    truth, guess = (np.asarray(sample[key]) for key in ("truth", "guess"))
    hues, background = palette(has_background(names)), has_background(names)
    present = [label for label in np.union1d(truth, guess).tolist() if label != VOID]
    seen = {plain(name_of(names, label)): None if background and not label else hues[label] for label in present}
    return paint(picture, truth, names), paint(picture, guess, names), seen


def _boxes(
    sample: Mapping[str, object], names: Sequence[str]
) -> tuple[Image.Image, Image.Image, dict[str, Color | None]]:
    """Truth, prediction, and the colours of the classes in them."""
    picture = Image.fromarray(np.asarray(sample["pixels"]))
    drawn, seen = [], {}
    for part in (sample["truth"], sample["guess"]):
        labels = np.asarray(part["labels"]).tolist()
        said = [plain(name_of(names, label - 1)) for label in labels]
        seen |= {name: box_color(label) for name, label in zip(said, labels, strict=True)}
        if "scores" in part:
            said = [f"{name} {score:.0%}" for name, score in zip(said, np.asarray(part["scores"]), strict=True)]
        corners = np.asarray(part["boxes"], np.float64).reshape(-1, 4) * (picture.size * 2)
        drawn.append(draw_boxes(picture, corners, labels, said))
    return *drawn, seen


def _said(sample: Mapping[str, object], names: Sequence[str], task: str) -> str:
    """What the caption adds to the score."""
    if task == "segmentation":
        truth, guess = (np.asarray(sample[key]) for key in ("truth", "guess"))
        counted = truth != VOID
        return f", {percent(float((truth == guess)[counted].mean()))} of the pixels right" if counted.any() else ""
    there, found = (len(sample[key]["labels"]) for key in ("truth", "guess"))
    return f", {there} there, {found} found"


def _image(picture: Image.Image, what: str) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY, subsampling=0)  # else thin coloured lines become grey
    return f'<img alt="{what}" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'
