"""Exported networks: torch.export in its default mode, ONNX and torch.jit.trace, with sizes that stay open."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

import mvit3_kernels
from mvit3_kernels import create_model, fuse
from mvit3_kernels import nn as blocks
from tests.golden import fill
from tests.networks import DISTINCT

BATCH = {0: Dim("batch")}
OPEN = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}


def network(name: str) -> nn.Module:
    """A network in evaluation whose norms have statistics of their own."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def onnx(program: ExportedProgram, several: bool = False):
    """An exported program as a function of a tensor that ONNX Runtime computes, with one result or `several`."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False).model_proto
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    [entry] = session.get_inputs()

    def run(x: Tensor) -> Tensor | list[Tensor]:
        found = [torch.from_numpy(y) for y in session.run(None, {entry.name: x.numpy()})]
        return found if several else found[0]

    return run


@torch.no_grad()
def assert_same(function, model: nn.Module, *shapes: tuple[int, ...]) -> None:
    for shape in shapes:
        with mvit3_kernels.backend("reference"):
            want = model(images(*shape))
        torch.testing.assert_close(function(images(*shape)), want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("name", DISTINCT)
def test_open_batch(name):
    """One program for every batch, run by PyTorch and by ONNX Runtime, for each sequence of operators that there is; a
    fused network exports as the plain one."""
    model = network(name)
    served = fuse(network(name)) if name.endswith(("xxs", "050")) else model
    program = torch.export.export(served, (images(2, 3, 64, 64),), dynamic_shapes=(BATCH,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called and not any("mvit3" in target for target in called)
    for function in (program.module(), onnx(program)):
        assert_same(function, model, (1, 3, 64, 64), (5, 3, 64, 64))


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv3_xxs", "mobilevitv3_050"])
def test_open_height_and_width(name):
    """Any size above 64 pixels, also those whose maps the patches do not divide and which are resized."""
    model = network(name)
    program = torch.export.export(model, (images(2, 3, 128, 160),), dynamic_shapes=(OPEN,))
    shapes = ((3, 3, 96, 224), (2, 3, 131, 97), (2, 3, 65, 65))
    assert_same(program.module(), model, *shapes)
    if name == "mobilevit_xxs":
        assert_same(onnx(program), model, *shapes)


def test_open_height_and_width_in_steps():
    """Named sizes must be multiples of what the network divides them by; a size that is none is refused, not
    rounded."""
    model = network("mobilevitv3_xxs")
    shapes = {**BATCH, 2: 32 * Dim("height", min=3), 3: 32 * Dim("width", min=3)}
    program = torch.export.export(model, (images(2, 3, 128, 160),), dynamic_shapes=(shapes,)).module()
    assert_same(program, model, (1, 3, 96, 224), (3, 3, 320, 96), (1, 3, 160, 160))
    for size in ((131, 97), (64, 128)):
        with pytest.raises((AssertionError, RuntimeError)):
            program(images(2, 3, *size))


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv3_050"])
def test_trace(name):
    model = network(name)
    with torch.no_grad():
        traced = torch.jit.trace(model, images(2, 3, 64, 64))
    assert_same(traced, model, (1, 3, 64, 64), (5, 3, 64, 64))


BLOCKS = {
    "ConvNormAct": lambda: blocks.ConvNormAct(8, 8, 3),
    "ConvNormAct 1x1": lambda: blocks.ConvNormAct(8, 12),
    "InvertedResidual": lambda: blocks.InvertedResidual(8, 8, 16),
    "InvertedResidual stride 2": lambda: blocks.InvertedResidual(8, 12, 16, stride=2),
    "TransformerLayer": lambda: blocks.TransformerLayer(8, 16, num_heads=2),
    "SeparableLayer": lambda: blocks.SeparableLayer(8, 16),
    "MobileViTBlock": lambda: blocks.MobileViTBlock(8, 8, 16, 1, num_heads=2),
    "MobileViTV2Block": lambda: blocks.MobileViTV2Block(8, 8, 16, 1),
    "MobileViTV3Block": lambda: blocks.MobileViTV3Block(8, 8, 16, 1, num_heads=2),
    "MobileViTV3SeparableBlock": lambda: blocks.MobileViTV3SeparableBlock(8, 8, 16, 1),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BLOCKS)
def test_open_batch_of_a_block(name, training):
    torch.manual_seed(0)
    block = BLOCKS[name]().train(training)
    program = torch.export.export(block, (images(2, 8, 12, 10),), dynamic_shapes=(BATCH,))
    assert_same(program.module(), block, (3, 8, 12, 10), (1, 8, 12, 10))


def test_open_batch_is_compiled_once():
    """torch.compile with open sizes takes one program for every batch of a network."""
    torch._dynamo.reset()
    model = network("mobilevitv3_xxs")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        compiled(images(2, 3, 64, 64))
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_same(compiled, model, (3, 3, 64, 64), (5, 3, 64, 64))


@pytest.mark.parametrize("name", ["deeplabv3_mobilevitv3_xxs", "pspnet_mobilevitv3_050", "ssdlite_mobilevitv3_xxs"])
def test_open_batch_of_dense_prediction(name):
    """Pyramids, up-sampling and six maps' heads leave the batch open."""
    model = fill(create_model(name, num_classes=3)).eval()
    program = torch.export.export(model, (images(2, 3, 96, 64),), dynamic_shapes=(BATCH,))
    assert not any("mvit3" in str(node.target) for node in program.graph.nodes)
    served = [program.module()]
    if name.startswith("ssdlite"):
        served.append(onnx(program, several=True))
    for batch in (1, 5):
        x = images(batch, 3, 96, 64)
        with torch.no_grad(), mvit3_kernels.backend("reference"):
            want = model(x)
        for function in served:
            for a, b in zip(tree_leaves(function(x)), tree_leaves(want), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())
