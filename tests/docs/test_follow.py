"""Following a page does what a reader does, and ends where a step does."""

from __future__ import annotations

import sys

import pytest

from .blocks import ROOT
from .follow import STARTS, run, steps

PAGE = """
<!-- not run: it installs -->
```sh
pip install --find-links dist mvit3_kernels
```
<!-- given: x = 3 -->
```python
x += 1
```
<!-- shortened by: there -->
```sh
echo here > file
```
<!-- not run: a download -->
```python
import nowhere
```
```python
open("file", "a").write(str(x))
```
"""


def test_steps_are_in_order_and_left_out_for_a_reason():
    found = steps("page", PAGE)
    assert [step["where"] for step in found] == ["page:4", "page:8, given", "page:8", "page:12", "page:16", "page:19"]
    assert [step["where"] for step in found if "left_out" in step] == ["page:16"]
    assert steps("page", PAGE, short=True)[3]["code"] == "echo here > file there"
    assert [step["where"] for step in steps("page", PAGE + "runs/s/")][1] == "page:4, a trained network"


def test_steps_run(tmp_path):
    assert run(sys.executable, steps("page", PAGE)[1:], tmp_path) == 0
    assert (tmp_path / "file").read_text() == "here\n4"


@pytest.mark.parametrize("block", ["```sh\nfalse\ntrue\n```", "```python\n1 / 0\n```"])
def test_a_step_that_fails_ends_it(tmp_path, block):
    assert run(sys.executable, steps("page", block + '\n```python\nopen("file", "w")\n```\n'), tmp_path) == 1
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("page", STARTS)
def test_a_first_page_says_how_to_install(page):
    first = steps(page, (ROOT / page).read_text())[0]
    assert first["code"].startswith("pip install ") and "left_out" not in first
