"""The README's figures are those of the recorded results."""

import subprocess
import sys
from pathlib import Path

from mvit3.results.command import SHOTS
from mvit3.results.page import page
from mvit3.results.reading import read_all

ROOT = Path(__file__).resolve().parents[1]


def test_readme_shows_the_recorded_results():
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"], check=True)


def test_page_shows_the_recorded_results():
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    made = page(read_all(results))
    assert made == (ROOT / "docs" / "report.html").read_text(), "docs/report.html is old: run `make report`"


def test_readme_shows_pictures_of_the_page():
    text = (ROOT / "README.md").read_text()
    for shot in SHOTS:
        assert f'"docs/{shot.name}"' in text and 10_000 < (ROOT / "docs" / shot.name).stat().st_size < 150_000
