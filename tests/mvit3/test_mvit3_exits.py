"""Every end of a run is an end: the process is gone, its status says so, and the last checkpoint is whole."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mvit3 import checkpoint, commands
from mvit3.cli import main
from mvit3.distributed import World
from mvit3.lock import alone
from mvit3.options import UsageError

from .conftest import process, small_arguments
from .test_mvit3_resume import images
from .test_mvit3_survival import wait_for


def test_fifty_exits(tmp_path):
    """An exception in loading, forward, backward, update, evaluation, checkpoint, report: with loading processes."""
    script = Path(__file__).with_name("exits.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True, timeout=600, check=True
    )
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(ends) >= 50
    for end in ends:
        assert end["code"] > 0, end  # negative where it had to be killed
        assert (
            (end["step"] >= 0 and "failing now" in end["said"])
            or "data" in end["point"]
            or "validation" in end["point"]
        ), end
        if "memory" in end["point"]:
            assert "mvit3 train: error: out of memory: " in end["said"] and "data.batch_size" in end["said"], end
            assert "Traceback" not in end["said"].partition("error: out of memory")[0], end
    assert {end["code"] for end in ends} == {1, 3, 130}
    assert all(not list((tmp_path / end["point"]).glob(".*")) for end in ends)


def start_long(folder, *more, **kwargs):
    """A run that has written a checkpoint and has many steps before it."""
    running = process(*small_arguments(folder, "--schedule.epochs=500", "--run.save_steps=1", *more), **kwargs)
    wait_for(folder / "last.pt", running)
    return running


def test_second_run_in_a_folder(tmp_path):
    """It is refused, says who is there, and leaves the first one's files alone; SIGHUP and Ctrl-C save and end the
    first."""
    running = start_long(tmp_path / "run")
    (tmp_path / "run" / ".last.pt.1.tmp").touch()
    with pytest.raises(SystemExit) as stop:
        main(small_arguments(tmp_path / "run", "--quiet"))
    assert stop.value.code == 2
    assert (tmp_path / "run" / ".lock").exists()
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=120)
    assert (
        running.returncode == 130 and "stopping after this step" in err and "the same command goes on from here" in out
    ), err
    assert checkpoint.load(tmp_path / "run" / "last.pt")["progress"]["step"] >= 1
    assert not (tmp_path / "run" / ".lock").exists()


def test_who_holds_a_folder(tmp_path):
    code = (
        "import sys, pathlib, torch; from mvit3.lock import alone; from mvit3.distributed import World\n"
        "with alone(pathlib.Path(sys.argv[1]), World(torch.device('cpu'))): print('in', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "in\n"
    with (
        pytest.raises(
            UsageError, match=f"run.output .* is in use by process {other.pid} on .*; take another run.output"
        ),
        alone(tmp_path, World("cpu")),
    ):
        pass
    other.kill()  # leaves its file, which keeps nobody out
    other.wait()
    with alone(tmp_path, World("cpu")):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_hang_up_and_lost_streams(tmp_path):
    """SIGHUP is as SIGTERM; a terminal that is gone is as SIGHUP; nobody sees a traceback."""

    def default():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup

    for how in ("SIGHUP", "stderr"):
        folder = tmp_path / how
        running = subprocess.Popen(
            [sys.executable, "-m", "mvit3", *small_arguments(folder, "--schedule.epochs=500", "--run.save_steps=1")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=default,
        )  # fmt: skip
        wait_for(folder / "last.pt", running)
        if how == "SIGHUP":
            running.send_signal(signal.SIGHUP)
            out, err = running.communicate(timeout=120)
            assert running.returncode == 0 and "Traceback" not in err
        else:
            running.stderr.close()
            out = running.stdout.read()
            assert running.wait(120) == 141
        assert "stopped before the end; the same command goes on from here" in out
        assert checkpoint.latest(folder, print)["progress"]["step"] >= 1


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "--print_config"]])
def test_head(arguments):
    """`mvit3 ... | head -1` says nothing more."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "mvit3", *arguments], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_closed_streams():
    """No file takes the place of a stream that is closed from the beginning."""
    command = f"{sys.executable} -m mvit3 train --print_config 2>&- >&-"
    assert subprocess.run(["sh", "-c", command], timeout=120).returncode == 0


def test_torchrun_sees_a_failure(tmp_path):
    """One process runs out of memory in its third step: the other one ends too, each with a line, and torchrun names
    the first."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from mvit3 import cli, loss\n"
        "if os.environ['RANK'] == '1':\n"
        "    original, calls = loss.Criterion.mix, []\n"
        "    def full(*batch):\n"
        "        calls.append(1)\n"
        "        if len(calls) == 3:\n"
        "            raise MemoryError\n"
        "        return original(*batch)\n"
        "    loss.Criterion.mix = full\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    data = (
        images(tmp_path / "images"),
        "--data.source=folder",
        "--data.limit_train=0",
        "--data.limit_val=0",
        "--data.batch_size=2",
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script))
    running = process(
        *small_arguments(tmp_path / "run", *data, "--run.save_steps=1", "--run.threads=1", "--quiet"), launcher=launcher
    )
    _, err = running.communicate(timeout=300)
    assert running.returncode == 1 and "mvit3 train: error: out of memory: no more memory is to be had" in err
    assert "rank      : 1 (local_rank: 1)" in err.partition("Root Cause")[2] and "trainer.py" not in err
    assert checkpoint.latest(tmp_path / "run", print)["progress"]["step"] == 2


def test_out_of_memory(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(commands, "start", full)
    assert main(small_arguments(tmp_path / "run", "--quiet")) == 1
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "out of memory: CUDA out of memory. Tried to allocate 20.00 MiB; a smaller data.batch_size" in said
    )
    assert not (tmp_path / "run").exists()  # nothing was in it

    monkeypatch.setattr(commands, "start", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a fault of the program is told as one
        main(small_arguments(tmp_path / "run", "--quiet"))
