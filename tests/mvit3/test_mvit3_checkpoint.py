"""Checkpoints are written whole or not at all, and a damaged one is a clear error."""

import errno

import pytest
import torch

import mvit3_kernels
from mvit3 import checkpoint
from mvit3.cli import main


@pytest.fixture
def content():
    model = mvit3_kernels.create_model("mobilevitv3_xxs", 10)
    return {"state_dict": model.state_dict(), "model": "mobilevitv3_xxs", "num_classes": 10,
            "config": {"ops": "fused"}, "epoch": 1, "accuracy": 0.5}  # fmt: skip


@pytest.fixture
def saved(tmp_path, content):
    path = tmp_path / "fused.pt"
    checkpoint.save(path, content)
    return path


def evaluate_error(path, capsys):
    """What `mvit3 evaluate` says about a bad checkpoint."""
    assert main(["evaluate", "--checkpoint", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") >= 1 and "Traceback" not in captured.err
    return captured.err


def test_round_trip(saved, content):
    loaded = checkpoint.load(saved)
    assert loaded.keys() == content.keys()
    assert all(torch.equal(t, loaded["state_dict"][name]) for name, t in content["state_dict"].items())
    assert [p.name for p in saved.parent.iterdir()] == ["fused.pt"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_interrupted_write_keeps_the_old_file(saved, content, monkeypatch, failure):
    before = saved.read_bytes()

    def half(content, file):
        file.write(before[: len(before) // 2])
        raise failure

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(type(failure)):
        checkpoint.save(saved, content)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["fused.pt"]


def test_file_is_on_disk_before_it_gets_its_name(saved, content, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(checkpoint.os, name)
        monkeypatch.setattr(checkpoint.os, name, lambda *args, name=name, original=original: (calls.append(name), original(*args)))
    checkpoint.save(saved, content)
    assert calls == ["fsync", "replace", "fsync"]


def test_missing(tmp_path, capsys):
    assert "there is no such file" in evaluate_error(tmp_path / "nothing.pt", capsys)
    assert "there is no such file" in evaluate_error(tmp_path, capsys)


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.999])
def test_truncated(saved, capsys, keep):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    assert "is truncated, or no checkpoint" in evaluate_error(saved, capsys)


def test_flipped_bit(saved, capsys):
    """One wrong bit among the weights loads without an error in plain torch.load."""
    damaged = bytearray(saved.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    saved.write_bytes(damaged)
    assert "is damaged: the checksum of" in evaluate_error(saved, capsys)


class Code:
    """Unpickled without care, this would run a command."""

    def __reduce__(self):
        return print, ("code from the file ran",)


@pytest.mark.parametrize(("foreign", "message"), [
    (b"a text file", "no checkpoint"),
    ([1, 2], "is no checkpoint of mvit3 train"),
    ({"epoch": 1}, "state_dict, model, num_classes, config, accuracy missing or of another type"),
    (Code(), "no checkpoint"),
])  # fmt: skip
def test_foreign_file(tmp_path, capsys, foreign, message):
    path = tmp_path / "foreign.pt"
    if isinstance(foreign, bytes):
        path.write_bytes(foreign)
    else:
        torch.save(foreign, path)
    assert message in evaluate_error(path, capsys)


@pytest.mark.parametrize(("change", "message"), [
    ({"model": "mobilevitv3_xs"}, "does not fit"),
    ({"model": "mobilevitv9"}, "does not fit"),
    ({"num_classes": 9}, "has 9 classes, the data set digits has 10"),
    ({"accuracy": None}, "accuracy missing or of another type"),
])  # fmt: skip
def test_content_that_does_not_fit(saved, content, capsys, change, message):
    checkpoint.save(saved, content | change)
    assert message in evaluate_error(saved, capsys)
