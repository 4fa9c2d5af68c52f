"""What a person sees: how soon, in which words, and that it is the truth."""

import csv
import io
import json
import math
import os
import re
import subprocess
import sys
import types
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from mvit3 import checkpoint, names
from mvit3.cli import main
from mvit3.config import DataConfig, RunConfig, section_options
from mvit3.gallery import SHOWN, Gallery
from mvit3.options import UsageError
from mvit3.report import class_rows
from mvit3.reporter import Reporter
from mvit3.screen import Bar, duration, table

from .conftest import small_arguments


@pytest.mark.parametrize("arguments", [["--help"], ["trian"], ["train", "--help"], ["train", "--lr", "1"], ["train", "--config", "digts"],
                                       ["train", "--model.name=mobilevit"], ["train", "--sampler.sizes=1"], ["train", "--data=nowhere"],
                                       ["evaluate", "--checkpoint=nowhere"], ["train", "--config=digits", "--print_config"]])  # fmt: skip
def test_help_and_mistakes_do_not_wait_for_libraries(arguments, tmp_path):
    """They take seconds to load. Counting modules is not a matter of how busy the machine is."""
    code = f"import sys\nfrom mvit3.cli import main\ntry: main({arguments})\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'timm', 'torchvision', 'torchmetrics', 'mvit3_kernels', 'sklearn') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_names_are_those_of_the_libraries():
    from timm.optim import list_optimizers

    import mvit3_kernels

    assert list(names.NETWORKS) == mvit3_kernels.list_models()
    assert set(names.OPTIMIZERS) <= set(list_optimizers())
    assert set(names.TIMM.values()) <= {f"{section}.{key}" for section, key, *_ in section_options()}


def refused(arguments, capsys, monkeypatch, folder):
    """The one line that these arguments are answered with, and the exit status."""
    monkeypatch.chdir(folder)
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and list(folder.iterdir()) == []
    for word in ("int,", "tuple", "float", "bool", "None", "<class", "Errno", "Traceback"):
        assert word not in captured.err
    return status, captured.err


@pytest.mark.parametrize(("arguments", "message"), [
    (["--lr", "1"], "there is no option '--lr'; the nearest is --optimizer.lr "),
    (["--batch-size=64"], "there is no option '--batch-size'; the nearest is --data.batch_size "),
    (["--epochs", "3"], "the nearest is --schedule.epochs "),
    (["--momentum", "0.9"], "the nearest are --optimizer.momentum and --ema.momentum "),
    (["--ema.momentun", "0.9"], "the nearest is --ema.momentum "),
    (["--optimizer.epochs", "3"], "the nearest is --schedule.epochs "),
    (["--quite"], "the nearest is --quiet "),
    (["-b", "64"], "there is no option '-b'; timm's -b is --data.batch_size here"),
    (["--opt", "adamw"], "timm's --opt is --optimizer.name here"),
    (["--sampler.sizes", "160,192"], "sampler.sizes must be a list of whole numbers such as [160,192], got '160,192'"),
    (["--sampler.sizes", "160", "192"], "sampler.sizes must be a list of whole numbers such as [160,192], got '160 192'"),
    (["--optimizer.betas", "0.9"], "optimizer.betas must be a list of numbers such as [0.9,0.999], got '0.9'"),
    (["--optimizer.betas=[0.9]"], "write them as [0.9,0.999]"),
    (["--data.mean=[0.5]"], "write them as [0.5,0.5,0.5]"),
    (["--optimizer.lr="], "optimizer.lr must be a number, got ''"),
    (["--optimizer.lr=-inf"], "optimizer.lr must be a number, got '-inf'"),
    (["--optimizer.lr"], "--optimizer.lr: expected one argument, a number"),
    (["--run.deterministic", "maybe"], "run.deterministic must be true or false, got 'maybe'"),
    (["--model.num_classes", "ten"], "model.num_classes must be a whole number or null, got 'ten'"),
    (["--optimizer.name", "adamww"], "optimizer.name must be one of 101 names; got 'adamww', the nearest is 'adamw'"),
    (["digits"], "'digits' is no option; a recipe is chosen with --config digits"),
    (["--quiet=yes"], "--quiet takes no value, got 'yes'"),
    (["--json", "yes"], "'yes' after --json is no option; options begin with --"),
    ([], "data.root must name the folder of the images for data.source folder: --data FOLDER"),
    (["--data", "nowhere"], "--data nowhere: there is no such folder"),
    (["--data.root", "nowhere"], "--data nowhere: there is no such folder"),
])  # fmt: skip
def test_mistakes_are_answered_in_plain_words(arguments, message, capsys, monkeypatch, tmp_path):
    status, said = refused(["train", *arguments], capsys, monkeypatch, tmp_path)
    assert message in said and said.startswith("mvit3 train: error: ") and status == (1 if "nowhere" in said else 2)


@pytest.mark.parametrize(("arguments", "message"), [
    (["evaluate"], "--checkpoint must be given"),
    (["evaluate", "--checkpoint", "nowhere.pt"], "--checkpoint nowhere.pt: there is no such file"),
    (["evaluate", "--checkpoint", "nowhere.pt", "--config", "digits"], "--checkpoint nowhere.pt: there is no such file"),
    (["evaluate", "--checkpoint", "x", "--weights", "best"], "--weights must be one of auto, ema, raw; got 'best'"),
    (["predict", "--checkpoint", "x"], "images must be given"),
    (["predict", "--checkpoint", "x", "y.png", "--top", "five"], "--top must be a whole number, got 'five'"),
])  # fmt: skip
def test_mistakes_with_a_checkpoint(arguments, message, capsys, monkeypatch, tmp_path):
    assert message in refused(arguments, capsys, monkeypatch, tmp_path)[1]


def test_file_that_is_no_checkpoint(tmp_path, capsys):
    path = tmp_path / "notes.pt"
    for content in (b"some words", b"PK\x03\x04 and no more", b""):
        path.write_bytes(content)
        assert main(["evaluate", "--checkpoint", str(path)]) == 1
        said = capsys.readouterr().err
        told = f"{path} is truncated, or no checkpoint; a checkpoint of another origin needs --config"
        assert said.splitlines()[-1].startswith(f"mvit3 evaluate: error: {told}")


@pytest.mark.parametrize("name", ["train", "evaluate", "predict"])
def test_help_is_in_plain_words(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"usage: mvit3 {name} ") and "[--config RECIPE] [--section.key VALUE ...]" in text
    for word in ("type:", "None", "True", "False", "tuple", "==SUPPRESS=="):
        assert word not in text
    assert "(a list of numbers such as [0,0,0]; default: [0,0,0])" in text and "(a whole number or null; default: null)" in text


def test_folder_without_the_parts_is_named_with_what_it_holds(tmp_path, capsys):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
    assert main(["train", "--data", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"--data {tmp_path} has no folder 'train', which --data.train names; it has cats, dogs" in said
    assert main(["train", "--data", str(tmp_path / "cats")]) == 1
    assert "it has no folders" in capsys.readouterr().err


def test_list_may_be_written_with_spaces(capsys):
    assert main(["train", "--sampler.sizes", "[160,", "192]", "--print_config"]) == 0
    assert "sizes:\n  - 160\n  - 192\n" in capsys.readouterr().out


def test_what_takes_time_is_said(tmp_path):
    """A line before PyTorch is loaded, one before folders are searched, each at once; none with --quiet."""
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
    arguments = [sys.executable, "-m", "mvit3", "train", "--data", str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    first, second, third = done.stderr.splitlines()[:3]
    assert (first, second) == ("loading PyTorch", f"looking for images in {tmp_path}") and third.startswith("mvit3 train: error: ")


# A run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that was stopped within its second epoch and went on, and what either start said."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    said = []
    for more in (["--run.max_steps=6"], ["--json"], []):
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            assert main(small_arguments(folder, *more)) == 0
        said.append((out.getvalue(), err.getvalue()))
        if len(said) == 1:
            stopped = (folder / "report.html").read_text()
    return types.SimpleNamespace(folder=folder, said=said, stopped=stopped, result=json.loads(said[1][0]))


def test_progress_in_a_file_is_plain_lines(run):
    """No control characters; the loss first, from the first step on, after a resume too."""
    for _, err in run.said[:2]:
        assert not set(err) & {"\r", "\x1b"}
        assert "64 training and 40 validation images of 10 classes; building mobilevitv3_xxs\n" in err
        first = re.search(r"^\d+/8  (epoch \d/2  .*)$", err, re.MULTILINE)[1]
        assert re.fullmatch(r"epoch \d/2  loss \d\.\d{3}  [\d.]+ img/s  lr [1-9]\.\de-0\d  waiting for data \d+\.\d\d%", first)
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
    assert f'<time datetime="{run.result["date"]}">' in text and re.match(r"\d{4}-\d\d-\d\dT.*[+-]\d\d:\d\d$", run.result["date"])
    assert run.result["command"].startswith("mvit3 train --model.name=mobilevitv3_xxs") and run.result["command"].endswith("--json")
    assert f"torch {torch.__version__.partition('+')[0]}" in text and f"python {sys.version.split()[0]}" in text
    assert "Configuration" in text and "batch_size: 16" in text and run.result["config"]["data"]["batch_size"] == 16


def test_report_has_classes_and_samples(run):
    page = Page((run.folder / "report.html").read_text())
    classes = run.result["classes"]
    assert [c["name"] for c in classes] == list("0123456789")
    assert sum(c["images"] for c in classes) == 40 and sum(c["correct"] for c in classes) == round(run.result["accuracy"] * 40)
    for row in class_rows(classes)[1:]:
        assert row[3] in page.words["td"]
    samples = checkpoint.load(run.folder / "last.pt")["progress"]["samples"]
    assert [len(samples[kind]) for kind in ("best", "worst")] == [SHOWN, SHOWN]
    images = page.all("img")
    assert SHOWN <= len(images) <= 2 * SHOWN and all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in images)
    assert sum(bool(re.fullmatch(r"\d \d+\.\d\d%", text)) for text in page.words["b"]) == len(images)


def test_report_fits_any_screen(run):
    """A viewport, nothing of a fixed width above a telephone's, and what cannot shrink scrolls by itself or is left out there."""
    text = (run.folder / "report.html").read_text()
    page = Page(text)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "overflow-wrap:anywhere" in style and "svg{display:block;max-width:100%;height:auto}" in style and "pre-wrap" in style
    assert re.search(r"@media\(max-width:700px\)\{\.more\{display:none\}", style)
    assert all(int(width) <= 390 - 32 for width in re.findall(r"(?<!max-)(?<!min-)width:(\d+)px", style))
    for svg in page.all("svg"):  # points; text of 10 of them stays above 9 pixels in a width of 358
        assert float(svg["viewbox"].split()[2]) <= 360 and svg["aria-label"]
    for table_text in re.findall(r"<table>.*?</table>", text):
        head = re.findall(r"<th[^>]*>", table_text[: table_text.index("</tr>")])
        assert sum("more" not in cell for cell in head) <= 4
    identifiers = re.findall(r' id="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))


def test_report_of_many_classes(run, tmp_path):
    """The lowest are shown, all are there folded up; long names and long lists of unreadable files do not drown the rest."""
    from mvit3.progress import Progress
    from mvit3.report import class_results, write_html

    many = [f"class_{i}_with_a_name_that_is_longer_than_a_line" for i in range(1000)]
    results = class_results([i % 50 for i in range(1000)], [50] * 1000, many)
    unreadable = {f"/data/{i}.jpg": "the file is empty" for i in range(200)}
    write_html(tmp_path / "many.html", {**run.result, "classes": results, "num_classes": 1000, "unreadable": unreadable}, Progress())
    text = (tmp_path / "many.html").read_text()
    before, folded = text.split("<details><summary>All 1000 classes</summary>")
    assert before.count("<tr>") < 30 and all(folded.count(f"<td>{name}</td>") == 1 for name in many)
    assert f"<td>{many[0]}</td>" in before and text.count("the file is empty") == 5 and "195 more, which report.json names" in text


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


# Parts


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 2


def test_bar_in_80_columns_shows_the_loss_before_the_speed(monkeypatch):
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((80, 24)))
    stream = Terminal()
    bar = Bar(quiet=False, stream=stream)
    bar.begin(24000, 11999)
    bar.update("epoch 123/300  loss 1.234  1234 img/s  lr 1.0e-03  waiting for data 7.12%")
    bar.bar.refresh()
    bar.close()
    shown = re.findall(r"[^\r\n]*loss[^\r\n]*", stream.getvalue())[-1]
    assert len(shown) <= 80 and "epoch 123/300  loss 1.234  1234 img/s" in shown


def test_bar_shows_the_mean_of_all_steps(monkeypatch):
    """Not the last step's loss, and nothing where no step was made."""
    reporter, seen = Reporter(quiet=True), []
    monkeypatch.setattr(reporter.bar, "update", lambda text, steps=1: seen.append(text))
    progress = types.SimpleNamespace(epoch=0, loss_sum=0.0, steps=0, wait_seconds=0.0, seconds=1.0)
    optimizer = types.SimpleNamespace(param_groups=[{"lr": 1e-3}])
    config = types.SimpleNamespace(schedule=types.SimpleNamespace(epochs=2))
    trainer = types.SimpleNamespace(progress=progress, optimizer=optimizer, config=config)
    for total, steps in ((0.0, 0), (3.0, 1), (4.0, 2)):
        progress.loss_sum, progress.steps = total, steps
        reporter.on_step(trainer, 16, 0.5)
    assert "loss" not in seen[0] and "loss 3.000" in seen[1] and "loss 2.000" in seen[2]


def test_quiet_run_says_nothing(tmp_path, capsys):
    assert main(small_arguments(tmp_path, "--quiet", "--schedule.epochs=1")) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out


@pytest.mark.parametrize(("seconds", "text"), [(0.25, "0.2 s"), (48, "48 s"), (200, "3 min 20 s"), (4320, "1 h 12 min"),
                                               (183600, "2 d 3 h"), (59.7, "1 min 0 s"), (3599.6, "1 h 0 min")])  # fmt: skip
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_gallery_keeps_the_surest_and_the_most_wrong():
    """Over batches; the pictures are those images, in RGB, however the network reads them."""
    data = DataConfig(mean=(0.5, 0.25, 0.125), std=(0.5, 0.25, 2.0), colors="bgr")
    gallery, levels = Gallery(data), torch.arange(40).float().div(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    images = (levels.view(40, 1, 1, 1) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1).expand(3, 8, 8) - mean) / std
    labels = torch.zeros(40, dtype=torch.int64)
    logits = torch.stack((torch.linspace(-3, 3, 40), torch.zeros(40)), 1)  # image 39 is the surest
    for part in torch.randperm(40, generator=torch.Generator().manual_seed(0)).split(9):
        gallery.add(images[part], labels[part], logits[part])
    found = gallery.samples()
    assert [int(s["pixels"][0, 0, 2]) for s in found["best"]] == [39, 38, 37, 36, 35, 34]
    assert [s["pixels"][0, 0].tolist() for s in found["worst"]] == [[3 * i, 2 * i, i] for i in range(SHOWN)]
    assert [s["guess"] for s in found["worst"]] == [1] * SHOWN and found["best"][0]["guess"] == 0
    assert found["best"][0]["probability"] == pytest.approx(1 / (1 + math.exp(-3)))
    assert found["best"][0]["loss"] == pytest.approx(math.log(1 + math.exp(-3)))


# Checkpoints in use


def test_evaluate_by_class(run, capsys):
    arguments = ["evaluate", "--checkpoint", str(run.folder / "last.pt")]
    assert main([*arguments, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["class"] for row in rows] == [*"0123456789", "all"]
    for row, expected in zip(rows, run.result["classes"], strict=False):
        assert (int(row["images"]), int(row["correct"])) == (expected["images"], expected["correct"])
    assert float(rows[-1]["accuracy"]) == run.result["accuracy"]
    assert main([*arguments, "--per_class"]) == 0
    captured = capsys.readouterr()
    assert table(class_rows(run.result["classes"])) in captured.out
    last = f"{run.result['weights']} weights of {run.folder / 'last.pt'}, mobilevitv3_xxs, on 40 validation images of digits"
    assert last in captured.out
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--csv", "--json"])
    assert stop.value.code == 2 and "--json and --csv exclude each other" in capsys.readouterr().err


def test_evaluate_names_weights_data_images_and_what_was_skipped(run, tmp_path, capsys):
    for name in "0123456789":
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "val" / name / "a.png")
    (tmp_path / "val" / "3" / "torn.png").write_bytes(b"no image")
    last = str(run.folder / "last.pt")
    arguments = ["evaluate", "--checkpoint", last, "--weights=raw", "--data", str(tmp_path), "--data.max_corrupt=0.5"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    told = f"trained weights of {last}, mobilevitv3_xxs, on 10 validation images of {tmp_path}, 1 image skipped as unreadable"
    assert told in captured.out
    assert "torn.png" in captured.err
    assert main([*arguments, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.count("\n") == 3


@pytest.mark.parametrize("command", [["evaluate"], ["predict", "x.png"]])
def test_checkpoint_of_another_network(run, command, capsys):
    """What differs first, and how much does, in plain words."""
    last = str(run.folder / "last.pt")
    assert main([*command, "--checkpoint", last, "--model.name=mobilevitv3_xs"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{last} does not fit mobilevitv3_xs: layer_1.0.block.exp_1x1.block.conv.weight is 32x16x1x1 there and 64x16x1x1 in the" in said
    assert re.search(r"\(\d+ differ in all\)", said) and "state_dict" not in said and "torch.Size" not in said


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, level in (("a.png", 10), ("b.png", 200)):
        Image.new("RGB", (40, 40), (level, level, level)).save(folder / name)
    (folder / "torn.png").write_bytes(b"no image")
    (folder / "._a.png").write_bytes(b"of another system")
    return folder


def test_predict_goes_on_after_what_cannot_be_read(run, pictures, capsys):
    """A file that was named counts; a stranger in a folder is said."""
    arguments = ["predict", "--checkpoint", str(run.folder / "last.pt"), "--json"]
    missing = str(pictures / "missing.png")
    assert main([*arguments, missing, str(pictures / "a.png"), str(pictures)]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [image["image"].rpartition("/")[2] for image in found] == ["missing.png", "a.png", "a.png", "b.png", "torn.png"]
    assert [image.get("error", "")[:22] for image in found] == ["there is no such file", "", "", "", "cannot be read: cannot"]
    assert ("2 of 5 images could not be read" in captured.err and "5/5" in captured.err) or "1/5" in captured.err
    assert main([*arguments, str(pictures)]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 3 and "1 of 3 images could not be read" in captured.err
    assert main([*arguments, str(pictures), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_predict_as_csv_and_as_a_table(run, pictures, capsys):
    arguments = ["predict", "--checkpoint", str(run.folder / "last.pt"), str(pictures), "--top=2"]
    assert main([*arguments, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["place"], bool(row["error"])) for row in rows] == [("1", False), ("2", False)] * 2 + [("", True)]
    assert main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("image ") and len(out) == 7
    assert len({line.index("%") for line in out if "%" in line}) == 1
    assert f"{float(rows[0]['probability']):.2%}" in out[2]


def test_predict_writes_as_it_goes(run, pictures, capsys, monkeypatch):
    """What was found before an interruption is there, and is whole."""
    from mvit3 import prediction

    monkeypatch.setattr(prediction, "BATCH", 1)
    read, opened = prediction.evaluation_transform, []

    def transform(config):
        whole = read(config)

        def one(path):
            opened.append(path)
            if len(opened) == 2:
                raise KeyboardInterrupt
            return whole(path)

        one.decoder = whole.decoder
        return one

    monkeypatch.setattr(prediction, "evaluation_transform", transform)
    assert main(["predict", "--checkpoint", str(run.folder / "last.pt"), str(pictures), "--json"]) == 130
    assert [image["image"].rpartition("/")[2] for image in json.loads(capsys.readouterr().out)] == ["a.png"]


def test_predict_takes_class_names_from_a_side_file(run, pictures, tmp_path, capsys):
    side = tmp_path / "classes.txt"
    side.write_text("".join(f"digit {i}\n" for i in range(10)))
    arguments = ["predict", "--checkpoint", str(run.folder / "last.pt"), str(pictures / "a.png"), "--json", "--data.class_map", str(side)]
    assert main(arguments) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert all(guess["name"] == f"digit {guess['index']}" for guess in found["classes"])
    side.write_text("one\ntwo\n")
    assert main(arguments) == 1
    assert "names 2 classes, the network has 10" in capsys.readouterr().err


def test_top_is_refused_before_the_checkpoint_is_read(capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--checkpoint", __file__, "x.png", "--top", "0", "--config", "digits"])
    assert "--top must be at least 1, got 0" in capsys.readouterr().err


# Records


def test_best_checkpoints(tmp_path):
    """As many as were asked for, the best ones, each of its epoch; best.pt is the first of them."""
    assert main(small_arguments(tmp_path, "--quiet", "--schedule.epochs=4", "--run.keep_best=2")) == 0
    history = json.loads((tmp_path / "report.json").read_text())["history"]
    accuracy = {row["epoch"]: row["accuracy" if row["weights"] == "trained" else "ema_accuracy"] for row in history}
    expected = sorted(accuracy, key=lambda epoch: (-accuracy[epoch], epoch))[:2]
    assert sorted(path.name for path in tmp_path.glob("best_*.pt")) == sorted(f"best_{epoch:04}.pt" for epoch in expected)
    for epoch in expected:
        assert checkpoint.load(tmp_path / f"best_{epoch:04}.pt")["progress"]["epoch"] == epoch
    assert checkpoint.load(tmp_path / "best.pt")["progress"]["epoch"] == expected[0]


def test_weights_and_biases(tmp_path, monkeypatch):
    """Where it is installed it gets losses and rows by the step, and a run that goes on is one run there."""
    seen, started = [], []

    class Run:
        def log(self, values, step):
            seen.append((step, values))

        def finish(self):
            seen.append("finished")

    def init(**settings):
        started.append(settings)
        return Run()

    module = types.ModuleType("wandb")
    module.init, module.__spec__ = init, types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    arguments = small_arguments(tmp_path, "--quiet", "--run.wandb=digits", "--run.log_steps=2")
    assert main([*arguments, "--run.max_steps=4"]) == 0
    assert main(arguments) == 0
    history = json.loads((tmp_path / "report.json").read_text())["history"]
    assert [s["project"] for s in started] == ["digits", "digits"] and started[0]["id"] == started[1]["id"]
    assert started[0]["config"]["data"]["batch_size"] == 16
    rows = [(entry[0], entry[1]["accuracy"]) for entry in seen if entry != "finished" and "accuracy" in entry[1]]
    assert rows == [(row["step"], row["accuracy"]) for row in history]
    losses = [entry[1]["loss"] for entry in seen if entry != "finished" and "loss" in entry[1] and entry[0] > 4]
    assert sum(losses) / len(losses) == pytest.approx(history[1]["train_loss"])  # means of two steps each, none left out
    assert seen.count("finished") == 2


def test_weights_and_biases_that_cannot_be_reached(tmp_path, monkeypatch, capsys):
    def init(**settings):
        raise ConnectionError("no route to it")

    module = types.ModuleType("wandb")
    module.init, module.__spec__ = init, types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert main(small_arguments(tmp_path, "--quiet", "--run.wandb=digits")) == 1
    said = capsys.readouterr().err
    assert said == "mvit3 train: error: run.wandb digits: Weights & Biases cannot be logged to: no route to it\n"


def test_weights_and_biases_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"run\.wandb digits needs Weights & Biases, which is not installed: pip install wandb"):
        RunConfig(wandb="digits")
