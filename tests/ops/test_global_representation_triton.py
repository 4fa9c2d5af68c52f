import importlib
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mvit3_kernels.ops import global_representation
from mvit3_kernels.ops.registry import FORMS

from ..triton_tools import SHARED_MEMORY_LIMITS, offline, resources
from . import test_global_representation as contract
from .inputs import Draw, mapped
from .test_running_stats import Counted
from .triton_kernel import BF16, F16, F32, Case, TritonKernel, needs_triton


def arguments(draw, batch, height, width, channels, hidden, **options):
    return contract.TestGlobalRepresentation.arguments(draw, batch, height, width, channels, hidden, **options)


def registered(arguments):
    x, layers, norm, num_heads, patch_size, *_ = arguments.values()
    flat = [t for layer in layers for norm_or_linear in layer for t in norm_or_linear[:2]]
    final = (None, None) if norm is None else norm[:2]
    yield (
        torch.ops.mvit3.global_representation_inference.default,
        (x, flat, *final, *layers[0].norm1[2:], num_heads, *patch_size),
    )


def registered_layer(arguments):
    """The forms of a layer in training and of the final norm, forward and backward."""
    x, layers, norm, num_heads, patch_size, attention, hidden, output, seed, ffn = arguments.values()
    layer = layers[0]
    parameters = [t for norm_or_linear in layer for t in norm_or_linear[:2]]
    eps, per_sample = layer.norm1[2:]
    settings = (per_sample, num_heads, *patch_size, attention, hidden, output, output if ffn is None else ffn, seed)
    if num_heads is None:
        settings = (per_sample, *settings[2:])
        forms = [("separable_layer", (x, *parameters, eps, *settings, None), (x, *parameters), settings)]
    else:
        forms = [("layer", (x, *parameters, None, eps, *settings), (x, *parameters), (None, *settings))]
    if norm is not None and not per_sample:
        forms.append(("norm", (x, *norm[:3]), (x, *norm[:2]), ()))
    for name, inputs, given, rest in forms:
        op = getattr(torch.ops.mvit3, f"global_representation_{name}_forward")
        yield op.default, inputs
        kept_of_forward = None if name != "separable_layer" else -1  # the moments of y are for the next layer
        with FakeTensorMode(allow_non_fake_inputs=True) if x.is_meta else nullcontext():
            kept = op(*inputs)[1:kept_of_forward]
        kept = [torch.empty_like(t, device="meta") for t in kept] if x.is_meta else kept
        backward = getattr(torch.ops.mvit3, f"global_representation_{name}_backward")
        yield backward.default, (torch.ones_like(x), *given, *kept, *rest)


V1, V2 = {"num_heads": 4, "layers": 1}, {"per_sample": True, "layers": 1, "conv": True}
SAME = {"parameters": "of the dtype of x"}
OTHERS = ("aten::_to_copy", "aten::copy_", "aten::clone", "aten::add", "aten::sum")
TRAINING = {"num_heads": 4, "layers": 1}


@needs_triton
class TestGlobalRepresentationTriton(TritonKernel):
    op = staticmethod(global_representation)
    arguments = staticmethod(arguments)
    registered = staticmethod(registered)
    alone = (90,)
    # The kernels of the ops have their own tests: here with weights that are rounded beforehand, without what only a
    # backward pass reads, and the final norm.
    cases = (
        Case(90, BF16, (40, 16, 16, 192, 384), V1),
        Case(90, BF16, (40, 8, 8, 240, 480), {**V1, **SAME}),
        Case(90, F16, (2, 32, 32, 144, 288), V1),
        Case(90, BF16, (40, 8, 8, 256, 512), V2),
        Case(90, F32, (1, 8, 8, 120, 240), V2),
        Case(80, BF16, (40, 16, 16, 192, 384), V1),
        Case(86, F16, (40, 8, 8, 256, 512), V2),
        Case("gfx942", BF16, (40, 16, 16, 192, 384), V1),
        Case("gfx942", F32, (4, 8, 8, 192, 384), V1),
    )
    larger = (50, 14, 14, 192, 384)

    def make(self, case, device):
        options = dict(case.options)
        same = options.pop("parameters", None)
        made = super().make(case._replace(options=options), device)
        return mapped(made, lambda _, t: t.to(case.dtype)) if same else made

    def test_weights_are_rounded_once(self):
        """For all layers, and nothing else is launched but kernels."""
        case = self.cases[0]._replace(options={**V1, "layers": 3})
        arguments = self.make(case, "meta")
        with Counted() as counted:
            self.launched(case, arguments, compiling=False)
        assert [name for name in counted.names if name in ("aten::_foreach_copy_", *OTHERS)] == ["aten::_foreach_copy_"]

    def test_weights_of_few_rows_are_read_as_they_are(self):
        case = self.cases[3]._replace(sizes=(1, 8, 8, 256, 512))
        arguments = self.make(case, "meta")
        with Counted() as counted:
            self.launched(case, arguments, compiling=False)
        assert not {"aten::_foreach_copy_", *OTHERS}.intersection(counted.names)


SPREAD = "global_representation_spread_inference"


@needs_triton
@pytest.mark.parametrize(
    ("sizes", "dtype", "parameters", "options"),
    [
        ((1, 32, 32, 144, 288), BF16, F32, V1),
        ((1, 16, 16, 192, 384), BF16, BF16, V1),
        ((1, 16, 16, 192, 384), F16, F32, V1),
        ((1, 8, 8, 240, 480), BF16, F32, V1),
        ((1, 32, 32, 128, 256), BF16, F32, V2),
        ((1, 16, 16, 192, 384), BF16, F32, V2),
        ((1, 16, 16, 192, 384), F16, F16, V2),
        ((1, 8, 8, 256, 512), BF16, F32, V2),
        ((32, 16, 16, 192, 384), F16, F32, V2),
        ((32, 8, 8, 256, 512), BF16, F32, V2),
    ],
    ids=str,
)
def test_spread_kernels_fit(sizes, dtype, parameters, options, tmp_path, monkeypatch):
    """No kernel spills, and each fits sm_90, the one that they are for."""
    launchers = importlib.import_module("mvit3_kernels.ops.global_representation.triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launchers, "multiprocessors", lambda x: 132)
    made = mapped(
        arguments(Draw(), *sizes, **options | {"layers": 2}),
        lambda name, t: t.to("meta", dtype if name == "x" else parameters),
    )
    [(_, inputs)] = registered(made)
    with offline(90, True) as kernels, Counted() as counted:
        getattr(launchers, SPREAD)(FORMS[SPREAD].call(*inputs))
    assert len(kernels.grids) == (6 if options is V2 else 4)
    assert not {"aten::_foreach_copy_", *OTHERS}.intersection(counted.names)  # the first launch rounds weights
    for kernel in kernels:
        used = resources(kernel)
        assert used.stack == 0, f"{kernel.metadata.name} spills: {used}"
        assert used.shared <= SHARED_MEMORY_LIMITS[90] and used.load_bits == 128, f"{kernel.metadata.name}: {used}"


@needs_triton
class TestLayerTriton(TritonKernel):
    """The kernels of a layer in training, which read weights in the dtype of x."""

    op = staticmethod(global_representation)
    arguments = staticmethod(arguments)
    registered = staticmethod(registered_layer)
    alone = (90,)
    cases = (
        Case(90, BF16, (25, 32, 32, 144, 288), TRAINING),
        Case(90, BF16, (100, 16, 16, 192, 384), TRAINING),
        Case(80, BF16, (4, 8, 8, 240, 480), TRAINING),
        Case(86, F16, (4, 8, 8, 240, 480), TRAINING | {"dropouts": (0.0, 0.0, 0.1)}),
    )
    # in the tests of the ops of a layer, but for the interpreter, which the first class runs
    test_interpreter = test_compiles_without_a_graph_break = test_one_binary_for_every_map_size = None

    def test_weights_are_rounded_once(self):
        """For both passes, and nothing else is launched but kernels."""
        arguments = self.make(self.cases[0], "meta")
        with Counted() as counted:
            kernels = self.launched(self.cases[0], arguments, compiling=False)
        launched = [name for name in counted.names if name in ("aten::_foreach_copy_", "aten::mm", *OTHERS)]
        assert launched == ["aten::_foreach_copy_"]
        assert len(kernels.grids) == 4 + 8  # with the final norm


SEPARABLE = {"per_sample": True, "layers": 1, "conv": True}


@needs_triton
class TestSeparableLayerTriton(TritonKernel):
    """The kernels of a layer of separable attention in training."""

    op = staticmethod(global_representation)
    arguments = staticmethod(arguments)
    registered = staticmethod(registered_layer)
    cases = (
        Case(90, BF16, (4, 32, 32, 128, 256), SEPARABLE),
        Case(90, BF16, (4, 16, 16, 192, 384), SEPARABLE),
        Case(90, F16, (4, 8, 8, 256, 512), SEPARABLE),
        Case(90, BF16, (4, 8, 8, 128, 256), SEPARABLE | {"dropouts": (0.1, 0.1, 0.1)}),
        Case(90, BF16, (4, 16, 16, 192, 384), {"layers": 1, "dropouts": (0.1, 0.0, 0.1), "bias": False}),
        Case(80, BF16, (4, 8, 8, 192, 384), SEPARABLE),
    )
    larger = (3, 18, 22, 128, 256)
    alone = (90,)
    # in the tests of the ops of a layer, but for the interpreter, which the first class runs
    test_interpreter = test_compiles_without_a_graph_break = None

    def test_nothing_else_is_launched(self):
        """No copies of weights, no additions of residuals, no measuring of what a launch before wrote."""
        arguments = self.make(self.cases[0], "meta")
        with Counted() as counted:
            kernels = self.launched(self.cases[0], arguments, compiling=False)
        assert not [name for name in counted.names if name in ("aten::_foreach_copy_", "aten::mm", *OTHERS)]
        assert len(kernels.grids) == 6 + 11
