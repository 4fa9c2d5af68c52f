"""Every page of the documentation is a script: its blocks run from top to bottom, in an empty folder, offline. What
cannot run says why in a comment in front of it, and its syntax, options and targets are checked all the same."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from mvit3 import runtime
from mvit3.cli import _arrange, main
from mvit3.parser import Parser
from mvit3.timm_options import TimmOptions

from .blocks import ROOT, RUNNABLE, TEXT, TRAINED, Block, blocks, pages

MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()
PAGES = {page.relative_to(ROOT).as_posix(): list(blocks(page.read_text())) for page in pages()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of `mvit3 train`, as pages have it in runs/s."""
    folder = tmp_path_factory.mktemp("trained")
    assert main([*TRAINED.split(), f"--run.output={folder}", f"--run.threads={torch.get_num_threads()}"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    """An empty folder, the threads of this process, and nothing left behind."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(runtime, "usable_cores", lambda: threads)
    monkeypatch.chdir(tmp_path)


def commands(block: Block) -> list[list[str]]:
    """Each command of a block in words, without comments."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_command(words: list[str], more: list[str]) -> None:
    """A command of ours in this process; `> file` takes its output."""
    if ">" in words:
        with open(words[-1], "w") as stream, redirect_stdout(stream):
            run_command(words[: words.index(">")], more)
    elif words[0] == "mvit3":
        assert main([*words[1:], *more]) == 0
    elif words[:2] == ["python", "-m"]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words[2:])
            runpy.run_module(words[2], run_name="__main__")
    else:
        raise AssertionError(f"no test can run {shlex.join(words)!r}: say why, <!-- not run: REASON -->")


def check_command(words: list[str]) -> None:
    """What can be known of a command that does not run: options, files and targets exist."""
    if "mvit3" in words:  # also behind `torchrun ... -m` and variables of the environment
        name, arguments = words[words.index("mvit3") + 1], words[words.index("mvit3") + 2 :]
        arguments = arguments[: arguments.index(">")] if ">" in arguments else arguments
        parser = Parser(name)
        parser.parse_args(_arrange(parser, arguments, TimmOptions(name)))
    elif "make" in words:
        targets = [word for word in words[words.index("make") + 1 :] if "=" not in word]
        assert all(re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE) for target in targets), targets
    elif words[:2] == ["pip", "install"]:
        named = [extra for word in words for extra in re.findall(r"(?:mvit3_kernels|^\.)\[([\w,]+)\]", word)]
        assert all(f"\n{extra} = [" in PROJECT for extras in named for extra in extras.split(",")), named
    elif files := [word for word in words if word.endswith((".py", ".sh"))]:
        assert all((ROOT / file).exists() for file in files), files


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_are(page):
    """A block without a language would be run by no test."""
    for block in PAGES[page]:
        assert block.language in (*RUNNABLE, *TEXT), f"{page}:{block.line}: a block in {block.language!r}"
        reason = block.notes.get("not run", "a reason")
        assert reason, f"{page}:{block.line}: not run without a reason"
        assert all((ROOT / file).exists() for file in re.findall(r"tests/\S+\.py", reason)), reason


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language in RUNNABLE for b in PAGES[page])])
def test_page_runs(page, trained, tmp_path):
    torch.manual_seed(0)
    shutil.copytree(trained, tmp_path / "runs" / "s")
    names: dict[str, object] = {"__name__": "page"}
    for block in PAGES[page]:
        where, reads = f"{page}:{block.line}", "not run" not in block.notes
        if given := block.notes.get("given"):
            exec(compile(given, f"{where}, given", "exec"), names)
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.code, page, "exec")
            if reads:
                exec(code, names)
        elif block.language == "sh":
            for words in commands(block):
                check_command(words)
                if reads:
                    run_command(words, shlex.split(block.notes.get("shortened by", "")))


def test_serving_page_shows_what_it_says(capsys):
    """`explain` says fused, as the page has it, and nothing is logged that a reader would wonder about."""
    block = next(block for block in PAGES["docs/start/serving.md"] if block.language == "python")
    exec(compile(block.code, "docs/start/serving.md", "exec"), {})
    assert "`explain` should say `fused`" in (ROOT / "docs/start/serving.md").read_text()
    told = capsys.readouterr()
    assert re.search(r"^network +FusedMobileViT +fused", told.out, re.MULTILINE) and not told.err


def test_a_wrong_block_is_found(tmp_path):
    """The checks above can fail."""
    text = "<!-- given: x = 1 -->\n<!-- not run: none -->\n```sh\nmvit3 train --optimizer.lrr 3\n```\n```\nx\n```\n"
    first, second = blocks(text)
    assert (first.line, first.notes) == (4, {"given": "x = 1", "not run": "none"}) and second.language == ""
    with pytest.raises(Exception, match="there is no option"):
        check_command(*commands(first))
    with pytest.raises(AssertionError):
        check_command(["make", "nothing"])
    with pytest.raises(AssertionError):
        check_command(["pip", "install", "mvit3_kernels[appp]", "timm"])
    with pytest.raises(AssertionError, match="say why"):
        run_command(["curl", "x"], [])
    assert list(Path().iterdir()) == []
