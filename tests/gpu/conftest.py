"""Tests that need a GPU: skipped, with the reason, where there is none.

With MVIT3_TEST_SECONDS they end with a verdict after that time: the first variant of every test runs before the second
of any, and what is left out is counted, and fails the run.
"""

import os
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

_WHY_NOT = None if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA device"
_SECONDS = float(os.environ.get("MVIT3_TEST_SECONDS", 0))


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)
            if _WHY_NOT:
                item.add_marker(pytest.mark.skip(reason=_WHY_NOT))
    if _SECONDS:
        in_turns(items)


def in_turns(items):
    """The first variants of all tests, then the second ones, and so on."""
    seen, turns = Counter(), {}
    for item in items:
        test = item.nodeid.partition("[")[0]
        turns[item] = seen[test]
        seen[test] += 1
    items.sort(key=turns.get)


class Clock:
    """Ends a session when its time is up."""

    def __init__(self, seconds):
        self.end, self.left = time.monotonic() + seconds, None

    def look(self, session, items, item):
        if time.monotonic() > self.end and not session.shouldstop:
            self.left = len(items) - items.index(item)
            session.shouldstop = f"time is up: {self.left} of {len(items)} tests did not run"


_clock = Clock(_SECONDS)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    if _SECONDS and nextitem is not None:
        _clock.look(item.session, item.session.items, nextitem)


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """No TF32: float32 is compared with float64."""
    if _WHY_NOT is None:
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def poisoned():
    """torch.empty is full of NaN, so that an element nobody wrote, in an output or a workspace, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
