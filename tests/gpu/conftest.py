"""Tests that need a GPU: skipped, with the reason, where there is none."""

from pathlib import Path

import pytest
import torch

_WHY_NOT = None if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA device"


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)
            if _WHY_NOT:
                item.add_marker(pytest.mark.skip(reason=_WHY_NOT))


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
