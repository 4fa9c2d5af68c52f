"""Training on a GPU: precisions, torch.compile and CUDA graphs, on a few digits."""

import json

import pytest
import torch

from mvit3 import checkpoint
from mvit3.cli import main

from ..mvit3.conftest import small_arguments


def run(folder, capsys, *options):
    """The result of a small run on the GPU."""
    assert (
        main(small_arguments(folder, "--run.device=cuda", "--run.deterministic=false", "--json", "--quiet", *options))
        == 0
    )
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("options", [
    ("--run.amp=none",),
    ("--run.amp=bf16",),
    ("--run.amp=fp16", "--optimizer.clip_grad=1.0"),
    ("--run.amp=bf16", "--run.cuda_graph=true"),
    ("--run.amp=fp16", "--run.cuda_graph=true", "--optimizer.clip_grad=1.0"),
    ("--run.amp=bf16", "--run.accumulate=2", "--loss.mixup_alpha=0.2"),
], ids=" ".join)  # fmt: skip
def test_precisions_and_graphs(tmp_path, capsys, options):
    result = run(tmp_path, capsys, *options)
    last = result["history"][-1]
    assert result["finished"] and 1 < last["train_loss"] < 4 and last["total"] == 40
    assert main(["evaluate", "--checkpoint", str(tmp_path / "last.pt"), "--run.device=cuda", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == result["accuracy"]
    content = checkpoint.load(tmp_path / "last.pt")
    assert all(t.isfinite().all() for t in content["state_dict"].values())


def test_resumed_run_ends_as_an_uninterrupted_one(tmp_path, capsys):
    options = ("--run.deterministic=true", "--run.ops=reference")
    run(tmp_path / "broken", capsys, *options, "--run.max_steps=3")
    broken, whole = run(tmp_path / "broken", capsys, *options), run(tmp_path / "whole", capsys, *options)
    assert broken["history"][-1]["train_loss"] == pytest.approx(whole["history"][-1]["train_loss"], rel=1e-6)
    weights = [checkpoint.load(tmp_path / name / "last.pt")["state_dict"] for name in ("broken", "whole")]
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


def test_fused_agrees_with_reference(tmp_path, capsys):
    first = {
        ops: run(tmp_path / ops, capsys, f"--run.ops={ops}", "--schedule.epochs=1")["history"][0]
        for ops in ("reference", "fused")
    }
    assert first["fused"]["train_loss"] == pytest.approx(first["reference"]["train_loss"], rel=1e-2)
