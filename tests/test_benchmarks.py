"""The benchmarks of single ops run under pytest-benchmark, where they are asked for only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import conftest, test_ops
from benchmarks.common import Case, backward_of, peak_cpu_memory, step
from mvit3.results import reading

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> str:
    """What `pytest benchmarks/` prints."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/", *arguments]
    # where this is a worker of pytest-xdist, its variables would tell the other process that it is one, too
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables["TORCHDYNAMO_DISABLE"] = "1"  # what compiles runs, without its seconds
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_case_is_checked_timed_and_compared(tmp_path):
    file, wanted = tmp_path / "found.json", "patch_attention-1-96-8-float32-training"
    run("-k", wanted, "--threads", "1", f"--benchmark-json={file}")
    recorded = json.loads(file.read_text())
    assert set(recorded["machine_info"]) == {"machine", "system", "python_implementation", "python_version", "cpu"}
    assert " at 0x" not in file.read_text()
    found = {one["extra_info"]["candidate"]: one for one in recorded["benchmarks"]}
    assert list(found) == ["ours", "eager", "compile", "sdpa"] and {one["group"] for one in found.values()} == {
        f"patch_attention-{wanted.partition('-')[2]}"
    }
    info, median = found["ours"]["extra_info"], found["ours"]["stats"]["median"]
    flops, tensors = 7 * 2 * 4 * 16**2 * 96, 12  # two products forward, five backward; qkv is three tensors
    assert info["gflop_s"] == pytest.approx(flops / median / 1e9)
    assert info["gb_s"] == pytest.approx(tensors * 8 * 8 * 96 * 4 / median / 1e9)
    assert info["threads"] == 1 and info["torch"] == torch.__version__ and info["device"] == "cpu"
    assert info["revision"] and 0 < info["error"] < 1e-5 and info["mode"] == "training"
    assert info["of_product"] == pytest.approx(info["gflop_s"] / info["mm_gflop_s"])
    assert info["of_copy"] == pytest.approx(info["gb_s"] / info["copy_gb_s"])
    assert 0 <= info["memory_mib"] < 100

    shown = run("-k", f"{wanted}-ours", "--threads", "1", f"--benchmark-compare={file}")
    rows = [line.split()[1] for line in shown.splitlines() if f"{wanted}-ours] " in line]
    assert len(rows) == 2 and {row.rpartition("/")[2].strip("()") for row in rows} == {"NOW", "found"}

    # the page of `mvit3 report` reads what was recorded
    figures = reading.read(file, "found.json").figures
    assert [f.candidate for f in figures] == list(found) and figures[0].ms == 1e3 * median
    assert figures[0].case == "1, 96, 8, float32" and figures[0].gflop_s == info["gflop_s"]


def test_a_few_shapes_are_chosen():
    """Of each op and mode, with all of their candidates."""
    items = [SimpleNamespace(callspec=SimpleNamespace(id=one.id)) for one in test_ops.parameters()]
    left, out = list(items), []
    hook = SimpleNamespace(pytest_deselected=lambda items: out.extend(items))
    config = SimpleNamespace(getoption={"--few": 2}.get, hook=hook)
    conftest.pytest_collection_modifyitems(config, left)
    names = Counter(item.callspec.id.rpartition("-")[0] for item in left)
    assert set(names.values()) <= {3, 4} and len(left) + len(out) == len(items)
    by_op = Counter((name.partition("-")[0], name.rpartition("-")[2]) for name in names)
    assert {mode for _, mode in by_op} == {"evaluation", "training", "backward"}
    assert len(by_op) >= 28 and set(by_op.values()) == {2}
    config.getoption = {"--few": 0}.get
    conftest.pytest_collection_modifyitems(config, items)
    assert len(items) == len(left) + len(out)


@pytest.mark.parametrize(("options", "message"), [
    ({"--threads": 0, "--few": 0}, "--threads must be at least 1 and at most [0-9]+, got 0"),
    ({"--threads": 9999, "--few": 0}, "--threads must be at least 1 and at most [0-9]+, got 9999"),
    ({"--threads": 1, "--few": -1}, "--few must be at least 0 .*, got -1"),
])  # fmt: skip
def test_impossible_options(options, message):
    with pytest.raises(pytest.UsageError, match=message):
        conftest.pytest_configure(SimpleNamespace(getoption=options.get, option=SimpleNamespace()))


def test_a_wrong_result_is_refused():
    exact = {"y": torch.rand(9, dtype=torch.float64) + 1}
    eager = {"y": exact["y"].float()}
    case = Case({}, {"eager": lambda: eager, "ours": lambda: {"y": eager["y"] * 1.0001}}, lambda: exact)
    with pytest.raises(AssertionError, match=r"y: relative error 1\.00e-04"):
        case.checked()


def test_a_wrong_compilation_is_refused():
    exact = {"y": torch.rand(9, dtype=torch.float64) + 1}
    eager = {"y": exact["y"].float()}
    runs = {"eager": lambda: eager, "ours": lambda: eager}
    wrong = Case({}, runs, lambda: exact, compiled=lambda: lambda: {"y": eager["y"] * 1.0001})
    with pytest.raises(AssertionError, match=r"y: relative error 1\.00e-04"):
        wrong.with_compiled()
    right = Case({}, runs, lambda: exact, compiled=lambda: lambda: eager).with_compiled()
    assert list(right.candidates) == ["eager", "ours", "compile"] and right.measure(
        {"mm_gflop_s": 1.0, "copy_gb_s": 1.0}, quick=True
    ).keys() >= {"compile_ms", "against_compile"}


def test_backward_alone():
    """Gradients of a forward pass that is over, and of one that is its own."""
    passes = []
    leaves = {"x": torch.rand(3), "w": torch.rand(3)}

    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        passes.append(1)
        return x * w

    def whole() -> dict[str, torch.Tensor]:
        return step(product, leaves, torch.ones(3))

    expected = whole()
    rest = backward_of(whole)
    assert len(passes) == 2
    dx, dw = rest()
    assert len(passes) == 2 and torch.equal(dx, expected["dx"]) and torch.equal(dw, expected["dw"])
    with pytest.raises(ValueError, match="no backward pass"):
        backward_of(lambda: step(product, leaves, None))


@pytest.mark.parametrize("op", test_ops.OPS)
def test_every_op_has_a_backward_pass(op):
    """The smallest training case of each: what is held is its last call of autograd, which gives gradients."""
    ids = {one.id: one.values for one in test_ops.parameters() if one.id.startswith(f"{op}-")}
    makes = [make for make, candidate, backward in ids.values() if backward and candidate == "ours"]
    assert makes
    rest = backward_of(makes[-1]().candidates["ours"])
    gradients = rest()
    assert gradients is None or all(g is not None for g in gradients)  # Tensor.backward returns None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell")
def test_memory_of_a_call():
    """Also of one that finds what it needs in memory that was given back to the allocator."""
    megabytes = 24
    torch.ones(megabytes << 18)
    for _ in range(2):
        assert 0.9 * megabytes < peak_cpu_memory(lambda: torch.ones(megabytes << 18)) < megabytes + 30
