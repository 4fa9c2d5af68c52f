"""Checkpoints are written whole or not at all, and a damaged one is a clear error."""

import errno
import resource
import shutil
import subprocess

import pytest
import torch

from mvit3 import checkpoint
from mvit3.cli import main

from .conftest import small_arguments, small_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of two steps and no epoch."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(small_arguments(folder, "--run.max_steps=2", "--quiet")) == 0
    return folder


@pytest.fixture
def saved(trained, tmp_path):
    return shutil.copyfile(trained / "last.pt", tmp_path / "last.pt")


@pytest.fixture
def content(trained):
    return checkpoint.load(trained / "last.pt")


def evaluate_error(path, capsys, *more):
    """What `mvit3 evaluate` says about a bad checkpoint."""
    assert main(["evaluate", "--checkpoint", str(path), "--quiet", *more]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") >= 1 and "Traceback" not in captured.err
    return captured.err


def test_round_trip(tmp_path, content):
    checkpoint.save(tmp_path, content, ("best.pt",))
    loaded = checkpoint.load(tmp_path / "last.pt")
    assert loaded.keys() == content.keys()
    assert all(torch.equal(t, loaded["state_dict"][name]) for name, t in content["state_dict"].items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "last.pt"]
    checkpoint.save(tmp_path, {**content, "num_classes": 11})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "last.pt", "previous.pt"]
    kept = {name: checkpoint.load(tmp_path / f"{name}.pt")["num_classes"] for name in ("best", "last", "previous")}
    assert kept == {"best": 10, "last": 11, "previous": 10}


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_interrupted_write_keeps_the_old_file(saved, content, monkeypatch, failure):
    before = saved.read_bytes()

    def half(content, file):
        file.write(before[: len(before) // 2])
        raise failure

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(type(failure)):
        checkpoint.save(saved.parent, content)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["last.pt"]


def test_file_is_on_disk_before_it_gets_its_name(saved, content, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(checkpoint.os, name)
        monkeypatch.setattr(
            checkpoint.os, name, lambda *args, name=name, original=original: (calls.append(name), original(*args))
        )
    checkpoint.save(saved.parent, content, ("best.pt",))
    assert calls == ["fsync", "replace", "replace", "replace", "fsync"]


def test_full_disk(tmp_path, content, capsys):
    """The run ends with a message, and what it had is kept."""
    folder = tmp_path / "runs"
    folder.mkdir()
    size = 20 * 2**20  # a checkpoint has 12 MB
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
    ).returncode
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        checkpoint.save(folder, content)
        before = (folder / "last.pt").read_bytes()
        if not mounted:  # without root, files that may not grow stand in for a disk that is full
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        status = main(small_arguments(folder, "--quiet"))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        message = capsys.readouterr().err
        assert status == 1 and message.count("\n") == 1
        assert ("No space left" if mounted else "File too large") in message
        assert f"the last good one is kept: {folder / 'last.pt'}" in message
        assert (folder / "last.pt").read_bytes() == before
        assert not list(folder.glob(".*"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_missing(tmp_path, capsys):
    assert "there is no such file" in evaluate_error(tmp_path / "nothing.pt", capsys)
    assert "is a folder" in evaluate_error(tmp_path, capsys)


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
    ({"config": {}}, "state_dict, ema_state_dict, num_classes, class_names, progress missing or of another type"),
    (Code(), "no checkpoint"),
])  # fmt: skip
def test_foreign_file(tmp_path, capsys, foreign, message):
    path = tmp_path / "foreign.pt"
    if isinstance(foreign, bytes):
        path.write_bytes(foreign)
    else:
        torch.save(foreign, path)
    said = evaluate_error(path, capsys)
    assert message in said and "needs --config with its recipe" in said


def test_content_that_does_not_fit(saved, content, capsys):
    other = {
        **content,
        "config": {**content["config"], "model": {**content["config"]["model"], "name": "mobilevitv3_xs"}},
    }
    checkpoint.save(saved.parent, other)
    assert "does not fit mobilevitv3_xs" in evaluate_error(saved, capsys)
    checkpoint.save(saved.parent, {**content, "class_names": [str(i) for i in range(10)], "num_classes": 9})
    assert "does not fit mobilevitv3_xxs" in evaluate_error(saved, capsys)


def test_previous_checkpoint_is_used(trained, tmp_path, capsys):
    """A truncated last.pt: the one before it is used, and that is said; without one, the run does not start anew by
    itself."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    last = tmp_path / "last.pt"
    shutil.copyfile(last, tmp_path / "previous.pt")
    last.write_bytes(last.read_bytes()[:1000])
    assert main(small_arguments(tmp_path, "--run.max_steps=3")) == 0
    said = capsys.readouterr().err
    assert (
        "last.pt is truncated" in said and "going on with" in said and "previous.pt" in said and "step 2 of 8" in said
    )
    assert checkpoint.load(last)["progress"]["step"] == 3

    last.write_bytes(b"")
    (tmp_path / "previous.pt").unlink()
    assert main(small_arguments(tmp_path, "--quiet")) == 1
    assert "no whole checkpoint is left; --run.resume never starts anew" in capsys.readouterr().err


def test_other_options_are_refused(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    with pytest.raises(SystemExit) as stop:
        main(small_arguments(tmp_path, "--quiet", "--optimizer.lr=0.5", "--data.batch_size=8"))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "optimizer.lr was 0.003, is 0.5" in said and "images per batch over all processes were 16, are 8" in said
    # Named, it is taken with the new options.
    assert (
        main(
            small_arguments(
                tmp_path / "new",
                "--quiet",
                "--optimizer.lr=0.5",
                "--run.max_steps=3",
                f"--run.resume={tmp_path / 'last.pt'}",
            )
        )
        == 0
    )
    assert checkpoint.load(tmp_path / "new" / "last.pt")["progress"]["step"] == 3


def test_small_config_is_the_command_line(trained):
    """Both spellings that the tests use are one configuration, and a checkpoint holds it."""
    then = checkpoint.load(trained / "last.pt")["config"]
    now = small_config().to_dict()
    assert {k: v for k, v in then.items() if k != "run"} == {k: v for k, v in now.items() if k != "run"}
