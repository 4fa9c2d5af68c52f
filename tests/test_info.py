import json
import subprocess
import sys

import torch

from mvit3_kernels import __version__, _native, info
from mvit3_kernels.ops.dispatch import BACKENDS, backend


def test_collect():
    found = info.collect()
    assert found["versions"]["mvit3_kernels"] == __version__ and found["versions"]["torch"] == torch.__version__
    assert tuple(found["backends"]) == BACKENDS
    for name, state in found["backends"].items():
        assert state["available"] == (state["reason"] is None), name
    assert found["backends"]["reference"]["available"]
    assert found["backends"]["cpu"]["reason"] == _native.why_not()
    assert found["backends"]["cpu"]["threads"] == torch.get_num_threads()


def test_report_names_every_backend_and_reason():
    text = info.report()
    for name, state in info.collect()["backends"].items():
        assert name in text and (state["reason"] or "yes") in text


def test_report_where_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(_native, "_reason", "the extension was not built: no compiler")
    monkeypatch.setattr(_native, "_isa", None)
    assert "no: the extension was not built: no compiler" in info.report()


def test_forced_backend_is_shown():
    with backend("reference"):
        assert info.collect()["forced_backend"] == {"name": "reference"}
        assert "forced       reference" in info.report()


def test_command():
    text, as_json = (
        subprocess.run(
            [sys.executable, "-m", "mvit3_kernels.info", *options], capture_output=True, text=True, check=True
        )
        for options in ((), ("--json",))
    )
    assert "Backends" in text.stdout and text.stderr == ""
    assert tuple(json.loads(as_json.stdout)["backends"]) == BACKENDS
