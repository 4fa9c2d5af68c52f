"""`mvit3 bench` times only what computes the right thing, and says what it left out."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch

from mvit3.bench import candidates, command, measure
from mvit3.bench.candidates import Subject, Work
from mvit3.cli import main
from mvit3.runtime import usable_cpus

SMALL = ("--size", "64", "--rounds", "1", "--threads", "1", "--no_memory")
FACTS = {
    "cpu": "a CPU",
    "threads": 1,
    "instruction_set": "avx2",
    "torch": "2",
    "revision": "r",
    "load_average": 0.0,
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(command, "machine", lambda: dict(FACTS))
    monkeypatch.setattr(measure, "PAUSE", 0)
    yield
    torch.set_num_threads(threads)


def bench(capsys, *arguments):
    """Exit status, rows by candidate, stderr."""
    status = main(["bench", *arguments, *SMALL, "--json"])
    captured = capsys.readouterr()
    return status, {row["candidate"]: row for row in json.loads(captured.out)["rows"]}, captured.err


def test_inference(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "machine", measure.machine)
    file = tmp_path / "new" / "results.json"
    status, rows, progress = bench(capsys, "mobilevitv3_xxs", "--peers", "channels_last", "--output", str(file))
    assert status == 0 and list(rows) == ["channels_last", "ours", "ours_fused"]
    for row in rows.values():
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["images_per_s"] == pytest.approx(1e3 / row["median_ms"])
        assert row["result"] == "right" and 0 < row["error"] < candidates.BOUND
    written = json.loads(file.read_text())
    assert written["rows"] == list(rows.values()) and written["schema"] == measure.SCHEMA
    assert written["machine"]["copy_gb_s"] > 0 and written["machine"]["threads"] == 1
    assert "mobilevitv3_xxs: prepar" in progress


def test_training_of_a_host(capsys):
    pytest.importorskip("timm")
    arguments = ("mobilevit_xxs", "--host", "timm", "--mode", "train", "--batch", "2")
    status, rows, _ = bench(capsys, *arguments, "--peers", "eager,openvino")
    assert status == 0 and list(rows) == ["eager", "ours_fused"]
    assert all(row["host"] == "timm" and row["work"] == "training" and row["median_ms"] > 0 for row in rows.values())
    assert 0 < rows["ours_fused"]["error"] < candidates.BOUND


def test_small_training(capsys):
    """Four values in the last batch norm: eager's own error counts, and a wrong result is wrong."""
    arguments = ("mobilevit_xs", "--mode", "train", "--batch", "4", "--size", "32", "--rounds", "1", "--threads", "1")
    assert main(["bench", *arguments, "--peers", "eager,channels_last", "--no_memory", "--json"]) == 0
    rows = {row["candidate"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == ["eager", "channels_last", "ours"]
    assert all(row["result"] == "right" and 0 < row["error"] < candidates.BOUND for row in rows.values())


def test_eager_that_errs_is_no_measure(monkeypatch):
    """Gradients are compared with those in float64: where eager errs, what errs as much is right and what is exact too,
    but not what errs more."""

    def spoiled(factor):
        return lambda network, _: lambda x: network(x) * (1.0 if x.dtype == torch.float64 else factor)

    for name, factor in {"eager_nchw": 1.02, "eager_channels_last": 1.02, "compile": 2.0}.items():
        monkeypatch.setitem(candidates.CANDIDATES, name, spoiled(factor))
    monkeypatch.setitem(candidates.HALF, "ours_bfloat16", spoiled(float("nan")))
    names = ("eager_channels_last", "compile", "ours", "ours_bfloat16")
    found = candidates.prepare(Subject("mobilevitv3_xxs"), Work("training", 4, 64, 1), names)
    assert found.errors["eager_nchw"] > candidates.BOUND and found.errors["ours"] < 1e-4
    assert list(found.right) == ["eager_channels_last", "ours"] and list(found.wrong) == ["compile", "ours_bfloat16"]
    with pytest.raises(AssertionError, match="results err by too much"):
        found.all_right()
    monkeypatch.setitem(candidates.CANDIDATES, "ours", spoiled(1.1))
    assert "ours" in candidates.prepare(Subject("mobilevitv3_xxs"), Work("training", 4, 64, 1), ("ours",)).wrong


@pytest.mark.parametrize(("candidate", "eager", "training", "bound"), [
    ("ours", 1e-6, True, candidates.BOUND),
    ("ours", 0.01, True, 0.02),
    ("compile", 0.01, True, 0.1),
    ("compile", float("inf"), True, 0.5),
    ("ours", float("nan"), False, candidates.BOUND),
    ("ours_bfloat16", 0.01, True, candidates.HALF_GRADIENTS),
    ("ours_fused_bfloat16", 0.01, False, candidates.HALF_BOUND),
    ("ours_bfloat16", 0.15, True, 0.3),
])  # fmt: skip
def test_what_a_candidate_may_err(candidate, eager, training, bound):
    errors = {candidates.EAGER_HALF if "bfloat16" in candidate else candidates.EAGER: eager}
    assert candidates.allowed(candidate, errors, training) == bound


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_wrong_result_is_shown_and_not_timed(capsys, monkeypatch, factor):
    monkeypatch.setitem(candidates.CANDIDATES, "ours_fused", lambda network, _: lambda x: network(x) * factor)
    assert main(["bench", "mobilevitv3_xxs", "--peers", "eager", *SMALL]) == 1
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if "mobilevitv3" in line}
    assert lines["ours_fused"].endswith("WRONG") and len(lines["ours_fused"].split()) == 4
    assert "1.0e-02" in lines["ours_fused"] or "nan" in lines["ours_fused"]
    assert lines["ours"].endswith("right") and "x as fast" in lines["eager"]


def test_peer_that_fails_or_is_missing_is_named(capsys, monkeypatch):
    def fails(network, x):
        raise RuntimeError("no such operator\nand more")

    find = candidates.importlib.util.find_spec
    monkeypatch.setattr(candidates.importlib.util, "find_spec", lambda m: None if m == "openvino" else find(m))
    monkeypatch.setitem(candidates.CANDIDATES, "eager_channels_last", fails)
    status, rows, progress = bench(capsys, "mobilevitv2_050", "--peers", "channels_last,openvino")
    assert status == 0 and "openvino" not in rows and "without openvino: not installed: openvino" in progress
    assert rows["channels_last"]["result"] == "failed: RuntimeError: no such operator"
    assert "median_ms" not in rows["channels_last"] and rows["ours"]["median_ms"] > 0


@pytest.mark.skipif(candidates.bfloat16_why_not() is not None, reason="the CPU has no such products")
def test_bfloat16(capsys):
    status, rows, _ = bench(capsys, "mobilevitv3_xxs", "--peers", "eager", "--dtype", "bfloat16")
    assert status == 0 and list(rows) == ["eager", "ours", "ours_fused", "eager_bfloat16", "ours_fused_bfloat16"]
    assert rows["ours_fused_bfloat16"]["dtype"] == "bfloat16"
    assert 1e-4 < rows["ours_fused_bfloat16"]["error"] < candidates.HALF_BOUND


@pytest.mark.parametrize(("arguments", "message"), [
    (["--batch", "0"], "--batch must be at least 1 to infer, got 0"),
    (["--batch", "1", "--mode", "train"], "--batch must be at least 2 to train, got 1"),
    (["--size", "16"], "--size must be at least 32, got 16"),
    (["--rounds", "0"], "--rounds must be at least 1, got 0"),
    (["--threads", "-1"], "--threads must be at least 0, got -1"),
    (["--threads", "9999"], f"at most {usable_cpus()}, the CPUs that this process may use, got 9999"),
    (["--mode", "train", "--dtype", "bfloat16", "--host", "timm"], "is of this package's networks, not of --host"),
    (["--mode", "train", "--batch", "3", "--size", "32"], "batch norm 3 values; to train in float32 it needs 4"),
    (["--mode", "train", "--size", "32", "--dtype", "bfloat16", "--batch", "7"], "to train in bfloat16 it needs 8"),
    (["--peers", "eager,opnvino"], "got 'opnvino', the nearest is 'openvino'"),
    (["--host", "jax"], "--host must be one of timm, transformers; got 'jax'"),
    (["mobilevit3_s"], "there is no classifier 'mobilevit3_s'; the nearest is 'mobilevitv3_s'"),
    (["mobilevit-smal", "--host", "transformers"], "of transformers; the nearest is 'mobilevit-small'"),
    (["--output", "."], "--output . is a folder"),
    (["--output", "/proc/results.json"], "--output /proc/results.json cannot be written: "),
    (["--output", "/dev/null"], "--output /dev/null is there and is no result file"),
    (["--batch-sise", "3"], "there is no option '--batch-sise'; the nearest is --batch (see"),
    (["--seed", "3"], "there is no option '--seed'; the nearest is --size"),
    (["--data", "digits"], "there is no option '--data'; the nearest"),
    (["--print_config"], "there is no option '--print_config'"),
    (["--config", "digits"], "there is no option '--config'"),
])  # fmt: skip
def test_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and message in captured.err and not captured.out
    assert "measuring" not in captured.err and "run." not in captured.err


@pytest.mark.parametrize("text", ["precious", '{"op": "models", "schema": 1, "machine": {}, "rows": []}', "[1]", ""])
def test_only_a_result_is_replaced(tmp_path, capsys, text):
    file = tmp_path / "found"
    file.write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--output", str(file)])
    assert stop.value.code == 2 and "is no result file of mvit3 bench; it is not replaced" in capsys.readouterr().err
    assert file.read_text() == text and list(tmp_path.iterdir()) == [file]
    file.write_text(measure.document("networks", [], FACTS))
    command.check_output(file)


def test_turns():
    """Each turn of several calls begins with one that is not counted."""
    calls, turns = [], []
    runs = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = measure.interleaved(runs, rounds=2, warmup=1, burst=3, told=turns.append)
    assert "".join(calls) == "ab" + 2 * ("aaaa" + "bbbb") and turns == list("abab")
    assert measure.spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == {
        "median_ms": 3.5,
        "min_ms": 1.0,
        "p20_ms": 2.0,
        "p80_ms": 5.0,
    }
    assert all(t["min_ms"] <= t["p20_ms"] <= t["median_ms"] <= t["p80_ms"] for t in times.values())


def test_memory_of_a_step():
    """More than gradients and optimiser state, which are three times the parameters."""
    weights = 4 * sum(p.numel() for p in Subject("mobilevitv3_xxs").network().parameters()) / 2**20
    assert 3 * weights < candidates.step_memory("ours", Subject("mobilevitv3_xxs"), Work("training", 8, 128, 1)) < 400


def test_training_under_autocast():
    """Our gradients are compared, and err less than eager's; dropouts are off for that and on for the steps."""
    names = ("ours", "ours_fused", "eager_bfloat16", "ours_bfloat16", "ours_fused_bfloat16")
    found = candidates.prepare(Subject("mobilevitv3_xxs"), Work("training", 4, 64, 1), names)
    assert list(found.right) == ["ours", "eager_bfloat16", "ours_bfloat16"]
    assert 1e-3 < found.errors["ours_bfloat16"] < found.errors["eager_bfloat16"]
    rates = [m.p for m in found.right["ours_bfloat16"].network.modules() if isinstance(m, torch.nn.Dropout)]
    assert sum(rates) > 0
    found.right["ours_bfloat16"].step()


def test_bfloat16_training(capsys):
    arguments = ("mobilevitv3_xxs", "--mode", "train", "--dtype", "bfloat16", "--batch", "2", "--peers", "eager")
    status, rows, _ = bench(capsys, *arguments)
    assert status == 0 and list(rows) == ["eager", "ours", "eager_bfloat16", "ours_bfloat16"]
    assert all(row["median_ms"] > 0 for row in rows.values()) and rows["ours_bfloat16"]["dtype"] == "bfloat16"


STOPPED = """
import os, signal, sys
from mvit3.bench import command
from mvit3.cli import main
command.machine = dict

def measure(subject, *rest):
    if subject.name == "mobilevitv2_075":
        os.kill(os.getpid(), signal.SIGTERM)
    return [{"network": subject.name}]

command.measure = measure
sys.exit(main(["bench", "mobilevitv2_050", "mobilevitv2_075", "--peers", "eager", "--output", sys.argv[1]]))
"""


def test_termination_keeps_what_is_done(tmp_path):
    """As docs/reference/commands.md tells: a shell calls this status 143."""
    file = tmp_path / "results.json"
    done = subprocess.run([sys.executable, "-c", STOPPED, str(file)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert [row["network"] for row in json.loads(file.read_text())["rows"]] == ["mobilevitv2_050"]
    assert "Traceback" not in done.stderr and [f.name for f in tmp_path.iterdir()] == [file.name]


def test_interruption_keeps_what_is_done(tmp_path, capsys, monkeypatch):
    def measure(subject, *rest):
        if subject.name == "mobilevitv2_075":
            signal.raise_signal(signal.SIGINT)
        return [{"network": subject.name}]

    monkeypatch.setattr(command, "measure", measure)
    file, names = tmp_path / "results.json", ["mobilevitv2_050", "mobilevitv2_075"]
    assert main(["bench", *names, *SMALL, "--output", str(file)]) == 130
    assert [row["network"] for row in json.loads(file.read_text())["rows"]] == names[:1]
    assert capsys.readouterr().err.endswith("mvit3 bench: interrupted\n")


def test_out_of_memory(capsys, monkeypatch):
    def full(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(command, "measure", full)
    assert main(["bench", "mobilevitv3_xxs", "--peers", "eager", *SMALL, "--quiet"]) == 1
    said = capsys.readouterr().err
    assert said.endswith("9 bytes; a smaller --batch or --size needs less\n") and "out of memory" in said
