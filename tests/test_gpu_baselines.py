"""The logic of benchmarks/gpu_baselines.py and gpu_all.sh, on a CPU."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def gpu_baselines():
    spec = importlib.util.spec_from_file_location("gpu_baselines", ROOT / "benchmarks" / "gpu_baselines.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("piece", ["train", "infer"])
def test_networks(gpu_baselines, piece, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "copy"))
    flags = [
        "--device",
        "cpu",
        "--tiny",
        "--model",
        "mobilevitv3_xxs",
        "--candidates",
        "eager_channels_last",
        "ours",
        "ours_graph",
    ]
    flags += ["--host", "plain"]
    gpu_baselines.main([piece, *flags, "--out", str(tmp_path)])
    name = f"gpu_{piece}_mobilevitv3_xxs_b2.json"
    result = json.loads((tmp_path / name).read_text())
    assert result == json.loads((tmp_path / "copy" / name).read_text())
    final = [row for row in result["rows"] if row.get("interleaved")]
    assert [row["candidate"] for row in final] == ["eager_channels_last", "ours"]
    assert all(row["correct"] and row["images_per_s"] > 0 for row in final)


@pytest.mark.parametrize("model", ["deeplabv3_mobilevitv3_xxs", "ssdlite_mobilevitv3_xxs"])
def test_dense_networks(gpu_baselines, model, tmp_path):
    flags = ["--device", "cpu", "--tiny", "--host", "plain", "--candidates", "eager_channels_last", "ours"]
    report = gpu_baselines.main(["train", *flags, "--model", model, "--out", str(tmp_path)])
    final = [row for row in report.rows if row.get("interleaved")]
    assert [row["candidate"] for row in final] == ["eager_channels_last", "ours"]
    assert all(row["correct"] for row in final), final


def test_saved_memory(gpu_baselines, tmp_path):
    report = gpu_baselines.main(
        ["memory", "--device", "cpu", "--tiny", "--model", "mobilevitv3_xxs", "--out", str(tmp_path)]
    )
    saved = {
        name: {r["block"]: r["saved_bytes"] for r in report.rows if r["candidate"] == name}
        for name in ("ours", "eager")
    }
    assert saved["ours"].keys() == saved["eager"].keys() and len(saved["ours"]) == 12
    assert 0 < sum(saved["ours"].values()) < sum(saved["eager"].values())


def test_ops(gpu_baselines, tmp_path):
    pytest.importorskip("triton")
    report = gpu_baselines.main(["ops", "--device", "cpu", "--tiny", "--out", str(tmp_path)])
    rows = [row for row in report.rows if "op" in row and "failure" not in row]
    assert not [row for row in report.rows if "failure" in row]
    assert {row["candidate"] for row in rows} == {"eager", "compile", "ours"}
    assert {row["mode"] for row in rows} == {"step", "forward", "evaluation"}


def test_smoke(gpu_baselines, tmp_path, monkeypatch):
    """Every op and mode once; what is wrong or fails is on the last screen."""
    pytest.importorskip("triton")
    from benchmarks import gpu_smoke, gpu_summary

    flags = ["smoke", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    rows = gpu_baselines.main(flags).rows
    assert all(row["correct"] for row in rows[:-1]) and rows[-1] == {"smoke": len(rows) - 1, "bad": 0}
    assert {row["op"] for row in rows[:-1]} >= {"inverted_residual", "patch_attention", "global_representation"}
    evidence = gpu_smoke.evidence

    def broken(case, backend, dtype=None):
        found = evidence(case, backend, dtype)
        if backend != "free":
            return found
        if case.mode != "step":
            raise RuntimeError("no kernel")
        return found | {"gradient 1": 0 * found["gradient 1"]}

    monkeypatch.setattr(gpu_smoke, "evidence", broken)
    rows = gpu_baselines.main([*flags, "--ops", "norm_linear"]).rows
    assert rows[-1]["bad"] == len(rows) - 1 == 2
    _, bad = gpu_summary.summary(tmp_path)
    assert len(bad) == 2 and any("gradient 1" in line for line in bad) and any("no kernel" in line for line in bad)


def test_profile(gpu_baselines, tmp_path, monkeypatch):
    from benchmarks import gpu_smoke

    monkeypatch.delitem(gpu_smoke._STEPS, "compile")  # half a minute
    flags = ["profile", "--device", "cpu", "--tiny", "--model", "mobilevitv3_xxs", "--out", str(tmp_path)]
    rows = gpu_baselines.main(flags).rows
    assert [(row["candidate"], row["mode"]) for row in rows] == [
        (name, mode) for name in ("eager", "ours", "ours_triton") for mode in ("training", "inference")
    ]
    assert all(row["kernels"] > 50 for row in rows)
    assert "convolution" in (tmp_path / "gpu_profile_eager_training.txt").read_text()


def test_shell(tmp_path):
    folder = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": folder + os.pathsep + os.environ["PATH"],
        "ARGUMENTS": f"--device cpu --tiny --out {tmp_path}",
    }
    script = str(ROOT / "benchmarks" / "gpu_all.sh")
    done = subprocess.run([script, "ceilings"], check=True, env=environment, capture_output=True, text=True)
    assert (tmp_path / "gpu_ceilings.json").exists()
    with tarfile.open(tmp_path / "gpu_results.tar.gz") as archive:
        assert archive.getnames() == ["gpu_ceilings.json"]
    assert done.stdout.splitlines()[-1] == "nothing failed"
    assert subprocess.run([script, "nothing"], env=environment, capture_output=True).returncode == 2
