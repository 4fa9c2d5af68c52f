"""Plugin of pytest under which timm's and transformers' own tests get fused networks, or timm's, without --fuse, those
of this library. In the folder of a source package or clone of either, with this repository in PYTHONPATH:

    python -m pytest -p benchmarks.host_suites --fuse inference tests/test_models.py -k "mobilevit and not pretrained"
    python -m pytest -p benchmarks.host_suites tests/test_models.py -k "mvit3 and not pretrained"
    python -m pytest -p benchmarks.host_suites --fuse training tests/models/mobilevit tests/models/mobilevitv2

All pass that pass without the plugin. Of this library's networks those of TorchScript fail, with what takes its place.
Tests with `pretrained` in their names need the Hugging Face Hub.
"""

from __future__ import annotations

import functools
import importlib

import pytest
import timm
import transformers
from torch import nn

import mvit3_kernels
from mvit3_kernels.fuse import MODES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuse", choices=MODES, help="fuse every MobileViT and MobileViTv2 that the tests make")


def pytest_configure(config: pytest.Config) -> None:
    mode = config.getoption("--fuse")
    if mode is None:
        importlib.import_module("mvit3_kernels.timm")  # registers them
        timm.list_models = _with_ours(timm.list_models)
        return
    timm.create_model = _fused(timm.create_model, mode)
    for family in ("MobileViT", "MobileViTV2"):
        for head in ("Model", "ForImageClassification", "ForSemanticSegmentation"):
            _fuse_new(getattr(transformers, family + head), mode)


def _with_ours(list_models):
    """timm's tests of intermediate maps name the modules of timm that have them; that of ours too."""

    def listed(*arguments, module="", **options):
        return list_models(*arguments, module=[*module, "timm"] if isinstance(module, list) else module, **options)

    return listed


def _fused(create_model, mode: str):
    def create(name: str, *arguments, **options) -> nn.Module:
        model = create_model(name, *arguments, **options)
        return mvit3_kernels.fuse(model, mode) if "mobilevit" in name else model

    return create


def _fuse_new(kind: type[nn.Module], mode: str) -> None:
    made = kind.__init__

    @functools.wraps(made)
    def make(self, *arguments, **options) -> None:
        made(self, *arguments, **options)
        if type(self) is kind:
            mvit3_kernels.fuse(self, mode)

    kind.__init__ = make
