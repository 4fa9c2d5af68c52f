"""`mvit3 bench` times only what computes the right thing, and says what it left out."""

from __future__ import annotations

import json

import pytest
import torch

from mvit3.bench import candidates, command, measure
from mvit3.bench.candidates import Subject, Work
from mvit3.cli import main

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
    (["--mode", "train", "--dtype", "bfloat16"], "--dtype bfloat16 is of inference: --mode infer"),
    (["--peers", "eager,opnvino"], "got 'opnvino', the nearest is 'openvino'"),
    (["--host", "jax"], "--host must be one of timm, transformers; got 'jax'"),
    (["mobilevit3_s"], "there is no classifier 'mobilevit3_s'; the nearest is 'mobilevitv3_s'"),
    (["mobilevit-smal", "--host", "transformers"], "of transformers; the nearest is 'mobilevit-small'"),
    (["--output", "."], "--output . is a folder"),
])  # fmt: skip
def test_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and message in captured.err and not captured.out


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
