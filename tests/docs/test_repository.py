"""Files that no program of ours reads say the same as those that one does."""

from __future__ import annotations

import re
import types
from datetime import date

import pytest
import yaml

import mvit3_kernels

from .blocks import ROOT

KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_citation_has_the_version_and_licence():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == mvit3_kernels.__version__ and cited["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()


def test_changelog_is_kept():
    """Keep a Changelog: [Unreleased] on top, then versions with their days, newest first; entries below a kind."""
    text = (ROOT / "CHANGELOG.md").read_text()
    first, *versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert first == "[Unreleased]"
    days = [date.fromisoformat(re.fullmatch(r"\[\d+\.\d+\.\d+\] - (\S+)", heading)[1]) for heading in versions]
    assert days == sorted(days, reverse=True)
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= KINDS
    assert all(re.match(r"\s*###", part) for part in re.split(r"^## .*$", text, flags=re.MULTILINE)[1:] if part.strip())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_what_there_is(path):
    workflow = yaml.safe_load(path.read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = " ; ".join(step["run"] for step in steps if "run" in step)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)", commands):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module in re.findall(r"python3? -m (tests\.[\w.]+)", commands):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    needed = {name for job in workflow["jobs"].values() for name in job.get("needs", [])}
    assert needed <= workflow["jobs"].keys()
    assert workflow["permissions"] == {"contents": "read"}  # more is given to a job alone


def test_manifest_names_what_there_is():
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        command, *names = line.split()
        if command in ("graft", "include"):
            assert all((ROOT / name).exists() for name in names), line


def test_every_page_is_in_the_site():
    """mkdocs says so too, where it is installed."""
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert named == {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}


@pytest.mark.parametrize("page", ["api", "ops", "nn", "tasks"])
def test_reference_has_every_public_name(page):
    package = mvit3_kernels if page == "api" else getattr(mvit3_kernels, page)
    public = {name for name in package.__all__ if not isinstance(getattr(package, name), types.ModuleType)}
    text = (ROOT / "docs" / "reference" / f"{page}.md").read_text()
    assert set(re.findall(r"^::: mvit3_kernels\.\S*?(\w+)$", text, re.MULTILINE)) == public


def test_no_line_names_a_machine():
    """Pages are for everyone."""
    for page in [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), *WORKFLOWS]:
        assert not re.search(r"/(work|root|tmp)/\w", page.read_text()), page
