"""Progress, times and pictures as a person sees them."""

import io
import math
import os
import re
import types

import pytest
import torch

from mvit3.cli import main
from mvit3.config import DataConfig
from mvit3.gallery import SHOWN, Gallery
from mvit3.reporter import Reporter
from mvit3.screen import Bar, duration, table
from mvit3.streams import guarded

from .conftest import small_arguments


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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.2 s"),
        (48, "48 s"),
        (200, "3 min 20 s"),
        (4320, "1 h 12 min"),
        (183600, "2 d 3 h"),
        (59.7, "1 min 0 s"),
        (3599.6, "1 h 0 min"),
    ],
)
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


def test_a_table_is_in_columns_of_a_terminal():
    """Two of them for a Chinese character, none for an accent by itself, and one line for a line break."""
    lines = table([["class", "images"], ["日本", "1"], ["e\u0301t\u00e9", "22"], ["a\nb", "3"]]).splitlines()
    assert lines == ["class  images", "-------------", "日本        1", "e\u0301t\u00e9        22", "a\\nb        3"]


def test_a_stream_that_lacks_a_character(monkeypatch):
    """A name that the encoding of a terminal does not have is written out, and ends no run."""
    for encoding, shown in (("ascii", "\\u65e5 \\xfc \\udcff"), ("utf-8", "日 ü \\udcff")):
        bytes_ = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(bytes_, encoding=encoding, write_through=True))
        with guarded():
            print("日 ü \udcff")
        assert bytes_.getvalue().decode() == f"{shown}\n"
