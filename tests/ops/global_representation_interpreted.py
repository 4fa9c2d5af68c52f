# ruff: noqa: RUF012 -- class attributes are the tables of the tests
"""global_representation's Triton kernels on CPU tensors, step by step; run by test_global_representation_triton.py."""

import importlib
from contextlib import nullcontext
from unittest import mock

import pytest
import torch

import mvit3_kernels
from mvit3_kernels import backend, ops
from mvit3_kernels.ops import Linear, triton_rows
from tests.bounds import assert_bound, half_a_rounding
from tests.ops.batch_norm_act_cases import poison
from tests.ops.inputs import Draw, mapped
from tests.ops.kernel import in_float32
from tests.ops.test_global_representation_triton import arguments, registered, registered_layer
from tests.ops.triton_kernel import BF16, TritonResults
from tests.triton_tools import compute_like_a_gpu

poison()
compute_like_a_gpu()
OP = importlib.import_module("mvit3_kernels.ops.global_representation")


class TestGlobalRepresentation(TritonResults):
    op = staticmethod(ops.global_representation)
    shapes = ((2, 4, 4, 12, 10), (1, 8, 8, 20, 18))
    options = {
        "heads": {"num_heads": 4},
        "heads-per-sample": {"num_heads": 1, "per_sample": True, "layers": 1, "patch_size": (1, 1), "bias": False},
        "separable": {"per_sample": True, "conv": True, "layers": 1},
        "separable-per-token": {"layers": 1, "patch_size": (2, 1), "bias": False, "final": False},
    }
    one_pixel = {"patch_size": (1, 1)}
    arguments = staticmethod(arguments)
    registered = staticmethod(registered)
    test_second_derivative_is_refused = None  # there are no gradients

    def results(self, backend, arguments, dtype=torch.float32, parameters=None):
        """y, of a call without gradients, which the op of a whole stage must run where the backend is Triton."""

        def leaf(name, t):
            return t.detach().to(dtype if name in self.maps else parameters or dtype)

        stage = nullcontext() if backend == "reference" else mock.patch.object(OP, "KERNELS", (OP.STAGE,))
        with mvit3_kernels.backend(backend), torch.no_grad(), stage:
            return {"y": self.op(**mapped(arguments, leaf))}

    def test_compiles_whole(self, option):
        with torch.no_grad():
            super().test_compiles_whole(option)

    def test_samples_of_several_tiles(self):
        """Of 144 pixels, whose mean is many deviations away from 0."""
        for options in ({}, {"num_heads": 2}):
            arguments = self.arguments(Draw(), 1, 12, 12, 20, 10, **options, per_sample=True, layers=1)
            arguments["x"] += 30
            self.holds(arguments)

    def test_many_rows(self, monkeypatch):
        """Of which weights are rounded beforehand, in blocks that fill a multiprocessor."""
        monkeypatch.setattr(triton_rows, "MOST_FEW_ROWS", 0)
        monkeypatch.setattr(triton_rows, "multiprocessors", lambda x: 1)
        for options in ({"num_heads": 2}, {"per_sample": True, "conv": True}):
            self.holds(self.arguments(Draw(), 2, 4, 6, 20, 18, **options), torch.float32)

    def holds(self, arguments, parameters=None):
        arguments = mapped(arguments, lambda _, t: t.bfloat16().double())
        found, reference = (self.results(name, arguments, BF16, parameters) for name in ("triton", "reference"))
        truth = self.results("reference", arguments, torch.float64)
        assert_bound(found, reference, truth, half_a_rounding(BF16))

    def test_calls_that_run_as_ops(self):
        """On Triton too, where the op of a whole stage refuses them."""
        arguments = in_float32(self.arguments(Draw(), 1, 2, 4, 8, 8, num_heads=1))
        first, second = arguments["layers"]
        for layers, reason in (
            ([], "there is no layer"),
            ([first, second._replace(norm2=second.norm2._replace(eps=1e-3))], "norms of one kind and with one eps"),
            ([first, second._replace(norm1=second.norm1._replace(per_sample=True))], "norms of one kind"),
        ):
            given = {**arguments, "layers": layers}
            assert reason in refusal(given) and reason in refusal(in_half(given), OP.SPREAD)
            with backend("triton"), torch.no_grad():
                y = self.op(**given)
            torch.testing.assert_close(y, TritonResults.results(self, "reference", given)["y"], rtol=1e-4, atol=1e-4)

    def test_rows_that_are_too_wide(self):
        for channels, heads, reason in ((257, None, "at most 256 channels"), (129, 1, "at most 128 channels")):
            arguments = in_float32(self.arguments(Draw(), 1, 2, 2, channels, 8, num_heads=heads, layers=1))
            assert f"{reason}" in refusal(arguments)

    def test_layers_that_differ(self):
        """In their parameters, the dtypes of these and the number of hidden channels."""
        arguments = in_float32(self.arguments(Draw(), 1, 2, 2, 8, 8, num_heads=1))
        first, second = arguments["layers"]
        hidden = {"fc1": Linear(second.fc1.weight[:5], second.fc1.bias[:5])}
        hidden["fc2"] = Linear(second.fc2.weight[:, :5], None)
        given = {**arguments, "layers": [first, second._replace(**hidden)]}
        for dtype in (torch.float32, BF16):
            tolerance = 1e-4 if dtype is torch.float32 else 0.1
            found, want = (self.results(name, given, dtype)["y"] for name in ("triton", "reference"))
            torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)
        assert "as many hidden channels each" in refusal(in_half(given), OP.SPREAD)

    def test_gradients_run_as_ops(self):
        arguments = mapped(self.arguments(Draw(), 1, 2, 4, 8, 8, num_heads=2), lambda _, t: t.float().requires_grad_())
        want, found = (TritonResults.results(self, name, arguments) for name in ("reference", "triton"))
        for name, t in want.items():
            torch.testing.assert_close(found[name], t, rtol=1e-4, atol=1e-4)


class TestSpread:
    """The kernels that spread a layer over a GPU."""

    @pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
    @pytest.mark.parametrize(
        ("sizes", "options"),
        [
            ((1, 4, 4, 12, 10), {"num_heads": 2}),
            ((2, 4, 6, 20, 130), {"num_heads": 4, "bias": False, "final": False, "patch_size": (1, 2)}),
            ((1, 8, 12, 33, 18), {"num_heads": 3, "layers": 1}),
            ((1, 16, 4, 144, 70), {"num_heads": 4, "layers": 1, "patch_size": (2, 1)}),
            ((2, 2, 4, 20, 70), {"per_sample": True, "conv": True, "layers": 2}),
            (
                (1, 6, 4, 40, 130),
                {"per_sample": True, "bias": False, "final": False, "patch_size": (1, 2), "layers": 1},
            ),
            ((1, 9, 8, 33, 18), {"per_sample": True, "layers": 1, "patch_size": (1, 1)}),
        ],
        ids=str,
    )
    def test_bound(self, sizes, options, dtype, monkeypatch):
        """Groups of 4 to 72 tokens, some of several blocks; one share of the hidden channels and more; heads that are
        no power of 2."""
        monkeypatch.setattr(importlib.import_module(f"{OP.__name__}.triton"), "multiprocessors", lambda x: 16)
        given = mapped(arguments(Draw(), *sizes, **options), lambda _, t: t.to(dtype).double())
        truth = results("reference", given, torch.float64)
        for parameters in (dtype, torch.float32):
            found, reference = (results(name, given, dtype, parameters) for name in ("triton", "reference"))
            assert_bound(found, reference, truth, half_a_rounding(dtype))

    def test_weights_of_several_dtypes(self, monkeypatch):
        """Some of which are that of x already."""
        for options in ({"num_heads": 2}, {"per_sample": True}):
            given = arguments(Draw(), 1, 4, 4, 12, 10, **options, layers=1)
            given = mapped(given, lambda _, t: t.to(BF16))
            [layer] = given["layers"]
            given["layers"] = [layer._replace(fc1=Linear(layer.fc1.weight.float(), layer.fc1.bias))]
            found = []
            for kernels in ((OP.SPREAD,), (OP.STAGE,)):
                monkeypatch.setattr(triton_rows, "_few", lambda rows: False)
                with backend("triton"), torch.no_grad(), mock.patch.object(OP, "KERNELS", kernels):
                    found.append(ops.global_representation(**given))
            with backend("reference"), torch.no_grad():
                want = ops.global_representation(**mapped(given, lambda _, t: t.double()))
            for y in found:
                torch.testing.assert_close(y.double(), want, rtol=0.05, atol=0.05)

    def test_taller_blocks(self, monkeypatch):
        """Of more tokens, in separable attention: some of several blocks, each of which has all channels."""
        monkeypatch.setattr(importlib.import_module(f"{OP.__name__}.triton"), "MOST_SPREAD", 16)
        given = arguments(Draw(), 1, 10, 8, 20, 18, per_sample=True, layers=1, patch_size=(2, 1))
        given = mapped(given, lambda _, t: t.bfloat16().double())
        found, reference = (results(name, given, BF16) for name in ("triton", "reference"))
        assert_bound(found, reference, results("reference", given, torch.float64), half_a_rounding(BF16))

    def test_hostile_values_stay_in_their_group(self):
        given = in_float32(arguments(Draw(), 1, 4, 4, 12, 10, num_heads=2))
        given["x"][0, 0, 1, 3] = torch.nan
        spoiled = results("triton", given, BF16)["y"].isnan().all(-1)[0]
        assert spoiled[::2, 1::2].all() and spoiled.sum() == 4

    @pytest.mark.parametrize(
        ("sizes", "options", "dtype", "reason"),
        [
            ((1, 4, 4, 8, 8), {"num_heads": 2}, torch.float32, "take maps of 16 bits"),
            ((1, 4, 4, 8, 8), {}, BF16, "of samples with separable attention"),
            ((1, 4, 4, 8, 8), {"num_heads": 1, "per_sample": True}, BF16, "take norms of tokens"),
            ((8, 32, 34, 8, 8), {"per_sample": True, "layers": 1}, BF16, "at most 8192 tokens, x has 8704"),
            ((1, 4, 4, 8, 8), {"num_heads": 1, "layers": 0}, BF16, "there is no layer"),
            ((1, 32, 34, 8, 8), {"num_heads": 1, "layers": 1}, BF16, "sequences of at most 256 tokens"),
            ((9, 32, 32, 4, 4), {"num_heads": 1, "layers": 1}, BF16, "at most 2048 tokens, x has 9216"),
            ((1, 2, 2, 257, 8), {"num_heads": 257, "layers": 1}, BF16, "at most 256 channels, x has 257"),
        ],
    )
    def test_calls_that_run_another_way(self, sizes, options, dtype, reason):
        given = mapped(arguments(Draw(), *sizes, **options), lambda _, t: t.to(dtype))
        x, layers, norm, num_heads, patch_size, *_ = given.values()
        assert reason in OP.SPREAD.why_not(x, layers, norm, num_heads, patch_size, False)


def results(name, given, dtype, parameters=None):
    """y of a call which, on Triton, the spread kernels run."""
    made = mapped(given, lambda name, t: t.to(dtype if name == "x" else parameters or dtype))
    with backend(name), torch.no_grad(), mock.patch.object(OP, "KERNELS", (OP.SPREAD,)):
        return {"y": ops.global_representation(**made)}


class TestLayers(TritonResults):
    """Layers of multi-head attention in training, of which each is one node of autograd."""

    op = staticmethod(ops.global_representation)
    shapes = ((2, 2, 4, 12, 30),)  # twice as many hidden channels as C, and a rest
    options = {
        "heads": {"num_heads": 3, "layers": 1, "bias": False},
        "dropouts-per-sample": {
            "num_heads": 1,
            "per_sample": True,
            "layers": 1,
            "final": False,
            "patch_size": (1, 2),
            "dropouts": (0.1, 0.3, 0.5),
            "ffn_dropout": 0.2,
        },
    }
    one_pixel = {"patch_size": (1, 1)}
    arguments = staticmethod(arguments)
    registered = staticmethod(registered_layer)
    # What the ops of a layer are held to is not done again.
    test_nan_and_infinity_reach_the_results = test_strides_do_not_matter = test_runs_are_identical = None
    test_arguments_are_not_changed = test_compiles_whole = test_maps_that_are_too_large = None

    def results(self, backend, *arguments, **named):
        """As of every op, where Triton must not run a layer as its ops."""
        plain = (
            nullcontext() if backend == "reference" else mock.patch.object(OP.reference, "global_representation", None)
        )
        with plain:
            return super().results(backend, *arguments, **named)

    def test_what_runs_as_ops(self):
        arguments = in_float32(self.arguments(Draw(), *self.shapes[0], num_heads=1))
        first, second = arguments["layers"]
        for other, reason in (
            (second._replace(norm2=second.norm2._replace(eps=1e-3)), "norms of one kind"),
            (second._replace(fc1=Linear(second.fc1.weight.bfloat16())), "weights of one dtype"),
            (second._replace(norm2=second.norm2._replace(bias=second.norm2.bias.bfloat16())), "norms of one dtype"),
        ):
            assert reason in refusal({**arguments, "layers": [first, other]}, OP.LAYERWISE, True)
        assert "gradients" in refusal(arguments, OP.LAYERWISE, False)
        assert refusal({**arguments, "num_heads": None}, OP.LAYERWISE, True) is None

    def test_many_rows(self, monkeypatch):
        """In blocks that fill a multiprocessor, the last of which is not whole."""
        monkeypatch.setattr(triton_rows, "MOST_FEW_INTERPRETED", 0)
        monkeypatch.setattr(triton_rows, "multiprocessors", lambda x: 1)
        arguments = self.arguments(Draw(), 3, 8, 12, 20, 18, num_heads=2, layers=1)
        arguments = mapped(arguments, lambda _, t: t.bfloat16().double())
        given = (("triton", BF16), ("reference", BF16), ("reference", torch.float64))
        assert_bound(*(self.results(name, arguments, dtype) for name, dtype in given), half_a_rounding(BF16))

    def test_autocast_in_the_backward_pass_alone(self):
        """Of a forward pass in float32: what its launches call of PyTorch stays in float32, too."""
        arguments = in_float32(self.arguments(Draw(), *self.shapes[0], num_heads=1, layers=1))
        with backend("triton"):
            x = arguments["x"].requires_grad_()
            y = self.op(**arguments)
            (want,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
            with torch.autocast("cpu", torch.bfloat16):
                (found,) = torch.autograd.grad(y.sum(), x)
                assert torch.is_autocast_enabled("cpu")
        assert torch.equal(found, want)


class TestSeparableLayers(TestLayers):
    """Layers of separable attention in training, the second of which is told the moments of what the first wrote."""

    shapes = ((2, 6, 8, 18, 10),)
    options = {
        "per-sample": {"per_sample": True, "layers": 2, "conv": True},
        "dropouts": {
            "per_sample": True,
            "layers": 2,
            "patch_size": (1, 2),
            "dropouts": (0.2, 0.3, 0.4),
            "ffn_dropout": 0.1,
            "bias": False,
        },
        "per-token": {"layers": 1, "patch_size": (3, 2), "final": False, "dropouts": (0.2, 0.0, 0.0)},
    }
    test_what_runs_as_ops = test_autocast_in_the_backward_pass_alone = test_many_rows = None

    def test_a_norm_of_samples_behind_norms_of_tokens(self):
        """Which have no moments to tell."""
        arguments = self.arguments(Draw(), 2, 16, 16, 18, 10, layers=2, final=False)
        first, second = arguments["layers"]
        kind = {f"norm{i}": getattr(second, f"norm{i}")._replace(per_sample=True) for i in (1, 2)}
        arguments["layers"] = [first, second._replace(**kind)]
        given = (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64))
        found = [{"y": self.results(name, arguments, dtype)["y"]} for name, dtype in given]
        assert_bound(*found, half_a_rounding(torch.float32))

    @pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
    def test_large_means(self, kind):
        """Blocks of several groups and groups of several blocks, of samples whose mean is many deviations from 0. In 16
        bits of y alone: what the first layer's output is rounded by makes values of the second change their sign in
        front of ReLU, whose gradients jump, in the reference as here."""
        for sizes, patch in (((2, 6, 8, 18, 10), (2, 2)), ((1, 10, 14, 33, 20), (1, 1))):
            arguments = self.arguments(Draw(), *sizes, per_sample=True, layers=2, patch_size=patch)
            arguments["x"] += 20
            arguments = mapped(arguments, lambda _, t: t.to(kind).double())
            given = (("triton", kind), ("reference", kind), ("reference", torch.float64))
            found = [self.results(name, arguments, dtype) for name, dtype in given]
            if kind is not torch.float32:
                found = [{"y": results["y"]} for results in found]
            assert_bound(*found, half_a_rounding(kind))


def in_half(arguments):
    return mapped(arguments, lambda _, t: t.to(BF16))


def refusal(arguments, kernel=OP.STAGE, training=False):
    x, layers, norm, num_heads, patch_size, *_ = arguments.values()
    return kernel.why_not(x, layers, norm, num_heads, patch_size, training)
