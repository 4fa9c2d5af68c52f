"""Recorded configurations of Triton kernels: looked up by architecture, dtype and channels, and no other one ever
runs."""

import json

import pytest
import torch

from .triton_kernel import needs_triton

tuning = pytest.importorskip("mvit3_kernels.ops.tuning", exc_type=ImportError)
pytestmark = needs_triton

OFFERED = [{"BLOCK": 64}, {"BLOCK": 32}, {"BLOCK": 16}]
KEY = "toy_fwd bfloat16 8x16"


@pytest.fixture
def records(tmp_path, monkeypatch):
    """A file of its own, and a GPU that the test names."""
    monkeypatch.setattr(tuning, "FILE", tmp_path / "tuned.json")

    def write(**entries):
        tuning.FILE.write_text(json.dumps(entries))
        tuning.forget()

    yield write
    tuning.forget()


def choose(architecture, monkeypatch, dtype=torch.bfloat16, channels=(8, 16), kernel="toy_fwd"):
    monkeypatch.setattr(tuning, "architecture", lambda x: architecture)
    return tuning.choose(kernel, torch.empty(2, 3, 5, 8, dtype=dtype), channels, lambda: OFFERED)


def test_records_are_found_by_architecture_dtype_and_channels(records, monkeypatch):
    records(sm_90={KEY: {"BLOCK": 16}}, sm_86={KEY: {"BLOCK": 32}}, gfx942={})
    assert choose("sm_90", monkeypatch) == {"BLOCK": 16}
    assert choose("sm_86", monkeypatch) == choose("sm_89", monkeypatch) == {"BLOCK": 32}
    for other in ("sm_80", "gfx942", "sm_100"):
        assert choose(other, monkeypatch) == {"BLOCK": 64}
    assert choose("sm_90", monkeypatch, dtype=torch.float16) == {"BLOCK": 64}
    assert choose("sm_90", monkeypatch, channels=(8, 17)) == {"BLOCK": 64}
    assert choose("sm_90", monkeypatch, kernel="toy_bwd") == {"BLOCK": 64}


def test_a_record_that_is_not_offered_does_not_run(records, monkeypatch):
    records(sm_90={KEY: {"BLOCK": 48}})
    assert choose("sm_90", monkeypatch) == {"BLOCK": 64}


def test_without_a_file(records, monkeypatch):
    tuning.forget()
    assert choose("sm_90", monkeypatch) == {"BLOCK": 64}


def test_a_choice_is_made_once(records, monkeypatch):
    """Nothing is listed or read at later launches on a GPU, whatever the map's size."""
    records()
    asked = []

    class OnGpu(torch.Tensor):
        is_cuda = True

    def configurations():
        asked.append(1)
        return OFFERED

    monkeypatch.setattr(tuning, "architecture", lambda x: "sm_90")
    for rows in (1, 2, 3):
        x = torch.empty(rows, 3, 5, 8).as_subclass(OnGpu)
        assert tuning.choose("toy_fwd", x, (8,), configurations) is OFFERED[0]
    assert len(asked) == 1


def test_shipped_records():
    """Of known architectures, and of kernels that the library has."""
    folder = tuning.FILE.parent
    sources = "".join(path.read_text() for path in (*folder.glob("*/triton.py"), folder / "triton_rows.py"))
    for architecture, entries in json.loads(tuning.FILE.read_text()).items():
        assert architecture in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
        for key, config in entries.items():
            kernel, dtype, channels = key.split(" ")
            assert dtype in ("float32", "bfloat16", "float16") and all(c.isdigit() for c in channels.split("x"))
            assert "_".join(kernel.split("_")[:2]) in sources and {"num_warps"} <= config.keys(), key


def test_tuning_records_what_is_faster(records, monkeypatch, capsys):
    """By 2 per cent at least; what fails or is recorded already is left out."""
    tune = pytest.importorskip("benchmarks.tune")
    records()
    monkeypatch.setattr(tuning, "architecture", lambda x: "sm_90")
    x, used = torch.empty(1, 1, 1, 8), []

    def call():
        for kernel in ("a", "b", "c", "known"):
            config = tuning.choose(kernel, x, (8,), lambda: OFFERED)
            used.append((kernel, config["BLOCK"]))
            if (kernel, config["BLOCK"]) == ("b", 16):
                raise RuntimeError("out of shared memory")

    speed = {"a": {64: 1.0, 32: 0.99, 16: 1.1}, "b": {64: 1.0, 32: 0.5}, "c": {64: 1.0, 32: 0.9, 16: 0.8}}

    def measure(calls):
        found = {}
        for name, run in calls.items():
            used.clear()
            run()
            found[name] = sum(speed.get(kernel, {}).get(block, 1.0) for kernel, block in used)
        return found

    assert tune.tune_call(call, measure, {"known float32 8": OFFERED[0]}) == {
        "a float32 8": {"BLOCK": 64},
        "b float32 8": {"BLOCK": 32},
        "c float32 8": {"BLOCK": 16},
    }
    tune.write({"sm_90": {"a float32 8": {"BLOCK": 16}}})
    tuning.forget()
    assert tuning.choose("a", x, (8,), lambda: OFFERED) == {"BLOCK": 16}
    assert "b float32 8: {'BLOCK': 16} fails" in capsys.readouterr().out
