"""Fused networks of hosts for torch.export and ONNX: plain ATen, with the batch left open."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from mvit3_kernels import fuse
from tests.golden import fill
from tests.models.test_export import onnx

from . import transformers_models
from .transformers_models import images


def network(name: str) -> nn.Module:
    if name in transformers_models.KINDS:
        return transformers_models.network(name)
    return fill(timm.create_model(name, num_classes=5)).eval()


@pytest.mark.parametrize(
    ("name", "mode", "in_onnx"),
    [
        ("v1 classes", "training", False),
        ("v2 masks", "inference", True),
        ("mobilevit_xxs", "inference", True),
        ("mobilevitv2_050", "training", False),
    ],
)
def test_open_batch(name, mode, in_onnx):
    """A program made at batch 2 serves batches of 1 and 5, with the host's results."""
    host = network(name)
    fused = fuse(copy.deepcopy(host), mode)
    program = torch.export.export(fused, (images(2, 3, 64, 64),), dynamic_shapes=({0: Dim("batch")},))
    assert not any("mvit3" in str(node.target) for node in program.graph.nodes)
    for function in (program.module(), *([onnx(program, several=True)] if in_onnx else [])):
        for batch in (1, 5):
            x = images(batch, 3, 64, 64)
            with torch.no_grad():
                want = [t for t in tree_leaves(host(x)) if t is not None]
            for found, t in zip(tree_leaves(function(x)), want, strict=True):
                torch.testing.assert_close(found, t, rtol=0, atol=1e-5 * t.abs().max().item())
