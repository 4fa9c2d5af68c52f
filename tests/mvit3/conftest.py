import pytest
import torch

from mvit3 import engine


@pytest.fixture(autouse=True)
def _keep_threads(monkeypatch):
    """Commands run inside a test use the threads that the test process has: workers of pytest-xdist share the cores."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(engine, "usable_cores", lambda: threads)
