"""What a run says while it goes, and its report."""

import html
import json
import re
import sys
from html.parser import HTMLParser

import torch

from mvit3 import checkpoint
from mvit3.gallery import SHOWN
from mvit3.progress import Progress
from mvit3.report import class_results, class_rows, write_html


def test_progress_in_a_file_is_plain_lines(run):
    """No control characters; the loss first, from the first step on, after a resume too."""
    for _, err in run.said[:2]:
        assert not set(err) & {"\r", "\x1b"}
        assert "64 training and 40 validation images of 10 classes; building mobilevitv3_xxs\n" in err
        first = re.search(r"^\d+/8  (epoch \d/2  .*)$", err, re.MULTILINE)[1]
        assert re.fullmatch(
            r"epoch \d/2  loss \d\.\d{3}  [\d.]+ img/s  lr [1-9]\.\de-0\d  waiting for data \d+\.\d\d%", first
        )
        assert "nan" not in err and "lr 0.0e+00" not in err


def test_epochs_are_a_table(run):
    lines = re.findall(r"^epoch \d/2  .*$", run.said[0][1] + run.said[1][1], re.MULTILINE)
    assert len(lines) == 2
    for word in ("loss", "accuracy", "average", "img/s", "waiting"):
        assert len({line.index(word) for line in lines}) == 1
    assert all(len(re.findall(r"\d\.\d\d%", line)) >= 3 for line in lines)


def test_time_and_starts_are_those_of_the_whole_run(run):
    history = run.result["history"]
    assert run.result["starts"] == 2 and run.result["seconds"] > sum(row["seconds"] for row in history)
    assert checkpoint.load(run.folder / "last.pt")["progress"]["total_seconds"] <= run.result["seconds"]
    assert "over 2 starts" in (run.folder / "report.html").read_text()


def test_complete_run_says_so_and_keeps_its_report(run):
    out, _ = run.said[2]
    assert "already complete, nothing was trained" in out.splitlines()[0] and "over 2 starts" in out
    assert json.loads((run.folder / "report.json").read_text()) == run.result
    assert "already complete" not in (run.folder / "report.html").read_text()


class Page(HTMLParser):
    """Tags with their attributes, text, and what of it stands where."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "path", "use", "rect", "circle", "g", "clippath", "image"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        self.words.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_report_has_one_headline(run):
    page, stopped = Page((run.folder / "report.html").read_text()), Page(run.stopped)
    result = run.result
    assert page.words["h1"] == [f"{result['accuracy']:.2%} accuracy, {result['weights']} weights, finished"]
    assert stopped.words["h1"][0].endswith("weights, stopped after 1 of 2 epochs")
    assert len(page.all("h1")) == len(stopped.all("h1")) == 1


def test_report_says_how_the_run_was_made(run):
    text = (run.folder / "report.html").read_text()
    assert f'<time datetime="{run.result["date"]}">' in text and re.match(
        r"\d{4}-\d\d-\d\dT.*[+-]\d\d:\d\d$", run.result["date"]
    )
    assert run.result["command"].startswith("mvit3 train --model.name=mobilevitv3_xxs") and run.result[
        "command"
    ].endswith("--json")
    assert f"torch {torch.__version__.partition('+')[0]}" in text and f"python {sys.version.split()[0]}" in text
    assert "Configuration" in text and "batch_size: 16" in text and run.result["config"]["data"]["batch_size"] == 16


def test_report_has_classes_and_samples(run):
    page = Page((run.folder / "report.html").read_text())
    classes = run.result["classes"]
    assert [c["name"] for c in classes] == list("0123456789")
    assert sum(c["images"] for c in classes) == 40 and sum(c["correct"] for c in classes) == round(
        run.result["accuracy"] * 40
    )
    for row in class_rows(classes)[1:]:
        assert row[3] in page.words["td"]
    samples = checkpoint.load(run.folder / "last.pt")["progress"]["samples"]
    assert [len(samples[kind]) for kind in ("best", "worst")] == [SHOWN, SHOWN]
    images = page.all("img")
    assert SHOWN <= len(images) <= 2 * SHOWN and all(
        image["src"].startswith("data:image/png;base64,") and image["alt"] for image in images
    )
    assert sum(bool(re.fullmatch(r"\d \d+\.\d\d%", text)) for text in page.words["b"]) == len(images)


def test_report_fits_any_screen(run):
    """A viewport, nothing of a fixed width above a telephone's, and what cannot shrink scrolls by itself or is left out
    there."""
    text = (run.folder / "report.html").read_text()
    page = Page(text)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    style = text[text.index("<style>") : text.index("</style>")]
    assert (
        "overflow-wrap:anywhere" in style
        and "svg{display:block;max-width:100%;height:auto}" in style
        and "pre-wrap" in style
    )
    assert re.search(r"@media\(max-width:700px\)\{\.more\{display:none\}", style)
    assert all(int(width) <= 390 - 32 for width in re.findall(r"(?<!max-)(?<!min-)width:(\d+)px", style))
    for svg in page.all("svg"):  # points; text of 10 of them stays above 9 pixels in a width of 358
        assert float(svg["viewbox"].split()[2]) <= 360 and svg["aria-label"]
    for table_text in re.findall(r"<table>.*?</table>", text):
        head = re.findall(r"<th[^>]*>", table_text[: table_text.index("</tr>")])
        assert sum("more" not in cell for cell in head) <= 4
    identifiers = re.findall(r' id="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))


def test_report_of_names_that_are_no_plain_words(run, tmp_path, recwarn):
    """Formulas between dollar signs, tags, line breaks, characters that the font does not have: each as it is."""
    names = ["$x$", "a$\\frac$", "_under", "日本", "%s {0}", "<b>&", "nl\nx", "-7", "#", "."]
    classes = [row | {"name": name} for row, name in zip(run.result["classes"], names, strict=True)]
    progress = Progress(**checkpoint.load(run.folder / "last.pt")["progress"])
    write_html(tmp_path / "report.html", {**run.result, "classes": classes}, progress)
    text = (tmp_path / "report.html").read_text()
    assert all(text.count(html.escape(name)) >= 2 for name in names if name.isprintable())
    assert not recwarn.list


def test_report_of_many_classes(run, tmp_path):
    """The lowest are shown, all are there folded up; long names and long lists of unreadable files do not drown the
    rest."""
    many = [f"class_{i}_with_a_name_that_is_longer_than_a_line" for i in range(1000)]
    results = class_results([i % 50 for i in range(1000)], [50] * 1000, many)
    unreadable = {f"/data/{i}.jpg": "the file is empty" for i in range(200)}
    write_html(
        tmp_path / "many.html",
        {**run.result, "classes": results, "num_classes": 1000, "unreadable": unreadable},
        Progress(),
    )
    text = (tmp_path / "many.html").read_text()
    before, folded = text.split("<details><summary>All 1000 classes</summary>")
    assert before.count("<tr>") < 30 and all(folded.count(f"<td>{name}</td>") == 1 for name in many)
    assert (
        f"<td>{many[0]}</td>" in before
        and text.count("the file is empty") == 5
        and "195 more, which report.json names" in text
    )


def test_charts_name_their_axes_and_leave_curves_free(run):
    from matplotlib import pyplot as plt

    from mvit3.report import _chart, _confusion

    for kind in ("loss", "accuracy", "learning rate", "speed"):
        figure = _chart(run.result["history"], kind)
        (axis,) = figure.axes
        assert axis.get_xlabel() == "epoch" and axis.get_ylabel()
        assert axis.get_legend() is None and not axis.texts  # the legend is the figure's, outside the axes
        figure.canvas.draw()
        for legend in figure.legends:
            assert legend.get_window_extent().y0 >= axis.get_window_extent().y1
        plt.close(figure)
    figure = _confusion([[3, 1], [0, 2]], ["a", "b"])
    assert figure.axes[0].get_xlabel() == "predicted class" and figure.axes[0].get_ylabel() == "true class"
    plt.close(figure)
