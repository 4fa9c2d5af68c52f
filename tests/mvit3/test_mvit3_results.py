"""`mvit3 report`: the page shows the numbers of its files, to everyone, and is whole or not there."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mvit3.cli import main
from mvit3.errors import Failure
from mvit3.results import browser
from mvit3.results.charts import Bar, bars, spread
from mvit3.results.page import page
from mvit3.results.reading import NETWORKS, OPS, read_all

from . import results_files as files

RECORDED = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "results").glob("*.json"))
VOID = {"meta", "link", "input"}
LIMITS = ("floor_ms", "mm_ms")


class Page(HTMLParser):
    """The elements of a page in their order, as (name, attributes, text); AssertionError where one is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.found.append([tag, dict(attributes), "", tuple(e[0] for e in self.open)])
        if tag not in VOID:
            self.open.append(self.found[-1])

    def handle_startendtag(self, tag, attributes):
        self.found.append([tag, dict(attributes), "", tuple(e[0] for e in self.open)])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag: str) -> list[list]:
        return [e for e in self.found if e[0] == tag]


@pytest.fixture(scope="module")
def recorded():
    return page(read_all(RECORDED))


@pytest.fixture
def every(tmp_path):
    """A page of small files of every kind."""
    names = files.write(
        tmp_path,
        bench=files.bench(files.bench_rows()),
        models=files.models(),
        ops=files.pytest_file(),
        predicted=files.predicted(),
        measured=files.measured(),
    )
    return page(read_all([Path(name) for name in names]))


def figures(text: str) -> list[dict[str, str]]:
    """Cells of the table of all figures by their headings, numbers as they are in the files."""
    head, _, body = text.partition('<table id="all">')[2].partition("</table>")[0].partition("<tbody>")
    names = re.findall(r"<button[^>]*>(.*?)</button>", head)
    found = []
    for row in re.findall(r"<tr .*?</tr>", body):
        cells = re.findall(r"<td.*?</td>", row)
        texts = [re.search(r'data-v="([^"]*)"', c)[1] if "data-v" in c else re.sub("<.*?>", "", c) for c in cells]
        found.append(dict(zip(names, texts, strict=True)))
    return found


def test_numbers_are_those_of_the_files(recorded):
    """Every time of every recorded file, read here by other means, and no other."""
    expected = []
    for path in RECORDED:
        document = json.loads(path.read_text())
        for row in document.get("rows", []):
            if "predicted_ms" in row:
                expected += [(path.name, row["predicted_ms"]), (path.name, row["graph_ms"])]
            elif "median_ms" in row:
                expected.append((path.name, row["median_ms"]))
            else:
                names = [k for k in row if k.endswith("_ms") and not k.endswith(("built_ms", "first_ms"))]
                found = [row[k] for k in names if k not in LIMITS]
                expected += [(path.name, value) for value in found if value is not None and value == value]  # no NaN
        expected += [(path.name, 1e3 * one["stats"]["median"]) for one in document.get("benchmarks", [])]
    shown = [(row["file"], float(row["ms"])) for row in figures(recorded)]
    assert len(expected) > 1000 and sorted(shown) == sorted(expected)


def test_memory_and_rates_are_those_of_the_files(every):
    rows = {(row["file"], row["candidate"]): row for row in figures(every)}

    def numbers(file, candidate, *names):
        return [float(text) if (text := rows[file, candidate][name]) else None for name in names]

    found = numbers("bench.json", "ours, fuse", "ms", "low", "high", "MiB")
    assert found == [20.0625, 0.9 * 20.0625, 1.2 * 20.0625, 200.625]
    assert numbers("ops.json", "ours", "ms", "MiB", "GFLOP/s", "GB/s") == [4.25, 3.5, 0.5 / 0.00425, 0.02 / 0.00425]
    assert numbers("measured.json", "ours, drop-in", "ms", "low", "high", "MiB") == [20.5, None, None, 1024]
    assert rows["measured.json", "eager, channels last"]["result"] == "WRONG"
    assert rows["predicted.json", "torch.compile"]["result"] == "predicted"


def test_what_is_said(every):
    assert "1.27× as fast as the best peer: OpenVINO" in every  # 25.5 / 20.0625
    assert "1.30× as fast as the best peer: OpenVINO" in every  # 26 / 20
    text = Page(every)
    tables = {e[1].get("aria-label"): e[2] for e in text.all("div") if "aria-label" in e[1]}
    assert "10.25020.5000.50" in tables["Training, at 256"]  # predicted, measured, their ratio
    assert "7.500not measured" in tables["Training, at 256"]
    labels = [e[1]["aria-label"] for e in text.all("svg")]
    assert any("OpenVINO 25.5 ms" in label and "ours, fuse 20.1 ms" in label for label in labels)
    assert any(label.startswith("Roofline of patch_attention: ours up to 118 of 200 GFLOP/s") for label in labels)
    assert "1 predictions have been measured" not in every and "2 predictions have been measured" in every


def test_predictions_are_said_to_be_no_measurements(tmp_path):
    (file,) = files.write(tmp_path, model=files.predicted())
    text = page(read_all([Path(file)]))
    assert "Predicted, not measured" in text and "results are wrong" not in text
    assert all(row["result"] == "predicted" for row in figures(text))


def test_a_gpu_chart_shows_graphs_of_every_candidate(tmp_path):
    """By a mark of their own, which the legend names: ours is not set with a graph beside peers without."""
    (file,) = files.write(tmp_path, model=files.predicted())
    text = page(read_all([Path(file)]))
    times = {row["candidate"]: float(row["ms"]) for row in figures(text)}
    assert times["torch.compile"] == 7.5 and times["torch.compile, CUDA graph"] == 7.0
    (chart,) = re.findall(r"<figure.*?</figure>", text)
    marks = re.findall(r'<(circle|rect) [^>]*class="(\w+) hollow"', chart)
    assert sorted(marks) == sorted((mark, kind) for mark in ("circle", "rect") for kind in ("ours", "peer", "second"))
    for kind, said in (("round", "launch by launch"), ("square", "as a CUDA graph")):
        assert f'<span class="key {kind}">{said}</span>' in chart
    assert ">batch 32</text>" in chart


def test_every_chart_has_an_alternative(recorded, every):
    for text in (recorded, every):
        found = Page(text)
        charts = found.all("svg")
        assert len(charts) == len(found.all("figure")) > 5
        assert all(e[1]["role"] == "img" and len(e[1]["aria-label"]) > 30 for e in charts)
        for one in re.findall(r'<figure class="card">.*?</figure>', text):
            rows = one.partition("<details>")[2].count("<tr>")
            assert rows > 1, "a chart without its table"


@pytest.mark.parametrize("kind", ["recorded", "every"])
def test_page_stands_alone(kind, request):
    found = Page(request.getfixturevalue(kind))
    assert not [e for e in found.found if {"src", "srcset"} & e[1].keys() or e[0] in ("link", "img", "iframe")]
    names = [e[1]["id"] for e in found.found if "id" in e[1]]
    assert len(names) == len(set(names))
    assert {e[1]["href"] for e in found.all("a")} <= {f"#{name}" for name in names}
    assert "http" not in request.getfixturevalue(kind) and "url(" not in request.getfixturevalue(kind)
    heads = [int(e[0][1]) for e in found.found if re.fullmatch("h[1-6]", e[0])]
    assert heads[0] == 1 and heads.count(1) == 1


def luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast(every):
    """WCAG AA: text 4.5, and what a chart is read by 3. The theme of a dark system is that of the button."""
    themes = [dict(re.findall(r"--(\w+): (#\w{6});", part)) for part in re.findall(r":root\S* \{(.*?)\}", every, re.S)]
    light, dark, by_system = themes
    assert dark == by_system and light.keys() == dark.keys() and light != dark
    for theme in (light, dark):
        for ground in ("ground", "surface"):
            for text in ("text", "quiet", "ours", "wrong"):
                assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
            for mark in ("ours", "peer", "second", "focus"):
                assert contrast(theme[mark], theme[ground]) >= 3, (mark, ground)


def test_wrong_and_failed_are_shown(tmp_path):
    rows = [*files.bench_rows(), files.bench_row("compile", None, result="WRONG", error=0.5)]
    rows.append(files.bench_row("onnxruntime", None, result="failed: RuntimeError: <no> such op"))
    del rows[-1]["error"]
    (file,) = files.write(tmp_path, bench=files.bench(rows))
    text = page(read_all([Path(file)]))
    shown = {row["candidate"]: row for row in figures(text)}
    assert [shown["torch.compile"][n] for n in ("ms", "low", "high", "result")] == ["", "", "", "WRONG"]
    assert shown["ONNX Runtime"]["result"] == "failed: RuntimeError: &lt;no&gt; such op"
    assert "torch.compile WRONG; ONNX Runtime failed" in text and "1 of 5</strong>" in text


def test_names_are_text(tmp_path):
    name = '</script><b onclick="x">\'&'
    rows = [row | {"network": name} for row in files.bench_rows()]
    (file,) = files.write(tmp_path, bench=files.bench(rows, cpu=name))
    text = page(read_all([Path(file)]))
    assert not Page(text).all("b") and "<b " not in text and "&lt;/script&gt;" in text


def test_scaling_joins_one_machine_only(tmp_path):
    def card(**machine):
        more = [row | {"batch": 8, "median_ms": 6 * row["median_ms"]} for row in files.bench_rows()]
        names = files.write(tmp_path, one=files.bench(files.bench_rows()), eight=files.bench(more, **machine))
        labels = [e[1]["aria-label"] for e in Page(page(read_all([Path(n) for n in names]))).all("svg")]
        return [label for label in labels if label.startswith("Lines:")]

    (found,) = card()
    assert f"ours, fuse {1e3 / 20.0625:.1f} at 1, {8e3 / (6 * 20.0625):.1f} at 8" in found
    assert card(revision="other") == card(cpu="other") == []


def test_scaling_over_threads(tmp_path):
    names = files.write(
        tmp_path,
        two=files.bench(files.bench_rows()),
        one=files.bench(files.bench_rows(1.75), threads=1),
    )
    labels = [e[1]["aria-label"] for e in Page(page(read_all([Path(n) for n in names]))).all("svg")]
    (found,) = (label for label in labels if label.startswith("Lines:"))
    assert f"ours, fuse {1e3 / 20.0625 / 1.75:.1f} at 1, {1e3 / 20.0625:.1f} at 2" in found


def test_what_was_measured_twice_is_compared(tmp_path, capsys):
    """A machine that was slower that day is one thing, a figure that is off another."""
    names = files.write(tmp_path, bench=files.bench(files.bench_rows()), models=files.models(1.5, ours_fused_ms=40.0))
    assert main(["report", *names, "--output", str(tmp_path / "page.html")]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("bench.json and models.json: 4 figures in both") and "3 of 4 within 10%" in first
    other = files.write(tmp_path, models=files.models() | {"machine": files.MACHINE | {"cpu": "another"}})
    assert main(["report", names[0], *other, "--output", str(tmp_path / "page.html")]) == 0
    assert "figures in both" not in capsys.readouterr().out


BROKEN = {
    "text": ("not JSON", "is not JSON"),
    "list": ([1], "is no file of benchmark results"),
    "strange": ({"rows": []}, "is no file of benchmark results"),
    "schema": ({"schema": 2, "op": "models", "machine": {}, "rows": []}, "schema 2, known is 1"),
    "empty": (files.bench([]), "has no results"),
    "short": (files.bench([{"network": "mobilevitv3_s"}]), "is not whole: 'host' is missing"),
    "negative": (files.bench([files.bench_row("eager", -1.0)]), "median_ms must be above 0, got -1.0"),
    "word": (files.models(ours_ms="fast"), "could not convert string to float: 'fast'"),
    "untimed": (files.bench([files.bench_row("eager", None)]), "eager on mobilevitv3_s is right with median_ms None"),
    "op": (files.models() | {"op": "something"}, "op 'something' is none of networks, training, models"),
    "surrogate": (files.bench([files.bench_row("eager", 1.0, network="\ud800")]), "a lone surrogate"),
    "deep": ("[" * 100_000, "is nested too deeply"),
    "large": (" " * 20_000_001, "has more than 20 MB"),
    "threads": (files.bench(files.bench_rows(), threads=-1), "must be a number of at least 1, got -1"),
    "batch": (files.bench([files.bench_row("eager", 1.0, batch=10**400)]), "batch must be a whole number"),
    "foreign": ({"machine_info": {}, "benchmarks": [{"stats": {}, "extra_info": {}, "group": None}]}, "is not whole"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_other_files_are_refused(kind, tmp_path, capsys):
    """By their names, with what is allowed, and nothing is written."""
    document, message = BROKEN[kind]
    good, bad = files.write(tmp_path, good=files.bench(files.bench_rows()), **{kind: document})
    output = tmp_path / "page.html"
    output.write_text("kept")
    assert main(["report", good, bad, "--output", str(output)]) == 1
    captured = capsys.readouterr()
    assert bad in captured.err and message in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert kind == "empty" or "allowed are results of `mvit3 bench --output`" in captured.err
    assert output.read_text() == "kept" and sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["good.json", Path(bad).name, "page.html"]
    )


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Where a JSON document has values; of lists the first and the last."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    if isinstance(value, list):
        for i in sorted({0, len(value) - 1}) if value else ():
            yield from places(value[i], (*path, i))


@pytest.mark.parametrize("kind", ["bench", "models", "pytest_file", "predicted", "measured"])
def test_a_page_or_one_line(kind, tmp_path):
    """Whatever one value of a file is, there is a whole page or an error of ours."""
    make = {"bench": lambda: files.bench(files.bench_rows())}.get(kind) or getattr(files, kind)
    refused = pages = 0
    for path in places(make()):
        for value in (None, "x", -1, True, [], {}, 1e308):
            document = make()
            inside = document
            for step in path[:-1]:
                inside = inside[step]
            inside[path[-1]] = value
            (file,) = files.write(tmp_path, changed=document)
            try:
                Page(page(read_all([Path(file)])))
                pages += 1
            except Failure as error:
                assert str(error).startswith(file)
                refused += 1
    assert refused > 20 and pages > 20


def test_outputs_that_cannot_be(tmp_path, capsys, monkeypatch):
    (file,) = files.write(tmp_path, bench=files.bench(files.bench_rows()))
    for arguments, status, message in (
        ([file, "--output", str(tmp_path)], 2, "is a folder"),
        ([file, "--output", str(tmp_path / "page.html"), "--png", file], 2, "is a file; it must be a folder"),
        ([str(tmp_path / "none.json")], 1, "none.json: No such file or directory"),
        ([], 2, "files must be given"),
    ):
        try:
            found = main(["report", *arguments])
        except SystemExit as stop:
            found = stop.code
        assert found == status and message in capsys.readouterr().err
    monkeypatch.setattr(browser.shutil, "which", lambda name: None)
    arguments = ["--output", str(tmp_path / "page.html"), "--png", str(tmp_path / "pictures")]
    assert main(["report", file, *arguments]) == 1
    assert "needs Chromium" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["bench.json"]


@pytest.mark.parametrize("name", ["in.json", "link.json", "hard.json", "folder/../in.json"])
def test_a_file_that_is_read_is_not_replaced(name, tmp_path, capsys):
    """By whatever name the output has it."""
    first, other = files.write(tmp_path, first=files.bench(files.bench_rows()), **{"in": files.models()})
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.json").symlink_to(other)
    (tmp_path / "hard.json").hardlink_to(other)
    before = Path(other).read_bytes()
    assert refusal(["report", first, other, "--output", str(tmp_path / name)]) == 2
    assert "which is to be read" in capsys.readouterr().err
    assert refusal(["report", first, str(tmp_path / name), "--output", other]) == 2
    assert Path(other).read_bytes() == before and (tmp_path / "link.json").is_symlink()


def test_only_a_page_is_replaced(tmp_path, capsys):
    (file,) = files.write(tmp_path, bench=files.bench(files.bench_rows()))
    precious = tmp_path / "precious.json"
    precious.write_text("{}")
    assert refusal(["report", file, "--output", str(precious)]) == 2
    assert "is no page of mvit3 report" in capsys.readouterr().err and precious.read_text() == "{}"
    os.mkfifo(tmp_path / "pipe.html")
    assert refusal(["report", file, "--output", str(tmp_path / "pipe.html")]) == 2
    assert "is no ordinary file" in capsys.readouterr().err
    (tmp_path / "pipe.html").unlink()
    for name in ("page", "page", "a.html", "a.html"):  # new, and again
        assert main(["report", file, "--output", str(tmp_path / name)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"bench.json", "precious.json", "page", "a.html"}


def refusal(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file's name is text")
def test_a_file_name_may_be_any_bytes(tmp_path, capsys):
    file = Path(os.fsdecode(os.fsencode(tmp_path / "x") + b"\xff.json"))
    file.write_text(json.dumps(files.bench(files.bench_rows())))
    output = file.with_suffix(".html")
    assert main(["report", str(file), "--output", str(output)]) == 0
    assert "x\ufffd.html" in capsys.readouterr().out and "x\ufffd.json" in output.read_text(encoding="utf-8")


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(files.bench(files.bench_rows())), encoding="utf-8-sig")
    assert len(read_all([path])[0].figures) == 4


def test_known_ops_are_those_that_are_measured():
    names = {path.stem.removeprefix("bench_") for path in (RECORDED[0].parents[1]).glob("bench_*.py")}
    assert set(OPS) == names - {"data", "training", *NETWORKS}


def test_long_names_are_cut_in_charts(tmp_path):
    name = "n" * 5000
    rows = [files.bench_row(c, 10.0, network=name) for c in ("ours", "eager", name)]
    (file,) = files.write(tmp_path, bench=files.bench(rows))
    text = page(read_all([Path(file)]))
    (card, *_) = re.findall(r"<figure.*?</figure>", text)
    chart = card.partition("<details>")[0]
    assert len(chart) < 20_000 and "…" in chart and name in {row["candidate"] for row in figures(text)}
    assert max(len(t) for t in re.findall(r"<text[^>]*>(.*?)</text>", chart)) <= 20
    gpu = files.predicted()
    for row in gpu["rows"]:
        row["network"] = name
    (file,) = files.write(tmp_path, gpu=gpu)
    (card, *_) = re.findall(r"<figure.*?</figure>", page(read_all([Path(file)])))
    assert max(len(t) for t in re.findall(r"<text[^>]*>(.*?)</text>", card)) <= 26


def test_our_own_network_beside_a_fused_host_is_not_compared(tmp_path):
    """Ours is `fuse` of the host's network."""
    row = {"network": "timm/mobilevit_s", "work": "inference", "batch": 1, "side": 256}
    row |= {"eager_nchw_ms": 30.0, "fused_ms": 20.0, "own_ms": 10.0}
    (file,) = files.write(tmp_path, hosts={"schema": 1, "op": "hosts", "machine": files.MACHINE, "rows": [row]})
    text = page(read_all([Path(file)]))
    assert "1.50× as fast as the best peer: eager" in text and "3.00×" not in text
    assert '<span class="key own">our own network: beside, not compared</span>' in text
    assert [e[1]["data-whose"] for e in Page(text).all("tr") if "data-whose" in e[1]] == ["peer", "ours", "own"]
    (file,) = files.write(tmp_path, bench=files.bench(files.bench_rows()))
    assert "our own network" not in page(read_all([Path(file)]))


def test_the_headline_of_memory_names_its_peer(tmp_path):
    def said(**memory):
        rows = [
            files.bench_row(c, 10.0, work="training", memory_mib=mib, dtype=("float32", "bfloat16")["bf" in c])
            for c, mib in memory.items()
        ]
        (file,) = files.write(tmp_path, bench=files.bench(rows))
        return re.findall(r"<strong>(\d+%)</strong><span>(.*?)</span>", page(read_all([Path(file)])))

    eager = "of eager PyTorch&#x27;s memory in training (eager, channels last): median of 1"
    assert said(eager_channels_last=100.0, ours=33.0, ours_bfloat16=10.0) == [("33%", eager)]
    both = "of the memory of the peer that needs least (eager, torch.compile) in training: median of 1"
    assert said(eager=100.0, compile=50.0, ours=25.0) == [("50%", both)]
    assert said(ours=25.0) == []


def test_only_what_is_there_is_explained(tmp_path):
    (bench,) = files.write(tmp_path, bench=files.bench(files.bench_rows()))
    (models,) = files.write(tmp_path, models=files.models())
    with_range, without = page(read_all([Path(bench)])), page(read_all([Path(models)]))
    assert "a thin line" in with_range and "low and high are" in with_range
    assert "a thin line" not in without and "low and high are" not in without and "percentile" not in without
    assert list(figures(with_range)[0])[:3] == list(figures(without)[0])[:3] == ["what", "candidate", "ms"]
    assert "low" in figures(with_range)[0] and not {"low", "GB/s", "of floor"} & figures(without)[0].keys()


def test_one_of_a_thing(tmp_path):
    op = {"shape": "8x128", "eager_ms": 2.0, "ours_ms": 1.0, "of_floor": 0.5}
    document = {"schema": 1, "op": "pointwise", "machine": files.MACHINE | {"threads": 1}, "rows": [op]}
    names = files.write(tmp_path, op=document)
    text = page(read_all([Path(names[0])]))
    assert "2 figures from 1 file; a CPU, 1 thread<" in text and "over 1 shape<" in text
    assert not re.findall(r"\b1 (?:threads|files|shapes|figures|rows|comparisons)\b", text)


def test_it_loads_no_torch(tmp_path):
    (file,) = files.write(tmp_path, bench=files.bench(files.bench_rows()))
    code = "import sys; from mvit3.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "report", file, "--output", str(tmp_path / "page.html"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["figures"] == {"bench.json": 4} and (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_bars_are_as_long_as_their_values():
    chart = bars([Bar("a", 10.0, "10 ms", "peer", 8.0, 16.0), Bar("b", 4.0, "4 ms", "ours")], "a text")
    lengths = [float(value) for value in re.findall(r'<rect [^>]*?width="([\d.]+)"', chart)]
    assert lengths[0] / lengths[1] == pytest.approx(2.5, rel=0.01)
    start, end = (float(v) for v in re.search(r'<line x1="([\d.]+)".*?x2="([\d.]+)"', chart).groups())
    assert (end - start) / lengths[0] == pytest.approx(0.8, rel=0.01)


def test_labels_do_not_lie_on_each_other():
    for wanted in ([10, 11, 12, 190, 199], [199, 198, 197], [5.0]):
        found = spread(wanted, 14, 200)
        order = sorted(range(len(wanted)), key=lambda i: wanted[i])
        heights = [found[i] for i in order]
        assert all(b - a >= 14 - 1e-9 for a, b in itertools.pairwise(heights)) and heights[-1] <= 200
