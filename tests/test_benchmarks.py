"""The benchmarks of single ops run under pytest-benchmark, where they are asked for only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.common import Case

ROOT = Path(__file__).parents[1]


def test_a_case_is_checked_and_timed(tmp_path):
    file, wanted = tmp_path / "found.json", "patch_attention-1-96-8-float32-training"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/", "-k", wanted]
    # where this is a worker of pytest-xdist, its variables would tell the other process that it is one, too
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "--threads", "1", f"--benchmark-json={file}"],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    found = {one["extra_info"]["candidate"]: one for one in json.loads(file.read_text())["benchmarks"]}
    assert list(found) == ["ours", "eager", "sdpa"] and {one["group"] for one in found.values()} == {
        f"patch_attention-{wanted.partition('-')[2]}"
    }
    info, median = found["ours"]["extra_info"], found["ours"]["stats"]["median"]
    flops, tensors = 7 * 2 * 4 * 16**2 * 96, 12  # two products forward, five backward; qkv is three tensors
    assert info["gflop_s"] == pytest.approx(flops / median / 1e9)
    assert info["gb_s"] == pytest.approx(tensors * 8 * 8 * 96 * 4 / median / 1e9)
    assert info["threads"] == 1 and info["torch"] == torch.__version__ and info["device"] == "cpu"
    assert info["revision"] and 0 < info["error"] < 1e-5 and info["mode"] == "training"


def test_a_wrong_result_is_refused():
    exact = {"y": torch.rand(9, dtype=torch.float64) + 1}
    eager = {"y": exact["y"].float()}
    case = Case({}, {"eager": lambda: eager, "ours": lambda: {"y": eager["y"] * 1.0001}}, lambda: exact)
    with pytest.raises(AssertionError, match=r"y: relative error 1\.00e-04"):
        case.checked()
