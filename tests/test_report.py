"""The README's figures are those of the recorded results."""

import re
import subprocess
import sys
from pathlib import Path

from mvit3.results.command import SHOTS
from mvit3.results.page import page
from mvit3.results.reading import read_all

ROOT = Path(__file__).resolve().parents[1]


def test_readme_shows_the_recorded_results():
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"], check=True)


def test_readme_names_revisions_that_can_be_looked_up():
    text = (ROOT / "README.md").read_text().partition("<!-- results:begin -->")[2].partition("<!-- results:end -->")[0]
    found = set(re.findall(r"revision (\S+?)[.;]", text))
    assert found and all(re.fullmatch("[0-9a-f]{7,40}", name) for name in found), found
    for name in found if (ROOT / ".git").exists() and git("rev-parse", "--is-shallow-repository") == "false" else ():
        assert git("cat-file", "-t", name) == "commit", f"revision {name} of README.md is not in the repository"


def test_readme_names_the_machine_of_each_table():
    """In the line above it, or the paragraph that ends there."""
    text = (ROOT / "README.md").read_text().partition("<!-- results:begin -->")[2].partition("<!-- results:end -->")[0]
    tables = re.findall(r"([^\n]*)\n\n(?=\| [^\n]*\n\| ---)", text)
    assert len(tables) > 5
    for before in tables:
        assert re.search(r", \d+ threads?, \w+, torch \d", before) or before.startswith("Training steps under"), before


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def test_page_shows_the_recorded_results():
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    made = page(read_all(results))
    assert made == (ROOT / "docs" / "report.html").read_text(), "docs/report.html is old: run `make report`"


def test_readme_shows_pictures_of_the_page():
    text = (ROOT / "README.md").read_text()
    for shot in SHOTS:
        assert f'"docs/{shot.name}"' in text and 10_000 < (ROOT / "docs" / shot.name).stat().st_size < 150_000
