"""What makes the first minutes on a GPU count, with stand-ins where there is none: checks before anything runs, wrong
results that show, shards of tests that end with a verdict, one archive, a cache of compiled kernels."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import gpu_check, gpu_networks, gpu_ops, gpu_summary
from benchmarks.common import Report
from benchmarks.gpu_networks import Candidate, Task, Variant, errors, wrong
from mvit3_kernels import graphs, info
from tests.gpu import conftest
from tests.replay import FakeRecorder

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_all.sh"


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


TASK = Task(small, small, 8, lambda x: torch.arange(len(x)) % 5, F.cross_entropy, lambda logits, loss: logits)
OPTIONS = argparse.Namespace(piece="train", device="cpu", tiny=True)


def candidate(variant: Variant) -> Candidate:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return Candidate(small, TASK, variant, x, TASK.target(x), OPTIONS)


def exact() -> dict[str, torch.Tensor]:
    return candidate(Variant("exact", True)).evidence(torch.float32)


class Forgetful(FakeRecorder):
    """Its replays do nothing, as a graph recorded on the wrong stream would."""

    def record(self, device, run):
        _, outputs = super().record(device, run)
        return lambda: None, outputs


@pytest.mark.parametrize("recorder", [FakeRecorder, Forgetful])
def test_evidence_of_a_graph_is_that_of_its_replay(recorder, monkeypatch):
    monkeypatch.setattr(graphs, "_Cuda", recorder)
    graph = candidate(Variant("ours_graph", True, graph=True))
    before = [p.detach().clone() for p in graph.model.parameters()]
    found, eager = graph.evidence(), candidate(Variant("eager", True)).evidence()
    for p, old in zip(graph.model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=0, atol=0)
    assert [float(group["lr"]) for group in graph.optimizer.param_groups] == pytest.approx([1e-4])
    assert found.keys() == eager.keys() - {"shown"}
    assert bool(wrong(errors(found, exact()), errors(eager, exact()))) == (recorder is Forgetful)


def test_a_small_layer_that_is_wrong_shows():
    """Beside a large one, of whose rounding its error is a part."""
    true = {"gradient 0": torch.randn(100_000), "gradient 1": torch.randn(8), "gradient 2": torch.full((8,), 1e-9)}
    eager = {name: t + 5e-3 * torch.randn(t.shape) for name, t in true.items()}
    eager["gradient 2"] = true["gradient 2"] + 1e-6
    close = {name: t + 8e-3 * torch.randn(t.shape) for name, t in true.items()}
    close["gradient 2"] = -eager["gradient 2"]
    allowed = errors(eager, true)
    assert wrong(errors(close, true), allowed) == []
    spoilt = close | {"gradient 1": 0.5 * true["gradient 1"]}
    assert errors(spoilt, true)["all"] < 2 * allowed["all"]
    assert wrong(errors(spoilt, true), allowed) == ["gradient 1"]
    assert "gradient 0" in wrong(errors(close | {"gradient 0": true["gradient 0"] * torch.nan}, true), allowed)


def test_exact_results_are_without_tf32(monkeypatch):
    seen = []

    def evidence(self, dtype=torch.bfloat16):
        seen.append((dtype, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return {"shown": torch.zeros(1)}

    monkeypatch.setattr(Candidate, "evidence", evidence)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    options = argparse.Namespace(**vars(OPTIONS), candidates=["eager_channels_last"], model="small", rounds=1)
    gpu_networks._time_network(TASK, None, "plain", torch.randn(2, 3, 8, 8), options, SimpleNamespace(add=print_row))
    assert seen[:2] == [(torch.float32, False, False)] * 2 and seen[2][1] and torch.backends.cudnn.benchmark


def print_row(**row):
    print(row)


def cases(monkeypatch, batches_seen):
    def of_batch(batch, device, tiny):
        batches_seen.append(batch)
        for op in ("first", "second"):
            x = torch.zeros(batch)
            yield gpu_ops.OpCase(op, "forward", torch.neg, [x], 4)

    monkeypatch.setattr(gpu_ops, "op_cases", of_batch)
    monkeypatch.setattr(gpu_ops, "ceilings", lambda *_: {"copy": 1.0})


def test_every_op_is_timed_at_both_batches_before_the_next(monkeypatch, tmp_path):
    batches: list[int] = []
    cases(monkeypatch, batches)
    timed = []
    monkeypatch.setattr(gpu_ops, "_time_op", lambda case, *_: timed.append((case.op, len(case.leaves[0]))))
    gpu_ops.time_ops(argparse.Namespace(tiny=False, device="cpu", ops=None), Report("ops", "cpu", tmp_path))
    assert timed == [("first", 128), ("first", 1), ("second", 128), ("second", 1)]


def test_a_failed_capture_costs_one_candidate(monkeypatch, tmp_path):
    def graphed(run, device):
        if len(captured) == 1:
            captured.append("failed")
            raise RuntimeError("operation not permitted when stream is capturing")
        captured.append("recorded")
        return run

    captured: list[str] = []
    cases(monkeypatch, [])
    monkeypatch.setattr(gpu_ops, "graphed", graphed)
    report = Report("ops", "cpu", tmp_path)
    options = argparse.Namespace(tiny=True, device="cpu", ops=["first"], rounds=1)
    gpu_ops.time_ops(options, report)
    assert [("failure" in row, row["candidate"]) for row in report.rows] == [
        (True, "compile"),
        (False, "eager"),
        (False, "ours"),
    ]


def test_what_a_measurement_lacks_is_named_with_its_reason():
    found = info.collect()
    found["backends"]["triton"] = {"available": True, "reason": None}
    found["backends"]["cuda"] = {"available": False, "reason": "the CUDA extension was not built: no nvcc"}
    assert gpu_check.missing(found) == ["backend cuda: the CUDA extension was not built: no nvcc"]


def test_results_say_which_backends_there_were(tmp_path):
    facts = Report("ops", "cpu", tmp_path).facts
    assert facts["backends"].keys() == {"reference", "cpu", "triton", "cuda"} and facts["backends"]["cuda"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_nothing_is_measured_where_something_is_missing(tmp_path):
    environment = {**os.environ, "PATH": path_with_python(), "OUT": str(tmp_path)}
    done = subprocess.run([SCRIPT, "ceilings"], env=environment, capture_output=True, text=True)
    assert done.returncode == 3 and "backend cuda: " in done.stderr and not list(tmp_path.iterdir())


def path_with_python() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def test_shards_are_whole_classes_and_every_function(tmp_path):
    """A stand-in for python3 notes what each shard would run."""
    notes = tmp_path / "notes"
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$MVIT3_TEST_SECONDS $*" >>{notes}\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "OUT": str(tmp_path)}
    environment["ARGUMENTS"] = "--device cpu"
    subprocess.run([SCRIPT, "tests"], env=environment, capture_output=True, text=True)
    shards = [line.split() for line in notes.read_text().splitlines() if "-m pytest" in line]
    assert all(float(shard[0]) > 100 for shard in shards)
    nodes = [word for shard in shards for word in shard if "test_kernels_gpu.py::" in word]
    names = [node.partition("::")[2] for node in nodes]
    assert len(names) == len(set(names))
    assert {"TestInvertedResidual", "TestInvertedResidualCuda", "test_recorded_configurations_are_offered"} <= {*names}


class Item:
    def __init__(self, nodeid):
        self.nodeid = nodeid


def test_tests_end_with_a_verdict_when_time_is_up():
    items = [Item(f"{test}[{i}]") for test in ("a", "b") for i in range(3)]
    conftest.in_turns(items)
    assert [item.nodeid for item in items] == ["a[0]", "b[0]", "a[1]", "b[1]", "a[2]", "b[2]"]
    session = SimpleNamespace(shouldstop=False)
    conftest.Clock(100).look(session, items, items[1])
    assert not session.shouldstop
    conftest.Clock(-1).look(session, items, items[4])
    assert session.shouldstop == "time is up: 2 of 6 tests did not run"


def test_what_went_wrong_is_on_the_last_screen(tmp_path):
    rows = [
        {"candidate": "ours", "interleaved": True, "correct": True, "images_per_s": 1234.5},
        {"candidate": "compile", "interleaved": True, "correct": False, "wrong": ["gradient 3"], "images_per_s": 1.0},
        {"candidate": "ours_graph", "failure": "CudaGraphError: no"},
    ]
    (tmp_path / "gpu_train.json").write_text(json.dumps({"piece": "train", "facts": {}, "rows": rows}))
    (tmp_path / "gpu_tests_TestDropout.txt").write_text("....\n=== 4 passed in 1.2s ===\n")
    lines, bad = gpu_summary.summary(tmp_path)
    assert "1234.5 images/s" in lines[0] and "4 passed" in lines[1]
    assert bad == ["wrong: train compile: gradient 3", "failed: train ours_graph: CudaGraphError: no"]


def test_a_cache_of_kernels_is_found_in_another_folder(tmp_path):
    pytest.importorskip("triton")
    from benchmarks import triton_cache

    made, there = tmp_path / "made", tmp_path / "there"
    (made / "HASH").mkdir(parents=True)
    (made / "HASH" / "k.cubin").write_bytes(b"code")
    group = made / "HASH" / "__grp__k.json"
    group.write_text(json.dumps({"child_paths": {"k.cubin": str(made / "HASH" / "k.cubin")}}))
    assert triton_cache.pack(made, tmp_path / "cache.tar.gz") == 1
    assert triton_cache.unpack(tmp_path / "cache.tar.gz", there) == (1, True)
    [listed] = json.loads((there / "HASH" / group.name).read_text())["child_paths"].values()
    assert Path(listed).read_bytes() == b"code" and Path(listed).is_relative_to(there)
    (made / "triton_key").write_text("another")
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as tar:
        tar.add(made, arcname=".")
    assert triton_cache.unpack(tmp_path / "other.tar.gz", there) == (1, False)
