"""The page of `mvit3 report` in headless Chromium: what a person sees at 390 and at 1440 pixels, dark and light."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from mvit3.cli import main
from mvit3.results import browser
from mvit3.results.command import SHOTS

from . import results_files as files

RECORDED = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "results").glob("*.json"))
pytestmark = pytest.mark.skipif(browser.chromium() is None, reason="there is no Chromium")

WIDER = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 &&"
WIDER += " !e.closest('.scroll') && !e.closest('nav')).map(e => e.outerHTML.slice(0, 80))"
# Texts of charts that reach out of their card, lie on another one or on a dot or bar, or are smaller than 11 pixels.
CUT = """(() => {
  const bad = [];
  for (const chart of document.querySelectorAll("svg")) {
    const card = chart.closest("figure").getBoundingClientRect(), scale = chart.getBoundingClientRect().width / 344;
    const boxes = [...chart.querySelectorAll("text")].map((t) => [t, t.getBoundingClientRect()]);
    const marks = [...chart.querySelectorAll("circle, rect")].map((m) => [m, m.getBoundingClientRect()]);
    boxes.forEach(([text, box], i) => {
      if (box.left < card.left || box.right > card.right) bad.push(`out: ${text.textContent}`);
      if (12 * scale < 11) bad.push(`small: ${text.textContent}`);
      for (const [other, b] of [...boxes.slice(i + 1), ...marks]) {
        const across = Math.min(box.right, b.right) - Math.max(box.left, b.left);
        const down = Math.min(box.bottom, b.bottom) - Math.max(box.top, b.top);
        if (across > 1 && down > 4) bad.push(`on each other: ${text.textContent}, ${other.textContent}`);
      }
    });
  }
  return bad;
})()"""
# Elements with text whose colour is too near that of what they lie on.
FAINT = """(() => {
  const channels = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => channels(c).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$/.test(c)) return c;
  } return "rgb(255, 255, 255)"; };
  const bad = new Set();
  for (const e of document.querySelectorAll("body *")) {
    const words = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!words || e.closest("script, title, option")) continue;
    const style = getComputedStyle(e), colour = e.closest("svg") ? style.fill : style.color;
    const [low, high] = [light(colour), light(ground(e))].sort((a, b) => a - b);
    if ((high + 0.05) / (low + 0.05) < 4.5) bad.add(`${e.tagName} ${e.className} ${colour} on ${ground(e)}`);
  }
  return [...bad];
})()"""
ROWS = "[...document.querySelectorAll('#all tbody tr')].filter(r => !r.hidden)"


@pytest.fixture(scope="module")
def running():
    with browser.browser() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of the recorded results and of a file of every kind."""
    folder = tmp_path_factory.mktemp("results")
    rows = [*files.bench_rows(), files.bench_row("compile", None, result="WRONG")]
    names = files.write(folder, bench=files.bench(rows), ops=files.pytest_file(), gpu=files.measured())
    assert main(["report", *names, *map(str, RECORDED), "--output", str(folder / "page.html")]) == 0
    return folder / "page.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_what_is_seen(running, page, width, dark):
    running.show(page, width, 900, dark)
    assert running.value("innerWidth") == width
    assert running.value("document.documentElement.scrollWidth") == width and running.value(WIDER) == []
    assert running.value(CUT) == []
    assert running.value(FAINT) == []
    said = [m for m in running.messages if m.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert not said
    # all tables open too
    running.value("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert running.value("document.documentElement.scrollWidth") == width


def test_on_a_telephone(running, page):
    """The first column stays while the table scrolls, files are a list, and text does not touch the cards below it."""
    running.show(page, 390, 900, False)
    left = "document.querySelector('#all tbody td').getBoundingClientRect().left"
    before = running.value(left)
    times = "document.querySelectorAll('#all th')[2].getBoundingClientRect().right"
    assert running.value(times) <= 390 - 16, "a time is not beside its candidate"
    running.value("document.querySelector('#figures .scroll').scrollLeft = 200")
    assert running.value(left) == before
    assert running.value("document.querySelector('#files .scroll').scrollWidth") <= 390
    assert running.value("getComputedStyle(document.querySelector('nav div')).maskImage").startswith("linear-gradient")
    gaps = running.value("""[...document.querySelectorAll("section > .cards, section > .scroll")].map(e =>
        e.getBoundingClientRect().top - e.previousElementSibling.getBoundingClientRect().bottom)""")
    assert len(gaps) > 5 and min(gaps) >= 8


def test_theme_is_the_systems_until_it_is_chosen(running, page):
    ground = "getComputedStyle(document.body).backgroundColor"
    button = "document.getElementById('theme')"
    running.show(page, 1440, 900, False)
    running.value("localStorage.clear()")
    seen = {}
    for dark in (False, True):
        running.show(page, 1440, 900, dark)
        seen[dark] = running.value(ground)
    assert seen[False] != seen[True] and running.value(f"{button}.textContent") == "Light"
    running.value(f"{button}.click()")
    assert running.value(ground) == seen[False] and running.value(f"{button}.getAttribute('aria-pressed')") == "false"
    running.show(page, 1440, 900, True)
    assert running.value(ground) == seen[False], "the choice is forgotten"
    running.value("localStorage.clear()")


def test_without_a_script_a_dark_system_is_dark(running, page):
    running.command("Emulation.setScriptExecutionDisabled", value=True)
    running.show(page, 390, 900, True)
    running.command("Emulation.setScriptExecutionDisabled", value=False)
    assert running.value("document.documentElement.dataset.theme") is None
    assert running.value("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"


def test_table_sorts_and_filters(running, page):
    running.show(page, 1440, 900, False)
    times = f"{ROWS}.map(r => r.cells[2].dataset.v).map(v => v === undefined ? null : Number(v))"
    head = "document.querySelectorAll('#all th')[2]"
    every = running.value(times)
    for order, ascending in (("ascending", True), ("descending", False)):
        running.value(f"{head}.querySelector('button').click()")
        assert running.value(f"{head}.getAttribute('aria-sort')") == order
        found = running.value(times)
        numbers = [v for v in every if v is not None]
        assert found == sorted(numbers, reverse=not ascending) + [None] * (len(every) - len(numbers))  # numbers first
    running.value("document.querySelectorAll('#all th')[0].querySelector('button').click()")
    assert running.value("document.querySelectorAll('#all th[aria-sort=ascending]').length") == 1

    typed = "e => { e.value = 'bench.json FUSE'; e.dispatchEvent(new Event('input')); }"
    running.value(f"({typed})(document.getElementById('words'))")
    assert running.value(f"{ROWS}.map(r => r.cells[1].textContent)") == ["ours, fuse"]
    assert running.value("document.getElementById('count').textContent") == f"1 of {len(every)} rows"
    running.value("document.getElementById('words').value = ''")
    for name, value, cell in (("kind", "gpu", None), ("work", "training", 3), ("whose", "peer", None)):
        chosen = f"(e => {{ e.value = '{value}'; e.dispatchEvent(new Event('change')); }})"
        running.value(f"{chosen}(document.getElementById('{name}'))")
        if cell is not None:
            assert set(running.value(f"{ROWS}.map(r => r.cells[{cell}].textContent)")) == {value}
    left = running.value(f"{ROWS}.map(r => r.cells[1].textContent)")
    assert set(left) == {*("eager, channels last", "torch.compile", "eager, CUDA graph", "torch.compile, CUDA graph")}


def test_pictures(page, tmp_path, capsys):
    """Of the size that they are to have, small enough for a repository, and of the same page."""
    folder = tmp_path / "new" / "pictures"
    (file,) = files.write(tmp_path, bench=files.bench(files.bench_rows()))
    assert main(["report", file, "--output", str(tmp_path / "page.html"), "--png", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "page.html"), *(str(folder / s.name) for s in SHOTS)]
    for shot in SHOTS:
        content = (folder / shot.name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", content[16:24]) == (shot.width, shot.height)
        assert len(content) < 150_000
