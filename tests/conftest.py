from __future__ import annotations

import os

import pytest
import torch

pytest.register_assert_rewrite("tests.bounds")

# Workers of pytest-xdist share the cores instead of oversubscribing them.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // workers))
